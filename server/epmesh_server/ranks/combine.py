"""The way back: one rank's part in one combine, from its results to the sums for its own rows.

Sums are formed inside a node first, in rank order and fp32, and rounded; the node sums of a row are then added in slot
order and fp32, and rounded: one row travels per (row, node), and the result has the same bits every run.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from epmesh import errors
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.frames import Message
from epmesh.layout import Ints
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.buffers import Region
from epmesh_server.ranks.calls import Call, describe, verdict
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.tensors import accumulator, as_rows, dtype_name, from_bytes, meta_of, sum_rows

if TYPE_CHECKING:
    from epmesh_server.ranks.exchange import OpenExchange

_COMBINE = frame_pb2.FRAME_KIND_COMBINE


class CombineStage:
    """One combine on one rank: `post`, `collect`.

    Attributes:
        bytes_sent, floor_bytes: between nodes, handed to the sockets; least possible.
    """

    def __init__(self, member: GroupMember, exchange: OpenExchange, hidden_states: torch.Tensor) -> None:
        self._member, self._topology, self._exchange = member, member.topology, exchange
        self._hidden = hidden_states
        self._call = describe(
            "combine", f"hidden={list(hidden_states.shape[1:])} dtype={dtype_name(hidden_states.dtype)}"
        )
        self.bytes_sent = self.floor_bytes = 0

    def post(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        """Shows this rank's results, or its refusal, to its neighbours."""
        try:
            self._check(is_sequence_parallel, output)
        except InvalidRequest as exc:
            self._call.refusal.CopyFrom(exc.to_proto())
        region = self._member.buffers.out(self._topology.me, self._exchange.slot)
        self._ends = [0, *itertools.accumulate(self._exchange.counts)]
        if not self._call.HasField("refusal"):
            self._results = self._exchange.compact(self._hidden)
            if len(self._topology.local) > 1:
                self._show(region)
        region.describe(self._ends[-1], self._call.SerializeToString())
        self._member.session.page.barrier()
        region.publish(self._member.flag(self._exchange.sequence))
        for position in self._topology.local:
            if position != self._topology.me:
                self._member.buffers.wake(position)

    def _show(self, region: Region) -> None:
        """Puts the results where neighbours read them, unless the caller computed them there."""
        data = as_rows(self._results)
        if data.ctypes.data != region.payload.ctypes.data:
            region.payload[: data.size] = data.reshape(-1)
        region.offsets[: len(self._ends)] = self._ends

    def collect(self) -> torch.Tensor:
        """Waits for all results of this rank's rows and sums them; sends on what it owes to other nodes.

        Returns:
            ``[num_tokens, hidden]``.

        Raises:
            EpmeshError: the calls do not agree, or a member refused: the same on all members.
        """
        shown = self._await_neighbours()
        failed = verdict(shown)
        for source in self._exchange.relayed:
            self._send_sums(source, shown, failed)
        layout, parts = self._exchange.layout, []
        if failed is None:
            everything = np.arange(layout.num_tokens, dtype=np.int64)
            parts.append((self._topology.slot, everything, self._node_sum(self._topology.me, layout.num_tokens)))
        messages = self._await_nodes()
        self._agree(shown, failed, messages)
        for slot, message in messages.items():
            rows = layout.rows_to_node[slot]
            values = from_bytes(message.tensors[0], self._hidden.dtype, (len(rows), self._hidden.shape[1]))
            parts.append((slot, rows, values))
        if len(parts) == 1:
            return parts[0][2]
        ordered = [(rows, values) for _, rows, values in sorted(parts, key=lambda part: part[0])]
        return sum_rows(ordered, layout.num_tokens, self._hidden.shape[1], self._hidden.dtype)

    def _check(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        hidden, received = self._hidden, self._exchange.num_returned
        if hidden.dim() != 2 or hidden.shape[0] != received:
            raise InvalidRequest(
                f"hidden_states is {list(hidden.shape)}; the dispatch returned {received} rows, so it must be "
                f"[{received}, hidden]"
            )
        accumulator(hidden.dtype, "combine")
        if is_sequence_parallel != self._exchange.is_sequence_parallel and self._member.view.tensor_parallel_size > 1:
            raise InvalidRequest(f"is_sequence_parallel={is_sequence_parallel}; the dispatch had the other value")
        wanted = [self._exchange.layout.num_tokens, hidden.shape[1]]
        if output is not None and (list(output.shape) != wanted or output.dtype != hidden.dtype):
            got = f"{dtype_name(output.dtype)}{list(output.shape)}"
            raise InvalidRequest(f"output is {got}; it must be {dtype_name(hidden.dtype)}{wanted}")
        room = self._member.buffers.layout.out_bytes
        if hidden.numel() * hidden.element_size() > room:
            raise InvalidRequest(f"{hidden.shape[0]} rows take more than the buffer's {room} bytes; send fewer at once")

    # Inside the node -------------------------------------------------------------------------------------------

    def _await_neighbours(self) -> dict[int, Call]:
        """Waits until all local members show their results; their calls by global rank."""
        member, slot = self._member, self._exchange.slot
        flag = member.flag(self._exchange.sequence)
        pending = [position for position in self._topology.local if position != self._topology.me]

        def ready() -> bool:
            pending[:] = [p for p in pending if member.buffers.out(p, slot).flag != flag]
            return not pending

        deadline = time.monotonic() + member.timeout_s
        member.wait_until(ready, self._exchange.sequence, deadline, lambda: pending)
        return {member.global_rank(p): Call.FromString(member.buffers.out(p, slot).call) for p in self._topology.local}

    def _node_sum(self, source: int, num_rows: int) -> torch.Tensor:
        """``[num_rows, hidden]``: this node's results for a source's rows, in rank order, rounded."""
        hidden, dtype = self._hidden.shape[1], self._hidden.dtype
        parts = [(self._rows_at(source, p), self._results_of(p, source, hidden, dtype)) for p in self._topology.local]
        return sum_rows(parts, num_rows, hidden, dtype)

    def _rows_at(self, source: int, position: int) -> Ints:
        """Which of the source's rows (of its message, where it is on another node) went to a local member."""
        if source == self._topology.me:
            return self._exchange.layout.rows_to[position]
        return self._exchange.relayed[source].rows_of[position]

    def _results_of(self, position: int, source: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        if position == self._topology.me:
            return self._results[self._ends[source] : self._ends[source + 1]]
        region = self._member.buffers.out(position, self._exchange.slot)
        start, stop = (int(offset) for offset in region.offsets[source : source + 2])
        width = hidden * dtype.itemsize
        return from_bytes(region.payload[start * width : stop * width], dtype, (stop - start, hidden))

    # Between nodes ---------------------------------------------------------------------------------------------

    def _send_sums(self, source: int, shown: dict[int, Call], failed: EpmeshError | None) -> None:
        header = self._member.header(_COMBINE, self._exchange.sequence)
        header.call = shown[min(shown)].SerializeToString()
        if failed is not None:
            header.error.CopyFrom(failed.to_proto())
            self._member.send(source, header)
            return
        total = self._node_sum(source, self._exchange.relayed[source].num_rows)
        header.tensors.append(meta_of(total))
        data = as_rows(total).reshape(-1)
        self.floor_bytes += data.size
        self.bytes_sent += self._member.send(source, header, [data.data])

    def _await_nodes(self) -> dict[int, Message]:
        """Waits for the sums of every other node; by slot."""
        member, topology = self._member, self._topology
        pending = list(topology.remote_slots)
        arrived: dict[int, Message] = {}

        def arrive(slot: int) -> bool:
            message = member.take(_COMBINE, self._exchange.sequence, topology.rail(topology.me, slot))
            if message is not None:
                arrived[slot] = message
            return message is not None

        def ready() -> bool:
            pending[:] = [slot for slot in pending if not arrive(slot)]
            return not pending

        deadline = time.monotonic() + member.timeout_s
        rails = {slot: topology.rail(topology.me, slot) for slot in pending}
        member.wait_until(ready, self._exchange.sequence, deadline, lambda: [rails[slot] for slot in pending])
        return arrived

    def _agree(self, shown: dict[int, Call], failed: EpmeshError | None, messages: dict[int, Message]) -> None:
        """Raises the same error on all members: that of the lowest slot, or that nodes called differently."""
        slot_of = self._member.view.slot_of
        refused = {
            slot: errors.from_proto(m.header.error) for slot, m in messages.items() if m.header.HasField("error")
        }
        if failed is not None:
            refused[self._topology.slot] = failed
        if refused:
            raise refused[min(refused)]
        calls = {min(shown): shown[min(shown)]}
        for slot, message in messages.items():
            lowest = min(self._member.global_rank(p) for p in self._topology.members[slot])
            calls[lowest] = Call.FromString(message.header.call)
            assert slot_of(lowest) == slot
        error = verdict(calls)
        if error is not None:
            raise error
        for slot, message in messages.items():
            self._check_sums(slot, message)

    def _check_sums(self, slot: int, message: Message) -> None:
        expected = [len(self._exchange.layout.rows_to_node[slot]), self._hidden.shape[1]]
        metas = message.header.tensors
        if len(metas) != 1 or list(metas[0].shape) != expected or metas[0].dtype != dtype_name(self._hidden.dtype):
            raise InvalidRequest(f"rank {message.header.source} sent sums of another shape than {expected}")
