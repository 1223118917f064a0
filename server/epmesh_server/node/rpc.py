"""How a node service serves gRPC: keepalive, sizes, deadlines. Its channels are those of `epmesh.channels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import grpc

from epmesh.channels import COMMON, KEEPALIVE

CALL_TIMEOUT_S = 1.0

_PERMISSIVE = (
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a share of its connections
)
TCP_SERVER_OPTIONS: Sequence[tuple[str, int]] = (*COMMON, *KEEPALIVE, *_PERMISSIVE)
# The kernel says when a local peer is gone; pings from here would only punish processes that are late, not dead.
UNIX_SERVER_OPTIONS: Sequence[tuple[str, int]] = (*COMMON, *_PERMISSIVE)


def seconds_left(context: grpc.aio.ServicerContext[Any, Any], most_s: float) -> float:
    """Seconds until the caller of `context` gives up; `most_s` where that is later or never."""
    remaining = cast("float | None", context.time_remaining())  # the stubs do not know of calls without a deadline
    return most_s if remaining is None else min(remaining, most_s)
