"""Ranks that serve fail, stall, stop and leave; their routers get typed errors at once, and right sums or none."""

from __future__ import annotations

import itertools
import operator
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import epmesh
from epmesh import DeadlineExceeded, EpmeshError, InvalidRequest, Overloaded, PeerLost, StaleEpoch
from epmesh.testing import LocalMesh
from epmesh_server.fair_budget import FairBudget
from epmesh_server.ranks.serving_experts import ServeStats
from tests.integration import mesh_works, serve_works
from tests.integration.serve_works import Call, PlainRouter, reference, some_rows, total, wait_serving

pytestmark = pytest.mark.fault

EVERYTHING = range(8)
ONE_NODE = [EVERYTHING, EVERYTHING]
ROW_BYTES = 4 * serve_works.HIDDEN + 2 * (4 + 8)
KILLED_S, STOPPED_S, OVERLOADED_S, STRETCH = (
    0.5,
    2.0,
    0.05,
    4,
)  # the promises, and how far a busy test machine may stretch them
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass
class Held:
    """A node of two ranks that serve and hold every expert. The experts of rank 1 stand still while `hold` is there."""

    mesh: LocalMesh
    router: PlainRouter
    done: Future[list[ServeStats]]
    folder: Path

    def release(self) -> None:
        """Lets the experts of rank 1 go on."""
        (self.folder / "hold").unlink(missing_ok=True)

    def stop(self) -> None:
        """Has both ranks stop."""
        (self.folder / "stop").touch()

    def ask(self, rows: Rows, rank: int, **options: Any) -> Call:
        """Has `rank` compute rows that rank 0 takes in."""
        targets = torch.where(rows[2] >= 0, rank, -1)
        (call,) = self.router.start(*rows, targets=targets, entry=0, **options)
        return call

    def await_seen(self, shares: int, cancelled: int = 0) -> None:
        """Until rank 1, which stands still, has heard of so many at least."""
        deadline = time.monotonic() + 20
        while not all(map(operator.ge, now := serve_works.seen(self.folder), (shares, cancelled))):
            assert time.monotonic() < deadline, now
            time.sleep(0.005)

    def check(self, rows: Rows, call: Call) -> None:
        """The answer is right."""
        torch.testing.assert_close(total(rows[0], [call]).double(), reference(None, *rows), rtol=1e-5, atol=1e-5)

    def finish(self) -> list[ServeStats]:
        """Ends serving."""
        self.release()
        self.stop()
        return self.done.result(30)


@contextmanager
def held(tmp_path: Path, **options: float) -> Iterator[Held]:
    (tmp_path / "hold").touch()
    with LocalMesh(1, 2, num_experts=len(EVERYTHING), experts=ONE_NODE) as mesh:
        done = mesh.start(serve_works.serve_held, tmp_path, 1, options)
        view = wait_serving(mesh.view, [0, 1])
        with closing(PlainRouter(view)) as router:
            yield Held(mesh, router, done, tmp_path)


def rows_of(seed: int, num_rows: int = 6) -> Rows:
    return some_rows(num_rows, len(EVERYTHING), 2, seed)


def wanted(rows: Rows) -> int:
    """How many of the rows want an expert."""
    return int((rows[2] >= 0).any(1).sum())


def poisoned(rows: Rows) -> Rows:
    rows[0][0, 0] = serve_works.POISON
    return rows


def test_requests_that_come_while_another_is_computed_go_together(tmp_path: Path) -> None:
    with held(tmp_path) as node:
        rows = [rows_of(seed) for seed in range(20)]
        first = node.ask(rows[0], 1)
        node.await_seen(1)
        calls = [node.ask(each, 1) for each in rows[1:]]
        node.await_seen(20)
        node.release()
        for each, call in zip(rows, [first, *calls], strict=True):
            node.check(each, call)
        stats = node.finish()
        assert stats[0].requests == stats[1].shares == 20
        assert stats[1].batches == 2
        assert stats[1].rows == sum(map(wanted, rows))


