"""Routers over a transport that computes in this process: threads, tasks, deadlines, budget, close."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import epmesh
from epmesh.errors import (
    DeadlineExceeded,
    EpmeshError,
    ExpertUnavailable,
    InvalidRequest,
    MeshUnavailable,
    NotReady,
    Overloaded,
    PeerLost,
    StaleEpoch,
)
from epmesh.forward import NodeCall
from epmesh.hold_offs import LONGEST_S
from epmesh.router import AsyncRouter, Router
from epmesh.router_core import RouterCore, RouterOptions, Run
from epmesh.view import View
from tests.unit.router_fakes import FakeMesh, FakeTransport, expected, make_view

EVERYWHERE = {0: range(8), 1: range(8), 4: range(8), 5: range(8)}
SPLIT = {0: (0, 1), 1: (2, 3), 4: (4, 5), 5: (6, 7)}

Floats = npt.NDArray[np.float32]
Batch = tuple[Floats, Floats, npt.NDArray[np.int64]]


def batch(num_tokens: int = 6, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-8, 8, (num_tokens, 4)).astype(np.float32)
    return hidden, rng.integers(1, 4, (num_tokens, 3)).astype(np.float32), rng.integers(-1, 8, (num_tokens, 3))


class Bench:
    """A router with everything around it."""

    def __init__(self, view: View, **options: Any) -> None:
        self.mesh, self.transport = FakeMesh(view), FakeTransport()
        self.names: list[str] = []
        self.core = RouterCore(self.mesh, RouterOptions(**{"transport": "zmq", **options}), self._make, 0)
        self.router = Router._of(self.core)

    def _make(self, name: str) -> FakeTransport:
        self.names.append(name)
        return self.transport

    def fail_once(self, error: EpmeshError, rank: int) -> None:
        """The first call that `rank` takes fails."""
        left = itertools.chain([error], itertools.repeat(None))
        self.transport.before = lambda call: next(left) if call.entry.rank == rank else None


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(view: View | None = None, **options: Any) -> Bench:
        made.append(Bench(view or make_view(1, SPLIT), **options))
        return made[-1]

    yield make
    for bench in made:
        bench.router.close()


MakeBench = Callable[..., Bench]


def test_sums_come_back_as_the_caller_has_them(make_bench: MakeBench) -> None:
    router, given = make_bench().router, batch()
    out = router.forward(*given)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float32
    assert np.array_equal(out, expected(*given))
    as_torch = router.forward(*map(torch.from_numpy, given))
    assert torch.equal(as_torch, torch.from_numpy(expected(*given)))
    assert np.array_equal(router.forward(given[0], torch.from_numpy(given[1]), given[2].astype(np.int32)), out)


def test_tasks_and_threads_get_the_same(make_bench: MakeBench) -> None:
    bench, given = make_bench(), batch()

    async def main() -> Any:
        router = AsyncRouter._of(bench.core)
        return await asyncio.gather(*(router.forward(*given) for _ in range(20)))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: bench.router.forward(*given), range(50)))
    results += asyncio.run(main())
    assert all(np.array_equal(result, expected(*given)) for result in results)


def test_a_lost_rank_with_replicas_is_no_error_to_anybody(make_bench: MakeBench) -> None:
    bench, given = make_bench(make_view(1, EVERYWHERE)), batch()
    bench.transport.before = lambda call: PeerLost([4], 0) if call.entry.rank == 4 else None
    for _ in range(8):
        assert np.array_equal(bench.router.forward(*given), expected(*given))
    assert bench.router.stats.retries > 0
    assert bench.router.stats.failed == 0


def test_a_new_view_wakes_who_waits_for_it(make_bench: MakeBench) -> None:
    bench, given = make_bench(), batch()
    bench.fail_once(StaleEpoch(2), 4)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bench.router.forward, *given)
        for _ in range(2):
            assert bench.transport.sent.acquire(timeout=10)
        bench.mesh.set(make_view(2, SPLIT))
        assert np.array_equal(waiting.result(10), expected(*given))


def test_a_view_without_the_last_holder_fails_who_waits(make_bench: MakeBench) -> None:
    bench, given = make_bench(), batch()
    bench.transport.held = True
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bench.router.forward, *given)
        for _ in range(2):
            assert bench.transport.sent.acquire(timeout=10)
        bench.mesh.set(make_view(2, SPLIT, alive=(0, 1)))
        with pytest.raises(ExpertUnavailable):
            waiting.result(10)
    assert {call.part.node.slot for call in bench.transport.cancelled} == {0, 1}


def test_older_views_are_not_gone_back_to(make_bench: MakeBench) -> None:
    bench = make_bench(make_view(5, SPLIT))
    bench.mesh.set(make_view(4, {0: range(8)}))
    bench.router.forward(*batch())
    assert {call.view.epoch for call in bench.transport.calls} == {5}


def test_the_deadline_ends_the_call_and_tells_the_ranks(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.transport.held = True
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"ranks 0, 4 did not answer within 0\.5 s") as caught:
        bench.router.forward(*batch(), timeout=0.5)
    assert time.monotonic() - began < 5
    assert caught.value.rank == 0
    assert sorted(call.entry.rank for call in bench.transport.cancelled) == [0, 4]
    assert bench.core.budget.held_bytes == 0


def test_the_deadline_names_the_last_refusal_where_no_view_came(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.fail_once(StaleEpoch(7, "epoch 1 is over"), 4)
    with pytest.raises(DeadlineExceeded, match="the last refusal: epoch 1 is over"):
        bench.router.forward(*batch(), timeout=0.5)


def test_the_routers_own_deadline_holds_where_none_is_named(make_bench: MakeBench) -> None:
    bench = make_bench(timeout_s=0.05)
    bench.transport.held = True
    with pytest.raises(DeadlineExceeded):
        bench.router.forward(*batch())


def test_a_cancelled_task_cancels_its_rows(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.transport.held = True

    async def main() -> None:
        task = asyncio.create_task(AsyncRouter._of(bench.core).forward(*batch()))
        for _ in range(2):
            assert await asyncio.to_thread(bench.transport.sent.acquire, timeout=10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(bench.transport.cancelled) == 2
    assert bench.core.budget.held_bytes == 0


def test_beyond_the_budget_a_forward_waits_for_room(make_bench: MakeBench) -> None:
    given = batch(1)
    bench = make_bench(make_view(1, {0: range(8)}), max_inflight_bytes=2 * 16 + 12 + 24)  # one token out and back
    bench.transport.held = True
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bench.router.forward, *given)
        assert bench.transport.sent.acquire(timeout=10)
        with pytest.raises(Overloaded, match="max_inflight_bytes") as caught:
            bench.router.forward(*given, timeout=0.5)
        assert caught.value.retry_after_s > 0
        second = pool.submit(bench.router.forward, *given)
        assert not bench.transport.sent.acquire(timeout=0.05)
        bench.transport.release()
        assert np.array_equal(first.result(10), expected(*given))
        assert np.array_equal(second.result(10), expected(*given))
    with pytest.raises(InvalidRequest, match="send fewer tokens at once, or raise it"):
        bench.router.forward(*batch(2, seed=1))


def test_what_a_rank_refused_is_not_sent_again_before_it_may_be_taken(make_bench: MakeBench) -> None:
    given = batch()
    bench = make_bench(make_view(1, {0: range(8)}))
    bench.fail_once(Overloaded(60.0, "full"), 0)
    for why in ("full", "node 0 refused as much a moment ago"):
        with pytest.raises(Overloaded, match=why) as refused:
            bench.router.forward(*given, timeout=5)
    assert 0 < refused.value.retry_after_s <= LONGEST_S
    assert len(bench.transport.calls) == 1
    assert bench.core.budget.held_bytes == 0
    fewer = tuple(each[:3] for each in given)
    assert np.array_equal(bench.router.forward(*fewer, timeout=5), expected(*fewer))
    assert np.array_equal(bench.router.forward(*given, timeout=50), expected(*given))
    bench.core.held_off.note(((0, 1),), rows=1, left_s=5.0, retry_after_s=0.0, now=time.monotonic())
    assert np.array_equal(bench.router.forward(*given, timeout=5), expected(*given))


def test_close_fails_what_is_pending_and_what_comes_after(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.transport.held = True
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(bench.router.forward, *batch())
        assert bench.transport.sent.acquire(timeout=10)
        bench.router.close()
        bench.router.close()
        with pytest.raises(MeshUnavailable, match="this router was closed"):
            pending.result(10)
    with pytest.raises(MeshUnavailable, match="this router was closed"):
        bench.router.forward(*batch())
    assert bench.transport.closed
    assert bench.mesh.closed


def test_nothing_is_sent_where_no_id_asks_for_an_expert(make_bench: MakeBench) -> None:
    bench = make_bench()
    none = np.full((3, 2), -1)
    out = bench.router.forward(np.ones((3, 4), np.float16), np.ones((3, 2), np.float32), none)
    assert out.dtype == np.float16
    assert out.tolist() == np.zeros((3, 4)).tolist()
    assert bench.router.forward(*batch(0)).shape == (0, 4)
    assert not bench.transport.calls


GOOD = batch(2)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({0: [[1.0]]}, "hidden_states is a list"),
        ({0: np.ones((2, 0), np.float32)}, "rows of no elements"),
        ({0: np.ones((3, 4), np.float32)}, "hidden_states has 3 rows and topk_ids 2"),
        ({1: np.ones((2, 3), np.int64)}, "topk_weights is int64; it must be floating point"),
        ({1: np.ones((2, 2), np.float32)}, r"topk_weights has shape \[2, 2\] and topk_ids \[2, 3\]"),
        ({2: np.ones((2, 3), np.float32)}, "topk_ids is float32"),
        ({2: np.full((2, 3), -2)}, "topk_ids has -2"),
        ({2: np.full((2, 3), 8)}, "topk_ids has 8 in row 0; ids are .* to 7"),
    ],
)
def test_wrong_input_is_named_before_anything_is_sent(
    make_bench: MakeBench, changed: dict[int, Any], text: str
) -> None:
    bench = make_bench()
    with pytest.raises(InvalidRequest, match=text):
        bench.router.forward(*(changed.get(index, value) for index, value in enumerate(GOOD)))
    assert not bench.transport.calls


@pytest.mark.parametrize("layer", [-1, True, "1", 1 << 32])
def test_a_layer_that_is_none_is_refused(make_bench: MakeBench, layer: Any) -> None:
    with pytest.raises(InvalidRequest, match="layer is "):
        make_bench().router.forward(*GOOD, layer=layer)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "1", True, 1e9])
def test_a_timeout_that_is_none_is_refused(make_bench: MakeBench, timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout is "):
        make_bench().router.forward(*GOOD, timeout=timeout)


def test_a_layer_without_a_placement_names_those_there_are(make_bench: MakeBench) -> None:
    bench = make_bench(make_view(1, SPLIT, layers=(2, 5)))
    with pytest.raises(InvalidRequest, match="no placement for layer 1; there are placements for: 2, 5"):
        bench.router.forward(*GOOD, layer=1)
    bench.router.forward(*GOOD, layer=5)
    assert {call.layer for call in bench.transport.calls} == {5}


def test_a_mesh_without_experts_is_not_ready(make_bench: MakeBench) -> None:
    with pytest.raises(NotReady, match="no rank declares experts in epoch 1"):
        make_bench(make_view(1, SPLIT, layers=())).router.forward(*GOOD)


@pytest.mark.parametrize("options", [{"transport": "tcp"}, {"timeout_s": 0}, {"max_inflight_bytes": 0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        RouterOptions(**options)
    with pytest.raises(InvalidRequest):
        AsyncRouter("127.0.0.1:1", **options)


def test_stats_count_bytes_beside_the_floor(make_bench: MakeBench) -> None:
    bench, given = make_bench(make_view(1, {0: range(8)})), batch(6)
    bench.router.forward(*given)
    stats = bench.router.stats
    rows = int((given[2] >= 0).any(axis=1).sum())
    assert (stats.calls, stats.failed, stats.rows, stats.retries) == (1, 0, 6, 0)
    assert stats.floor_bytes == rows * (16 + 12 + 24 + 16)
    assert stats.bytes_sent + stats.bytes_received == stats.floor_bytes + rows * 3  # and a target for each id
    assert stats.latency[0].answers == 1
    assert stats.inflight_bytes == 0


def test_calls_go_to_the_rank_with_the_fewest_under_way(make_bench: MakeBench) -> None:
    bench = make_bench(make_view(1, {0: range(4), 1: range(4, 8)}))
    bench.transport.held = True
    given = np.ones((1, 4), np.float32), np.ones((1, 2), np.float32), np.array([[0, 4]])
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(bench.router.forward, *given) for _ in range(4)]
        for _ in waiting:
            assert bench.transport.sent.acquire(timeout=10)
        bench.transport.release()
        assert [one.result(10).tolist() for one in waiting] == [[[6.0] * 4]] * 4
    assert sorted(call.entry.rank for call in bench.transport.calls) == [0, 0, 1, 1]


def test_the_same_choices_give_the_same_bits(make_bench: MakeBench) -> None:
    rng = np.random.default_rng(3)
    given = rng.normal(size=(32, 4)).astype(np.float32), rng.random((32, 3)).astype(np.float32), batch(32)[2]
    bench = make_bench()
    order = threading.Event()

    def later_first(call: NodeCall) -> None:
        if call.part.node.slot == 0:
            order.set()

    first = bench.router.forward(*given)
    bench.transport.before = later_first
    assert np.array_equal(bench.router.forward(*given).view(np.uint32), first.view(np.uint32))
    assert order.is_set()


def test_routers_are_part_of_the_package() -> None:
    assert epmesh.Router is Router
    assert epmesh.AsyncRouter is AsyncRouter
    assert epmesh.__all__ == sorted(epmesh.__all__)


def test_a_rank_that_one_forward_lost_is_avoided_by_the_others(make_bench: MakeBench) -> None:
    bench, given = make_bench(make_view(1, EVERYWHERE)), batch()
    bench.transport.before = lambda call: PeerLost([4], 0) if call.entry.rank == 4 else None
    for _ in range(16):
        bench.router.forward(*given)
    assert sum(call.entry.rank == 4 for call in bench.transport.calls) == 1
    bench.mesh.set(make_view(2, EVERYWHERE))
    bench.transport.before = lambda call: None
    for _ in range(16):
        bench.router.forward(*given)
    assert sum(call.entry.rank == 4 for call in bench.transport.calls) > 1


def test_large_batches_do_not_keep_the_event_loop(make_bench: MakeBench) -> None:
    bench = make_bench(make_view(1, {0: range(8)}))
    threads: list[threading.Thread] = []
    bench.transport.before = lambda call: threads.append(threading.current_thread())
    large = np.ones((256, 2048), np.float32), np.ones((256, 1), np.float32), np.zeros((256, 1), np.int64)

    async def main() -> None:
        router = AsyncRouter._of(bench.core)
        assert np.array_equal(await router.forward(*large), large[0])
        await router.forward(*batch())
        bench.transport.held = True
        task = asyncio.create_task(router.forward(*large))
        assert await asyncio.to_thread(bench.transport.sent.acquire, timeout=10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [thread is threading.main_thread() for thread in threads] == [False, True]
    assert bench.core.budget.held_bytes == 0


@pytest.mark.parametrize(("listens", "name"), [(True, "zmq"), (False, "grpc")])
def test_what_gets_through_first_is_used(make_bench: MakeBench, listens: bool, name: str) -> None:
    with socket.socket() as front:
        front.bind(("127.0.0.1", 0))
        if listens:
            front.listen()
        bench = make_bench(make_view(1, {0: range(8)}, front_port=front.getsockname()[1]), transport=None)
        bench.core.choose_transport()
        assert bench.names == [name]


def test_a_router_of_a_mesh_in_which_nobody_serves_chooses_later(make_bench: MakeBench) -> None:
    core = RouterCore(FakeMesh(make_view(1, SPLIT, exchange=SPLIT)), RouterOptions(), lambda asked: FakeTransport())
    core.choose_transport()
    assert core.transport_name is None
    with pytest.raises(ExpertUnavailable):
        Router._of(core).forward(*batch())
    core.close()


def test_layers_without_a_placement_of_their_own_share_one(make_bench: MakeBench) -> None:
    bench = make_bench(make_view(1, SPLIT, layers=(None, 2)))
    for layer in (None, 0, 1, 2, 1 << 31):
        bench.router.forward(*GOOD, layer=layer)
    assert {call.layer for call in bench.transport.calls} == {None, 0, 1, 2, 1 << 31}
    assert set(bench.core.routes._routings) == {None, 2}


@pytest.mark.parametrize("fails", [False, True])
def test_rows_are_let_go_at_once_when_a_forward_ends(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    bench = make_bench()
    if fails:
        bench.transport.before = lambda call: EpmeshError("experts raised")
    begun: list[weakref.ref[Run]] = []
    begin = bench.core.begin

    def remember(*args: Any) -> Run:
        run = begin(*args)
        begun.append(weakref.ref(run))
        return run

    monkeypatch.setattr(bench.core, "begin", remember)
    gc.disable()
    try:
        with contextlib.suppress(EpmeshError):
            bench.router.forward(*batch())
        assert [run() for run in begun] == [None]
    finally:
        gc.enable()


def test_a_router_for_asyncio_connects_when_it_is_first_used() -> None:
    async def main() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            router = AsyncRouter(f"127.0.0.1:{nobody.getsockname()[1]}", connect_timeout_s=0.2, transport="grpc")
            assert router.transport == "grpc"
            assert router.stats.calls == 0
            with pytest.raises(MeshUnavailable, match="nobody answered"):
                await router.forward(*GOOD)
            await router.close()
            await router.close()
            with pytest.raises(MeshUnavailable, match="this router was closed"):
                await router.forward(*GOOD)

    asyncio.run(main())


def test_no_address_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must be host:port"):
        Router("node-0")
