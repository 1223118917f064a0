"""Routers while ranks and nodes are killed: no error with replicas, the right one without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from epmesh import ExpertUnavailable, Router
from epmesh.testing import LocalMesh
from tests.integration import serve_works
from tests.integration.serve_works import reference, some_rows, wait_serving

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


def stream(router: Router, stop: threading.Event, answered: threading.Semaphore, seed: int) -> int:
    """Forwards until it is stopped, each of them checked; how many there were."""
    count = 0
    while not stop.is_set():
        given = some_rows(1 + (seed + count) * 7 % 50, EXPERTS, 3, seed * 1000 + count)
        got = router.forward(*given)
        torch.testing.assert_close(got.double(), reference(None, *given), rtol=1e-5, atol=1e-5)
        count += 1
        answered.release()
    return count


def await_answers(answered: threading.Semaphore, count: int) -> None:
    deadline = time.monotonic() + 30
    for _ in range(count):
        assert answered.acquire(timeout=max(0.0, deadline - time.monotonic()))


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
    stop, answered = threading.Event(), threading.Semaphore(0)
    with serving_mesh(tmp_path, REPLICATED) as (mesh, router), ThreadPoolExecutor(_THREADS) as pool:
        streams = [pool.submit(stream, router, stop, answered, seed) for seed in range(_THREADS)]
        try:
            await_answers(answered, 40)
            hurt(mesh)
            await_answers(answered, 400)
        finally:
            stop.set()
        for one in streams:
            one.result(30)
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
