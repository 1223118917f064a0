"""Routers against ranks that serve: threads, tasks, libraries, ragged sizes."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from epmesh import AsyncRouter, EpmeshError, InvalidRequest, Router
from epmesh.testing import LocalMesh
from tests.integration import serve_works
from tests.integration.serve_works import POISON, reference, some_rows, wait_serving
from tests.processes import eventually, open_descriptors

EXPERTS = 8
REPLICATED = [range(8), range(4), range(4, 8), range(8)]


@dataclass
class Served:
    """A mesh whose ranks all serve, and a router."""

    mesh: LocalMesh
    router: Router


SHAPES = {
    "1x1": (1, 1, None, False),
    "2x2": (2, 2, None, False),
    "replicas": (2, 2, REPLICATED, False),
    "tls": (2, 2, None, True),
}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    nodes, ranks_per_node, experts, tls = request.param
    stop = tmp_path_factory.mktemp("serve") / "stop"
    with LocalMesh(nodes, ranks_per_node, num_experts=EXPERTS, experts=experts, tls=tls) as mesh:
        done = mesh.start(serve_works.serve, stop)
        wait_serving(mesh.view, list(range(nodes * ranks_per_node)))
        yield mesh
        stop.touch()
        done.result(30)


@pytest.fixture(scope="module", params=["zmq", "grpc"])
def served(request: pytest.FixtureRequest, mesh: LocalMesh) -> Iterator[Served]:
    with Router(mesh.addresses, transport=request.param, tls=mesh.tls) as router:
        yield Served(mesh, router)


def check(out: Any, layer: int | None, *given: torch.Tensor, tolerance: float = 1e-5) -> None:
    got = torch.from_numpy(out) if isinstance(out, np.ndarray) else out
    torch.testing.assert_close(got.double(), reference(layer, *given), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_sums_are_those_of_a_plain_reference(served: Served, num_rows: int, dtype: torch.dtype) -> None:
    given = some_rows(num_rows, EXPERTS, 3, num_rows, dtype)
    out = served.router.forward(*given, layer=2)
    assert out.dtype == dtype
    check(out, 2, *given, tolerance=1e-5 if dtype.itemsize >= 4 else 0.06)


def test_numpy_callers_get_numpy(served: Served) -> None:
    given = some_rows(9, EXPERTS, 2, 1)
    out = served.router.forward(*(tensor.numpy() for tensor in given))
    assert out.dtype == np.float32
    check(out, None, *given)
    narrow = served.router.forward(given[0].bfloat16(), given[1], given[2].int())
    assert narrow.dtype == torch.bfloat16


def test_threads_share_a_router(served: Served) -> None:
    def one(seed: int) -> None:
        given = some_rows(1 + seed * 7 % 40, EXPERTS, 3, seed)
        check(served.router.forward(*given, layer=1), 1, *given)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(100)))


def test_tasks_share_a_router(served: Served) -> None:
    async def one(router: AsyncRouter, seed: int) -> None:
        given = some_rows(1 + seed * 5 % 30, EXPERTS, 3, seed)
        check(await router.forward(*given), None, *given)

    async def main() -> None:
        async with AsyncRouter(served.mesh.addresses, transport=served.router.transport, tls=served.mesh.tls) as router:
            await asyncio.gather(*(one(router, seed) for seed in range(60)))

    asyncio.run(main())


def test_experts_that_raise_are_heard_and_the_rest_goes_on(served: Served) -> None:
    given = some_rows(5, EXPERTS, 3, 1)
    given[0][0, 0], given[2][0, 0] = POISON, 1
    with pytest.raises(EpmeshError, match="poison"):
        served.router.forward(*given)
    given[0][0, 0] = 1.0
    check(served.router.forward(*given), None, *given)


def test_ids_beyond_the_placement_are_refused(served: Served) -> None:
    hidden, weights, ids = some_rows(2, EXPERTS, 3, 1)
    ids[1, 1] = EXPERTS
    with pytest.raises(InvalidRequest, match=f"topk_ids has {EXPERTS} in row 1"):
        served.router.forward(hidden, weights, ids)


def test_bytes_stay_near_the_floor_over_what_gets_through_first(mesh: LocalMesh) -> None:
    with Router(mesh.address, tls=mesh.tls) as router:
        router.forward(*some_rows(300, EXPERTS, 3, 1))
        stats = router.stats
        assert router.transport == "zmq"
    assert stats.floor_bytes < stats.bytes_sent + stats.bytes_received < 1.05 * stats.floor_bytes
    assert set(stats.latency) <= {node.slot for node in mesh.view().nodes}


def test_rows_of_many_megabytes_go_in_one_forward(served: Served) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1024, 4096, generator=generator)
    weights, ids = some_rows(1024, EXPERTS, 2, 1)[1:]
    check(served.router.forward(hidden, weights, ids), None, hidden, weights, ids)


@pytest.mark.parametrize("transport", ["zmq", "grpc"])
@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_a_router_that_is_closed_or_dropped_leaves_no_thread_and_no_descriptor(
    mesh: LocalMesh, transport: str, how: str
) -> None:
    def use() -> None:
        router = Router(mesh.addresses, transport=transport, tls=mesh.tls)
        router.forward(*some_rows(3, EXPERTS, 2, 1))
        if how == "closed":
            router.close()

    use()  # what gRPC keeps for the process is there from now on
    threads, descriptors = set(threading.enumerate()), open_descriptors()
    for _ in range(8):
        use()
    gc.collect()
    assert eventually(lambda: set(threading.enumerate()) <= threads)
    assert eventually(lambda: open_descriptors() <= descriptors + 3)  # gRPC closes its own when it comes to it
