"""Who is at the other end of a CURVE connection, and what that one may say. Pure.

The user id is what the ZAP handler answers; ZeroMQ hands it to the receiver with every message of the connection, so
nothing in a message can change it.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from urllib.parse import quote, unquote

from epmesh.v1 import frame_pb2, front_pb2

NODE = "node"  # the node service of the rank that is asked
_MAX_NAME_CHARS = 64
_MAX_OWNER_CHARS = 128
_SAFE = " '=,"  # a colon is not, and ends the owner


class Domain(enum.Enum):
    """The ZAP domain of an endpoint: what it is for."""

    LINK = "link"
    FRONT = "front"


@dataclass(frozen=True)
class RankUser:
    """A member of the mesh."""

    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"rank:{self.rank}:{self.incarnation:x}"


@dataclass(frozen=True)
class ClientUser:
    """A client with a lease.

    Attributes:
        lease: its number at this node.
        owner: who has it, as authenticated.
        name: as the client calls itself.
    """

    lease: int
    owner: str
    name: str

    def __str__(self) -> str:
        return f"client:{self.lease}:{_quoted(self.owner)}:{self.name}"


def printable(name: str) -> str:
    """A name as a user id may show it."""
    return "".join(char if char.isprintable() else "?" for char in name[:_MAX_NAME_CHARS])


def lease_of(user: str) -> int | None:
    """The lease of a client's user id; `None` for others."""
    kind, _, rest = user.partition(":")
    return int(rest.partition(":")[0]) if kind == "client" else None


def account_of(user: str) -> str:
    """With whom the owner of a user id shares: a client with all who have leases of the same owner, at any node."""
    kind, _, rest = user.partition(":")
    return unquote(rest.split(":")[1]) if kind == "client" else user


def is_rank(user: str) -> bool:
    """Whether a user id is that of a member."""
    return user.startswith("rank:")


def link_refusal(user: str, header: frame_pb2.FrameHeader) -> str | None:
    """Why `user` may not send a frame with this header on a link; `None` where it may."""
    source = RankUser(header.source, header.incarnation)
    return None if user == str(source) else f"{user or 'nobody'} sent a frame as {source}"


def front_refusal(user: str, request: front_pb2.FrontRequest) -> str | None:
    """Why `user` may not make this request at a front; `None` where it may.

    Members hand each other shares, in their own name; clients and the rank's own node service ask for everything else.
    """
    kind = request.WhichOneof("request")
    if kind == "cancel":  # of a request of the same connection
        return None
    if kind != "serve_share":
        return f"{user} is a member; it may not ask for {kind}" if is_rank(user) else None
    if not is_rank(user):
        return f"{user or 'nobody'} is no member; it may not ask for {kind}"
    rank = int(user.split(":")[1])
    source = request.serve_share.source
    return None if rank == source else f"{user} handed over a share as rank {source}"


def _quoted(owner: str) -> str:
    quoted = quote(owner, safe=_SAFE)
    return quoted if len(quoted) <= _MAX_OWNER_CHARS else hashlib.sha256(owner.encode()).hexdigest()