def test_only_the_router_whose_rows_the_experts_fail_on_hears_of_it(tmp_path: Path) -> None:
    with held(tmp_path) as node:
        first = node.ask(rows_of(0), 1)
        node.await_seen(1)
        good = [rows_of(seed) for seed in range(1, 5)]
        calls = [node.ask(each, 1) for each in good[:2]]
        bad = node.ask(poisoned(rows_of(9)), 1)
        calls += [node.ask(each, 1) for each in good[2:]]
        node.await_seen(6)
        node.release()
        with pytest.raises(EpmeshError, match="experts on rank 1 failed: ArithmeticError: poison"):
            bad.reply.result(20)
        node.check(rows_of(0), first)
        for each, call in zip(good, calls, strict=True):
            node.check(each, call)
        after = rows_of(10)
        node.check(after, node.ask(after, 1))
        assert [each.failures for each in node.finish()] == [1, 0]


def test_rows_whose_router_gave_up_are_not_computed(tmp_path: Path) -> None:
    with held(tmp_path) as node:
        first = node.ask(rows_of(0), 1)
        node.await_seen(1)
        given_up = [node.ask(rows_of(seed), 1) for seed in range(1, 4)]
        kept = node.ask(rows_of(4), 1)
        node.await_seen(5)
        for call in given_up:
            assert call.reply.cancel()
        node.await_seen(5, cancelled=3)
        node.release()
        node.check(rows_of(0), first)
        node.check(rows_of(4), kept)
        stats = node.finish()
        assert stats[0].cancelled == 3
        assert stats[1].rows == wanted(rows_of(0)) + wanted(rows_of(4))


def test_a_late_rank_is_named_before_its_router_gives_up_and_the_next_request_is_answered(tmp_path: Path) -> None:
    with held(tmp_path) as node:
        for rank in (1, 1):
            late = node.ask(rows_of(0), rank, timeout_s=1.5)
            with pytest.raises(DeadlineExceeded) as caught:
                late.reply.result(20)
            assert caught.value.rank == 1
        node.release()
        node.check(rows_of(1), node.ask(rows_of(1), 1))
        node.finish()


def test_rows_beyond_the_queues_bytes_are_refused_at_once_with_a_hint(tmp_path: Path) -> None:
    with held(tmp_path, max_queued_bytes=4000) as node:
        node.ask(rows_of(0), 1)
        node.await_seen(1)
        rows = [rows_of(seed) for seed in range(1, 20)]
        budget, fit = FairBudget(4000), []
        for each in rows:
            size = wanted(each) * ROW_BYTES
            fit.append(budget.fits("the router", size))
            budget.hold("the router", size if fit[-1] else 0)
        calls = [node.ask(each, 1, timeout_s=60) for each in rows]
        for call in itertools.compress(calls, map(operator.not_, fit)):
            with pytest.raises(Overloaded) as refused:
                call.reply.result(5)  # at once, and not when the others are done
            assert 0 < refused.value.retry_after_s <= 5
        node.release()
        for each, call in itertools.compress(zip(rows, calls, strict=True), fit):
            node.check(each, call)
        assert node.finish()[0].overloaded == fit.count(False) > 5


def test_a_neighbour_that_is_killed_in_the_middle_is_lost_to_the_router_at_once(tmp_path: Path) -> None:
    with held(tmp_path) as node:
        rows = rows_of(0)
        call = node.ask(rows, 1, timeout_s=60)
        node.await_seen(1)
        struck_at = time.monotonic()
        node.mesh.kill_rank(1)
        with pytest.raises(PeerLost) as lost:
            call.reply.result(20)
        assert time.monotonic() - struck_at < STRETCH * KILLED_S
        assert lost.value.ranks == (1,)
        node.check(rows, node.ask(rows, 0))  # to the replica
        wait_serving(node.mesh.view, [0])
        with pytest.raises(StaleEpoch):
            node.ask(rows, 1).reply.result(20)
        node.finish()


def test_a_zombie_neighbour_changes_no_later_result(tmp_path: Path) -> None:
    with held(tmp_path) as node:
        rows = rows_of(0, 400)
        calls = [node.ask(rows_of(seed, 400), 1, timeout_s=60) for seed in range(4)]
        node.await_seen(1)
        struck_at = time.monotonic()
        node.mesh.pause_rank(1)
        for call in calls:
            with pytest.raises(PeerLost) as lost:
                call.reply.result(20)
            assert lost.value.ranks == (1,)
        assert time.monotonic() - struck_at < STRETCH * STOPPED_S
        wait_serving(node.mesh.view, [0])
        node.release()
        node.mesh.resume_rank(1)
        with closing(PlainRouter(node.mesh.view())) as router:
            for seed in range(200):  # it wakes up, computes what nobody waits for, and writes it
                rows = rows_of(seed, 50)
                got = router.forward(*rows)
                torch.testing.assert_close(got.double(), reference(None, *rows), rtol=1e-5, atol=1e-5)
        node.stop()
        with pytest.raises(EpmeshError):  # the zombie, which was evicted
            node.done.result(30)


