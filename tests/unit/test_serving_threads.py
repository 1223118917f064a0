"""What the threads of a rank that serves, or is driven, owe to each other."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from epmesh import EpmeshError, Overloaded
from epmesh.v1 import front_pb2
from epmesh_server.driver_tokens import make_token
from epmesh_server.ranks.driven import DrivenRank, _GroupWorker, _Task
from epmesh_server.ranks.front import Incoming
from epmesh_server.ranks.serving_batch import BatchLimits
from epmesh_server.ranks.serving_desk import Desk
from epmesh_server.ranks.serving_experts import ExpertCalls, Outcome, QueuedShare, ServeStats, ShareQueue
from epmesh_server.ranks.serving_rows import BatchKey, Rows
from epmesh_server.ranks.session import RankSession
from tests.processes import eventually


class Given:
    """A request that its sender has given up; it notes what it was answered."""

    cancelled = True
    client = ""

    def __init__(self, deadline: float = 0.0, **shapes: list[int]) -> None:
        self.deadline = deadline
        self.request: Any = front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(ranks=[0]), deadline_ms=1000)
        for dtype, shape in shapes.items():
            self.request.tensors.add(dtype=dtype, shape=shape)
        self.refusals: list[EpmeshError] = []

    def refuse(self, error: EpmeshError) -> None:
        self.refusals.append(error)


SHAPES = {"float32": [8, 1], "float16": [8, 1], "int64": [8, 1]}


def rows() -> Rows:
    key = BatchKey(None, 1, 1, "float32", "float32", "int64")
    hidden = np.ones((1, 1), np.float32).view(np.uint8)
    return Rows(key, hidden, hidden.copy(), np.zeros((1, 1), np.int64))


def test_results_that_cannot_be_delivered_harm_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    queue = ShareQueue(BatchLimits())
    got: list[Any] = []

    def fail(_: Outcome) -> None:
        raise ValueError("no place for results")

    for deliver in (fail, got.append):
        queue.put(QueuedShare(rows(), time.monotonic() + 60, lambda: False, deliver))
    calls = ExpertCalls(lambda _layer, hidden, *_: hidden * 2, 0, torch.device("cpu"), queue, ServeStats())
    with caplog.at_level(logging.CRITICAL, "epmesh_server"):
        while not got:
            assert calls.run(10)
    assert [each.tolist() for each in got] == [[[2.0]]]


def test_a_neighbour_may_have_answered_before_its_share_is_noted() -> None:
    session = SimpleNamespace(rank=0, wake_fd=os.eventfd(0, os.EFD_NONBLOCK), calm=lambda: False, view=None)
    desk: Any = Desk(cast(RankSession, session), ShareQueue(BatchLimits()), ServeStats())
    future: Future[Any] = Future()

    def call(*_: Any, on_answer: Any, **__: Any) -> Future[Any]:
        on_answer(front_pb2.FrontResponse())
        return future

    request: Any = SimpleNamespace(
        router_rows=SimpleNamespace(index=lambda _: np.zeros(1, np.int64)),
        view=SimpleNamespace(ranks={1: SimpleNamespace(incarnation=1, front_endpoint="", curve_key=b"")}),
        incoming=SimpleNamespace(client=""),
        deadline=0.0,
        neighbours=[],
    )
    desk._client = SimpleNamespace(call=call, close=lambda: None)
    desk._written = lambda *_: (front_pb2.FrontRequest(), [], None, 0)
    desk._post(lambda: desk._announce(request, 1, as_frames=True))
    try:
        assert eventually(lambda: request.neighbours and request.neighbours[0].answered)
    finally:
        desk._memories = SimpleNamespace(close=lambda: None)
        desk.close(EpmeshError("over"))
        os.close(session.wake_fd)


def test_a_desk_that_was_closed_writes_to_no_descriptor_that_took_its_numbers_place() -> None:
    other, session_fd = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    session = SimpleNamespace(rank=0, wake_fd=session_fd, calm=lambda: False, view=None)
    desk = Desk(cast(RankSession, session), ShareQueue(BatchLimits()), ServeStats())
    number = desk._wake_fd
    desk.close(EpmeshError("over"))
    os.dup2(other, number)
    try:
        desk.take_in(cast(Incoming, Given()))
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
    finally:
        for fd in (other, number, session_fd):
            os.close(fd)


def test_rows_that_would_be_late_are_refused_before_anybody_looks_into_them() -> None:
    session_fd, stats, queue = os.eventfd(0, os.EFD_NONBLOCK), ServeStats(), ShareQueue(BatchLimits(max_batch_rows=8))
    session = SimpleNamespace(rank=0, wake_fd=session_fd, calm=lambda: False, view=None)
    desk = Desk(cast(RankSession, session), queue, stats)
    queue.computed(0.2)
    running = QueuedShare(rows(), time.monotonic() + 60, lambda: False, lambda _: None)
    queue.put(running)
    assert queue.take(10) == ([running], [])
    late, looked_into = Given(time.monotonic() + 0.3, **SHAPES), Given(time.monotonic() + 60, **SHAPES)
    try:
        with pytest.raises(Overloaded):  # on the thread that asks: nothing was queued for the desk's
            desk.take_in(cast(Incoming, late))
        desk.take_in(cast(Incoming, looked_into))
        assert eventually(lambda: len(looked_into.refusals) == 1)  # it was given up meanwhile
    finally:
        desk.close(EpmeshError("over"))
        os.close(session_fd)
    assert late.refusals == []
    assert (stats.refused_unseen, stats.overloaded) == (1, 0)


def test_a_drivers_call_that_was_given_up_while_it_waited_is_forgotten() -> None:
    worker = _GroupWorker(cast(Any, SimpleNamespace(global_rank=0)), "ep", cast(Any, None))
    call = Given()
    worker.put(_Task(1, cast(Incoming, call)))
    assert worker.end(time.monotonic() + 5.0)
    assert len(call.refusals) == 1


def test_groups_that_are_no_more_keep_no_threads() -> None:
    groups = {"ep"}
    view = SimpleNamespace(has_group=groups.__contains__)
    session = SimpleNamespace(token=b"secret", driver_memory=None)
    comm = SimpleNamespace(global_rank=0, view=view, _rank_process=SimpleNamespace(session=session))
    driven, token = DrivenRank(cast(Any, comm)), make_token(b"secret", 1)

    def call(group: str) -> None:
        given = Given()
        driver_call = SimpleNamespace(token=token, group=group)
        given.request = SimpleNamespace(WhichOneof=lambda _: "driver_call", driver_call=driver_call)
        driven.handle(cast(Incoming, given))

    call("ep")
    ended = []
    for number in range(5):
        groups.add(f"g{number}")
        call(f"g{number}")
        ended.append(driven._workers[f"g{number}"]._thread)
        groups.remove(f"g{number}")
    groups.add("last")
    call("last")
    for thread in ended:
        thread.join(10)
    assert not any(thread.is_alive() for thread in ended)
    assert sorted(driven._workers) == ["ep", "last"]
    driven.close()
