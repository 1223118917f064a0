"""A TCP proxy that can fall silent, as a network does where packets vanish: nothing passes, nothing is closed."""

from __future__ import annotations

import selectors
import socket
import threading
from types import TracebackType
from typing import Self


class SilentProxy:
    """Passes bytes on to `target` until `fall_silent`, from the ``with`` statement on; one thread."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, socket.socket] = {}
        self._wake, self._woken = socket.socketpair()
        self._silent = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="silent-proxy")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        for each in (self._listener, self._woken):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._wake.send(b"x")
        self._thread.join()
        self._selector.close()
        for each in (self._listener, self._wake, self._woken, *self._peers):
            each.close()

    def fall_silent(self) -> None:
        """From now on nothing passes; connections stay open, and new ones are taken and not answered."""
        self._silent.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is self._listener:
                    self._accept()
                elif source in self._peers:
                    self._pass_on(source)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._target)
        self._peers |= {near: far, far: near}
        for each in (near, far):
            self._selector.register(each, selectors.EVENT_READ)

    def _pass_on(self, source: socket.socket) -> None:
        try:
            data = source.recv(65_536)
            if not self._silent.is_set() and data:
                self._peers[source].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(source)
