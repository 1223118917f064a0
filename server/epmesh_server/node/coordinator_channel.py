"""The node's channel to its coordinator, opened anew where the node's certificate was replaced since."""

from __future__ import annotations

import logging

import grpc

from epmesh.channels import open_aio_channel
from epmesh.errors import InvalidRequest
from epmesh.tls import COORDINATOR_NAME, TlsFiles

_log = logging.getLogger(__name__)


class CoordinatorChannel:
    """A channel of gRPC shows the certificate that it was opened with, also when it connects again. Used on one loop.

    Attributes:
        address: host:port of the coordinator.
        tls: what the node shows itself with.
        current: the channel for calls.
    """

    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        """Opens it; connects when first used.

        Raises:
            InvalidRequest: the files of `tls` cannot be read.
        """
        self.address, self.tls = address, tls
        self._stamp = tls.stamp if tls is not None else None
        self.current = self._open()

    async def renewed(self) -> grpc.aio.Channel:
        """`current`, after it was opened anew if there are new files. Ends its calls then: call it between sessions."""
        stamp = self.tls.stamp if self.tls is not None else None
        if stamp == self._stamp:
            return self.current
        try:
            opened = self._open()
        except InvalidRequest as exc:
            _log.warning("tls.failed: %s; the coordinator is called with the certificate from before", exc)
            return self.current
        before, self.current, self._stamp = self.current, opened, stamp
        await before.close(None)
        return opened

    async def close(self) -> None:
        """Ends all calls; idempotent."""
        await self.current.close(None)

    def _open(self) -> grpc.aio.Channel:
        return open_aio_channel(self.address, tls=self.tls, server=COORDINATOR_NAME)
