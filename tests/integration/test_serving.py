"""Ranks that serve, asked over their fronts by a plain router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch

from epmesh.testing import LocalMesh
from tests.integration import serve_works
from tests.integration.serve_works import PlainRouter, reference, some_rows, wait_serving

EXPERTS = 8


@dataclass
class Served:
    """A mesh whose ranks all serve."""

    mesh: LocalMesh
    router: PlainRouter


@pytest.fixture(scope="module", params=[(1, 1), (1, 4), (2, 2)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    nodes, ranks_per_node = request.param
    stop = tmp_path_factory.mktemp("serve") / "stop"
    with LocalMesh(nodes, ranks_per_node, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve, stop)
        view = wait_serving(mesh.view, list(range(nodes * ranks_per_node)))
        with closing(PlainRouter(view)) as router:
            yield Served(mesh, router)
        stop.touch()
        done.result(30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_sums_are_those_of_a_plain_reference(served: Served, num_rows: int, dtype: torch.dtype) -> None:
    hidden, weights, ids = some_rows(num_rows, EXPERTS, 3, num_rows, dtype)
    got = served.router.forward(hidden, weights, ids, layer=2)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.06
    torch.testing.assert_close(got.double(), reference(2, hidden, weights, ids), rtol=tolerance, atol=tolerance)
