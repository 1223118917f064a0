"""The exchange: dispatch and combine, inside a node by symmetric buffers and between nodes by links.

The way there (`dispatch.py`): a source puts rows straight into its neighbours' receive regions, and sends each other
node one copy of every row wanted there, to the rank on its rail, which passes rows on. The way back (`combine.py`):
every rank shows its results in its own `out` region, neighbours pull and sum; for a source on another node its rail
sums and sends one row per row.

What members called travels with the rows, so every rank sees every member's call and all raise the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

import torch

from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, PeerLost
from epmesh.layout import Layout
from epmesh_server.ranks.buffers import MAX_WORLD_SIZE
from epmesh_server.ranks.calls import Call
from epmesh_server.ranks.combine import CombineStage, shown_dtype, shown_rows
from epmesh_server.ranks.dispatch import DispatchStage
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.open_exchange import BROKEN, ExchangeStats, OpenExchange, OpenExchanges, WayBack, WayThere
from epmesh_server.shared_memory import BufferLayout


class Exchange(OpenExchanges[GroupMember]):
    """Runs the exchanges of one group on one rank."""

    turns = BufferLayout.TURNS

    def __init__(
        self, member: GroupMember, stats: ExchangeStats, turn: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Starts with nothing open; arguments as `OpenExchanges` takes them.

        Raises:
            InvalidRequest: the group is too large.
        """
        if member.topology.world_size > MAX_WORLD_SIZE:
            raise InvalidRequest(f"a group of {member.topology.world_size}; at most {MAX_WORLD_SIZE} can exchange")
        super().__init__(member, stats, turn)

    def round(self, call: Call, timeout_s: float | None = None) -> tuple[int, dict[int, Call]]:
        """A dispatch without rows: every member learns every member's call; the number stays open.

        Args:
            timeout_s: how long to wait for the others, if not as long as ever.

        Returns:
            The sequence number, which the caller completes, and the calls by global rank.

        Raises:
            EpmeshError: the calls do not agree, the same error on all members.
        """
        self._settle_all()
        sequence = self.member.begin()
        with self.guard(sequence, call.method):
            stage = DispatchStage(self.member, sequence, [], None)
            stage.post(call)
            calls = stage.wait(timeout_s)
            self.member.dispatched(sequence)
        return sequence, calls

    def combine_buffer(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Memory in which a plain combine reads its input in place; `None` where it would be copied anyway."""
        local = self.member.topology.local
        if self._last is None or len(local) == 1 or shown_dtype(dtype) != dtype or not num_rows * hidden:
            return None
        region = self.member.buffers.out(self.member.topology.me, self._last.slot)
        if (num_rows + 1) * hidden * dtype.itemsize > len(region.payload):
            return None
        return shown_rows(region, num_rows, hidden, dtype)

    def guard(self, sequence: int, method: str) -> AbstractContextManager[None]:
        """What a failure means: see `Guard`."""
        return Guard(self.member, sequence, method)

    def count(self, stage: WayThere, layout: Layout | None, seconds: float) -> None:
        """Adds a dispatch to the statistics, and its rows."""
        super().count(stage, layout, seconds)
        if layout is None or not isinstance(stage, DispatchStage):
            return
        topology, stats = self.member.topology, self.stats
        neighbours = [position for position in topology.local if position != topology.me]
        out = sum(len(layout.rows_to[position]) for position in neighbours)
        came_inside = sum(stage.counts[position] for position in neighbours)
        stats.inside.sent += out
        stats.inside.received += came_inside
        stats.inside_bytes += out * stage.row_bytes
        stats.between.sent += sum(map(len, layout.rows_to_node.values()))
        stats.between.received += sum(stage.counts) - came_inside - stage.counts[topology.me]

    def _way_there(self, sequence: int, tensors: Sequence[torch.Tensor], layout: Layout | None) -> WayThere:
        return DispatchStage(self.member, sequence, tensors, layout)

    def _way_back(self, exchange: OpenExchange, hidden_states: torch.Tensor) -> WayBack:
        return CombineStage(self.member, exchange, hidden_states)

    def _check_room(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
        DispatchStage.check_room(layout, tensors, self.member)


class Guard:
    """What a failure inside a numbered call means: agreed refusals and deadlines end the number, losses do not, and
    whatever nobody else could know of is told to all members, so that none of them waits for it."""

    def __init__(self, member: GroupMember, sequence: int, method: str) -> None:
        self._member, self._sequence, self._method = member, sequence, method

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        member, sequence = self._member, self._sequence
        known = error is member.agreed or sequence in member.inbox.abandoned or sequence == member.abandoned
        if isinstance(error, BROKEN):
            if isinstance(error, PeerLost) and not known:  # others may not have noticed yet
                member.abandon(sequence, error)
            return
        if not known:
            rank = member.session.rank
            text = f"{self._method} failed on rank {rank}: {type(error).__name__}: {error}"
            told = error if isinstance(error, EpmeshError) else DeadlineExceeded(rank, sequence, text)
            member.abandon(sequence, told)
        member.complete(sequence)
