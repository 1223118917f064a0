"""The GPU benchmark, as far as it needs no GPU: its inputs, what it counts, and its chart."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch

from benchmarks.gpu_chart import chart
from benchmarks.gpu_exchange import GpuBenchPlan, _check_sums, _rows_away
from epmesh.errors import InvalidRequest

CPU = torch.device("cpu")


@pytest.mark.parametrize("routing", ["uniform", "zipf", "node-limited"])
def test_every_row_wants_distinct_experts(routing: str) -> None:
    plan = GpuBenchPlan(hidden=16, routing=routing)
    _, _, ids = plan.inputs(64, 0, CPU)
    assert ids.shape == (64, plan.topk)
    assert all(len(set(row)) == plan.topk for row in ids.tolist())
    assert 0 <= int(ids.min()) <= int(ids.max()) < plan.experts


def test_zipf_wants_the_first_experts_most_and_node_limited_few_blocks() -> None:
    _, _, ids = GpuBenchPlan(hidden=16, routing="zipf").inputs(512, 0, CPU)
    counts = torch.bincount(ids.flatten(), minlength=256)
    assert counts[:16].sum() > 2 * counts[-128:].sum()
    _, _, ids = GpuBenchPlan(hidden=16, routing="node-limited").inputs(512, 0, CPU)
    assert max(len(set(row)) for row in (ids // 32).tolist()) <= 4


def test_a_ranks_own_rows_do_not_count_as_moved() -> None:
    plan = GpuBenchPlan(hidden=16, topk=2, experts=4)
    ids = torch.tensor([[0, 1], [0, 2], [2, 3]])
    assert _rows_away(ids, plan, 1, 0) == 0
    assert [_rows_away(ids, plan, 2, rank) for rank in range(2)] == [2, 2]


def test_wrong_sums_are_not_timed() -> None:
    plan = GpuBenchPlan(hidden=16, topk=2, experts=4)
    rows, ids = torch.randn(3, 16).bfloat16(), torch.tensor([[0, 1], [0, 2], [2, 3]])
    right = rows * torch.tensor([1, 2, 1]).bfloat16()[:, None]
    _check_sums(right, rows, ids, plan, 2)
    for exact in (True, False):
        with pytest.raises(InvalidRequest, match="wrong"):
            _check_sums(rows, rows, ids, plan, 2, exact=exact)


def test_the_chart_has_a_line_for_every_mode() -> None:
    lines = {"a <b>": [(1, 9.0), (4096, 160.0)], "c": [(1, 30.0)]}
    root = ET.fromstring(chart("title & more", {"dispatch": lines, "combine": lines}))
    assert len(root.findall(".//{*}polyline")) == 4
