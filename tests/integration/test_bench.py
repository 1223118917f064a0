"""A small run of the benchmark: both ways give the same sums, and bytes are what the promise says."""

from __future__ import annotations

import json

import pytest

from benchmarks import faults
from epmesh_server.cli.bench import BenchPlan, run_bench
from epmesh_server.cli.bench_ways import TRANSPORTS, bench_attach, bench_routers


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


SMALL = BenchPlan(nodes=2, ranks=1, tokens=(0, 5), hidden=16, topk=2, experts=8, warmups=1, runs=2)


def test_routers_are_timed_beside_a_bare_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_routers(SMALL, as_json=True)
    assert [row["tokens"] for row in rows] == [0, 5]
    for row in rows:
        assert row["zmq / bare"] == pytest.approx(row["forward by zmq"] / row["bare round trip"])
        assert row["forward by grpc"] > 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows


def test_attached_ranks_are_timed_beside_joined_ones(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_attach(SMALL)
    for row in rows:
        assert row["shm / join"] == pytest.approx(row["shm"] / row["join"])
        assert all(row[name] > 0 for name in TRANSPORTS)
    assert "shm / join" in capsys.readouterr().out


def test_faults_are_met_within_four_times_what_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    figures = faults.run(faults.Plan(nodes=2, ranks=2, tokens=4, trials=1), as_json=True)
    assert len(figures) == 10
    for figure in figures:
        assert len(figure.measured_s) == 1
        assert 0 < figure.measured_s[0] < 4 * figure.promised_s, figure.name
    printed = json.loads(capsys.readouterr().out)
    assert printed["rank killed: PeerLost"] == figures[0].measured_s
