"""Routers while ranks and nodes are killed: no error with replicas, the right one without."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from epmesh import DeadlineExceeded, ExpertUnavailable, Mesh, Overloaded, Router, connect
from epmesh.testing import LocalMesh
from tests.integration import serve_works
from tests.integration.commands import Command, Shell, open_shell
from tests.integration.serve_works import reference, some_rows, wait_serving
from tests.processes import eventually

pytestmark = pytest.mark.fault

EXPERTS = 8
REPLICATED = [range(4), range(4, 8)] * 2  # each node has all experts
_THREADS = 8


@contextmanager
def serving_mesh(folder: Path, experts: list[range] | None) -> Iterator[tuple[LocalMesh, Router]]:
    with LocalMesh(2, 2, num_experts=EXPERTS, experts=experts) as mesh:
        mesh.start(serve_works.serve, folder / "stop")  # a stopped rank never ends it; the mesh does
        wait_serving(mesh.view, [0, 1, 2, 3])
        with Router(mesh.addresses, timeout_s=20) as router:
            yield mesh, router
        (folder / "stop").touch()


class Streams:
    """Threads that forward until the block ends, and compare with what is `right`; `routers` take turns."""

    def __init__(self, right: Callable[..., torch.Tensor], *routers: Router) -> None:
        self._right, self._routers = right, routers
        self._stop, self._answered = threading.Event(), threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> Streams:
        self._running = [self._pool.submit(self._run, seed) for seed in range(_THREADS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for one in self._running:
            one.result()

    def await_answers(self, count: int) -> None:
        """Waits for so many more."""
        deadline = time.monotonic() + 30
        for _ in range(count):
            assert self._answered.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def _run(self, seed: int) -> None:
        for number in itertools.count():
            given = some_rows(1 + (seed + number) * 7 % 50, EXPERTS, 3, seed * 1000 + number)
            got = self._routers[seed % len(self._routers)].forward(*given)
            torch.testing.assert_close(got.double(), self._right(*given).double(), rtol=1e-4, atol=1e-4)
            self._answered.release()
            if self._stop.is_set():
                return


def right(hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return reference(None, hidden, weights, ids)


def kill_rank(mesh: LocalMesh) -> None:
    mesh.kill_rank(1)


def kill_node(mesh: LocalMesh) -> None:
    mesh.kill_node(1)


def pause_rank(mesh: LocalMesh) -> None:
    mesh.pause_rank(2)


@pytest.mark.parametrize("hurt", [kill_rank, kill_node, pause_rank])
def test_no_router_sees_an_error_as_long_as_every_expert_has_a_replica(
    tmp_path: Path, hurt: Callable[[LocalMesh], None]
) -> None:
    with serving_mesh(tmp_path, REPLICATED) as (mesh, router):
        with Streams(right, router) as streams:
            streams.await_answers(40)
            hurt(mesh)
            streams.await_answers(400)
        assert router.stats.failed == 0


def test_an_expert_without_a_holder_is_unavailable_and_the_rest_goes_on(tmp_path: Path) -> None:
    with serving_mesh(tmp_path, None) as (mesh, router):
        given = some_rows(20, EXPERTS, 3, 1)
        router.forward(*given)
        mesh.kill_rank(3)
        began = time.monotonic()
        with pytest.raises(ExpertUnavailable) as caught:
            router.forward(*given)
        assert time.monotonic() - began < 6  # four times the bound of what is lost and what comes next
        assert set(caught.value.experts) <= {6, 7}
        given[2][given[2] >= 6] = -1
        torch.testing.assert_close(router.forward(*given).double(), reference(None, *given), rtol=1e-5, atol=1e-5)


# Hosted ranks that come back -----------------------------------------------------------------------------------------

HOSTED = ("--ranks", "2", "--num-experts", "8", "--hold", "0-3;4-7")
HOSTED_EXPERTS = ("--experts", "tests.integration.hosted_experts:plus_id")
COMES_BACK_S = 120.0  # a restarted service imports torch


def plus_id(hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What `hosted_experts.plus_id` makes of rows."""
    weights = torch.where(ids >= 0, weights, 0)
    return hidden * weights.sum(1, keepdim=True) + (weights * ids).sum(1, keepdim=True)


