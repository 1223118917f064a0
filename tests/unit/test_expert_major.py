"""Rows expert by expert, against loops; on the GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import epmesh
from epmesh.errors import InvalidRequest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_EXPERTS, HIDDEN = 7, 16
EXPERTS = [5, 1, 2]


def rows(num_rows: int, topk: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    source = torch.Generator().manual_seed(num_rows + topk)
    hidden = (torch.randn(num_rows, HIDDEN, generator=source) * 8).to(dtype)
    ids = torch.randint(-1, NUM_EXPERTS, (num_rows, topk), generator=source)
    return tuple(each.to(DEVICE) for each in (hidden, torch.rand(num_rows, topk, generator=source), ids))


def grouped(given: tuple[torch.Tensor, ...], alignment: int = 1, experts: Any = EXPERTS) -> epmesh.ExpertMajor:
    return epmesh.group_by_expert(*given, experts=experts, num_experts=NUM_EXPERTS, expert_alignment=alignment)


@pytest.mark.parametrize("alignment", [1, 4, 128])
@pytest.mark.parametrize(("num_rows", "topk"), [(0, 2), (1, 1), (13, 3), (40, 8)])
def test_groups_hold_each_experts_rows_in_order_and_are_padded_with_zeros(
    num_rows: int, topk: int, alignment: int
) -> None:
    hidden, weights, ids = given = rows(num_rows, topk)
    found = grouped(given, alignment)
    assert int(found.offsets[-1]) <= len(found.hidden_states)
    assert not found.hidden_states[int(found.offsets[-1]) :].any()
    for group, expert in enumerate(EXPERTS):
        first, end = found.offsets[group : group + 2].tolist()
        wanted = hidden[(ids == expert).nonzero()[:, 0]]
        assert (end - first) % alignment == 0
        assert 0 <= end - first - len(wanted) < alignment
        assert found.counts[group] == len(wanted)
        assert torch.equal(found.hidden_states[first : first + len(wanted)], wanted)
        assert not found.hidden_states[first + len(wanted) : end].any()
    assert found.offsets.dtype == torch.int32
    assert found.topk_weights is weights


@pytest.mark.parametrize("apply_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_come_back_to_their_rows_weighted_or_not(dtype: torch.dtype, apply_weights: bool) -> None:
    hidden, weights, ids = given = rows(21, 4, dtype)
    found = grouped(given, 8)
    results = torch.full_like(found.hidden_states, float("nan"))  # what is padding must not count
    total = torch.zeros(21, HIDDEN, device=DEVICE)
    for group, expert in enumerate(EXPERTS):
        first = int(found.offsets[group])
        mine = slice(first, first + int(found.counts[group]))
        results[mine] = found.hidden_states[mine] * (expert + 1)
    for k in range(4):
        held = torch.where(torch.isin(ids[:, k], torch.tensor(EXPERTS, device=DEVICE)), ids[:, k] + 1, 0)
        weight = weights[:, k : k + 1] if apply_weights else 1.0
        total += torch.where((held > 0)[:, None], (hidden * held[:, None]).to(dtype).float() * weight, 0.0)
    assert torch.equal(found.to_rows(results, apply_weights=apply_weights), total.to(dtype))
    output = torch.empty(21, HIDDEN, dtype=dtype, device=DEVICE)
    assert found.to_rows(results, apply_weights=apply_weights, output=output) is output
    assert torch.equal(output, total.to(dtype))


def test_every_place_is_used_once_and_fp8_rows_and_expert_tensors_are_taken() -> None:
    hidden, weights, ids = rows(17, 3)
    narrow = hidden.to(torch.float8_e4m3fn)
    found = grouped((narrow, weights, ids), 4, torch.tensor(EXPERTS, device=DEVICE))
    used = found.places[found.places >= 0]
    assert len(used.unique()) == len(used) == int(found.counts.sum())
    again = found.hidden_states.float()[found.places.clamp(min=0)]
    assert torch.equal(again[found.places >= 0], narrow.float()[(found.places >= 0).nonzero()[:, 0]])


def test_what_cannot_be_grouped_is_refused_with_the_value() -> None:
    hidden, weights, ids = given = rows(3, 2)
    with pytest.raises(InvalidRequest, match="expert_alignment is 0"):
        grouped(given, 0)
    with pytest.raises(InvalidRequest, match=r"experts is \[1, 1\]"):
        grouped(given, 1, [1, 1])
    with pytest.raises(InvalidRequest, match="0 to 6"):
        grouped(given, 1, [7])
    with pytest.raises(InvalidRequest, match="as many rows"):
        grouped((hidden[:2], weights, ids))
    with pytest.raises(InvalidRequest, match="topk_weights is"):
        grouped((hidden, weights[:, :1], ids))
    with pytest.raises(InvalidRequest, match="int32 or int64"):
        grouped((hidden, weights, ids.float()))
    with pytest.raises(InvalidRequest, match="as torch tensors"):
        epmesh.group_by_expert([1], weights, ids, experts=EXPERTS, num_experts=NUM_EXPERTS)
    found = grouped(given)
    with pytest.raises(InvalidRequest, match="results are"):
        found.to_rows(hidden[:1])
    with pytest.raises(InvalidRequest, match="output is"):
        found.to_rows(found.hidden_states, output=hidden[:1])
