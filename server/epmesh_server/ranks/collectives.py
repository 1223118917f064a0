"""Collectives of a group: device group, then links, then device group.

Before any device-group call every member learns what all others called (`Exchange.round`), so that a mismatch is a
typed error on all instead of a hang. Between nodes, members exchange along rails, or lane by lane: lane i is the i-th
member of every node. Sums over nodes are formed in slot order, in the accumulator's precision, and rounded.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch

from epmesh.errors import InvalidRequest
from epmesh.frames import Message
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.buffers import Bytes
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.device_group import DeviceGroup, GlooDeviceGroup
from epmesh_server.ranks.exchange import Exchange, Guard
from epmesh_server.ranks.store import NodeStore
from epmesh_server.ranks.tensors import accumulator, as_bytes, dtype_name, from_bytes, meta_of

_COLLECTIVE = frame_pb2.FRAME_KIND_COLLECTIVE
_T = TypeVar("_T")
_K = TypeVar("_K", bound=Hashable)


class Collectives:
    """Runs the collectives of one group on one rank. Arguments were checked by the communicator."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._member, self._topology = exchange.member, exchange.member.topology
        self._group: DeviceGroup | None = None
        self._generation = 0
        self._sequence = 0
        self._steps = itertools.count()

    # The calls -------------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums contiguous `tensor` in place."""
        call = describe("all_reduce", _shape(tensor))
        return self._numbered(call, lambda calls: self._all_reduce(tensor, calls))

    def all_gather_blocks(
        self, method: str, tensors: Sequence[torch.Tensor], arguments: str
    ) -> list[list[torch.Tensor]]:
        """Every member's tensors, by member; the same dtypes and dimensions, but lengths may differ."""
        call = describe(method, arguments, [length for tensor in tensors for length in tensor.shape])
        return self._numbered(call, lambda calls: self._all_gather_blocks(tensors, calls))

    def reduce_scatter(self, method: str, rows: torch.Tensor, sizes: Sequence[int], arguments: str) -> torch.Tensor:
        """This member's slice ``[sizes[me], ...]`` of the sum of ``rows`` ``[sum(sizes), ...]``."""
        call = describe(method, arguments)
        return self._numbered(call, lambda calls: self._reduce_scatter(rows, sizes, calls))

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Overwrites contiguous `tensor` with that of position `src`."""
        call = describe("broadcast", f"{_shape(tensor)} src={src}")
        return self._numbered(call, lambda calls: self._broadcast(tensor, src, calls))

    def gather(self, tensor: torch.Tensor, dst: int, arguments: str) -> list[torch.Tensor] | None:
        """Every member's tensor on position `dst`; `None` elsewhere."""
        call = describe("gather", arguments)
        return self._numbered(call, lambda calls: self._gather(tensor, dst, calls))

    def agree(self, call: Call, timeout_s: float | None = None) -> tuple[int, dict[int, Call]]:
        """Only learns every member's call: the number, and the calls by global rank."""
        result: dict[int, Call] = self._numbered(call, lambda calls: calls, timeout_s)
        return self._sequence, result

    def process_group(self) -> object:
        """The torch process group of the local members; formed when first asked for, by all of them."""
        return self._device_group().process_group

    def close(self) -> None:
        """Ends the device group; idempotent."""
        self._end_gloo()

    # What they do once all members' calls agree -----------------------------------------------------------------

    def _all_reduce(self, tensor: torch.Tensor, calls: Mapping[int, Call]) -> torch.Tensor:
        return tensor.copy_(self._sum(tensor))

    def _all_gather_blocks(
        self, tensors: Sequence[torch.Tensor], calls: Mapping[int, Call]
    ) -> list[list[torch.Tensor]]:
        shapes = self._shapes(tensors, calls)
        sizes = [sum(block_sizes(shape, tensors)) for shape in shapes]
        blocks = self._gather_bytes(np.concatenate([as_bytes(tensor) for tensor in tensors]), sizes)
        return [cut_block(block, shape, tensors) for block, shape in zip(blocks, shapes, strict=True)]

    def _reduce_scatter(self, rows: torch.Tensor, sizes: Sequence[int], calls: Mapping[int, Call]) -> torch.Tensor:
        total = self._local_sum(rows)
        bounds = [0, *itertools.accumulate(sizes)]
        step = next(self._steps)
        for position in self._topology.relayed:
            self._post(position, total[bounds[position] : bounds[position + 1]], step)
        mine = total[bounds[self._topology.me] : bounds[self._topology.me + 1]]
        rails = {slot: self._topology.rail(self._topology.me, slot) for slot in self._topology.remote_slots}
        others = self._await(rails, step)
        parts = {slot: self._tensor(message, mine) for slot, message in others.items()}
        return sum_parts({**parts, self._topology.slot: mine})

    def _broadcast(self, tensor: torch.Tensor, src: int, calls: Mapping[int, Call]) -> torch.Tensor:
        topology = self._topology
        home = topology.slots[src]
        step = next(self._steps)
        if topology.me == src:
            for slot in topology.remote_slots:
                self._post(topology.rail(src, slot), tensor, step)
        entry = src if topology.slot == home else topology.rail(src, topology.slot)
        if topology.me == entry != src:
            message = self._await({home: src}, step)[home]
            tensor.copy_(self._tensor(message, tensor))
        if len(topology.local) > 1 and tensor.numel():
            flat = torch.from_numpy(as_bytes(tensor))
            self._device_group().broadcast(flat, topology.local.index(entry))
        return tensor

    def _gather(self, tensor: torch.Tensor, dst: int, calls: Mapping[int, Call]) -> list[torch.Tensor] | None:
        topology, step = self._topology, next(self._steps)
        if topology.me != dst:
            self._post(dst, tensor, step)
            return None
        others = self._await({p: p for p in range(topology.world_size) if p != dst}, step)
        return [tensor if p == dst else self._tensor(others[p], tensor) for p in range(topology.world_size)]

    def _shapes(self, tensors: Sequence[torch.Tensor], calls: Mapping[int, Call]) -> list[list[tuple[int, ...]]]:
        """Every member's shapes of `tensors`, by member."""
        return [split_shapes(calls[rank].numbers, tensors) for rank in self._topology.ranks]

    def _give_up(self) -> None:
        """Ends the device group after a failed call: members cannot know who took part in what."""
        self._end_gloo()

    def _end_gloo(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    # Inside the node -------------------------------------------------------------------------------------------

    def _numbered(self, call: Call, run: Callable[[dict[int, Call]], _T], timeout_s: float | None = None) -> _T:
        """Compares calls, then runs; what goes wrong ends the number on all members."""
        self._sequence, calls = self._exchange.round(call, timeout_s)
        self._steps = itertools.count()
        with Guard(self._member, self._sequence, call.method):
            try:
                result = run(calls)
            except BaseException:
                self._give_up()
                raise
        self._member.complete(self._sequence)
        return result

    def _device_group(self) -> DeviceGroup:
        """The group of the local members, formed anew after a call that was given up: all members know of it."""
        if self._group is None or self._generation != self._member.abandoned:
            self._end_gloo()
            member, local = self._member, self._topology.local
            self._generation = member.abandoned
            prefix = f"{member.membership_epoch}/group/{member.group_id}/{self._generation}/{self._topology.slot}/"
            store = NodeStore(member.session.channel, prefix, member.timeout_s, self._check)
            self._group = GlooDeviceGroup(
                store, local.index(self._topology.me), len(local), member.timeout_s, self._check
            )
        return self._group

    def _check(self) -> None:
        self._member.poll_links()
        self._member.check(self._sequence)

    def _local_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The node's sum, in the tensor's dtype; a new tensor."""
        wide = tensor.to(accumulator(tensor.dtype, "the sum"), copy=True).contiguous()
        if len(self._topology.local) > 1 and wide.numel():
            self._device_group().all_reduce(wide)
        return wide.to(tensor.dtype)

    def _share(self, block: Bytes, local_index: int) -> None:
        """One local member's bytes to all others on the node."""
        if len(self._topology.local) > 1 and block.size:
            self._device_group().broadcast(torch.from_numpy(block), local_index)

    # Between nodes ---------------------------------------------------------------------------------------------

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all members, shaped like `tensor`; each lane sums a part over the nodes."""
        total = self._local_sum(tensor)
        topology, step = self._topology, next(self._steps)
        if not topology.remote_slots:
            return total
        flat = total.reshape(-1)
        lanes = min(map(len, topology.members.values()))
        bounds = [flat.numel() * lane // lanes for lane in range(lanes + 1)]
        lane = topology.local.index(topology.me)
        if lane < lanes:
            part = flat[bounds[lane] : bounds[lane + 1]]
            peers = {slot: topology.members[slot][lane] for slot in topology.remote_slots}
            for peer in peers.values():
                self._post(peer, part, step)
            others = {slot: self._tensor(message, part) for slot, message in self._await(peers, step).items()}
            part.copy_(sum_parts({**others, topology.slot: part}))
        for index in range(lanes):
            self._share(as_bytes(flat[bounds[index] : bounds[index + 1]]), index)
        return total

    def _gather_bytes(self, own: Bytes, sizes: Sequence[int]) -> list[Bytes]:
        """Every member's bytes, by member, whose numbers are known to all."""
        topology, step = self._topology, next(self._steps)
        for slot in topology.remote_slots:
            self._post(topology.rail(topology.me, slot), torch.from_numpy(own), step)
        blocks = [np.empty(size, np.uint8) for size in sizes]
        blocks[topology.me][:] = own
        for position, message in self._await({p: p for p in topology.relayed}, step).items():
            if len(message.tensors) != 1 or len(message.tensors[0]) != sizes[position]:
                raise InvalidRequest(f"rank {message.header.source} sent another size than it had announced")
            blocks[position][:] = np.frombuffer(message.tensors[0], np.uint8)
        for index, entry in enumerate(topology.local):
            carried = [p for p in range(topology.world_size) if entry in (p, self._rail_here(p))]
            joined = np.concatenate([blocks[p] for p in carried])
            self._share(joined, index)
            ends = list(itertools.accumulate(sizes[p] for p in carried))
            for position, end in zip(carried, ends, strict=True):
                blocks[position] = joined[end - sizes[position] : end]
        return blocks

    def _rail_here(self, position: int) -> int:
        """Where a member's bytes come to this node: itself, or its rail."""
        topology = self._topology
        return position if topology.slots[position] == topology.slot else topology.rail(position, topology.slot)

    def _post(self, position: int, tensor: torch.Tensor, step: int) -> None:
        header = self._member.header(_COLLECTIVE, self._sequence, step)
        header.tensors.append(meta_of(tensor))
        self._member.send(position, header, [as_bytes(tensor).copy().data])  # the caller may change its tensor

    def _await(self, peers: Mapping[_K, int], step: int) -> dict[_K, Message]:
        """One message from each of `peers` (positions), by key."""
        pending, arrived = dict(peers), {}

        def ready() -> bool:
            for key, position in list(pending.items()):
                message = self._member.take(_COLLECTIVE, self._sequence, position, step)
                if message is not None:
                    arrived[key] = message
                    del pending[key]
            return not pending

        deadline = time.monotonic() + self._member.timeout_s
        self._member.wait_until(ready, self._sequence, deadline, pending.values)
        return arrived

    def _tensor(self, message: Message, like: torch.Tensor) -> torch.Tensor:
        metas = message.header.tensors
        if len(metas) != 1 or list(metas[0].shape) != list(like.shape) or metas[0].dtype != dtype_name(like.dtype):
            raise InvalidRequest(f"rank {message.header.source} sent another tensor than {_shape(like)}")
        return from_bytes(message.tensors[0], like.dtype, like.shape)


def _shape(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def sum_parts(parts: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Adds node sums in slot order and rounds once."""
    first, *rest = (parts[slot] for slot in sorted(parts))
    if not rest:
        return first
    total = first.to(accumulator(first.dtype, "the sum"), copy=True)
    for part in rest:
        total += part
    return total.to(first.dtype)


def split_shapes(numbers: Sequence[int], tensors: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """The shapes of one member's tensors, from the numbers of its call."""
    if len(numbers) != sum(tensor.dim() for tensor in tensors):
        raise InvalidRequest(f"a member announced {len(numbers)} lengths for {len(tensors)} tensors")
    rest = iter(numbers)
    return [tuple(itertools.islice(rest, tensor.dim())) for tensor in tensors]


def block_sizes(shapes: Sequence[tuple[int, ...]], tensors: Sequence[torch.Tensor]) -> list[int]:
    """Bytes of one member's tensors, by their shapes."""
    return [math.prod(shape) * tensor.element_size() for shape, tensor in zip(shapes, tensors, strict=True)]


def cut_block(block: Bytes, shapes: Sequence[tuple[int, ...]], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One member's bytes as its tensors."""
    ends = itertools.accumulate(block_sizes(shapes, tensors))
    pieces = []
    for shape, tensor, size, end in zip(shapes, tensors, block_sizes(shapes, tensors), ends, strict=True):
        pieces.append(from_bytes(block[end - size : end].copy(), tensor.dtype, shape))
    return pieces
