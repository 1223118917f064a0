"""Which groups a view has. Pure; a group's counters stay as they were, the commit fills in the new ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from epmesh.view import GroupInfo, RankMode, View
from epmesh_server.membership.declarations import RankDeclaration
from epmesh_server.membership.records import FIRST_USER_GROUP_ID

WORLD, EP = "world", "ep"
WORLD_ID, EP_ID, FIRST_TENSOR_PARALLEL_ID = 0, 1, 16
TENSOR_PARALLEL_PREFIX = "tp:"


@dataclass(frozen=True, slots=True)
class UserGroup:
    """A group as its user declared it."""

    group_id: int
    name: str
    declared_ranks: tuple[int, ...]


def is_reserved(name: str) -> bool:
    """Whether only epmesh itself makes groups of that name."""
    return name in (WORLD, EP) or name.startswith(TENSOR_PARALLEL_PREFIX)


def user_groups(view: View) -> dict[str, UserGroup]:
    """The groups of a view that users made, by name."""
    return {
        group.name: UserGroup(group.group_id, group.name, group.declared_ranks)
        for group in view.groups
        if group.group_id >= FIRST_USER_GROUP_ID
    }


def compose_groups(
    base: View, ranks: Mapping[int, RankDeclaration], tensor_parallel_size: int, wanted: Iterable[UserGroup]
) -> tuple[GroupInfo, ...]:
    """All groups over the living `ranks` (ascending), ascending by id."""
    exchange = [rank for rank, declared in ranks.items() if declared.info.mode is RankMode.EXCHANGE]
    living = frozenset(exchange)
    groups = [
        GroupInfo(WORLD, WORLD_ID, tuple(ranks), tuple(ranks)),
        GroupInfo(EP, EP_ID, tuple(exchange), tuple(exchange)),
        *_tensor_parallel_groups(base, ranks, exchange, tensor_parallel_size),
    ]
    for group in sorted(wanted, key=lambda group: group.group_id):
        members = tuple(rank for rank in group.declared_ranks if rank in living)
        groups.append(GroupInfo(group.name, group.group_id, members, group.declared_ranks))
    before = {group.group_id: group for group in base.groups}
    return tuple(_with_counters(group, before.get(group.group_id)) for group in groups)


def _with_counters(group: GroupInfo, before: GroupInfo | None) -> GroupInfo:
    return replace(group, sequence=before.sequence, completed=before.completed) if before else group


def _tensor_parallel_groups(
    base: View, ranks: Mapping[int, RankDeclaration], exchange: Sequence[int], size: int
) -> list[GroupInfo]:
    """One group for each block of `size` consecutive local ranks; blocks keep their numbers, dead ones too.

    A block is numbered once as many ranks as it waits for are there, all of one commit in slot order: what starts
    together has the same numbers whoever came first.
    """
    if size <= 1:
        return []
    members = [rank for rank in exchange if ranks[rank].tensor_parallel_size == size]
    numbers = _known_blocks(base, size)
    ready = {_block(rank, base.stride, size) for rank in members if ranks[rank].world_size <= len(exchange)}
    for block in sorted(ready - numbers.keys()):
        numbers[block] = max(numbers.values(), default=-1) + 1
    living: dict[int, list[int]] = {}
    for rank in members:
        living.setdefault(_block(rank, base.stride, size), []).append(rank)
    return [
        GroupInfo(
            f"{TENSOR_PARALLEL_PREFIX}{number}",
            FIRST_TENSOR_PARALLEL_ID + number,
            tuple(living.get(block, ())),
            tuple(range(block, block + size)),
        )
        for block, number in sorted(numbers.items(), key=lambda item: item[1])
    ]


def _known_blocks(base: View, size: int) -> dict[int, int]:
    """First rank of every block -> number; none are known where the size was another."""
    if base.tensor_parallel_size != size:
        return {}
    tensor_parallel = [group for group in base.groups if group.name.startswith(TENSOR_PARALLEL_PREFIX)]
    return {group.declared_ranks[0]: group.group_id - FIRST_TENSOR_PARALLEL_ID for group in tensor_parallel}


def _block(rank: int, stride: int, size: int) -> int:
    """The first global rank of the block that `rank` is in."""
    return rank - rank % stride % size