def test_a_rank_that_stops_answers_everybody_and_exchanges_again(tmp_path: Path) -> None:
    with held(tmp_path) as node:
        rows = [rows_of(seed) for seed in range(8)]
        calls = [node.ask(each, 1) for each in rows]
        node.await_seen(1)
        node.stop()
        wait_serving(node.mesh.view, [1])
        calls.append(node.ask(rows[0], 0))  # by the old view: this router has not heard that rank 0 leaves
        node.release()
        for each, call in zip([*rows, rows[0]], calls, strict=True):
            node.check(each, call)
        stats = node.done.result(30)
        assert [each.failures for each in stats] == [0, 0]
        assert node.mesh.run(mesh_works.total) == [1, 1]


@pytest.mark.parametrize("kind", ["float8", "wrong_rows", "not_a_tensor", "complex"])
def test_results_that_cannot_be_summed_are_refused(tmp_path: Path, kind: str) -> None:
    stop = tmp_path / "stop"
    with LocalMesh(1, 2, num_experts=8) as mesh:
        done = mesh.start(serve_works.serve_wrong, stop, kind)
        view = wait_serving(mesh.view, [0, 1])
        with closing(PlainRouter(view)) as router, pytest.raises(InvalidRequest, match="experts on rank"):
            router.forward(*rows_of(0))
        stop.touch()
        done.result(30)


def test_integers_are_summed_exactly(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    with LocalMesh(1, 2, num_experts=8) as mesh:
        done = mesh.start(serve_works.serve_wrong, stop, "integers")
        with closing(PlainRouter(wait_serving(mesh.view, [0, 1]))) as router:
            (call,) = router.start(torch.ones(1, serve_works.HIDDEN), torch.ones(1, 2), torch.tensor([[0, 7]]))
            reply = call.reply.result(20)
            assert reply.response.tensors[0].dtype == "int64"
            assert reply.response.tensors[0].shape == [1, 1]
            assert memoryview(bytes(reply.tensors[0])).cast("q").tolist() == [2 * serve_works.ODD]
        stop.touch()
        done.result(30)


def test_collective_calls_of_a_rank_that_serves_are_refused(tmp_path: Path) -> None:
    with LocalMesh(1, 1, num_experts=8) as mesh:
        assert mesh.run(serve_works.serve_and_call) == [["rank 0 serves routers", "rank 0 serves already"]]


def test_ranks_that_die_join_and_leave_disturb_no_request_of_their_neighbours(tmp_path: Path) -> None:
    with LocalMesh(1, 3, num_experts=8, experts=[range(4), range(4, 8), []]) as mesh:
        done = mesh.start(serve_works.serve, tmp_path / "stop")
        view = wait_serving(mesh.view, [0, 1, 2])
        stop = threading.Event()
        with closing(PlainRouter(view)) as router, ThreadPoolExecutor(1) as threads:
            traffic = threads.submit(ask_until, router, stop)
            try:
                mesh.kill_rank(2)
                wait_serving(mesh.view, [0, 1])
                for _ in range(8):
                    with epmesh.join(mesh.address, local_rank=2, mode="serve", num_experts=8, experts=[]) as comm:
                        assert comm.view.membership_epoch > view.membership_epoch
            finally:
                stop.set()
            assert traffic.result(30) > 0
        (tmp_path / "stop").touch()
        assert [type(each) for each in done.result(30)] == [ServeStats, ServeStats, PeerLost]


def ask_until(router: PlainRouter, stop: threading.Event) -> int:
    """Has ranks 0 and 1 compute rows until `stop` is set, and checks the sums; how many requests."""
    for count in itertools.count():
        if stop.is_set():
            return count
        rows = rows_of(count, 40)
        targets = torch.where(rows[2] >= 0, rows[2] // 4, -1)
        (call,) = router.start(*rows, targets=targets, entry=count % 2)
        torch.testing.assert_close(total(rows[0], [call]).double(), reference(None, *rows), rtol=1e-5, atol=1e-5)
    raise AssertionError
