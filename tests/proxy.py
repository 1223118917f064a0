"""A TCP proxy on loopback that cuts connections, swallows what is on its way, and stands still, when it is told to."""

from __future__ import annotations

import contextlib
import enum
import selectors
import socket
import struct
import threading
from collections.abc import Callable

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, and throw away what was not sent


class Mode(enum.Enum):
    """What happens to bytes and connections."""

    FORWARD = "both ways"
    SWALLOW = "what the connecting side sends vanishes; the other way is open"
    HOLD = "connections stand still, as if a network dropped every packet"
    REFUSE = "nobody can connect"


class Proxy:
    """Forwards connections to one ZeroMQ endpoint, in a thread of its own. Methods return once they took effect."""

    def __init__(self, target: str) -> None:
        """Listens at `endpoint` for `target`, both ``tcp://host:port``."""
        host, port = target.removeprefix("tcp://").rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server((host, 0))
        self._listener.setblocking(False)
        self.endpoint = f"tcp://{host}:{self._listener.getsockname()[1]}"
        self.connections = 0  # accepted so far
        self._mode = Mode.FORWARD
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._accepted: set[socket.socket] = set()
        self._waiting: dict[socket.socket, bytearray] = {}  # bytes for a socket that takes no more
        self._selector = selectors.DefaultSelector()
        self._commands: list[tuple[Callable[[], None], threading.Event]] = []
        self._wake, self._woken = socket.socketpair()
        self._closing = False
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def set(self, mode: Mode) -> None:
        """Changes what happens from now on."""

        def change() -> None:
            self._mode = mode
            for each in list(self._pairs):
                self._watch(each)

        self._do(change)

    def cut(self, mode: Mode = Mode.FORWARD) -> None:
        """Resets every connection, and loses what is on its way in either direction; new ones meet `mode`."""

        def cut() -> None:
            self._mode = mode
            while self._pairs:
                self._drop(next(iter(self._pairs)))

        self._do(cut)

    def close(self) -> None:
        """Ends the proxy and its connections."""

        def stop() -> None:
            self._closing = True

        self._do(stop)
        self._thread.join()

    def _do(self, command: Callable[[], None]) -> None:
        done = threading.Event()
        self._commands.append((command, done))
        self._wake.send(b"x")
        done.wait(10)

    def _run(self) -> None:
        while not self._closing:
            for key, events in self._selector.select():
                if key.fileobj is self._woken:
                    self._obey()
                elif key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._pairs:
                    self._move(key.fileobj, events)
        for each in [*self._pairs, self._listener, self._wake, self._woken]:
            each.close()
        self._selector.close()

    def _obey(self) -> None:
        self._woken.recv(_CHUNK)
        while self._commands:
            command, done = self._commands.pop(0)
            command()
            done.set()

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        self.connections += 1
        if self._mode is Mode.REFUSE:
            _reset(near)
            return
        try:
            far = socket.create_connection(self._target, timeout=5)
        except OSError:
            _reset(near)
            return
        self._accepted.add(near)
        self._pairs[near], self._pairs[far] = far, near
        for each in (near, far):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._waiting[each] = bytearray()
        for each in (near, far):
            self._watch(each)

    def _move(self, each: socket.socket, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(each)
            if events & selectors.EVENT_READ and each in self._pairs:
                self._read(each)
        except OSError:
            self._drop(each)

    def _read(self, each: socket.socket) -> None:
        data = each.recv(_CHUNK)
        if not data:
            self._drop(each)
        elif self._mode is not Mode.SWALLOW or each not in self._accepted:
            self._waiting[self._pairs[each]] += data
            self._flush(self._pairs[each])

    def _flush(self, each: socket.socket) -> None:
        waiting = self._waiting[each]
        with contextlib.suppress(BlockingIOError):
            while waiting:
                del waiting[: each.send(waiting)]
        for either in (each, self._pairs[each]):
            self._watch(either)

    def _watch(self, each: socket.socket) -> None:
        """Waits for what `each` can do: nobody reads for one whose partner takes no more."""
        events = 0
        if self._mode is not Mode.HOLD:
            events |= 0 if self._waiting[self._pairs[each]] else selectors.EVENT_READ
            events |= selectors.EVENT_WRITE if self._waiting[each] else 0
        with contextlib.suppress(KeyError):
            self._selector.unregister(each)
        if events:
            self._selector.register(each, events)

    def _drop(self, each: socket.socket) -> None:
        for either in (each, self._pairs[each]):
            with contextlib.suppress(KeyError):
                self._selector.unregister(either)
            self._accepted.discard(either)
            del self._waiting[either], self._pairs[either]
            _reset(either)


def _reset(each: socket.socket) -> None:
    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    each.close()
