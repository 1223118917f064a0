"""Collectives of a group of which nothing is known but its process group.

Each is a round, in which the members' calls are compared, and what moves the bytes. Sums are formed by whoever needs
them, in rank order and in the accumulator's precision, and rounded once: the same bits on all ranks and every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from epmesh_server.ranks.arguments import shape_text
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.collectives import block_sizes, cut_block, split_shapes, sum_parts
from epmesh_server.ranks.flat_exchange import FlatExchange
from epmesh_server.ranks.tensors import Bytes, as_bytes, from_bytes, row_bytes

_T = TypeVar("_T")
_LITTLE_BYTES = 64 << 10  # up to here one scatter more costs more than sending everything to everybody


class FlatCollectives:
    """Runs the collectives of one group on one rank. Arguments were checked by the communicator."""

    def __init__(self, exchange: FlatExchange) -> None:
        self._exchange = exchange
        self._member, self._topology = exchange.member, exchange.member.topology
        self._sequence = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums contiguous `tensor` in place; each member sums a part for all, or, of little, everything for itself."""
        world_size = self._topology.world_size
        bounds = [tensor.numel() * position // world_size for position in range(world_size + 1)]
        sizes = [(end - start) * tensor.element_size() for start, end in itertools.pairwise(bounds)]

        def run(_: dict[int, Call]) -> torch.Tensor:
            data = as_bytes(tensor)
            if data.size <= _LITTLE_BYTES:
                whole = _sum(self._share(data, [data.size] * world_size), tensor.dtype)
            else:
                whole = np.concatenate(self._share(self._sum(data, sizes, tensor.dtype), sizes))
            return tensor.copy_(from_bytes(whole, tensor.dtype, tensor.shape))

        return self._numbered(describe("all_reduce", shape_text(tensor)), run)

    def all_gather_blocks(
        self, method: str, tensors: Sequence[torch.Tensor], arguments: str
    ) -> list[list[torch.Tensor]]:
        """Every member's tensors, by member; the same dtypes and dimensions, but lengths may differ."""
        own = np.concatenate([as_bytes(tensor) for tensor in tensors])
        numbers = [length for tensor in tensors for length in tensor.shape]

        def run(calls: dict[int, Call]) -> list[list[torch.Tensor]]:
            shapes = [split_shapes(calls[rank].numbers, tensors) for rank in self._topology.ranks]
            blocks = self._share(own, [sum(block_sizes(shape, tensors)) for shape in shapes])
            return [cut_block(block, shape, tensors) for block, shape in zip(blocks, shapes, strict=True)]

        return self._numbered(describe(method, arguments, numbers), run)

    def reduce_scatter(self, method: str, rows: torch.Tensor, sizes: Sequence[int], arguments: str) -> torch.Tensor:
        """This member's slice ``[sizes[me], ...]`` of the sum of ``rows`` ``[sum(sizes), ...]``."""

        def run(_: dict[int, Call]) -> torch.Tensor:
            total = self._sum(as_bytes(rows), [size * row_bytes(rows) for size in sizes], rows.dtype)
            return from_bytes(total, rows.dtype, (sizes[self._topology.me], *rows.shape[1:]))

        return self._numbered(describe(method, arguments), run)

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Overwrites contiguous `tensor` with that of position `src`."""

        def run(_: dict[int, Call]) -> torch.Tensor:
            self._member.mail.broadcast(as_bytes(tensor), src)
            return tensor

        return self._numbered(describe("broadcast", f"{shape_text(tensor)} src={src}"), run)

    def gather(self, tensor: torch.Tensor, dst: int, arguments: str) -> list[torch.Tensor] | None:
        """Every member's tensor on position `dst`; `None` elsewhere."""
        data, world_size = as_bytes(tensor), self._topology.world_size
        sizes = [data.size if position == dst else 0 for position in range(world_size)]
        coming = [data.size if self._topology.me == dst else 0] * world_size

        def run(_: dict[int, Call]) -> list[torch.Tensor] | None:
            blocks = self._member.move(data, sizes, coming)
            if self._topology.me != dst:
                return None
            return [from_bytes(block, tensor.dtype, tensor.shape) for block in blocks]

        return self._numbered(describe("gather", arguments), run)

    def agree(self, call: Call, timeout_s: float | None = None) -> tuple[int, dict[int, Call]]:
        """Only learns every member's call: the number, and the calls by global rank."""
        result: dict[int, Call] = self._numbered(call, lambda calls: calls)
        return self._sequence, result

    def _numbered(self, call: Call, run: Callable[[dict[int, Call]], _T]) -> _T:
        """Compares calls, then runs, in its turn."""
        member = self._member
        sequence = self._sequence = member.begin()
        with member.guard(sequence):
            result = member.in_turn(lambda: run(member.round(sequence, call)[0]))
        member.complete(sequence)
        return result

    def _sum(self, data: Bytes, sizes: Sequence[int], dtype: torch.dtype) -> Bytes:
        """The sum of the segments that all members have for this one."""
        size = sizes[self._topology.me]
        return _sum(self._member.move(data, sizes, [size] * len(sizes)), dtype)

    def _share(self, own: Bytes, sizes: Sequence[int]) -> list[Bytes]:
        """Every member's bytes, by member, whose numbers are known to all."""
        return self._member.move(np.tile(own, len(sizes)), [own.size] * len(sizes), sizes)


def _sum(blocks: Sequence[Bytes], dtype: torch.dtype) -> Bytes:
    """The sum of equally long blocks, in their order."""
    parts = [from_bytes(block, dtype, (block.size // dtype.itemsize,)) for block in blocks]
    return as_bytes(sum_parts(dict(enumerate(parts))))
