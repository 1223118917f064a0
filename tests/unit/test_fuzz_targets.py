"""Everything that reads bytes from outside answers any bytes with a typed refusal; `make fuzz` looks for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epmesh.errors import EpmeshError
from epmesh_server.ranks.serving_rows import RouterRows, parse_router_rows
from tests.fuzz import engine, targets
from tests.fuzz.engine import by_mutation, call, inputs
from tests.fuzz.targets import TARGETS, Target, pack, unpack

each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@each_target
def test_seeds_are_accepted(target: Target) -> None:
    for seed in target.seeds:
        target.run(seed)  # raises nothing at all


@each_target
def test_what_broke_a_target_once_does_so_no_more(target: Target) -> None:
    for data in inputs(target):
        call(target, data)


@each_target
def test_mutations_of_seeds_are_refused_by_name(target: Target) -> None:
    assert by_mutation(target, seconds=0.3, seed=1) > 0


@each_target
@settings(max_examples=50)
@given(data=st.one_of(st.binary(max_size=600), st.lists(st.binary(max_size=80), max_size=6).map(pack)))
def test_any_bytes_are_refused_by_name(target: Target, data: bytes) -> None:
    call(target, data)


@given(parts=st.lists(st.binary(max_size=40), max_size=5))
def test_parts_come_out_as_they_went_in(parts: list[bytes]) -> None:
    assert list(unpack(pack(parts))) == parts


def test_seeds_reach_beyond_the_first_check(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[RouterRows] = []

    def parse(*arguments: Any) -> RouterRows:
        read.append(parse_router_rows(*arguments))
        return read[-1]

    monkeypatch.setattr(targets, "parse_router_rows", parse)
    TARGETS["front_requests"].run(TARGETS["front_requests"].seeds[0])
    assert [list(rows.wanted) for rows in read] == [[0]]


def test_what_gets_through_is_kept_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        if len(data) > 3:
            raise KeyError(data)
        raise EpmeshError("refused")

    monkeypatch.setattr(engine, "CRASHES", tmp_path)
    with pytest.raises(KeyError):
        by_mutation(Target("broken", broken, (b"abc",)), seconds=30, seed=1)
    (kept,) = (tmp_path / "broken").iterdir()
    assert len(kept.read_bytes()) > 3


def test_the_command_ends_with_a_verdict() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", "0.01", "--target", "error", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("fuzz: PASS\n")
