"""The way there: one rank's part in one dispatch, from its rows to the rows it receives."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from epmesh.errors import InvalidRequest
from epmesh.frames import Message
from epmesh.layout import Ints, Layout, relay_ids, relay_rows
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.buffers import MAX_CALL_BYTES, Bytes, Region, payload_bytes
from epmesh_server.ranks.calls import Call, describe, verdict
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.open_exchange import IDS_AT, Relayed
from epmesh_server.ranks.tensors import as_rows, meta_of, row_bytes

_DISPATCH = frame_pb2.FRAME_KIND_DISPATCH


@dataclass
class _PassedOn:
    """A remote source's message, and which of its rows went to which local position."""

    message: Message
    parts: list[Bytes]
    codes: Bytes | None
    num_rows: int
    rows_of: dict[int, Ints]


class DispatchStage:
    """One dispatch on one rank: `post`, `wait`, `assemble`.

    Attributes:
        member, sequence: whose and which dispatch it is.
        counts: after `assemble`, rows received by source position.
        passed_on: by source position, what came on this rank's rail.
        bytes_sent, floor_bytes: between nodes, handed to the sockets; least possible.
        row_bytes: of one row of all tensors.
    """

    def __init__(
        self, member: GroupMember, sequence: int, tensors: Sequence[torch.Tensor], layout: Layout | None
    ) -> None:
        """Prepares; `layout` is `None` for a round without rows, or where this rank's input is refused."""
        self.member, self.sequence = member, sequence
        self._topology = member.topology
        self._layout = layout
        self._tensors = tensors if layout is not None else ()
        self._sources = [as_rows(tensor) for tensor in self._tensors]
        self._widths = [row_bytes(tensor) for tensor in self._tensors]
        self._arrived: dict[int, Region] = {}
        self.passed_on: dict[int, _PassedOn] = {}
        self._kept: list[Bytes] = []
        self.counts: list[int] = []
        self.bytes_sent = self.floor_bytes = 0
        self.row_bytes = sum(self._widths)

    @staticmethod
    def check_room(layout: Layout, tensors: Sequence[torch.Tensor], member: GroupMember) -> None:
        """Refuses more rows than a region holds.

        Raises:
            InvalidRequest: with the sizes and the mend.
        """
        widths = [row_bytes(tensor) for tensor in tensors]
        most = max(map(len, [*layout.rows_to, *layout.rows_to_node.values()]), default=0)
        need, room = payload_bytes(most, widths), member.buffers.layout.region_bytes
        if need > room:
            raise InvalidRequest(
                f"{most} rows for one rank take {need} bytes, the buffer has {room}; send fewer rows at once, or start "
                f"the node service with a larger --buffer-bytes"
            )

    def post(self, call: Call) -> None:
        """Sends this rank's part to everybody: other nodes first, their way is longer."""
        call.abandoned = self.member.abandoned
        self._call = call
        encoded = call.SerializeToString()
        if len(encoded) > MAX_CALL_BYTES:
            encoded = describe(
                call.method, refusal=InvalidRequest(f"arguments take {len(encoded)} bytes; {MAX_CALL_BYTES} fit")
            ).SerializeToString()
            self._call = Call.FromString(encoded)
        self._encoded = encoded
        for slot in self._topology.remote_slots:
            self._post_node(slot, encoded)
        for position in self._topology.local:
            if position != self._topology.me:
                self._post_neighbour(position, encoded)

    def let_caller_go(self) -> None:
        """Copies the rows this rank has for itself, because its caller may change them before `assemble`."""
        if self._layout is not None:
            rows = self._own_rows()
            self._kept = [row.copy() if row is source else row for row, source in zip(rows, self._sources, strict=True)]

    def wait(self, timeout_s: float | None = None) -> dict[int, Call]:
        """Waits for everybody's part, passing on what comes on this rank's rail.

        Returns:
            Every member's call, by global rank.

        Raises:
            EpmeshError: the calls do not agree, or a member refused: the same on all members.
        """
        member, topology = self.member, self._topology
        relayed, flag = set(topology.relayed), np.uint64(member.flag(self.sequence))
        flags = member.buffers.recv_flags(self.sequence)
        direct = np.array([p != topology.me and p not in relayed for p in range(topology.world_size)])
        pending = [p for p in range(topology.world_size) if p != topology.me]

        def ready() -> bool:
            relayed.difference_update([source for source in relayed if self._take_in(source)])
            here = flags == flag
            if relayed or not here[direct].all():
                pending[:] = [p for p in pending if p in relayed or (direct[p] and not here[p])]
                return False
            return True

        def late() -> list[int]:
            waiting = set(pending)
            told = [p for p in pending if p in self._topology.local or self._rail_here(p) not in waiting]
            return told or pending

        limit_s = member.timeout_s if timeout_s is None else timeout_s
        member.wait_until(ready, self.sequence, time.monotonic() + limit_s, late)
        self._arrived = {
            source: member.buffers.recv(topology.me, self.sequence, source)
            for source in map(int, np.flatnonzero(direct))
        }
        calls = self._calls()
        member.abandoned = max(call.abandoned for call in calls.values())
        error = member.agreed = verdict(calls)
        if error is not None:
            raise error
        return calls

    def assemble(self) -> list[torch.Tensor]:
        """Copies all received rows, by source rank, then source row, into new tensors."""
        everybody = range(self._topology.world_size)
        self.counts = [self._num_rows_from(position) for position in everybody]
        made = [torch.empty((sum(self.counts), *tensor.shape[1:]), dtype=tensor.dtype) for tensor in self._tensors]
        arrays = [as_rows(tensor) for tensor in made]
        start = 0
        for position, count in zip(everybody, self.counts, strict=True):
            if count:  # a message without rows does not say how wide they are
                self._fill(position, [array[start : start + count] for array in arrays])
            start += count
        return made

    def relayed(self) -> dict[int, Relayed]:
        """By source position, what came on this rank's rail and was passed on."""
        return {source: Relayed(passed.num_rows, passed.rows_of) for source, passed in self.passed_on.items()}

    # Sending ---------------------------------------------------------------------------------------------------

    def _post_node(self, slot: int, call: bytes) -> None:
        header = self.member.header(_DISPATCH, self.sequence)
        header.call = call
        frames: list[memoryview] = []
        if self._layout is not None:
            rows = self._layout.rows_to_node[slot]
            for tensor, source in zip(self._tensors, self._sources, strict=True):
                meta = meta_of(tensor)
                meta.shape[0] = len(rows)
                header.tensors.append(meta)
                taken = _take(source, rows)
                # ZeroMQ reads the frame after this call; the caller may change its tensor by then.
                frames.append(_flat(taken.copy() if taken is source else taken))
            self.floor_bytes += sum(map(len, frames))
            codes = self._layout.codes_to_node[slot]
            if codes is not None:
                header.with_targets = True
                header.tensors.add(dtype="uint8", shape=codes.shape)
                frames.append(_flat(codes))
        self.bytes_sent += self.member.send(self._topology.rail(self._topology.me, slot), header, frames)

    def _post_neighbour(self, position: int, call: bytes) -> None:
        region = self.member.buffers.recv(position, self.sequence, self._topology.me)
        rows = np.empty(0, np.int64)
        if self._layout is not None:
            rows = self._layout.rows_to[position]
            arrays = region.arrays(len(rows), self._widths)
            for array, source in zip(arrays, self._sources, strict=True):
                _take(source, rows, into=array)
            self._mask(self._layout, position, arrays)
        self._publish(region, len(rows), call, position, self._topology.me)

    def _mask(self, layout: Layout, position: int, arrays: Sequence[Bytes]) -> None:
        """Makes ids -1 (all bits set) where another replica was chosen."""
        if layout.targets is None or layout.replicated is None:
            return
        rows = layout.rows_to[position]
        other = layout.replicated[rows] & (layout.targets[rows] != position)
        _as_items(arrays[IDS_AT], other.shape)[other] = 0xFF

    def _publish(self, region: Region, num_rows: int, call: bytes, position: int, source: int) -> None:
        region.describe(num_rows, call)
        self.member.session.page.barrier()
        self.member.buffers.publish_recv(position, self.sequence, source, self.member.flag(self.sequence))

    # Receiving -------------------------------------------------------------------------------------------------

    def _rail_here(self, source: int) -> int:
        return self._topology.rail(source, self._topology.slot)

    def _take_in(self, source: int) -> bool:
        """Whether a message came on this rank's rail; if so it is passed on."""
        message = self.member.take(_DISPATCH, self.sequence, source)
        if message is not None:
            self.passed_on[source] = self._pass_on(source, message)
        return message is not None

    def _pass_on(self, source: int, message: Message) -> _PassedOn:
        """Puts a remote source's rows into the neighbours' regions, once per (row, rank)."""
        passed = _unpack(message)
        call = message.header.call
        has_ids = passed.codes is not None and Call.FromString(call).method == "dispatch"
        widths = [part.shape[1] for part in passed.parts]
        room = self.member.buffers.layout.region_bytes
        fits = payload_bytes(passed.num_rows, widths) <= room and len(call) <= MAX_CALL_BYTES
        for index, position in enumerate(self._topology.local):
            rows = passed.rows_of[position] = relay_rows(passed.codes, passed.num_rows, index)
            if position == self._topology.me or not fits:
                continue
            region = self.member.buffers.recv(position, self.sequence, source)
            arrays = region.arrays(len(rows), widths)
            for array, part in zip(arrays, passed.parts, strict=True):
                _take(part, rows, into=array)
            if has_ids:
                arrays[IDS_AT][:] = _relayed_ids(passed, rows, index)
            self._publish(region, len(rows), call, position, source)
        if not fits:
            raise InvalidRequest(f"rank {message.header.source} sent more rows than a buffer of {room} bytes holds")
        return passed

    def _calls(self) -> dict[int, Call]:
        """Every member's call by global rank; those that are the same to the byte are decoded once."""
        known = {self._encoded: self._call}
        calls: dict[int, Call] = {}
        for position, rank in enumerate(self._topology.ranks):
            encoded = self._call_of(position)
            if encoded not in known:
                known[encoded] = Call.FromString(encoded)
            calls[rank] = known[encoded]
        return calls

    def _call_of(self, position: int) -> bytes:
        if position == self._topology.me:
            return self._encoded
        if position in self.passed_on:
            return self.passed_on[position].message.header.call
        return self._arrived[position].call

    def _num_rows_from(self, position: int) -> int:
        if position == self._topology.me:
            return len(self._layout.rows_to[position]) if self._layout is not None else 0
        if position in self._arrived:
            return self._arrived[position].num_rows
        return len(self.passed_on[position].rows_of[self._topology.me])

    def _fill(self, position: int, arrays: Sequence[Bytes]) -> None:
        """Writes the rows of one source into `arrays`, ``[n, width]`` for every tensor."""
        if position == self._topology.me:
            for array, rows in zip(arrays, self._kept or self._own_rows(), strict=True):
                array[:] = rows
        elif position in self._arrived:
            for array, rows in zip(arrays, self._arrived[position].arrays(len(arrays[0]), self._widths), strict=True):
                array[:] = rows
        else:
            passed = self.passed_on[position]
            self._fill_from(passed, passed.rows_of[self._topology.me], arrays)

    def _fill_from(self, passed: _PassedOn, rows: Ints, arrays: Sequence[Bytes]) -> None:
        for array, part in zip(arrays, passed.parts, strict=True):
            _take(part, rows, into=array)
        if passed.codes is not None and self._call.method == "dispatch":
            arrays[IDS_AT][:] = _relayed_ids(passed, rows, self._topology.local.index(self._topology.me))

    def _own_rows(self) -> list[Bytes]:
        assert self._layout is not None
        arrays = [_take(source, self._layout.rows_to[self._topology.me]) for source in self._sources]
        if self._layout.replicated is not None:
            arrays[IDS_AT] = arrays[IDS_AT].copy()
            self._mask(self._layout, self._topology.me, arrays)
        return arrays


