"""The exchange of a group of which nothing is known but its process group: rows go straight to whoever wants them.

A dispatch is a round, in which every source says how many rows it has for every rank, and one scatter that moves rows,
weights, ids and extra tensors together. A combine mirrors it: a round, then the results go back, and each source adds
up its own in rank order. All members count as one node, for nothing says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from epmesh.errors import EpmeshError
from epmesh.layout import Layout
from epmesh_server.ranks.arguments import refusals
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.flat_member import FlatMember, cut
from epmesh_server.ranks.open_exchange import IDS_AT, ExchangeStats, OpenExchange, OpenExchanges, Relayed
from epmesh_server.ranks.tensors import Bytes, as_bytes, as_rows, from_bytes, row_bytes, sum_rows


class FlatExchange(OpenExchanges[FlatMember]):
    """Runs the exchanges of one group on one rank."""

    turns = 1 << 30  # nothing is overwritten, so rows need not be taken in before a later call

    def __init__(
        self,
        member: FlatMember,
        tensor_parallel_size: int,
        turn: Callable[[], AbstractContextManager[None]],
        stats: ExchangeStats,
    ) -> None:
        """Starts with nothing open; arguments as `OpenExchanges` takes them."""
        super().__init__(member, stats, turn)
        self._tensor_parallel_size = tensor_parallel_size

    def guard(self, sequence: int, method: str) -> AbstractContextManager[None]:
        """What a failure means: see `FlatMember.guard`."""
        return self.member.guard(sequence)

    def _way_there(self, sequence: int, tensors: Sequence[torch.Tensor], layout: Layout | None) -> FlatDispatch:
        return FlatDispatch(self.member, sequence, tensors, layout)

    def _way_back(self, exchange: OpenExchange, hidden_states: torch.Tensor) -> FlatCombine:
        return FlatCombine(self.member, exchange, hidden_states, self._tensor_parallel_size)

    def _check_room(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
        """There is no buffer that could be too small."""


class FlatDispatch:
    """One dispatch on one rank.

    Attributes:
        counts: after `wait`, rows received by source position.
        bytes_sent, floor_bytes: to other ranks, handed to the process group; least possible.
    """

    def __init__(
        self, member: FlatMember, sequence: int, tensors: Sequence[torch.Tensor], layout: Layout | None
    ) -> None:
        """Prepares; `layout` is `None` where this rank's input is refused."""
        self.sequence = sequence
        self._member = member
        self._tensors = tensors
        self._layout = layout
        self._came: list[Bytes] = []
        self.counts: list[int] = []
        self.bytes_sent = self.floor_bytes = 0

    def post(self, call: Call) -> None:
        """Copies this rank's rows by destination; nothing reads the caller's tensors afterwards."""
        self._call = call
        self._rows = self._sizes = [0] * self._member.topology.world_size
        if self._layout is not None:
            try:
                with refusals():
                    self._pack(self._layout)
            except EpmeshError as exc:
                self._call = describe(call.method, call.arguments, refusal=exc)
        self._result: Callable[[], list[Bytes]] = lambda: self._member.in_turn(self._travel)

    def let_caller_go(self) -> None:
        """Has the courier move the rows."""
        self._result = self._member.send_courier(self._travel)

    def wait(self) -> None:
        """Waits for everybody's rows."""
        self._came = self._result()

    def assemble(self) -> list[torch.Tensor]:
        """All received rows, by source rank, then source row, in new tensors."""
        pieces = [_arrays(data, rows, self._widths) for data, rows in zip(self._came, self.counts, strict=True)]
        total, self._came = sum(self.counts), []
        received = []
        for index, tensor in enumerate(self._tensors):
            result = torch.empty((total, *tensor.shape[1:]), dtype=tensor.dtype)
            if result.numel():
                np.concatenate([piece[index] for piece in pieces], axis=0, out=as_rows(result))
            received.append(result)
        return received

    def relayed(self) -> dict[int, Relayed]:
        """Nothing is passed on."""
        return {}

    def _travel(self) -> list[Bytes]:
        before = self._member.bytes_sent
        _, self.counts = self._member.round(self.sequence, self._call, self._rows)
        row_size = sum(self._widths)
        came = self._member.move(self._outgoing, self._sizes, [rows * row_size for rows in self.counts])
        self.bytes_sent = self._member.bytes_sent - before
        self.floor_bytes = sum(self._sizes) - self._sizes[self._member.topology.me]
        return came

    def _pack(self, layout: Layout) -> None:
        sources = [as_rows(tensor) for tensor in self._tensors]
        self._widths = [row_bytes(tensor) for tensor in self._tensors]
        self._rows = [len(rows) for rows in layout.rows_to]
        self._sizes = [rows * sum(self._widths) for rows in self._rows]
        self._outgoing = np.empty(sum(self._sizes), np.uint8)
        for position, segment in enumerate(cut(self._outgoing, self._sizes)):
            rows = layout.rows_to[position]
            arrays = _arrays(segment, len(rows), self._widths)
            for array, source in zip(arrays, sources, strict=True):
                if array.size:
                    np.take(source, rows, axis=0, out=array, mode="clip")
            if layout.replicated is not None and arrays[IDS_AT].size:
                ids = layout.ids_for(self._tensors[IDS_AT].contiguous().numpy(), position)
                arrays[IDS_AT][:] = np.ascontiguousarray(ids).view(np.uint8)


