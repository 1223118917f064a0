"""gRPC channels: how everything that calls a service opens one. Keepalive, sizes, reconnection.

Servers take `COMMON` and `KEEPALIVE` too, for both ends of a connection must agree on them.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

import grpc
import grpc.aio

from epmesh.errors import InvalidRequest
from epmesh.tls import SERVICE_NAME, TlsFiles

_log = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 16 << 20
UNIX_PREFIX = "unix:"
_MAX_BEFORE = 8  # channels of earlier certificates; one rotation replaces three files, and may be seen as three

Options = tuple[tuple[str, int], ...]

COMMON: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
)
# Without these a half-open connection hangs a call for good; with them it ends within 2 s.
KEEPALIVE: Options = (
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1500),  # without it a keepalive ping is awaited for a minute
    ("grpc.keepalive_permit_without_calls", 1),
)
CHANNEL_OPTIONS: Options = (
    *COMMON,
    *KEEPALIVE,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),  # how long one try may take
    ("grpc.max_reconnect_backoff_ms", 300),
)
# For a channel that is opened for one try and then thrown away: it shares no connection, and so no back-off, with
# earlier ones, and looks names up anew. The service may be farther away than a node's own, so a try may take longer.
ONE_TRY_OPTIONS: Options = (
    *(option for option in CHANNEL_OPTIONS if option[0] != "grpc.min_reconnect_backoff_ms"),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
    # Else a stream opened just as the server stops may wait for ever for a second chance (seen with 1.85).
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True)
class NodeAddress:
    """Where a node service is, and the name its certificate must have."""

    address: str
    server: str = SERVICE_NAME


def open_channel(
    target: str, options: Options = CHANNEL_OPTIONS, *, tls: TlsFiles | None = None, server: str = SERVICE_NAME
) -> grpc.Channel:
    """A channel to a service at host:port or ``unix:path``; connects when first used. Open it after a fork, only.

    Args:
        tls: what this process shows itself with; `None`, and over a unix socket, which file modes protect: no TLS.
        server: the name that the service's certificate must have.

    Raises:
        InvalidRequest: the files of `tls` cannot be read.
    """
    if tls is None or target.startswith(UNIX_PREFIX):
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, _credentials(tls), options=_named(options, server))


def open_aio_channel(
    target: str, options: Options = CHANNEL_OPTIONS, *, tls: TlsFiles | None = None, server: str = SERVICE_NAME
) -> grpc.aio.Channel:
    """As `open_channel`, for asyncio."""
    if tls is None or target.startswith(UNIX_PREFIX):
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, _credentials(tls), options=_named(options, server))


class RenewedChannel:
    """A channel to a node service that shows the certificate of now: opened anew, for later calls, once its files were
    replaced. (A channel of gRPC shows the one that it was opened with, also when it connects again.)

    Not for several threads at once.
    """

    def __init__(self, node: NodeAddress, tls: TlsFiles | None) -> None:
        """Opens the first one.

        Raises:
            InvalidRequest: the files of `tls` cannot be read.
        """
        self._node, self._tls = node, tls
        self._stamp = _stamp(tls)
        self._channel = self._open()
        self._before: deque[grpc.Channel] = deque()  # calls from before the files were replaced go on there

    def get(self, in_use: grpc.Channel | None = None) -> grpc.Channel:
        """The channel for a new call; `in_use`, an earlier one, is left open, however often the files are replaced."""
        stamp = _stamp(self._tls)
        if stamp == self._stamp:
            return self._channel
        try:
            opened = self._open()
        except InvalidRequest as exc:
            _log.warning("tls.failed: %s; calls go on with the certificate from before", exc)
            return self._channel
        self._before.append(self._channel)
        self._channel, self._stamp = opened, stamp
        if len(self._before) > _MAX_BEFORE:
            oldest = next(each for each in self._before if each is not in_use)
            self._before.remove(oldest)
            oldest.close()
        return opened

    def close(self) -> None:
        """Ends all calls."""
        for channel in (*self._before, self._channel):
            channel.close()

    def _open(self) -> grpc.Channel:
        return open_channel(self._node.address, tls=self._tls, server=self._node.server)


def _stamp(tls: TlsFiles | None) -> object:
    return None if tls is None else tls.stamp


def _credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    contents = tls.read()
    return grpc.ssl_channel_credentials(contents.ca, contents.private_key, contents.certificate)


def _named(options: Options, server: str) -> tuple[tuple[str, int | str], ...]:
    return (*options, ("grpc.ssl_target_name_override", server))
