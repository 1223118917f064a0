"""Ranks of real processes that share this machine's first GPU: exchanges, graphs, refusals and faults.

The contract suite runs on the same ranks: ``pytest tests/integration -k join-cuda``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from epmesh import InvalidRequest, PeerLost
from epmesh.testing import LocalMesh
from tests.fault import works as faults
from tests.fault.works import Seen
from tests.gpu import works
from tests.integration.mesh_works import Inbox
from tests.integration.on_device import on_device

_log = logging.getLogger(__name__)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

DEVICE = "cuda:0"
EXPERTS = list(range(6))
KILLED_S, STOPPED_S, STRETCH = 0.5, 2.0, 4


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    with contextlib.closing(Inbox(tmp_path)) as inbox:
        yield inbox


def mesh(ranks: int = 3, num_experts: int = 6, exchange_timeout_s: float = 60.0, nodes: int = 1) -> LocalMesh:
    return LocalMesh(
        nodes,
        ranks,
        num_experts=num_experts,
        device=DEVICE,
        max_tokens_per_rank=16,
        exchange_timeout_s=exchange_timeout_s,
        timeout_s=60.0,
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_captured_exchange_is_replayed_with_another_routing_and_placement(
    ranks: int, in_place: bool, replays: int
) -> None:
    with mesh(ranks, works.EXPERTS_A_RANK * ranks) as ranks_of_one_gpu:
        for seen in ranks_of_one_gpu.run(works.replay, 11, replays, in_place):
            assert seen.wrong == 0, seen


def test_a_graph_cannot_capture_an_exchange_between_nodes() -> None:
    with mesh(1, nodes=2) as two_nodes:
        for refusal, total in two_nodes.run(works.capture_between_nodes):
            assert "spans 2 nodes; its exchanges go through the host" in refusal, refusal
            assert refusal.startswith("InvalidRequest: ")
            assert total == [1.0, 1.0]


def test_a_graph_whose_routing_has_another_form_now_says_so_and_the_group_goes_on() -> None:
    with mesh(3, 3) as three:
        for stale, total in three.run(works.replay_what_has_no_replicas):
            assert "had other numbers of experts or replicas; capture anew" in stale
            assert total == [1.0, 1.0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_exact_results_may_be_made_where_peers_read_them(ranks: int) -> None:
    with mesh(ranks, works.EXPERTS_A_RANK * ranks) as ranks_of_one_gpu:
        assert ranks_of_one_gpu.run(works.combine_in_place, 40) == [0] * ranks


@pytest.mark.parametrize("ranks", [1, 3])
def test_prepared_calls_move_the_rows_of_every_call(ranks: int) -> None:
    with mesh(ranks, works.EXPERTS_A_RANK * ranks) as ranks_of_one_gpu:
        for worst, wrong, prepared in ranks_of_one_gpu.run(works.repeat, 11, 60):
            assert wrong == 0, worst
            assert prepared == 6  # both modes, each as it is, with extra tensors, and quantized


def test_exact_and_static_exchanges_take_turns_without_growth(exchanges: int) -> None:
    with mesh(2, 8) as two:
        for early, late in two.run(works.exchange_and_measure, exchanges):
            assert late - early < 64 << 20


def test_a_refusal_in_static_mode_reaches_all_ranks_and_static_mode_goes_on() -> None:
    with mesh(2) as two:
        for error, total in two.run(works.refuse_one_static, 1):
            assert error == InvalidRequest.__name__
            assert total == [1.0, 1.0]


def test_a_bound_on_multiprocessors_holds_from_the_next_dispatch_on() -> None:
    with mesh(2) as two:
        for used, programs, sums in two.run(works.exchange_on_few_sms, 4):
            assert used == 4
            assert max(programs) <= 4
            assert sums == [[1.0] * 9] * 6


def meet(three: LocalMesh, inbox: Inbox, plan: str, strike: str, bound_s: float) -> list[Seen]:
    """Has rank 1 struck in the middle of `plan`; what the others saw."""
    three.run(on_device, faults.exchange, EXPERTS)
    future = three.start(on_device, faults.until_error, inbox.path, plan, [1], EXPERTS)
    inbox.lines(3)
    struck_at = time.monotonic()
    getattr(three, strike)(1)
    if strike == "pause_rank":
        inbox.lines(2)  # both survivors saw it
        three.kill_rank(1)
    results = future.result(90)
    assert isinstance(results[1], PeerLost)
    survivors = [results[0], results[2]]
    for seen in survivors:
        assert (seen.error, seen.ranks) == ("PeerLost", (1,)), seen
        assert seen.at - struck_at < STRETCH * bound_s
        assert seen.view == [0, 2]
        assert seen.sums == [1.0, 2.0, 5.0, 6.0]
        assert seen.unavailable == (2, 3)
        _log.info("%s %s: error %.3f s, resumed %.3f s", plan, strike, seen.at - struck_at, seen.resumed_at - struck_at)
    return survivors


@pytest.mark.fault
@pytest.mark.parametrize("plan", ["dispatch", "combine", "exchanges"])
def test_survivors_get_peer_lost_and_go_on_when_a_rank_is_killed(inbox: Inbox, plan: str) -> None:
    with mesh() as three:
        meet(three, inbox, plan, "kill_rank", KILLED_S)


@pytest.mark.fault
@pytest.mark.parametrize("plan", ["dispatch", "exchanges"])
def test_survivors_on_other_nodes_get_peer_lost_and_go_on_when_a_rank_is_killed(inbox: Inbox, plan: str) -> None:
    with mesh(1, nodes=3) as three:
        meet(three, inbox, plan, "kill_rank", KILLED_S)


@pytest.mark.fault
def test_survivors_get_peer_lost_and_go_on_when_a_rank_is_stopped(inbox: Inbox) -> None:
    with mesh() as three:
        meet(three, inbox, "exchanges", "pause_rank", STOPPED_S)


@pytest.mark.fault
def test_a_graph_of_an_older_view_gives_up_and_says_so(inbox: Inbox) -> None:
    with mesh() as three:
        future = three.start(works.replay_after_a_loss, inbox.path, 1)
        inbox.lines(3)
        three.kill_rank(1)
        results = future.result(90)
    for lost, stale, total in (results[0], results[2]):
        assert lost.startswith("PeerLost: ")
        assert stale.startswith("InvalidRequest: a CUDA graph was replayed")
        assert total == [1.0, 1.0]


@pytest.mark.fault
def test_a_late_rank_is_named_and_the_group_goes_on() -> None:
    with mesh(2, 2, exchange_timeout_s=20.0) as two:
        two.run(on_device, faults.exchange, [0, 1])  # compiles, with patience
    with mesh(2, 2, exchange_timeout_s=2.0) as two:
        for seen, before in two.run(on_device, faults.late, 1, 3.0):
            assert (seen.error, seen.ranks) == ("DeadlineExceeded", (1,)), seen
            assert (seen.sums, seen.epoch) == ([1.0, 2.0], before)
