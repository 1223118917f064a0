"""What every method of the contract must give, written plainly: all ranks' inputs in, all ranks' outputs out.

Lists are indexed by position in the group. Nothing here is shared with the code under test, and nothing is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from epmesh.placement import Placement

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The members of a group as global ranks, and what of the mesh matters to them."""

    ranks: tuple[int, ...]
    stride: int
    tensor_parallel_size: int = 1

    def slot(self, rank: int) -> int:
        """The node of a global rank."""
        return rank // self.stride

    def tensor_parallel_index(self, rank: int) -> int:
        """A global rank's place in its block of tensor-parallel ranks."""
        return rank % self.stride % self.tensor_parallel_size


@dataclass
class Rows:
    """One rank's input to a dispatch."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    extra_tensors: list[torch.Tensor] | None = None


@dataclass
class Received:
    """What one rank gets from a dispatch, and where each row came from: (position of its source, row there)."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    extra_tensors: list[torch.Tensor] | None
    origins: list[tuple[int, int]]


# Collectives ----------------------------------------------------------------------------------------------------


def all_reduce(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    total = wide_sum(inputs)
    return [total.clone() for _ in inputs]


def all_gather(inputs: list[torch.Tensor], dim: int = -1) -> list[torch.Tensor]:
    return [_concatenate(inputs, dim) for _ in inputs]


def all_gatherv(inputs: list[torch.Tensor], dim: int = 0) -> list[torch.Tensor]:
    return all_gather(inputs, dim)


def reduce_scatter(inputs: list[torch.Tensor], dim: int = -1) -> list[torch.Tensor]:
    return reduce_scatterv(inputs, dim, [inputs[0].shape[dim] // len(inputs)] * len(inputs))


def reduce_scatterv(inputs: list[torch.Tensor], dim: int, sizes: list[int]) -> list[torch.Tensor]:
    total = wide_sum(inputs)
    starts = [sum(sizes[:position]) for position in range(len(sizes))]
    return [total.narrow(dim, start, size).clone() for start, size in zip(starts, sizes, strict=True)]


def gather(inputs: list[torch.Tensor], dst: int = 0, dim: int = -1) -> list[torch.Tensor | None]:
    whole = _concatenate(inputs, dim)
    return [whole if position == dst else None for position in range(len(inputs))]


def broadcast(inputs: list[torch.Tensor], src: int = 0) -> list[torch.Tensor]:
    return [inputs[src].clone() for _ in inputs]


def send_to_next(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each rank's ``recv`` where each sent to the next, which is the default of both."""
    return [inputs[position - 1] for position in range(len(inputs))]


def wide_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, formed where nothing is lost on the way, in the tensors' dtype."""
    dtype = tensors[0].dtype
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    return torch.stack([tensor.to(wide) for tensor in tensors]).sum(0).to(dtype)


def _concatenate(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """`torch.cat`, by bytes: it does not know every dtype."""
    width = tensors[0].dtype.itemsize
    moved = [as_bytes(tensor).movedim(dim if dim >= 0 else dim - 1, 0) for tensor in tensors]
    whole = torch.cat(moved).movedim(0, dim if dim >= 0 else dim - 1).contiguous()
    assert whole.shape[-1] == width
    return whole.view(tensors[0].dtype).squeeze(-1)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., itemsize]`` uint8: one more dimension, the bytes of an element."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)


# The exchange ---------------------------------------------------------------------------------------------------


def dispatch(
    group: Group, rows: list[Rows], placement: Placement | None, is_sequence_parallel: bool = True
) -> list[Received]:
    """Each row to the holders of its experts, once; every expert the group has must have one holder in it."""
    received = []
    for rank in group.ranks:
        origins = [
            (position, row)
            for position, source in enumerate(group.ranks)
            for row in range(len(rows[position].topk_ids))
            if rank in destinations(group, source, rows[position].topk_ids[row], placement, is_sequence_parallel)
        ]
        received.append(pick(rows, origins))
    return received


def destinations(
    group: Group, source: int, ids: torch.Tensor, placement: Placement | None, is_sequence_parallel: bool
) -> set[int]:
    """Global ranks one row of `source` goes to."""
    eligible = eligible_ranks(group, source, is_sequence_parallel)
    if placement is None:
        return set(eligible)
    wanted = {int(expert) for expert in ids if expert >= 0}
    return {rank for rank in eligible if wanted.intersection(placement.experts_of.get(rank, ()))}


def eligible_ranks(group: Group, source: int, is_sequence_parallel: bool) -> list[int]:
    """Global ranks that `source` may send to."""
    index = group.tensor_parallel_index
    return [rank for rank in group.ranks if is_sequence_parallel or index(rank) == index(source)]


def pick(rows: list[Rows], origins: list[tuple[int, int]]) -> Received:
    """The rows named by `origins`, in that order."""
    first = rows[0]
    extras = None
    if first.extra_tensors is not None:
        extras = [
            _pick([source.extra_tensors[index] for source in rows if source.extra_tensors is not None], origins)
            for index in range(len(first.extra_tensors))
        ]
    return Received(
        _pick([source.hidden_states for source in rows], origins),
        _pick([source.topk_weights for source in rows], origins),
        _pick([source.topk_ids for source in rows], origins),
        extras,
        origins,
    )


def _pick(tensors: list[torch.Tensor], origins: list[tuple[int, int]]) -> torch.Tensor:
    if not origins:
        return tensors[0].new_empty((0, *tensors[0].shape[1:]))
    return (
        torch.stack([as_bytes(tensors[position][row]) for position, row in origins]).view(tensors[0].dtype).squeeze(-1)
    )


def combine(
    group: Group, num_tokens: list[int], origins: list[list[tuple[int, int]]], results: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Every token's results summed: on each node in rank order, rounded; then over the nodes in slot order, rounded.

    Args:
        num_tokens: rows of each source.
        origins: for each rank, where its rows came from.
        results: for each rank ``[len(origins), hidden]``.
    """
    slots = sorted({group.slot(rank) for rank in group.ranks})
    dtype, width = results[0].dtype, results[0].shape[1]
    outputs = []
    for source, tokens in enumerate(num_tokens):
        total = torch.zeros(tokens, width, dtype=accumulator(dtype))
        for slot in slots:
            members = [position for position, rank in enumerate(group.ranks) if group.slot(rank) == slot]
            node_sum = torch.zeros_like(total)
            for member in members:
                of_source = [number for number, (origin, _) in enumerate(origins[member]) if origin == source]
                rows = [origins[member][number][1] for number in of_source]  # each at most once
                node_sum[rows] += results[member][of_source].to(node_sum.dtype)
            total += node_sum.to(dtype).to(total.dtype)
        outputs.append(total.to(dtype))
    return outputs


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of `dtype` are formed."""
    if dtype == torch.float64:
        return torch.float64
    return torch.float32 if dtype.is_floating_point else torch.int64
