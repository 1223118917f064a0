"""Where rows go: topology of a group, and the layout of one dispatch. Pure NumPy; ranks here are group positions.

A row travels once per (row, rank) inside a node and once per (row, node) between nodes, where the rank on the sender's
rail receives it and passes it on. The layout says which rows; it moves none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from epmesh.errors import ExpertUnavailable, InvalidRequest
from epmesh.placement import Placement

Ints = npt.NDArray[np.int64]

MAX_MEMBERS_PER_NODE = 126
_ELSEWHERE, _REPLICATED = 127, 128  # target codes: low 7 bits index the node's members; bit 7: the expert has replicas


@dataclass(frozen=True)
class Topology:
    """Members of a group and the nodes they are on, as one source of rows sees them.

    Attributes:
        ranks: global ranks in group order.
        slots: the slot of each member's node.
        me: position of the rank this topology is for; -1 for a source that is no member, such as a router: no node is
            its own, so every node is a remote one.
    """

    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    me: int

    @cached_property
    def members(self) -> dict[int, tuple[int, ...]]:
        """Positions of the members on each node, by slot, ascending."""
        found: dict[int, list[int]] = {}
        for position, slot in enumerate(self.slots):
            found.setdefault(slot, []).append(position)
        return {slot: tuple(found[slot]) for slot in sorted(found)}

    @property
    def world_size(self) -> int:
        """Members of the group."""
        return len(self.ranks)

    @property
    def slot(self) -> int:
        """Slot of this rank's node; -1 where the source is no member."""
        return self.slots[self.me] if self.me >= 0 else -1

    @cached_property
    def local(self) -> tuple[int, ...]:
        """Positions of the members on this rank's node, itself included; none where the source is no member."""
        return self.members.get(self.slot, ())

    @cached_property
    def remote_slots(self) -> tuple[int, ...]:
        """Slots of the other nodes, ascending."""
        return tuple(slot for slot in self.members if slot != self.slot)

    def rail(self, position: int, slot: int) -> int:
        """The member on node `slot` that exchanges with `position`: same index on its node, modulo their count."""
        members = self.members[slot]
        return members[self.members[self.slots[position]].index(position) % len(members)]

    @cached_property
    def awaited(self) -> dict[int, tuple[int, ...]]:
        """For each member on this rank's node, whose rows others on the node put where it finds them: all but its own,
        and those that it takes in itself because it is on their rail."""
        return {
            owner: tuple(
                source
                for source in range(self.world_size)
                if source != owner and (self.slots[source] == self.slot or self.rail(source, self.slot) != owner)
            )
            for owner in self.local
        }

    @cached_property
    def relayed(self) -> tuple[int, ...]:
        """Positions on other nodes whose rail on this node is this rank, ascending."""
        if self.me < 0:
            return ()
        return tuple(p for p, slot in enumerate(self.slots) if slot != self.slot and self.rail(p, self.slot) == self.me)


@dataclass(frozen=True)
class Routing:
    """A placement as one source rank of a group uses it.

    Attributes:
        candidates: ``[num_experts, n]`` positions that an expert's rows may go to, padded with -1; -1 also stands for
            one that another rank with the same tokens sends to.
        counts: ``[num_experts]`` number of candidates, those of others included.
        available: ``[num_experts]`` whether any living rank holds the expert.
        replicated: ``[num_experts]`` whether more than one living member holds it.
        turn: where the turns among candidates start; the same on all ranks with the same tokens.
    """

    candidates: Ints
    counts: Ints
    available: npt.NDArray[np.bool_]
    replicated: npt.NDArray[np.bool_]
    turn: int

    @property
    def num_experts(self) -> int:
        """Logical experts."""
        return len(self.counts)


@dataclass(frozen=True)
class Reach:
    """Whom a source sends to, and who else holds its tokens.

    Attributes:
        eligible: positions the source may send to.
        siblings: positions that hold the same tokens, the source among them.
        covered: positions that the source or a sibling may send to.
    """

    eligible: tuple[int, ...]
    siblings: tuple[int, ...]
    covered: tuple[int, ...]


