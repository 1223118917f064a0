"""Dispatched rows in the order that grouped matrix products take them: expert by expert. torch, on the rows' device.

A dispatch gives a rank every row once, however many of its experts the row is for. Here a row stands once for each of
them, and `ExpertMajor.to_rows` adds up what the experts made of it. Nothing waits for the device unless sizes are asked
for, so on GPUs all of it can be captured in a graph.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from epmesh.errors import InvalidRequest


@dataclass(frozen=True)
class ExpertMajor:
    """Rows by expert.

    Attributes:
        hidden_states: ``[num_places, hidden]``: the rows for the first expert, then those for the second, and so on;
            each group is padded with zeros. Rows from ``offsets[-1]`` on belong to no group, and are zeros too.
        offsets: ``[num_local_experts + 1]`` int32: group e is ``hidden_states[offsets[e] : offsets[e + 1]]``.
        counts: ``[num_local_experts]`` int32: rows of each group that are no padding.
        places: ``[num_rows, num_topk]`` int64: where each row stands for each of its ids, -1: nowhere.
        topk_weights: ``[num_rows, num_topk]``, as dispatched.
    """

    hidden_states: Any
    offsets: Any
    counts: Any
    places: Any
    topk_weights: Any

    def to_rows(self, results: Any, *, apply_weights: bool = True, output: Any = None) -> Any:
        """Adds up each dispatched row's results, in the order of its ids, in float32 and rounded once.

        Args:
            results: ``[num_places, hidden]``, the experts' results where the rows stood; what stands in padding does
                not matter.
            apply_weights: multiplies each result by its weight; without, the experts have done so.
            output: ``[num_rows, hidden]`` in the results' dtype to write into, such as what
                `Communicator.allocate_combine_input` gives; `None`: a new tensor.

        Returns:
            ``[num_rows, hidden]`` for `Communicator.combine`; zeros in rows that none of the experts had.

        Raises:
            InvalidRequest: shapes or dtypes do not fit.
        """
        torch = _torch(results)
        num_places, (num_rows, num_topk) = len(self.hidden_states), self.places.shape
        if results.dim() != 2 or len(results) != num_places or not results.dtype.is_floating_point:
            raise InvalidRequest(
                f"results are {results.dtype} {list(results.shape)}; they must be floating point [{num_places}, hidden]"
            )
        wanted = (num_rows, results.shape[1])
        if output is not None and (tuple(output.shape) != wanted or output.dtype != results.dtype):
            raise InvalidRequest(
                f"output is {output.dtype} {list(output.shape)}; it must be {results.dtype} {list(wanted)}"
            )
        total = torch.zeros(wanted, dtype=torch.float32, device=results.device)
        for k in range(num_topk if num_places else 0):
            place = self.places[:, k : k + 1]
            part = results.index_select(0, place[:, 0].clamp(min=0)).float()
            if apply_weights:
                part = part * self.topk_weights[:, k : k + 1].float()
            total += torch.where(place >= 0, part, 0.0)
        return total.to(results.dtype) if output is None else output.copy_(total)


def group_by_expert(
    hidden_states: Any,
    topk_weights: Any,
    topk_ids: Any,
    *,
    experts: Any,
    num_experts: int,
    expert_alignment: int = 1,
) -> ExpertMajor:
    """Dispatched rows, expert by expert. Rows of an expert keep their order.

    Args:
        hidden_states: ``[num_rows, hidden]`` as a dispatch returned them, in exact or static mode.
        topk_weights: ``[num_rows, num_topk]``, likewise.
        topk_ids: ``[num_rows, num_topk]``, likewise; -1, and experts that are not among `experts`, count for nothing.
        experts: those of this rank, in the order of groups: numbers, or an int64 tensor of them on the rows' device,
            which is not checked. On a GPU numbers are copied there; while a graph is captured only a tensor will do.
        num_experts: of the layer.
        expert_alignment: every group's length is made a multiple of it.

    Returns:
        What was asked for, with room for every id to be one of this rank's: ``num_rows x num_topk`` places and what
        padding can need, so that sizes do not depend on the routing.

    Raises:
        InvalidRequest: shapes do not fit, an expert is out of range or named twice, or the alignment is no length.
    """
    torch = _torch(hidden_states, topk_weights, topk_ids)
    _check(hidden_states, topk_weights, topk_ids, expert_alignment)
    num_rows, num_topk = topk_ids.shape
    device, num_local, num_pairs = topk_ids.device, len(experts), num_rows * num_topk
    if not isinstance(experts, torch.Tensor):
        experts = torch.tensor(_checked(list(experts), num_experts), device=device)
    group_of = torch.full((num_experts + 1,), num_local, dtype=torch.int64, device=device)
    group_of.scatter_(0, experts, torch.arange(num_local, device=device))
    ids = topk_ids.reshape(-1).long()
    known = (ids >= 0) & (ids < num_experts)
    group = group_of[torch.where(known, ids, num_experts)]
    ordered, order = group.sort(stable=True)
    counts = torch.zeros(num_local + 1, dtype=torch.int64, device=device).scatter_add_(0, group, torch.ones_like(group))
    lengths = (counts[:-1] + expert_alignment - 1) // expert_alignment * expert_alignment
    offsets = torch.zeros(num_local + 1, dtype=torch.int64, device=device)
    offsets[1:] = lengths.cumsum(0)
    firsts = counts.cumsum(0) - counts
    place = offsets[ordered] + torch.arange(num_pairs, device=device) - firsts[ordered]
    num_places = num_pairs + min(num_local, num_pairs) * (expert_alignment - 1)
    place = torch.where(ordered < num_local, place, num_places)
    source = torch.full((num_places + 1,), num_rows, dtype=torch.int64, device=device)
    source.scatter_(0, place, order // max(1, num_topk))
    places = torch.empty_like(place).scatter_(0, order, torch.where(place < num_places, place, -1))
    return ExpertMajor(
        _rows_at(hidden_states, source[:num_places]),
        offsets.int(),
        counts[:-1].int(),
        places.view(num_rows, num_topk),
        topk_weights,
    )


def _rows_at(hidden_states: Any, source: Any) -> Any:
    """The rows numbered in `source`; zeros where there is no such row. As bytes: not every dtype can be selected."""
    torch, num_rows = sys.modules["torch"], len(hidden_states)
    data = hidden_states.contiguous().view(torch.uint8)
    if not num_rows:
        return hidden_states.new_zeros((len(source), hidden_states.shape[1]))
    rows = data.index_select(0, source.clamp(max=num_rows - 1))
    return rows.masked_fill_((source == num_rows).unsqueeze(1), 0).view(hidden_states.dtype)


def _torch(*tensors: Any) -> Any:
    torch = sys.modules.get("torch")
    for tensor in tensors:
        if torch is None or not isinstance(tensor, torch.Tensor):
            raise InvalidRequest(f"a {type(tensor).__name__}; rows are grouped as torch tensors")
    return torch


def _check(hidden_states: Any, topk_weights: Any, topk_ids: Any, alignment: int) -> None:
    if hidden_states.dim() != 2 or topk_ids.dim() != 2 or len(hidden_states) != len(topk_ids):
        raise InvalidRequest(
            f"hidden_states is {list(hidden_states.shape)} and topk_ids {list(topk_ids.shape)}; they must be matrices "
            f"of as many rows"
        )
    if topk_weights.shape != topk_ids.shape:
        raise InvalidRequest(f"topk_weights is {list(topk_weights.shape)} and topk_ids {list(topk_ids.shape)}")
    if topk_ids.dtype.is_floating_point or topk_ids.dtype.is_complex:
        raise InvalidRequest(f"topk_ids is {topk_ids.dtype}; it must be int32 or int64")
    if alignment < 1:
        raise InvalidRequest(f"expert_alignment is {alignment}; it must be 1 or more")


def _checked(experts: list[int], num_experts: int) -> list[int]:
    if not experts or len(set(experts)) != len(experts) or not all(0 <= each < num_experts for each in experts):
        raise InvalidRequest(f"experts is {experts}; they must be different, and 0 to {num_experts - 1}")
    return experts
