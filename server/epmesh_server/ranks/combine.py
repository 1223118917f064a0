"""The way back: one rank's part in one combine, from its results to the sums for its own rows.

Sums are formed inside a node first, in rank order and fp32, and rounded; the node sums of a row are then added in slot
order and fp32, and rounded: one row travels per (row, node), and the result has the same bits every run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import numpy as np
import torch

from epmesh import errors
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.frames import Message
from epmesh.layout import Ints
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.arguments import refusals
from epmesh_server.ranks.buffers import Region
from epmesh_server.ranks.calls import Call, describe, verdict
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.open_exchange import OpenExchange
from epmesh_server.ranks.tensors import as_rows, dtype_name, from_bytes, meta_of, sum_rows

_COMBINE = frame_pb2.FRAME_KIND_COMBINE
_WORTH_TELLING_S = 0.0002


class CombineStage:
    """One combine on one rank: `post`, `collect`.

    Attributes:
        bytes_sent, floor_bytes: between nodes, handed to the sockets; least possible.
    """

    def __init__(self, member: GroupMember, exchange: OpenExchange, hidden_states: torch.Tensor) -> None:
        self._member, self._topology, self._exchange = member, member.topology, exchange
        self._hidden = hidden_states
        self._call = describe("combine")
        self.bytes_sent = self.floor_bytes = 0

    def post(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        """Shows this rank's results, or its refusal, to its neighbours."""
        try:
            with refusals():
                self._check(is_sequence_parallel, output)
        except EpmeshError as exc:
            self._call.refusal.CopyFrom(exc.to_proto())
        region = self._member.buffers.out(self._topology.me, self._exchange.slot)
        self._ends = [0, *itertools.accumulate(self._exchange.counts)]
        if not self._call.HasField("refusal"):
            self._results = self._exchange.compact(self._hidden)
            if len(self._topology.local) > 1:
                self._show(region)
        self._encoded = self._call.SerializeToString()
        region.describe(self._ends[-1], self._encoded)
        self._member.session.page.barrier()
        self._member.buffers.publish_out(self._exchange.slot, self._member.flag(self._exchange.sequence))

    def _show(self, region: Region) -> None:
        """Puts the results where neighbours read them, unless the caller computed them there."""
        results = self._results
        shown = shown_rows(region, len(results), results.shape[1], shown_dtype(results.dtype))
        ahead = results.data_ptr() - region.payload.ctypes.data
        within = 0 <= ahead < len(region.payload)
        if not (within and shown.data_ptr() == results.data_ptr() and results.is_contiguous()):
            shown.copy_(
                results.clone() if within else results
            )  # a part of the buffer would be overwritten as it is read
        region.offsets[: len(self._ends)] = self._ends

    def collect(self) -> torch.Tensor:
        """Waits for all results of this rank's rows and sums them; sends on what it owes to other nodes.

        Returns:
            ``[num_tokens, hidden]``.

        Raises:
            EpmeshError: the calls do not agree, or a member refused: the same on all members.
        """
        self._kept_by, self._kept_s = -1, 0.0
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
        hidden, tensor_parallel_size = self._hidden, self._member.view.tensor_parallel_size
        self._call.arguments = self._exchange.check_results(hidden, output, is_sequence_parallel, tensor_parallel_size)
        room = self._member.buffers.layout.out_bytes
        if (hidden.shape[0] + 1) * hidden.shape[1] * shown_dtype(hidden.dtype).itemsize > room:
            raise InvalidRequest(f"{hidden.shape[0]} rows take more than the buffer's {room} bytes; send fewer at once")

    # Inside the node -------------------------------------------------------------------------------------------

    def _await_neighbours(self) -> dict[int, Call]:
        """Waits until all local members show their results; their calls by global rank."""
        member, slot = self._member, self._exchange.slot
        flag, flags = np.uint64(member.flag(self._exchange.sequence)), member.buffers.out_flags(slot)

        def late() -> list[int]:
            return [self._topology.local[index] for index in np.flatnonzero(flags != flag)]

        def ready() -> bool:
            here = flags == flag
            if not here.all():
                self._look_for_strays([p for p, shown in zip(self._topology.local, here, strict=True) if not shown])
            return bool(here.all())

        before = dict(member.waits.by_rank)
        deadline = time.monotonic() + member.timeout_s
        member.wait_until(ready, self._exchange.sequence, deadline, late)
        self._note_who_kept(before)
        known = {self._encoded: self._call}
        calls: dict[int, Call] = {}
        for position in self._topology.local:
            encoded = member.buffers.out(position, slot).call
            if encoded not in known:
                known[encoded] = Call.FromString(encoded)
            calls[member.global_rank(position)] = known[encoded]
        return calls

    def _note_who_kept(self, before: Mapping[int, float]) -> None:
        """Which neighbour this rank waited for the longest: who waits for this rank on other nodes waits for that."""
        waits = self._member.waits
        for rank in map(self._member.global_rank, self._topology.local):
            seconds = waits.of(rank) - before.get(rank, 0.0)
            if seconds > self._kept_s:
                self._kept_by, self._kept_s = rank, seconds

    def _node_sum(self, source: int, num_rows: int) -> torch.Tensor:
        """``[num_rows, hidden]``: this node's results for a source's rows, in rank order, rounded."""
        hidden, dtype = self._hidden.shape[1], self._hidden.dtype
        local = self._topology.local
        if len(local) == 1:
            own = self._results[self._ends[source] : self._ends[source + 1]]
            return sum_rows([(self._rows_at(source, local[0]), own)], num_rows, hidden, dtype)
        if dtype.is_floating_point and num_rows and hidden:
            return self._bag_sum(source, num_rows)
        return sum_rows([(self._rows_at(source, p), self._shown_by(p, source)) for p in local], num_rows, hidden, dtype)

    def _bag_sum(self, source: int, num_rows: int) -> torch.Tensor:
        """The sum in one pass: every row of the source is a bag of rows of the node's memory, in rank order."""
        hidden, dtype, buffers = self._hidden.shape[1], self._hidden.dtype, self._member.buffers
        wide = shown_dtype(dtype)
        width = hidden * wide.itemsize
        index = np.full((num_rows, len(self._topology.local)), -1, np.int64)
        for column, position in enumerate(self._topology.local):
            region = buffers.out(position, self._exchange.slot)
            first = -(-region.start // width) + int(region.offsets[source])
            rows = self._rows_at(source, position)
            index[rows, column] = np.arange(first, first + len(rows))
        held = index >= 0
        ends = np.zeros(num_rows + 1, np.int64)
        np.cumsum(held.sum(axis=1), out=ends[1:])
        num_table_rows = len(buffers.memory) // width
        table = from_bytes(buffers.memory[: num_table_rows * width], wide, (num_table_rows, hidden))
        bags = torch.from_numpy(index[held]), torch.from_numpy(ends)
        return torch.embedding_bag(table, *bags, False, 0, False, None, True)[0].to(dtype)

    def _rows_at(self, source: int, position: int) -> Ints:
        """Which of the source's rows (of its message, where it is on another node) went to a local member."""
        if source == self._topology.me:
            return self._exchange.layout.rows_to[position]
        return self._exchange.relayed[source].rows_of[position]

    def _shown_by(self, position: int, source: int) -> torch.Tensor:
        """A local member's results for a source's rows."""
        region = self._member.buffers.out(position, self._exchange.slot)
        start, stop = (int(offset) for offset in region.offsets[source : source + 2])
        return shown_rows(region, stop, self._hidden.shape[1], shown_dtype(self._hidden.dtype))[start:]

    # Members that went on without this combine -------------------------------------------------------------------

    def _look_for_strays(self, positions: list[int]) -> None:
        """Local members that have not come to this combine must not have begun the next call either."""
        sequence = self._exchange.sequence + 1
        flags, flag = self._member.buffers.recv_flags(sequence), np.uint64(self._member.flag(sequence))
        for position in positions:
            # A member shows its results before it begins the next call, so they are looked for last.
            if flags[position] == flag and not self._came(position):
                self._refuse_stray(position, self._member.buffers.recv(self._topology.me, sequence, position).call)

    def _came(self, position: int) -> bool:
        shown = self._member.buffers.out_flags(self._exchange.slot)[self._topology.local.index(position)]
        return bool(shown == np.uint64(self._member.flag(self._exchange.sequence)))

    def _went_on(self, position: int) -> bool:
        """Whether a member on another node began the next call; it sends its sums before that."""
        return self._member.peek(frame_pb2.FRAME_KIND_DISPATCH, self._exchange.sequence + 1, position) is not None

    def _next_call_of(self, position: int) -> bytes:
        message = self._member.peek(frame_pb2.FRAME_KIND_DISPATCH, self._exchange.sequence + 1, position)
        return message.header.call if message is not None else b""

    def _refuse_stray(self, position: int, encoded: bytes) -> None:
        """Ends the exchange, and the call that was begun in its place, for all members."""
        member, sequence, call = self._member, self._exchange.sequence, Call.FromString(encoded)
        if member.row.begun > sequence or call.abandoned >= sequence:
            return  # two exchanges are open, and all began the second before the first's combine; or it was given up
        rank = member.global_rank(position)
        text = f"ranks called different methods: {call.method} on rank {rank}, combine on others; "
        member.agreed = InvalidRequest(f"{text}call the same, in the same order")
        member.abandon(sequence + 1, member.agreed)  # in this order: who hears of the second has heard of the first
        member.abandon(sequence, member.agreed)
        member.pass_over(sequence + 1)
        raise member.agreed

    # Between nodes ---------------------------------------------------------------------------------------------

    def _send_sums(self, source: int, shown: dict[int, Call], failed: EpmeshError | None) -> None:
        header = self._member.header(_COMBINE, self._exchange.sequence)
        header.call = shown[min(shown)].SerializeToString()
        if self._kept_s > _WORTH_TELLING_S:
            header.waited_for.rank, header.waited_for.seconds = self._kept_by, self._kept_s
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
        rails = {slot: topology.rail(topology.me, slot) for slot in pending}
        arrived: dict[int, Message] = {}
        before = {slot: member.waits.of(member.global_rank(rail)) for slot, rail in rails.items()}

        def arrive(slot: int) -> bool:
            message = member.take(_COMBINE, self._exchange.sequence, topology.rail(topology.me, slot))
            if message is not None:
                arrived[slot] = message
            return message is not None

        def ready() -> bool:
            pending[:] = [slot for slot in pending if not arrive(slot)]
            for slot in [slot for slot in pending if self._went_on(rails[slot])]:
                if arrive(slot):  # another thread took in both since: the sums come first
                    pending.remove(slot)
                else:
                    self._refuse_stray(rails[slot], self._next_call_of(rails[slot]))
            return not pending

        deadline = time.monotonic() + member.timeout_s
        member.wait_until(ready, self._exchange.sequence, deadline, lambda: [rails[slot] for slot in pending])
        for slot, message in arrived.items():
            self._hand_on(member.global_rank(rails[slot]), before[slot], message.header)
        return arrived

    def _hand_on(self, rail: int, before: float, header: frame_pb2.FrameHeader) -> None:
        """A rail that was late for it waited itself says for whom."""
        waits, told = self._member.waits, header.waited_for
        if told.seconds > 0 and told.rank in self._member.view.ranks:
            waits.hand_on(rail, told.rank, min(told.seconds, waits.of(rail) - before))

    def _agree(self, shown: dict[int, Call], failed: EpmeshError | None, messages: dict[int, Message]) -> None:
        """Raises the same error on all members: that of the lowest slot, or that nodes called differently."""
        slot_of = self._member.view.slot_of
        refused = {
            slot: errors.from_proto(m.header.error) for slot, m in messages.items() if m.header.HasField("error")
        }
        if failed is not None:
            refused[self._topology.slot] = failed
        if refused:
            self._member.agreed = refused[min(refused)]
            raise self._member.agreed
        calls = {min(shown): shown[min(shown)]}
        for slot, message in messages.items():
            lowest = min(self._member.global_rank(p) for p in self._topology.members[slot])
            calls[lowest] = Call.FromString(message.header.call)
            assert slot_of(lowest) == slot
        error = self._member.agreed = verdict(calls)
        if error is not None:
            raise error
        for slot, message in messages.items():
            self._check_sums(slot, message)

    def _check_sums(self, slot: int, message: Message) -> None:
        expected = [len(self._exchange.layout.rows_to_node[slot]), self._hidden.shape[1]]
        metas = message.header.tensors
        if len(metas) != 1 or list(metas[0].shape) != expected or metas[0].dtype != dtype_name(self._hidden.dtype):
            raise InvalidRequest(f"rank {message.header.source} sent sums of another shape than {expected}")


def shown_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results of `dtype` stand in an `out` region: bf16 widened, so that sums round once."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def shown_rows(region: Region, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """``[num_rows, hidden]`` of an `out` region. Rows start at multiples of their size in the node's whole memory, so
    that all of it can be read as one table."""
    width = hidden * dtype.itemsize
    pad = -region.start % width if width else 0
    return from_bytes(region.payload[pad : pad + num_rows * width], dtype, (num_rows, hidden))
