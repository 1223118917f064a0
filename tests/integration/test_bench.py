"""A small run of the benchmark: both ways give the same sums, and bytes are what the promise says."""

from __future__ import annotations

import json

import pytest

from epmesh_server.cli.bench import BenchPlan, run_bench


def test_a_run_checks_both_ways_against_each_other_and_stays_close_to_the_floor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = BenchPlan(nodes=2, ranks=2, tokens=(0, 128), hidden=256, topk=2, experts=8, warmups=1, runs=2)
    rows = run_bench(plan, as_json=True)
    assert [row.tokens for row in rows] == [0, 128]
    assert rows[0].floor_bytes == 0
    assert 1.0 < rows[1].sent_bytes / rows[1].floor_bytes <= 1.05
    assert all(row.ratio > 0 for row in rows)
    printed = json.loads(capsys.readouterr().out)
    assert printed["plan"]["hidden"] == 256
    assert len(printed["rows"]) == 2