def _take(source: Bytes, rows: Ints, into: Bytes | None = None) -> Bytes:
    """The rows ``[n, width]`` of `source`, itself where that is all of them; or copied `into` an array."""
    if into is not None:
        if len(rows) == len(source):
            into[:] = source
        elif into.size:
            np.take(source, rows, axis=0, out=into, mode="clip")
        return into
    return source if len(rows) == len(source) else source.take(rows, axis=0)


def _flat(array: Bytes) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).data


def _as_items(array: Bytes, shape: tuple[int, ...]) -> Bytes:
    """``[n, k x item]`` bytes as ``[n, k, item]``."""
    return array.reshape(*shape, -1) if array.size else array.reshape(*shape, 0)


def _relayed_ids(passed: _PassedOn, rows: Ints, member: int) -> Bytes:
    """The ids of the rows that go to the node's member with index `member`, as bytes ``[n, width]``."""
    part = passed.parts[IDS_AT]
    num_topk = passed.message.header.tensors[IDS_AT].shape[-1]
    item = np.dtype(np.int64 if part.shape[1] == 8 * num_topk else np.int32)
    ids = np.ascontiguousarray(part).view(item) if part.size else np.empty((passed.num_rows, num_topk), item)
    chosen = np.ascontiguousarray(relay_ids(ids, passed.codes, rows, member))
    return chosen.view(np.uint8) if chosen.size else np.empty((len(rows), part.shape[1]), np.uint8)


def _unpack(message: Message) -> _PassedOn:
    """A remote source's rows: an array ``[n, width]`` for every tensor, and the target codes.

    Raises:
        InvalidRequest: the tensors do not belong together.
    """
    metas = list(message.header.tensors)
    num_rows = metas[0].shape[0] if metas and metas[0].shape else 0
    arrays: list[Bytes] = []
    for meta, data in zip(metas, message.tensors, strict=True):
        if not meta.shape or meta.shape[0] != num_rows:
            raise InvalidRequest(f"rank {message.header.source} sent tensors of different row counts")
        width = len(data) // num_rows if num_rows else 0
        arrays.append(np.frombuffer(data, np.uint8).reshape(num_rows, width))
    codes = arrays.pop() if message.header.with_targets and arrays else None
    return _PassedOn(message, arrays, codes, num_rows, {})
