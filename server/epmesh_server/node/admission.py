"""Whom the ZeroMQ endpoints of this node's ranks admit. Pure: a decision over keys, no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from epmesh.view import View
from epmesh_server.curve_users import NODE, Domain, RankUser


@dataclass(frozen=True)
class Admitted:
    """The connection may stand."""

    user: str


@dataclass(frozen=True)
class Refused:
    """It may not; `may_change` where a view or a lease that is on its way could admit it."""

    reason: str
    may_change: bool = False


def decide(domain: str, mechanism: str, credentials: Sequence[bytes], known: Mapping[bytes, str]) -> Admitted | Refused:
    """Whether a connection is admitted, and as whom.

    Args:
        domain: of the endpoint.
        mechanism: of the handshake; ``CURVE`` alone will do.
        credentials: for CURVE the public key, which the handshake has proved.
        known: user ids by public key.
    """
    if domain not in {each.value for each in Domain}:
        return Refused(f"there is no endpoint of the kind {domain[:32]!r}")
    if mechanism != "CURVE":
        return Refused(f"mechanism {mechanism[:32]!r}; only CURVE is taken")
    if len(credentials) != 1:
        return Refused(f"{len(credentials)} credentials; CURVE has one, the public key")
    user = known.get(credentials[0])
    if user is None:
        return Refused("nobody in the view or with a lease has this key", may_change=True)
    if domain == Domain.LINK.value and user.startswith("client:"):
        return Refused(f"{user} is a client; links are for members")
    return Admitted(user)


def member_keys(view: View | None, node_key: bytes) -> dict[bytes, str]:
    """User ids by public key: all members of `view`, and the node service itself."""
    ranks = view.ranks.values() if view is not None else ()
    keys = {info.curve_key: str(RankUser(info.rank, info.incarnation)) for info in ranks if info.curve_key}
    return {**keys, node_key: NODE}
