"""How long the GPU tests go on: ``pytest tests/gpu --replays 1000 --exchanges 10000``."""

from __future__ import annotations

import pytest

_REPLAYS, _EXCHANGES = 200, 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--replays", type=int, default=_REPLAYS, help="replays of a captured exchange")
    parser.addoption("--exchanges", type=int, default=_EXCHANGES, help="exchanges of both modes in turn")


@pytest.fixture
def replays(request: pytest.FixtureRequest) -> int:
    found = request.config.getoption("--replays", default=_REPLAYS)
    assert isinstance(found, int)
    return found


@pytest.fixture
def exchanges(request: pytest.FixtureRequest) -> int:
    found = request.config.getoption("--exchanges", default=_EXCHANGES)
    assert isinstance(found, int)
    return found
