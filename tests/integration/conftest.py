"""Meshes that tests share. Only one is alive at a time: tests are ordered by it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from epmesh.testing import LocalMesh
from tests.integration.contract import MAX_TOKENS, Shape
from tests.integration.targets import Target

SHAPES = [Shape(1, 1), Shape(1, 4), Shape(2, 1), Shape(2, 2), Shape(4, 2)]


@pytest.fixture(scope="session", params=SHAPES, ids=lambda shape: shape.name)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """A running mesh of each shape, its groups and placements declared."""
    shape: Shape = request.param
    with LocalMesh(
        shape.nodes,
        shape.ranks_per_node,
        tensor_parallel_size=shape.tensor_parallel_size,
        exchange_timeout_s=20.0,
        max_tokens_per_rank=MAX_TOKENS,
    ) as mesh:
        yield Target(shape, mesh.run)
