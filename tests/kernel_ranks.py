"""Several ranks' lanes in this process, on one device: what the kernels do, without a mesh.

On a GPU every rank has a stream and its kernels wait for each other; in Triton's interpreter, which runs one program
after the other, all ranks put first and then all await.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from epmesh.layout import Topology, make_reach, make_routing
from epmesh.placement import Placement
from epmesh_server.kernels.plan import ArenaPlan
from epmesh_server.ranks.tensors import row_bytes
from tests.reference import Rows

STAMP = 7 << 40
_BOTH, _PUT, _AWAIT = (True, True), (True, False), (False, True)


class KernelRanks:
    """Ranks 0 to `world_size` - 1 of one node."""

    def __init__(
        self, world_size: int, device: str, *, counted: bool = False, limit_s: float = 5.0, programs: int = 4
    ) -> None:
        from epmesh_server.kernels.lane import Lane

        self.device = torch.device(device)
        self.plan = ArenaPlan(
            world_size=world_size, rows=64, programs=programs, region_bytes=1 << 16, out_bytes=1 << 16
        )
        self.arenas = [torch.zeros(self.plan.total_bytes, dtype=torch.uint8, device=device) for _ in range(world_size)]
        bases = [arena.data_ptr() for arena in self.arenas]
        start = STAMP if counted else -1
        self.lanes = [Lane(self.plan, me, bases, self.device, limit_s, start) for me in range(world_size)]
        self._sequence = 0
        self.side_by_side = self.device.type == "cuda"
        new_stream: Any = torch.cuda.Stream
        self._streams: list[Any] = [new_stream() for _ in self.lanes] if self.side_by_side else []
        if self.side_by_side:
            torch.cuda.synchronize()

    def rows(self, inputs: Sequence[Rows], placement: Placement | None) -> list[Any]:
        """The ranks' inputs as their lanes take them."""
        from epmesh_server.kernels.lane import Rows as LaneRows
        from epmesh_server.kernels.lane import Table

        world = len(inputs)
        found = []
        for me, source in enumerate(inputs):
            topology = Topology(tuple(range(world)), (0,) * world, me)
            routing = make_routing(placement, topology, make_reach(topology, world)) if placement else None
            tensors = (source.hidden_states, source.topk_weights, source.topk_ids, *(source.extra_tensors or ()))
            table = Table.of(routing, self.device) if routing is not None else None
            found.append(LaneRows(tuple(t.to(self.device).contiguous() for t in tensors), table, (1 << world) - 1))
        return found

    @contextlib.contextmanager
    def on(self, me: int) -> Iterator[None]:
        """Has launches go to the stream of rank `me`."""
        with torch.cuda.stream(self._streams[me]) if self.side_by_side else contextlib.nullcontext():
            yield

    def wait(self) -> None:
        """Waits for the device."""
        if self.side_by_side:
            torch.cuda.synchronize()

    def next_stamp(self) -> int:
        self._sequence += 1
        return STAMP + self._sequence

    def dispatch(
        self, rows: Sequence[Any], stamp: int, signatures: Sequence[int] | None = None, refused: int | None = None
    ) -> list[Any]:
        """One exact dispatch of all ranks; what each leaves for its combine."""
        sent: list[Any] = [None] * len(rows)
        for phases in (_BOTH,) if self.side_by_side else (_PUT, _AWAIT):
            for me, lane in enumerate(self.lanes):
                with self.on(me):
                    signature = signatures[me] if signatures else 1
                    sent[me] = lane.dispatch(
                        rows[me], signature, stamp=stamp, refused=me == refused, phases=phases, sent=sent[me]
                    )
        self.wait()
        return sent

    def take(self, rows: Sequence[Any], sent: Sequence[Any], stamp: int) -> list[list[torch.Tensor]]:
        """The received rows of all ranks."""
        received = []
        for me, lane in enumerate(self.lanes):
            assert lane.outcome(stamp) == (True, None)
            with self.on(me):
                received.append(lane.take(rows[me], sent[me], sum(lane.counts(stamp)), stamp))
        self.wait()
        return received

    def dispatch_static(self, rows: Sequence[Any], static_rows: int) -> tuple[list[Any], list[list[torch.Tensor]]]:
        """One static dispatch of all ranks."""
        sent: list[Any] = [None] * len(rows)
        outputs: list[Any] = [None] * len(rows)
        for phases in (_BOTH,) if self.side_by_side else (_PUT, _AWAIT):
            for me, lane in enumerate(self.lanes):
                with self.on(me):
                    sent[me], outputs[me] = lane.dispatch_static(rows[me], 1, static_rows, phases=phases, sent=sent[me])
        self.wait()
        return sent, outputs

    def in_place(self, me: int, results: torch.Tensor, slot: int) -> torch.Tensor:
        """A rank's results, written where the others read them."""
        lane, width = self.lanes[me], row_bytes(results)
        at = lane.room_in_place(slot, len(results), width)
        assert at is not None
        room = self.arenas[me][at : at + len(results) * width].view(results.dtype).view(results.shape)
        with self.on(me):
            room.copy_(results)
        assert lane.in_place(room, slot) == 1 + slot
        return room

    def combine(
        self, results: Sequence[torch.Tensor], sent: Sequence[Any], stamp: int = 0, slot: int = 0
    ) -> list[torch.Tensor]:
        """One combine of all ranks."""
        sums: list[Any] = [None] * len(results)
        for phases in (_BOTH,) if self.side_by_side else (_PUT, _AWAIT):
            for me, lane in enumerate(self.lanes):
                with self.on(me):
                    sums[me] = lane.combine(
                        results[me], sent[me], row_bytes(results[me]), stamp=stamp, slot=slot, phases=phases
                    )
        self.wait()
        return sums