def make_reach(topology: Topology, stride: int, tensor_parallel_size: int = 1) -> Reach:
    """The reach of a source whose block of `tensor_parallel_size` ranks holds the same tokens; 1: the source alone.

    A source that is no member has no siblings and may send to everyone.
    """
    everyone = tuple(range(topology.world_size))
    if topology.me < 0:
        return Reach(everyone, (), everyone)
    if tensor_parallel_size <= 1:
        return Reach(everyone, (topology.me,), everyone)
    blocks = [rank // stride * stride + rank % stride // tensor_parallel_size for rank in topology.ranks]
    indices = [rank % stride % tensor_parallel_size for rank in topology.ranks]
    siblings = tuple(position for position in everyone if blocks[position] == blocks[topology.me])
    present = {indices[position] for position in siblings}
    return Reach(
        tuple(position for position in everyone if indices[position] == indices[topology.me]),
        siblings,
        tuple(position for position in everyone if indices[position] in present),
    )


def make_routing(placement: Placement, topology: Topology, reach: Reach) -> Routing:
    """Who may get this source's rows: itself before its own node's holders before all others.

    Ranks that hold the same tokens choose alike, as if they were one, and each sends to those it may send to; so every
    id is computed once. An expert that none of them may send to is not available.

    Args:
        placement: by global rank, living or not.
        topology: of the group; its `me` is the source.
        reach: whom the source and those with its tokens may send to.
    """
    position_of = {rank: position for position, rank in enumerate(topology.ranks)}
    eligible, covered = frozenset(reach.eligible), frozenset(reach.covered)
    alive = [sorted(covered & {position_of[r] for r in holders if r in position_of}) for holders in placement.holders]
    chosen = [_nearest(positions, reach.siblings, topology) for positions in alive]
    counts = np.array([len(positions) for positions in chosen], np.int64)
    candidates = np.full((placement.num_experts, max(1, int(counts.max(initial=1)))), -1, np.int64)
    for expert, positions in enumerate(chosen):
        candidates[expert, : len(positions)] = [p if p in eligible else -1 for p in positions]
    available = np.array([bool(positions) for positions in alive], np.bool_)
    replicated = np.array([len(positions) > 1 for positions in alive], np.bool_)
    return Routing(candidates, counts, available, replicated, min(reach.siblings, default=0))


def _nearest(positions: list[int], siblings: Sequence[int], topology: Topology) -> list[int]:
    own = [position for position in positions if position in siblings]
    local = [position for position in positions if topology.slots[position] == topology.slot]
    return own or local or positions


@dataclass(frozen=True)
class Layout:
    """Which of a source's rows go where.

    Attributes:
        num_tokens: rows of the source.
        rows_to: for every position the source rows (ascending) that go to it; members of other nodes too.
        rows_to_node: for every remote slot the source rows (ascending) that go there.
        codes_to_node: for every remote slot ``[rows, num_topk]`` uint8 target codes; `None` where every member of the
            node gets every row.
        targets: ``[num_tokens, num_topk]`` chosen position of each id, -1 for none; `None` for broadcasts.
        replicated: ``[num_tokens, num_topk]`` whether the id's expert has replicas; `None` where none has.
    """

    num_tokens: int
    rows_to: tuple[Ints, ...]
    rows_to_node: dict[int, Ints]
    codes_to_node: dict[int, npt.NDArray[np.uint8] | None]
    targets: Ints | None = None
    replicated: npt.NDArray[np.bool_] | None = None

    def ids_for(self, topk_ids: npt.NDArray[np.generic], position: int) -> npt.NDArray[np.generic]:
        """The ids ``[rows, num_topk]`` of the rows that go to `position`: -1 where another replica was chosen."""
        rows = self.rows_to[position]
        ids = topk_ids[rows]
        if self.targets is not None and self.replicated is not None:
            ids[self.replicated[rows] & (self.targets[rows] != position)] = -1
        return ids


def broadcast_layout(num_tokens: int, topology: Topology, eligible: Sequence[int]) -> Layout:
    """Every row to every eligible member: what a dispatch without a placement, and router logits, do."""
    everything = np.arange(num_tokens, dtype=np.int64)
    nothing = everything[:0]
    allowed = frozenset(eligible)
    rows_to = tuple(everything if position in allowed else nothing for position in range(topology.world_size))
    rows_to_node: dict[int, Ints] = {}
    codes: dict[int, npt.NDArray[np.uint8] | None] = {}
    for slot in topology.remote_slots:
        members = topology.members[slot]
        wanted = [index for index, position in enumerate(members) if position in allowed]
        rows_to_node[slot] = everything if wanted else nothing
        whole = len(wanted) == len(members)
        codes[slot] = None if whole else np.tile(np.array(wanted, np.uint8), (len(rows_to_node[slot]), 1))
    return Layout(num_tokens, rows_to, rows_to_node, codes)


def routed_layout(topk_ids: npt.NDArray[np.integer], routing: Routing, topology: Topology) -> Layout:
    """One entry per (row, rank), however many of the rank's experts the row wants.

    Args:
        topk_ids: ``[num_tokens, num_topk]``, -1 means no expert.

    Raises:
        InvalidRequest: an id is out of range.
        ExpertUnavailable: an id's expert has no living holder.
    """
    ids = topk_ids.astype(np.int64, copy=False)
    check_ids(ids, routing)
    wanted = ids >= 0
    safe = np.where(wanted, ids, 0)
    targets = _choose(safe, wanted, routing)
    hits = np.zeros((len(ids), topology.world_size + 1), np.bool_)
    np.put_along_axis(hits, np.where(targets < 0, topology.world_size, targets), True, axis=1)
    rows_to = tuple(np.flatnonzero(hits[:, position]) for position in range(topology.world_size))
    replicated = (routing.replicated[safe] & wanted) if routing.replicated.any() else None
    rows_to_node: dict[int, Ints] = {}
    codes: dict[int, npt.NDArray[np.uint8] | None] = {}
    for slot in topology.remote_slots:
        rows = np.flatnonzero(hits[:, topology.members[slot]].any(axis=1))
        rows_to_node[slot] = rows
        codes[slot] = _codes(targets[rows], replicated[rows] if replicated is not None else None, slot, topology)
    return Layout(len(ids), rows_to, rows_to_node, codes, targets, replicated)


def relay_rows(codes: npt.NDArray[np.uint8] | None, num_rows: int, member: int) -> Ints:
    """Which rows of a message go to the node's member with index `member`."""
    if codes is None:
        return np.arange(num_rows, dtype=np.int64)
    return np.flatnonzero(((codes & _ELSEWHERE) == member).any(axis=1))


def relay_ids(
    ids: npt.NDArray[np.generic], codes: npt.NDArray[np.uint8] | None, rows: Ints, member: int
) -> npt.NDArray[np.generic]:
    """The ids of the rows that go to `member`: -1 where another replica was chosen."""
    chosen = ids[rows]
    if codes is not None and codes.shape == ids.shape:
        mine = codes[rows]
        chosen[(mine >= _REPLICATED) & ((mine & _ELSEWHERE) != member)] = -1
    return chosen


def check_ids(ids: Ints, routing: Routing) -> None:
    """Every id ``[num_tokens, num_topk]`` must be -1 or an expert that somebody holds.

    Raises:
        InvalidRequest: an id is out of range.
        ExpertUnavailable: an id's expert has no living holder.
    """
    if not ids.size:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= routing.num_experts:
        bad = high if high >= routing.num_experts else low
        row = int(np.argwhere(ids == bad)[0][0])
        raise InvalidRequest(f"topk_ids has {bad} in row {row}; ids are -1 (none) to {routing.num_experts - 1}")
    if not routing.available.all():
        gone = np.unique(ids[(ids >= 0) & ~routing.available[np.where(ids >= 0, ids, 0)]])
        if gone.size:
            raise ExpertUnavailable(map(int, gone))


def _choose(ids: Ints, wanted: npt.NDArray[np.bool_], routing: Routing) -> Ints:
    if routing.candidates.shape[1] == 1:
        return np.where(wanted, routing.candidates[ids, 0], -1)
    counts = np.maximum(routing.counts[ids], 1)
    turn = (occurrence(ids) + routing.turn) % counts
    return np.where(wanted, routing.candidates[ids, turn], -1)


def occurrence(ids: Ints) -> Ints:
    """For each element how many equal ones stand before it, in row order: replicas take turns by it."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if flat.size else np.empty(0, np.int64)
    lengths = np.diff(np.r_[starts, flat.size])
    result = np.empty(flat.size, np.int64)
    result[order] = np.arange(flat.size) - np.repeat(starts, lengths)
    return result.reshape(ids.shape)


def _codes(
    targets: Ints, replicated: npt.NDArray[np.bool_] | None, slot: int, topology: Topology
) -> npt.NDArray[np.uint8]:
    members = topology.members[slot]
    if len(members) > MAX_MEMBERS_PER_NODE:
        raise InvalidRequest(f"node {slot} has {len(members)} members; at most {MAX_MEMBERS_PER_NODE} are possible")
    index_of = np.full(topology.world_size + 1, _ELSEWHERE, np.uint8)
    index_of[list(members)] = np.arange(len(members), dtype=np.uint8)
    codes = index_of[targets]
    return codes if replicated is None else codes | np.where(replicated, _REPLICATED, 0).astype(np.uint8)
