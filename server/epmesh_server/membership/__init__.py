"""The pure part of the coordinator: who is in the mesh, and how a view is committed. No I/O."""

from epmesh_server.membership.declarations import (
    ExpertDeclaration,
    GroupProgress,
    LinkFailure,
    RankDeclaration,
    RankKey,
    Registration,
)
from epmesh_server.membership.machine import Membership
from epmesh_server.membership.records import (
    EpochUsed,
    MeshCreated,
    NodeRegistered,
    RanksLost,
    Record,
    Snapshot,
    ViewCommitted,
)
from epmesh_server.membership.settings import MembershipSettings

__all__ = [
    "EpochUsed",
    "ExpertDeclaration",
    "GroupProgress",
    "LinkFailure",
    "Membership",
    "MembershipSettings",
    "MeshCreated",
    "NodeRegistered",
    "RankDeclaration",
    "RankKey",
    "RanksLost",
    "Record",
    "Registration",
    "Snapshot",
    "ViewCommitted",
]