class FlatCombine:
    """One combine on one rank: `post`, `collect`.

    Attributes:
        bytes_sent, floor_bytes: to other ranks, handed to the process group; least possible.
    """

    def __init__(
        self, member: FlatMember, exchange: OpenExchange, hidden_states: torch.Tensor, tensor_parallel_size: int
    ) -> None:
        self._member, self._exchange = member, exchange
        self._hidden = hidden_states
        self._tensor_parallel_size = tensor_parallel_size
        self.bytes_sent = self.floor_bytes = 0

    def post(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        """Checks this rank's results; a refusal travels with the call."""
        exchange, size = self._exchange, self._tensor_parallel_size
        try:
            with refusals():
                what = exchange.check_results(self._hidden, output, is_sequence_parallel, size)
            self._call = describe("combine", f"{what} exchange={exchange.sequence}")
        except EpmeshError as exc:
            self._call = describe("combine", refusal=exc)

    def collect(self) -> torch.Tensor:
        """Sends results back and sums those of this rank's rows: ``[num_tokens, hidden]``."""
        came = self._member.in_turn(self._travel)
        layout, hidden, dtype = self._exchange.layout, self._hidden.shape[1], self._hidden.dtype
        pairs = zip(layout.rows_to, came, strict=True)
        parts = [(rows, from_bytes(data, dtype, (len(rows), hidden))) for rows, data in pairs]
        return sum_rows(parts, layout.num_tokens, hidden, dtype)

    def _travel(self) -> list[Bytes]:
        before = self._member.bytes_sent
        self._member.round(self._exchange.sequence, self._call)
        results = self._exchange.compact(self._hidden).contiguous()
        width = row_bytes(results)
        sizes = [rows * width for rows in self._exchange.counts]
        coming = [len(rows) * width for rows in self._exchange.layout.rows_to]
        came = self._member.move(as_bytes(results), sizes, coming)
        self.bytes_sent = self._member.bytes_sent - before
        self.floor_bytes = sum(sizes) - sizes[self._member.topology.me]
        return came


def _arrays(segment: Bytes, num_rows: int, widths: Sequence[int]) -> list[Bytes]:
    """A segment's arrays ``[num_rows, width]``, one behind the other."""
    pieces = cut(segment, [num_rows * width for width in widths])
    return [piece.reshape(num_rows, width) for piece, width in zip(pieces, widths, strict=True)]
