"""What the next view would be. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

from epmesh.errors import EpmeshError
from epmesh.placement import Placement
from epmesh.view import GroupInfo, NodeInfo, RankMode, View
from epmesh_server.membership.declarations import RankDeclaration, RankKey
from epmesh_server.membership.groups import compose_groups
from epmesh_server.membership.nodes import Node
from epmesh_server.membership.operations import Operation, Wishes
from epmesh_server.membership.placements import compose_placements

Member = tuple[int, int, RankMode]
"""(global rank, incarnation, mode): while these stay the same, so do device groups and buffers."""


@dataclass(frozen=True)
class Draft:
    """The next view without its epoch and counters, and how it differs from the last.

    Attributes:
        members: the view's processes with their modes.
        lost: ranks of the last view whose process is in this one no more, ascending.
        dead: those of them that did not leave in good order.
        members_unchanged: whether the set of processes and their modes stays the same.
        changed: whether there is anything to commit.
        done: operations that are carried out with it.
        refused: operations that cannot be, and why.
    """

    nodes: tuple[NodeInfo, ...]
    groups: tuple[GroupInfo, ...]
    placements: Mapping[int | None, Placement]
    tensor_parallel_size: int
    members: frozenset[Member]
    lost: tuple[int, ...]
    dead: tuple[int, ...]
    members_unchanged: bool
    changed: bool
    next_group_id: int
    done: tuple[Operation, ...]
    refused: tuple[tuple[Operation, EpmeshError], ...]

    @cached_property
    def incarnations(self) -> frozenset[tuple[int, int]]:
        """(slot, incarnation) of its nodes."""
        return frozenset((node.slot, node.incarnation) for node in self.nodes)

    def view(self, base: View, epoch: int, counters: Mapping[int, tuple[int, int]]) -> View:
        """The draft as epoch `epoch` after `base`; `counters` is group id -> (cut, completed)."""
        groups = (_counted(group, counters) for group in self.groups)
        return View(
            mesh_id=base.mesh_id,
            epoch=epoch,
            membership_epoch=base.membership_epoch if self.members_unchanged else epoch,
            stride=base.stride,
            nodes=self.nodes,
            groups=tuple(groups),
            placements=self.placements,
            tensor_parallel_size=self.tensor_parallel_size,
        )


def members_of(view: View) -> frozenset[Member]:
    """The processes of a view with their modes."""
    return frozenset((info.rank, info.incarnation, info.mode) for info in view.ranks.values())


def compose(
    base: View,
    nodes: Sequence[Node],
    operations: Sequence[Operation],
    next_group_id: int,
    tensor_parallel_size: int,
    left: Set[RankKey] = frozenset(),
) -> Draft:
    """The view that `nodes` (ascending by slot) and `operations` make of `base`; `left` went in good order."""
    ranks = _admitted(base, {rank: node.ranks[rank] for node in nodes for rank in sorted(node.ranks)})
    wishes, done, refused = _carried_out(base, ranks, operations, next_group_id)
    size = tensor_parallel_size or base.tensor_parallel_size
    infos = tuple(_with_ranks(node, ranks) for node in nodes)
    groups = compose_groups(base, ranks, size, wishes.groups.values())
    placements = _placements(base, ranks, wishes)
    members = frozenset((known.info.rank, known.info.incarnation, known.info.mode) for known in ranks.values())
    shape = (infos, groups, placements, size)
    lost = tuple(rank for rank, info in base.ranks.items() if not _lives(ranks.get(rank), info.incarnation))
    return Draft(
        *shape,
        members=members,
        lost=lost,
        dead=tuple(rank for rank in lost if (rank, base.ranks[rank].incarnation) not in left),
        members_unchanged=members == members_of(base),
        changed=bool(base.epoch or nodes or placements) and shape != _shape(base),
        next_group_id=wishes.next_group_id,
        done=done,
        refused=refused,
    )


def _admitted(base: View, ranks: Mapping[int, RankDeclaration]) -> dict[int, RankDeclaration]:
    """Without the newcomers that still wait for others.

    They would only stand in the others' way: a rank whose ``join`` has not returned answers no call. Ranks that serve
    wait for nobody: each answers for the experts it holds.
    """
    admitted = dict(ranks)
    while True:
        count = sum(known.info.mode is RankMode.EXCHANGE for known in admitted.values())
        waiting = [rank for rank, known in admitted.items() if _waits(known, count) and not _is_in(base, known)]
        if not waiting:
            return admitted
        for rank in waiting:
            del admitted[rank]


def _waits(rank: RankDeclaration, count: int) -> bool:
    return rank.info.mode is RankMode.EXCHANGE and rank.world_size > count


def _with_ranks(node: Node, admitted: Mapping[int, RankDeclaration]) -> NodeInfo:
    info = node.info
    return replace(info, ranks=tuple(known for known in info.ranks if known.rank in admitted))


def _shape(view: View) -> tuple[object, ...]:
    return view.nodes, view.groups, dict(view.placements), view.tensor_parallel_size


def _carried_out(
    base: View, ranks: Mapping[int, RankDeclaration], operations: Sequence[Operation], next_group_id: int
) -> tuple[Wishes, tuple[Operation, ...], tuple[tuple[Operation, EpmeshError], ...]]:
    wishes = Wishes.of(base, next_group_id)
    done, refused = [], []
    for operation in operations:
        try:
            wishes.carry_out(operation.event, ranks.get, base.epoch)
        except EpmeshError as error:
            refused.append((operation, error))
        else:
            done.append(operation)
    return wishes, tuple(done), tuple(refused)


def _placements(base: View, ranks: Mapping[int, RankDeclaration], wishes: Wishes) -> dict[int | None, Placement]:
    """Declarations of newcomers first, then what was asked for."""
    newcomers = [known for rank, known in ranks.items() if not _is_in(base, known)]
    survivors = {rank for rank, known in ranks.items() if _is_in(base, known)}
    composed = compose_placements(wishes.placements, ranks, newcomers, survivors)
    asked = {layer: known for layer, known in wishes.placements.items() if base.placements.get(layer) is not known}
    return composed | asked


def _is_in(base: View, rank: RankDeclaration) -> bool:
    return _lives(rank, info.incarnation) if (info := base.ranks.get(rank.info.rank)) else False


def _lives(rank: RankDeclaration | None, incarnation: int) -> bool:
    return rank is not None and rank.info.incarnation == incarnation


def _counted(group: GroupInfo, counters: Mapping[int, tuple[int, int]]) -> GroupInfo:
    sequence, completed = counters.get(group.group_id, (group.sequence, group.completed))
    return replace(group, sequence=sequence, completed=completed)
