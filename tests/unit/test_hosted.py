"""What is decided about hosted ranks, without a process."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.errors import InvalidRequest
from epmesh.placement import Placement
from epmesh.view import View
from epmesh_server.cli import serving
from epmesh_server.hosted import supervisor as supervisor_module
from epmesh_server.hosted.factory import load_factory
from epmesh_server.hosted.holdings import entry
from epmesh_server.hosted.options import HostedRank, HostedRanks, parse_hold
from epmesh_server.hosted.supervisor import HostedSupervisor
from epmesh_server.processes.backoff import Backoff
from tests.unit.test_cli import invoke


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("0-7;8-15", (tuple(range(8)), tuple(range(8, 16)))),
        ("0,3,5-7;1,2", ((0, 3, 5, 6, 7), (1, 2))),
        (" 3 , 1 - 2 ;", ((1, 2, 3), ())),
        ("4,4,4-5", ((4, 5),)),
        ("", ((),)),
    ],
)
def test_held_experts_are_read(text: str, held: tuple[tuple[int, ...], ...]) -> None:
    assert parse_hold(text) == held


@given(st.lists(st.lists(st.integers(0, 65_535), max_size=5), min_size=1, max_size=4))
def test_held_experts_are_read_back(held: list[list[int]]) -> None:
    text = ";".join(",".join(map(str, experts)) for experts in held)
    assert parse_hold(text) == tuple(tuple(sorted(set(experts))) for experts in held)


@pytest.mark.parametrize("text", ["a", "1-", "-1", "7-3", "1:2", "0-99999999", "65536", "1 2", "²", "0-1-2"])
def test_other_texts_are_refused_and_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--hold"):
        parse_hold(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "--ranks is 0"),
        ({"threads": 0}, "--threads is 0"),
        ({"world_size": 0}, "--world-size is 0"),
        ({"drain_s": -1.0}, "--drain is -1"),
        ({"drain_s": float("nan")}, "--drain is nan"),
        ({"num_experts": 0}, "--num-experts is 0"),
        ({"experts": "m:f"}, "--experts needs --num-experts"),
        ({"hold": ((1,), ())}, "--hold needs --num-experts"),
        ({"hold": ((1,),), "num_experts": 4}, "of 1 ranks, and --ranks is 2"),
        ({"hold": ((1,), (4,)), "num_experts": 4}, "gives local rank 1 expert 4"),
        ({"experts": "module", "num_experts": 4}, "--experts is 'module'; write package.module:factory"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        HostedRanks(**{"count": 2, **options})


def test_each_rank_gets_its_own_part() -> None:
    ranks = HostedRanks(count=2, num_experts=4, hold=((0, 1), (2, 3)), device="cuda")
    second = ranks.rank(1, "127.0.0.1:7400")
    assert (second.local_rank, second.held, second.device, second.world_size) == (1, (2, 3), "cuda:1", 2)
    assert HostedRanks(count=2, world_size=4).rank(0, "h:1").world_size == 4
    assert HostedRanks(count=2).rank(0, "h:1").held is None


@pytest.mark.parametrize(("count", "stride", "fits"), [(8, 8, True), (1, 8, True), (9, 8, False), (2, 1, False)])
def test_more_ranks_than_a_node_may_have_are_refused_before_any_is_started(
    monkeypatch: pytest.MonkeyPatch, count: int, stride: int, fits: bool
) -> None:
    started: list[int] = []

    async def keep_alive(_: HostedSupervisor, rank: HostedRank) -> None:
        started.append(rank.local_rank)

    async def start() -> None:
        supervisor = HostedSupervisor(HostedRanks(count=count))
        supervisor.start("h:1", stride)
        await supervisor.kill()

    monkeypatch.setattr(HostedSupervisor, "_keep_alive", keep_alive)
    monkeypatch.setattr(supervisor_module, "stop_fork_server", lambda: None)
    refusal = rf"--ranks is {count}, .* at most {stride} ranks; .* --stride {count} "
    with contextlib.nullcontext() if fits else pytest.raises(InvalidRequest, match=refusal):
        asyncio.run(start())
    assert started == (list(range(count)) if fits else [])


def test_a_rank_that_joins_again_declares_what_it_held_and_waits_for_nobody() -> None:
    first = HostedRanks(count=2, num_experts=4).rank(0, "h:1")
    again = first.again((0, 1))
    assert (again.held, again.world_size, again.local_rank) == ((0, 1), 1, 0)
    assert first.again(None) == first  # it never got experts: it still waits for the default
    without = HostedRanks(count=2).rank(0, "h:1")
    assert (without.again((0,)).held, without.again(None).world_size) == (None, 1)


def test_what_a_rank_held_is_what_the_view_says_of_the_same_model() -> None:
    view = View("m", 3, 3, 4, (), (), {None: Placement(4, {0: (0, 1), 5: ()})})
    assert entry(view, 0, 4) == (0, 1)
    assert entry(view, 5, 4) == ()
    assert entry(view, 1, 4) is None
    assert entry(view, 0, 8) is None
    assert entry(view, 0, None) is None
    assert entry(View("m", 3, 3, 4), 0, 4) is None


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> list[HostedRanks | None]:
    """The hosted ranks that `epmesh serve` would have run."""
    calls: list[HostedRanks | None] = []
    monkeypatch.setattr(serving, "serve", lambda settings, beside, ranks: calls.append(ranks))
    return calls


def test_serve_hosts_ranks_where_it_is_told_to(hosted: list[HostedRanks | None]) -> None:
    invoke("serve")
    invoke("serve", EPMESH_EXPERTS="m:f", EPMESH_DRAIN="1")  # the whole fleet may have the same environment
    assert hosted == [None, None]
    invoke("serve", "--ranks", "2", "--experts", "m:f", "--hold", "0-1;2-3", "--drain", "3", EPMESH_NUM_EXPERTS="4")
    found = hosted[-1]
    assert found is not None
    assert (found.count, found.experts, found.hold, found.num_experts) == (2, "m:f", ((0, 1), (2, 3)), 4)
    assert (found.drain_s, found.threads, found.path, found.log_level) == (3.0, 1, (str(Path.cwd()),), "info")


def test_options_of_hosted_ranks_are_refused_where_there_are_none(hosted: list[HostedRanks | None]) -> None:
    with pytest.raises(InvalidRequest, match=r"--num-experts, --drain: this node hosts no ranks; .* --ranks N"):
        invoke("serve", "--num-experts", "4", "--drain", "1")
    assert hosted == []


# Factories -------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_for_this.py").write_text("seven = 7\nclass Of:\n    @staticmethod\n    def f(comm): return 1\n")
    (tmp_path / "broken_for_this.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "made_for_this", raising=False)
    return "made_for_this"


def test_a_factory_may_stand_inside_a_class(module: str) -> None:
    assert load_factory(f"{module}:Of.f").__qualname__ == "Of.f"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("made_for_this:nobody", r"has no 'nobody'"),
        ("made_for_this:Of.g", r"has no 'Of.g'"),
        ("made_for_this:seven", r"it is 7, not a function"),
        ("not_made:f", r"ModuleNotFoundError: No module named 'not_made'; modules are looked for in the current dir"),
        ("broken_for_this:f", r"ZeroDivisionError: division by zero"),
        ("made_for_this", r"write package.module:factory"),
        ("made_for_this:", r"write package.module:factory"),
        (":f", r"write package.module:factory"),
        ("a b:f", r"write package.module:factory"),
        ("x:f()", r"write package.module:factory"),
    ],
)
def test_a_factory_that_cannot_be_had_is_named(module: str, name: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        load_factory(name)


# Back-off --------------------------------------------------------------------------------------------------------


def test_waits_double_to_a_limit() -> None:
    backoff = Backoff()
    waits = [backoff.after(0.1) for _ in range(9)]
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_a_child_that_lived_long_begins_anew() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.after(0.1)
    assert [backoff.after(60.0), backoff.after(0.1)] == [0.05, 0.1]
