"""The node's channel to its coordinator, opened anew where the node's certificate was replaced since."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import grpc

from epmesh.channels import open_aio_channel
from epmesh.errors import InvalidRequest
from epmesh.tls import COORDINATOR_NAME, TlsFiles

_log = logging.getLogger(__name__)


class CoordinatorChannel:
    """A channel of gRPC shows the certificate that it was opened with, also when it connects again. Used on one loop.

    Attributes:
        address: host:port of the coordinator that is called; the first of several until `turn` chooses the next.
        tls: what the node shows itself with.
        current: the channel for calls.
    """

    def __init__(self, addresses: Sequence[str], tls: TlsFiles | None) -> None:
        """Opens it; connects when first used.

        Args:
            addresses: where coordinators may be, of which one leads and the others do not answer.
            tls: see there.

        Raises:
            InvalidRequest: the files of `tls` cannot be read.
        """
        self._addresses, self.tls = tuple(addresses), tls
        self.address = self._addresses[0]
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

    async def turn(self) -> None:
        """Goes on to the next address, where there are several. Ends all calls then: call it between sessions."""
        if len(self._addresses) == 1:
            return
        before, address = self.current, self.address
        self.address = self._addresses[(self._addresses.index(address) + 1) % len(self._addresses)]
        try:
            self.current = self._open()
        except InvalidRequest as exc:  # its files are being replaced; `renewed` opens it anew once they are whole
            self.address = address
            _log.warning("tls.failed: %s; the coordinator at %s is called again", exc, address)
            return
        await before.close(None)

    async def close(self) -> None:
        """Ends all calls; idempotent."""
        await self.current.close(None)

    def _open(self) -> grpc.aio.Channel:
        return open_aio_channel(self.address, tls=self.tls, server=COORDINATOR_NAME)