def await_four(mesh: Mesh, after: int) -> int:
    """Waits for a later view in which four ranks serve; its epoch."""
    view = mesh.wait_view(
        lambda view: view.epoch > after and sum(bool(info.front_endpoint) for info in view.ranks.values()) == 4,
        COMES_BACK_S,
    )
    return view.epoch


def kill_hosted(service: Command) -> None:
    """Kills one of its ranks."""
    service.line("hosted by process")
    pids = re.findall(r"hosted by process (\d+)", service.output)
    os.kill(int(pids[0]), signal.SIGKILL)


def serve_second(shell: Shell) -> Command:
    return shell.start("serve", "--port", "7410", "--coordinator", shell.coordinator, *HOSTED, *HOSTED_EXPERTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_and_nodes_are_replaced_one_by_one_and_no_router_sees_an_error() -> None:
    with open_shell() as shell:
        first, second = shell.start("serve", *HOSTED, *HOSTED_EXPERTS), serve_second(shell)
        addresses = [shell.address, f"{shell.host}:7410"]
        with (
            connect(addresses, timeout_s=COMES_BACK_S) as mesh,
            Router(addresses, transport="zmq", connect_timeout_s=COMES_BACK_S) as direct,
            Router(addresses, transport="grpc", connect_timeout_s=COMES_BACK_S) as through_nodes,
        ):
            epoch = await_four(mesh, 0)
            with Streams(plus_id, direct, through_nodes) as streams:
                for service in (first, second):
                    kill_hosted(service)
                    epoch = await_four(mesh, epoch)
                second.stop()  # its ranks take leave
                second = serve_second(shell)
                await_four(mesh, epoch)
                first.process.kill()  # a node dies, and the coordinator with it
                streams.await_answers(200)
            assert direct.stats.failed == through_nodes.stats.failed == 0


# What ranks are told and tell ----------------------------------------------------------------------------------------


def test_rows_that_nobody_waits_for_are_not_computed(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    with LocalMesh(1, 1, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve_held, tmp_path, 0, {})
        wait_serving(mesh.view, [0])
        with Router(mesh.address) as router, ThreadPoolExecutor(1) as pool:
            first = pool.submit(router.forward, *some_rows(1, EXPERTS, 3, 0))
            assert eventually((tmp_path / "seen").exists)  # the experts have it, and stand still
            for seed in range(1, 9):
                with pytest.raises(DeadlineExceeded):
                    router.forward(*some_rows(7, EXPERTS, 3, seed), timeout=0.2)
            (tmp_path / "hold").unlink()
            first.result(30)
            last = some_rows(2, EXPERTS, 3, 9)
            torch.testing.assert_close(router.forward(*last).double(), reference(None, *last), rtol=1e-5, atol=1e-5)
        (tmp_path / "stop").touch()
        (stats,) = done.result(30)
    assert stats.cancelled + stats.failures >= 6  # by whose clock they were late
    assert stats.rows <= 1 + 2 + 2 * 7  # of the last two it may not have heard in time that they were given up


def test_a_ranks_full_queue_is_the_callers_to_hear_of(tmp_path: Path) -> None:
    with LocalMesh(1, 1, num_experts=EXPERTS) as mesh:
        mesh.start(partial(serve_works.serve, delay_s=0.3, max_queued_bytes=4096), tmp_path / "stop")
        wait_serving(mesh.view, [0])
        with Router(mesh.address) as router, ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(router.forward, *some_rows(30, EXPERTS, 3, seed)) for seed in range(8)]
            errors = [error for error in (one.exception(30) for one in waiting) if error is not None]
        assert errors
        assert all(isinstance(error, Overloaded) and error.retry_after_s > 0 for error in errors)
        (tmp_path / "stop").touch()
