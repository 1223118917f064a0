"""Who may call what: roles of certificates, and the gRPC methods that each of them may use. Pure.

A certificate says who its owner is in URI names, ``epmesh://<role>/<name>``; one may have several. The tables below
name every method that a TCP port serves: one that is not in them may be called by nobody.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from epmesh.errors import Unauthenticated

_SCHEME = "epmesh://"


class Role(enum.Enum):
    """What the owner of a certificate is in a mesh."""

    COORDINATOR = "coordinator"
    NODE = "node"
    DRIVER = "driver"
    ROUTER = "router"
    OBSERVER = "observer"


CLIENT_ROLES = (Role.DRIVER, Role.ROUTER, Role.OBSERVER)


@dataclass(frozen=True)
class Identity:
    """One URI name of a certificate: a role, and whose; of a node its node id, of a coordinator nothing."""

    role: Role
    name: str = ""

    def __str__(self) -> str:
        return f"{self.role.value} {self.name!r}" if self.name else f"a {self.role.value}"

    @property
    def uri(self) -> str:
        """As it stands in the certificate."""
        return f"{_SCHEME}{self.role.value}/{quote(self.name, safe='')}" if self.name else f"{_SCHEME}{self.role.value}"


def identities(uris: Iterable[str]) -> tuple[Identity, ...]:
    """Those of the URI names of a certificate that are epmesh's, in their order."""
    found = []
    for uri in uris:
        role, _, name = uri.removeprefix(_SCHEME).partition("/")
        if uri.startswith(_SCHEME) and role in _ROLES:
            found.append(Identity(_ROLES[role], unquote(name)))
    return tuple(found)


def name_of(caller: Iterable[Identity]) -> str:
    """One text for the owner of a certificate: the same for each of its connections, on every plane."""
    return ", ".join(sorted(map(str, caller)))


_ROLES = {role.value: role for role in Role}
_ANYBODY = frozenset(Role)
_NODES = frozenset({Role.NODE})
_READERS = _ANYBODY
_SENDERS = frozenset({Role.ROUTER, Role.DRIVER})
_DRIVERS = frozenset({Role.DRIVER})

Access = Mapping[str, frozenset[Role]]
"""``/package.Service/Method``, or ``/package.Service/*`` for all its methods: who may call it."""

_EVERYWHERE: Access = {
    "/grpc.health.v1.Health/*": _ANYBODY,
    "/epmesh.v1.DiscoveryService/*": _READERS,
    "/epmesh.v1.GroupService/ListGroups": _READERS,
}
COORDINATOR_ACCESS: Access = {
    **_EVERYWHERE,
    "/epmesh.v1.MembershipService/*": _NODES,
    "/epmesh.v1.GroupService/CreateGroup": _NODES,
    "/epmesh.v1.GroupService/DestroyGroup": _NODES,
    "/epmesh.v1.GroupService/SetExpertPlacement": _NODES,
}
NODE_ACCESS: Access = {
    **_EVERYWHERE,
    "/epmesh.v1.RankService/DescribeNode": _READERS,
    "/epmesh.v1.RankService/RankSession": frozenset(),  # over the unix socket only
    "/epmesh.v1.GroupService/CreateGroup": _DRIVERS,
    "/epmesh.v1.GroupService/DestroyGroup": _DRIVERS,
    "/epmesh.v1.GroupService/SetExpertPlacement": _DRIVERS,
    "/epmesh.v1.RouterService/ForwardRows": _SENDERS,
    "/epmesh.v1.KeyService/*": _SENDERS,
    "/epmesh.v1.CommunicatorService/*": _DRIVERS,
}


def authorize(access: Access, method: str, caller: Iterable[Identity]) -> Identity:
    """The identity by which a caller may use `method`.

    Raises:
        Unauthenticated: none of its identities may; the text says what it has and what is needed.
    """
    allowed = access.get(method)
    if allowed is None:
        allowed = access.get(f"{method.rpartition('/')[0]}/*", frozenset())
    caller = tuple(caller)
    for identity in caller:
        if identity.role in allowed:
            return identity
    needed = " or ".join(sorted(role.value for role in allowed)) or "nobody over this port"
    shown = ", ".join(map(str, caller)) or "no role of a mesh"
    raise Unauthenticated(f"{method} is for {needed}; the caller's certificate has {shown}")


def check_node(node_id: str, caller: Iterable[Identity] | None) -> None:
    """Refuses a caller that acts for a node which its certificate does not name; `None`: nothing authenticates here.

    Raises:
        Unauthenticated: it is another node's certificate.
    """
    if caller is None:
        return
    names = [identity.name for identity in caller if identity.role is Role.NODE]
    if node_id not in names:
        shown = ", ".join(map(repr, names)) or "no node"
        raise Unauthenticated(f"node id is {node_id!r}, and the caller's certificate is for {shown}")
