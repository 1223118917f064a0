"""What can happen to the membership machine.

`call` and `session` are numbers that the shell draws, one for every unary call and every control stream; it never uses
one twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from epmesh.placement import Placement
from epmesh_server.membership.declarations import GroupProgress, LinkFailure, RankDeclaration, RankKey, Registration


@dataclass(frozen=True, slots=True)
class RegisterNode:
    """A node asks for its slot; `slot` claims one whose node is dead."""

    call: int
    registration: Registration
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A registered node opened its control stream; `epoch` is the last one it committed, 0 if none."""

    session: int
    slot: int
    incarnation: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CloseSession:
    """A control stream ended; `orderly` where the node said so itself."""

    session: int
    orderly: bool = False


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life of a node and all its ranks."""

    session: int
    number: int


@dataclass(frozen=True, slots=True)
class ReportRanks:
    """All living ranks of a node, and those of the last view that left in good order."""

    session: int
    ranks: tuple[RankDeclaration, ...]
    left: frozenset[RankKey] = frozenset()


@dataclass(frozen=True, slots=True)
class ReportLinks:
    """All links that a node's ranks hold for broken."""

    session: int
    failures: tuple[LinkFailure, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A node raised its fences."""

    session: int
    epoch: int
    progress: tuple[GroupProgress, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A node's ranks are past the cut or gave up."""

    session: int
    epoch: int
    progress: tuple[GroupProgress, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """A node's ranks can see the view."""

    session: int
    epoch: int


@dataclass(frozen=True, slots=True)
class CreateGroup:
    """Somebody wants a group."""

    call: int
    request_id: str
    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DestroyGroup:
    """Somebody wants a group gone."""

    call: int
    request_id: str
    name: str


@dataclass(frozen=True, slots=True)
class SetPlacement:
    """Somebody replaces the placement of a layer (`None`: of every layer without its own)."""

    call: int
    request_id: str
    layer: int | None
    placement: Placement


@dataclass(frozen=True, slots=True)
class Stalled:
    """This process stood still for long, so that silence of others proves nothing."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


OperationEvent = CreateGroup | DestroyGroup | SetPlacement
ReportEvent = ReportRanks | ReportLinks | Prepared | Finished | Committed
Event = RegisterNode | OpenSession | CloseSession | Heartbeat | ReportEvent | OperationEvent | Stalled | Tick
