"""Kernels are compiled before they are needed, for more ranks first; whoever fails keeps nobody else from it."""

from __future__ import annotations

import functools
import threading

import pytest

from epmesh_server.kernels import precompile
from epmesh_server.kernels.precompile import Precompiler


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_CALM_S", 0.0)


def test_what_is_for_more_ranks_is_compiled_first() -> None:
    order: list[int] = []
    compiler, go = Precompiler(), threading.Event()
    compiler.add(9, lambda: go.wait(10))
    for world_size in (1, 3, 2):
        compiler.add(world_size, functools.partial(order.append, world_size))
    go.set()
    assert compiler.wait(10)
    assert order == [3, 2, 1]


def test_a_failure_is_logged_and_the_rest_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    order: list[int] = []
    compiler = Precompiler()
    compiler.add(2, lambda: 1 // 0)
    compiler.add(1, lambda: order.append(1))
    assert compiler.wait(10)
    assert order == [1]
    assert "kernels.precompile.failed" in caplog.text


def test_it_begins_again_after_it_had_nothing_left_to_do() -> None:
    order: list[int] = []
    compiler = Precompiler()
    for number in range(2):
        compiler.add(1, functools.partial(order.append, number))
        assert compiler.wait(10)
    assert order == [0, 1]
