"""Ports of loopback that a local mesh keeps for its services."""

from __future__ import annotations

import socket

HOST = "127.0.0.1"


class Port:
    """A TCP port of loopback that stays this mesh's until it is closed, whoever listens on it comes and goes.

    The socket is bound and never listens. With SO_REUSEADDR on both sides, which gRPC sets, another one may bind and
    listen beside it; but the kernel gives the number to nobody who asks for a free one. So a service that is killed
    finds its port free when it comes back.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, 0))
        self.number: int = self._socket.getsockname()[1]
        self.address = f"{HOST}:{self.number}"

    def close(self) -> None:
        """Gives the port back."""
        self._socket.close()
