"""Tells a stopped process from a busy one: a ZeroMQ connection whose heartbeats are answered without the GIL.

A process that was killed breaks its session; one that was stopped (SIGSTOP) breaks nothing. ZeroMQ's I/O thread of a
process that holds its GIL still answers, that of a stopped one does not. No data goes over this connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

_log = logging.getLogger(__name__)
_MAX_BYTES = 1024  # also bounds the handshake itself
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


@dataclass(frozen=True, kw_only=True)
class LivenessSettings:
    """How a probe decides.

    Attributes:
        interval_s: between heartbeats.
        timeout_s: without an answer for this long the connection is given up.
        grace_s: to connect again after that; a stopped process takes connections, but shakes no hands.
        first_s: for the first handshake.
    """

    interval_s: float = 0.2
    timeout_s: float = 0.6
    grace_s: float = 0.4
    first_s: float = 5.0


async def watch_process(
    context: zmq.asyncio.Context,
    endpoint: str,
    settings: LivenessSettings,
    secure: Callable[[zmq.asyncio.Socket], None] | None = None,
) -> str:
    """Watches the process that bound `endpoint`; returns why it is held for dead. Until then it runs for ever.

    Args:
        secure: sets CURVE on the socket before it connects; `None`: in the clear.
    """
    probe = _open(context, settings)
    if secure is not None:
        secure(probe)
    monitor = probe.get_monitor_socket(_EVENTS)
    try:
        try:
            probe.connect(endpoint)
        except zmq.ZMQError as exc:
            return f"its link endpoint {endpoint!r} is no address: {exc}"
        if not await _shakes_hands(monitor, settings.first_s):
            return f"nothing answers at its link endpoint {endpoint}"
        while True:
            await _event(monitor, zmq.EVENT_DISCONNECTED)
            if not await _shakes_hands(monitor, settings.grace_s):
                return f"its process is stopped or gone: no heartbeat for {settings.timeout_s + settings.grace_s:.1f} s"
            _log.info("liveness.%s back after an interruption", endpoint)
    finally:
        probe.disable_monitor()
        monitor.close(0)
        probe.close(0)


def _open(context: zmq.asyncio.Context, settings: LivenessSettings) -> zmq.asyncio.Socket:
    probe = context.socket(zmq.DEALER)
    probe.linger = 0
    probe.maxmsgsize = _MAX_BYTES
    probe.rcvhwm = 1
    probe.reconnect_ivl = 50
    probe.heartbeat_ivl = _ms(settings.interval_s)
    probe.heartbeat_timeout = _ms(settings.timeout_s)
    probe.heartbeat_ttl = _ms(settings.timeout_s)
    return probe


async def _shakes_hands(monitor: zmq.asyncio.Socket, within_s: float) -> bool:
    try:
        await asyncio.wait_for(_event(monitor, zmq.EVENT_HANDSHAKE_SUCCEEDED), within_s)
    except TimeoutError:
        return False
    return True


async def _event(monitor: zmq.asyncio.Socket, wanted: int) -> None:
    while True:
        message = await recv_monitor_message(monitor)
        if message["event"] == wanted:
            return


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
