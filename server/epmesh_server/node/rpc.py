"""How this service opens gRPC channels and servers: keepalive, sizes, deadlines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import grpc

CALL_TIMEOUT_S = 1.0
MAX_MESSAGE_BYTES = 16 << 20

_COMMON = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
)
# Without these a half-open connection hangs a call for good.
_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1500),  # without it a keepalive ping is awaited for a minute
    ("grpc.keepalive_permit_without_calls", 1),
)
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    *_COMMON,
    *_KEEPALIVE,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),  # how long one try may take
    ("grpc.max_reconnect_backoff_ms", 300),
)
_PERMISSIVE = (
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a share of its connections
)
TCP_SERVER_OPTIONS: Sequence[tuple[str, int]] = (*_COMMON, *_KEEPALIVE, *_PERMISSIVE)
# The kernel says when a local peer is gone; pings from here would only punish processes that are late, not dead.
UNIX_SERVER_OPTIONS: Sequence[tuple[str, int]] = (*_COMMON, *_PERMISSIVE)


def seconds_left(context: grpc.aio.ServicerContext[Any, Any], most_s: float) -> float:
    """Seconds until the caller of `context` gives up; `most_s` where that is later or never."""
    remaining = cast("float | None", context.time_remaining())  # the stubs do not know of calls without a deadline
    return most_s if remaining is None else min(remaining, most_s)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to a service at host:port; connects when first used."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
