"""Ranks that tests share. Those of one case are alive at a time: tests are ordered by it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.implementations import Case, case_id, cases
from tests.integration.targets import Target


@pytest.fixture(scope="session", params=cases(), ids=case_id)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Running ranks of each implementation in each of its shapes, their groups and placements declared."""
    case: Case = request.param
    implementation, shape = case
    with implementation.start(shape) as run:
        yield Target(shape, run, implementation.lacks)
