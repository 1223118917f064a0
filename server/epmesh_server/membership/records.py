"""What the coordinator must not forget, and the state that is left of it all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from epmesh.view import View
from epmesh_server.membership.declarations import RankKey, Registration

# Below are groups that epmesh makes: world 0, ep 1, tensor-parallel ones from 16.
FIRST_USER_GROUP_ID = 65_536
# How many processes that left are remembered for each node; a node service drops them long before.
MAX_REMEMBERED_PER_NODE = 1024


@dataclass(frozen=True, slots=True)
class MeshCreated:
    """The mesh's constants; the first record of every log."""

    mesh_id: str
    stride: int


@dataclass(frozen=True, slots=True)
class NodeRegistered:
    """A node was given a slot."""

    registration: Registration
    slot: int


@dataclass(frozen=True, slots=True)
class EpochUsed:
    """An epoch is about to be prepared; neither it nor a user's group id below `next_group_id` is given again."""

    epoch: int
    next_group_id: int


@dataclass(frozen=True, slots=True)
class RanksLost:
    """Processes that the next committed view leaves out."""

    ranks: tuple[RankKey, ...]


@dataclass(frozen=True, slots=True)
class ViewCommitted:
    """A view was committed."""

    view: View


Record = MeshCreated | NodeRegistered | EpochUsed | RanksLost | ViewCommitted


class Remembered:
    """Processes that left and must not come back: a bounded set for one node, the oldest forgotten first."""

    def __init__(self, keys: Iterable[RankKey] = ()) -> None:
        self._keys: dict[RankKey, None] = {}
        for key in keys:
            self.add(key)

    def add(self, key: RankKey) -> None:
        """Remembers one process."""
        self._keys[key] = None
        if len(self._keys) > MAX_REMEMBERED_PER_NODE:
            del self._keys[next(iter(self._keys))]

    def discard(self, key: RankKey) -> None:
        """Forgets one process."""
        self._keys.pop(key, None)

    def __contains__(self, key: RankKey) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[RankKey]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass
class Snapshot:
    """All records of a log folded into one state.

    Attributes:
        nodes: the latest registration of every slot.
        view: the last committed view.
        used_epoch: the largest epoch ever prepared.
        lost: processes that left, by slot, under the slot's present node incarnation.
    """

    mesh_id: str = ""
    stride: int = 0
    nodes: dict[int, Registration] = field(default_factory=dict)
    view: View | None = None
    used_epoch: int = 0
    next_group_id: int = FIRST_USER_GROUP_ID
    lost: dict[int, Remembered] = field(default_factory=dict)

    def apply(self, record: Record) -> None:
        """Folds one record in."""
        match record:
            case MeshCreated():
                self.mesh_id, self.stride = record.mesh_id, record.stride
            case NodeRegistered():
                self._register(record.slot, record.registration)
            case EpochUsed():
                self.used_epoch = max(self.used_epoch, record.epoch)
                self.next_group_id = max(self.next_group_id, record.next_group_id)
            case RanksLost():
                for key in record.ranks:
                    self.lost.setdefault(key[0] // self.stride, Remembered()).add(key)
            case ViewCommitted():
                self.view = record.view
                self.used_epoch = max(self.used_epoch, record.view.epoch)

    def _register(self, slot: int, registration: Registration) -> None:
        known = self.nodes.get(slot)
        if known is not None and known.identity != registration.identity:
            self.lost.pop(slot, None)  # a new node service never knew the old one's ranks
        self.nodes[slot] = registration

    def records(self) -> Iterator[Record]:
        """The shortest log that folds into this state."""
        if not self.mesh_id:
            return
        yield MeshCreated(self.mesh_id, self.stride)
        for slot in sorted(self.nodes):
            yield NodeRegistered(self.nodes[slot], slot)
        if self.used_epoch or self.next_group_id > FIRST_USER_GROUP_ID:
            yield EpochUsed(self.used_epoch, self.next_group_id)
        for slot in sorted(self.lost):
            yield RanksLost(tuple(self.lost[slot]))
        if self.view is not None:
            yield ViewCommitted(self.view)
