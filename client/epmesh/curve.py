"""CURVE on ZeroMQ sockets: keys, and what a socket that connects is told.

A process has one key pair for all its ZeroMQ endpoints. It is made when the process becomes a rank, a client or a node
service, and never leaves it: neither disk nor log nor wire ever has the secret half.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from epmesh.errors import InvalidRequest

KEY_BYTES = 32
HANDSHAKE_MS = 1500  # a connection that is not admitted by then is closed; who made it tries again


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair; both halves have 32 bytes. The secret one is not in its ``repr``."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> KeyPair:
        """A new pair.

        Raises:
            InvalidRequest: ZeroMQ was built without CURVE here.
        """
        if not zmq.has("curve"):
            raise InvalidRequest("this build of ZeroMQ has no CURVE; install pyzmq from its wheels")
        public, secret = zmq.curve_keypair()
        return cls(z85.decode(public), z85.decode(secret))


def secure_client(socket: zmq.Socket[Any], pair: KeyPair, server_key: bytes) -> None:
    """Has `socket` connect only to whoever holds the secret half of `server_key`; before ``connect``.

    Raises:
        InvalidRequest: `server_key` is no key.
    """
    check_key(server_key)
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_key)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def check_key(key: bytes, what: str = "a CURVE public key") -> None:
    """Refuses what cannot be a public key.

    Raises:
        InvalidRequest: it has not 32 bytes, or only zeros.
    """
    if len(key) != KEY_BYTES or not any(key):
        raise InvalidRequest(f"{what} has {len(key)} bytes; it must be {KEY_BYTES}, not all of them zero")
