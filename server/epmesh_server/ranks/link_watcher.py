"""Follows the connections of all links by ZeroMQ's monitors, in a thread of its own.

ZeroMQ's heartbeats are answered by its I/O thread, which needs no GIL: a connection that they end is to a process that
is stopped or cut off, not merely busy.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

RECONNECT_GRACE_S, CONNECT_GRACE_S = 0.3, 1.5
WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED

Peer = tuple[int, str]  # global rank and link endpoint: a replacement has another endpoint


class LinkWatcher:
    """Tells which peers are out of reach, which came back, and lends its thread to what must not wait for a call."""

    def __init__(
        self,
        on_change: Callable[[frozenset[Peer]], None],
        on_reconnect: Callable[[Peer], None],
        tend: Callable[[], float | None],
    ) -> None:
        """Starts the thread, which makes all the calls.

        Args:
            on_change: takes all peers out of reach, whenever that changes.
            on_reconnect: takes a peer whose connection was lost and made anew.
            tend: is called after every event; returns after how many seconds to call it again, `None` for no need.
        """
        self._on_change = on_change
        self._on_reconnect = on_reconnect
        self._tend = tend
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._monitors: dict[Peer, zmq.Socket[bytes]] = {}  # the rest is the thread's alone
        self._down_at: dict[Peer, float] = {}  # when the peer counts as out of reach
        self._connected: set[Peer] = set()  # once
        self._tend_at: float | None = None
        self._told: frozenset[Peer] = frozenset()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="epmesh-links", daemon=True)
        self._thread.start()

    def watch(self, peer: Peer, monitor: zmq.Socket[bytes]) -> None:
        """Follows a link that connects for the first time."""

        def add() -> None:
            self._monitors[peer] = monitor
            self._down_at[peer] = time.monotonic() + CONNECT_GRACE_S

        self._do(add)

    def unwatch(self, peer: Peer) -> None:
        """Forgets a link, and closes its monitor."""

        def remove() -> None:
            monitor = self._monitors.pop(peer, None)
            self._down_at.pop(peer, None)
            self._connected.discard(peer)
            if monitor is not None:
                monitor.close(linger=0)

        self._do(remove)

    def wake(self) -> None:
        """Has `tend` called soon."""
        self._do(lambda: None)

    def close(self) -> None:
        """Ends the thread."""

        def stop() -> None:
            self._closing = True

        self._do(stop)
        self._thread.join()
        os.close(self._wake_fd)

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        while not self._closing:
            poller = zmq.Poller()
            poller.register(self._wake_fd, zmq.POLLIN)
            for monitor in self._monitors.values():
                poller.register(monitor, zmq.POLLIN)
            ready = dict(poller.poll(self._timeout_ms()))
            now = time.monotonic()  # before the news is read, so that whatever came by now speaks for its peer
            if self._wake_fd in ready:
                self._run_commands()
            for key, monitor in list(self._monitors.items()):
                if monitor in ready or self._down_at.get(key, math.inf) <= now:  # this thread may come late from `poll`
                    self._follow(key, monitor)
            self._tell(now)
            wanted_s = self._tend()
            self._tend_at = None if wanted_s is None else time.monotonic() + wanted_s
        for monitor in self._monitors.values():
            monitor.close(linger=0)

    def _run_commands(self) -> None:
        os.eventfd_read(self._wake_fd)
        while not self._commands.empty():
            self._commands.get_nowait()()

    def _timeout_ms(self) -> int | None:
        now = time.monotonic()
        if any(at <= now and peer not in self._told for peer, at in self._down_at.items()):
            return 0
        pending = [at for at in self._down_at.values() if at > now]
        pending += [] if self._tend_at is None else [self._tend_at]
        return max(0, int((min(pending) - now) * 1000) + 1) if pending else None

    def _follow(self, key: Peer, monitor: zmq.Socket[bytes]) -> None:
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._down_at.pop(key, None)
                if key in self._connected:
                    self._on_reconnect(key)
                self._connected.add(key)
            elif event == zmq.EVENT_DISCONNECTED:
                self._down_at.setdefault(key, time.monotonic() + RECONNECT_GRACE_S)
            elif event == zmq.EVENT_MONITOR_STOPPED:
                return

    def _tell(self, now: float) -> None:
        unreachable = frozenset(peer for peer, at in self._down_at.items() if at <= now)
        if unreachable != self._told:
            self._told = unreachable
            self._on_change(unreachable)
