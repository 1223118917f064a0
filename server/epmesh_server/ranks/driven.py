"""A rank that a driver in another process uses: executes its calls on the rank's communicators.

Calls of one group are executed one after the other, on a thread of the group's own, those of different groups side by
side. Whatever is wrong with a call that all members make is made known to them, as if it had been made here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from epmesh.driver_memory import DriverMemory
from epmesh.errors import (
    DeadlineExceeded,
    EpmeshError,
    InvalidRequest,
    MeshUnavailable,
    Overloaded,
    Unauthenticated,
)
from epmesh.v1 import front_pb2
from epmesh_server.driver_tokens import verify_token
from epmesh_server.ranks.communicator import JoinedCommunicator
from epmesh_server.ranks.driver_calls import OpenHandles, OpenReceives, Outcome, describe, encoded_view, execute
from epmesh_server.ranks.driver_tensors import read_tensors, write_tensors
from epmesh_server.ranks.front import Front, Incoming

_log = logging.getLogger(__name__)
_MAX_QUEUED = 64  # calls of one group; a driver that waits for its answers has one
_MAX_UNKNOWN = 64  # groups with a thread, beyond which one must be in the view to get another
_END_POLL_S = 1.0
_DRAIN_S, _END_WITHIN_S = 0.3, 5.0


def drive(comm: JoinedCommunicator, front: Front, stop: threading.Event | None = None) -> None:
    """Executes what the rank's drivers ask for; returns once the rank's membership is over.

    Args:
        comm: the rank's communicator of the group ``ep``.
        front: the rank's, identified; its requests are handled here from now on.
        stop: ends it earlier.
    """
    driven = DrivenRank(comm)
    front.handle(driven.handle)
    session = comm._rank_process.session
    try:
        while not (stop is not None and stop.is_set()) and not session.wait_ended(_END_POLL_S if stop is None else 0.1):
            pass
    finally:
        driven.close()


@dataclass(frozen=True)
class _Task:
    """One call, verified."""

    number: int
    incoming: Incoming


class DrivenRank:
    """Hands calls to the threads of their groups. `handle` is called on the front's thread and never waits."""

    def __init__(self, comm: JoinedCommunicator) -> None:
        """Waits for the first driver of the rank whose ``ep`` is `comm`."""
        self._comm = comm
        self._session = comm._rank_process.session
        self._number = 0  # highest driver number seen
        self._workers: dict[str, _GroupWorker] = {}
        self._memory = _Memory(self._session.driver_memory)
        self._closed = False

    def handle(self, incoming: Incoming) -> None:
        """Takes one request.

        Raises:
            InvalidRequest: it is no driver's call.
            Unauthenticated: the token is not that of the newest driver.
            Overloaded: too many calls of the group wait.
            MeshUnavailable: the membership is over.
        """
        if self._closed:
            raise MeshUnavailable(f"rank {self._comm.global_rank} is no member any more; attach again")
        if incoming.request.WhichOneof("request") != "driver_call":
            raise InvalidRequest("this rank is in mode exchange; it takes the calls of its driver, and no others")
        call = incoming.request.driver_call
        number = verify_token(self._session.token, call.token)
        if number < self._number:
            raise Unauthenticated("this driver's hold on the rank is over; attach again")
        self._number = number
        worker = self._workers.get(call.group)
        if worker is None:
            self._retire()
            if not self._comm.view.has_group(call.group) and len(self._workers) >= _MAX_UNKNOWN:
                raise InvalidRequest(f"there is no group {call.group[:80]!r}")
            worker = self._workers[call.group] = _GroupWorker(self._comm, call.group, self._memory)
        worker.put(_Task(number, incoming))

    def _retire(self) -> None:
        """Lets the threads of groups go that are no more, after what they have to do."""
        for group in [group for group in self._workers if not self._comm.view.has_group(group)]:
            self._workers.pop(group).end(0.0)

    def close(self) -> None:
        """Refuses what comes later; what is under way has a moment to end well, and is given up then."""
        self._closed = True
        workers = list(self._workers.values())
        deadline = time.monotonic() + _DRAIN_S
        ended = [worker.end(deadline) for worker in workers]  # all of them: each is to take no more
        if not all(ended):
            self._session.give_up(MeshUnavailable(f"rank {self._comm.global_rank} is leaving; attach again"))
            deadline = time.monotonic() + _END_WITHIN_S
            for worker in workers:
                worker.end(deadline)
        self._memory.close()


class _GroupWorker:
    """Executes the calls of one group."""

    def __init__(self, comm: JoinedCommunicator, group: str, memory: _Memory) -> None:
        self._root = comm
        self._group = group
        self._memory = memory
        self._number = 0  # of the driver whose handles and receives these are
        self._handles, self._receives = OpenHandles(), OpenReceives()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"epmesh-driven-{group[:32]}", daemon=True)
        self._thread.start()

    def put(self, task: _Task) -> None:
        if self._tasks.qsize() >= _MAX_QUEUED:
            raise Overloaded(0.1, f"{_MAX_QUEUED} calls of group {self._group!r} wait; make one after the other")
        self._tasks.put(task)

    def end(self, deadline: float) -> bool:
        """Takes no more; says whether what is under way ended before `deadline`."""
        self._tasks.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if task.incoming.cancelled:
                task.incoming.refuse(DeadlineExceeded(self._root.global_rank))  # nobody hears it; the front forgets it
                continue
            try:
                self._serve(task)
            except EpmeshError as exc:
                task.incoming.refuse(exc)
            except Exception as exc:  # noqa: BLE001 - the thread must go on, whatever a call does
                _log.exception("rank=%d group=%s driver.failed", self._root.global_rank, self._group)
                rank = self._root.global_rank
                task.incoming.refuse(EpmeshError(f"rank {rank} failed: {type(exc).__name__}: {exc}"))

    def _serve(self, task: _Task) -> None:
        request = task.incoming.request
        memory = self._memory.of(task.number, request.driver_call)
        if memory is not None:
            memory.free(request.released)  # first: what the driver has read is free even if the call comes to nothing
        comm = self._root.group(self._group)
        assert isinstance(comm, JoinedCommunicator)
        if task.number != self._number:
            self._number = task.number
            self._handles.clear()
            self._receives.clear(comm)
            comm.begin_anew()
        outcome = execute(
            comm,
            request.driver_call,
            lambda: read_tensors(task.incoming, memory, comm.device),
            self._handles,
            self._receives,
        )
        self._answer(task.incoming, comm, outcome, memory)

    def _answer(
        self, incoming: Incoming, comm: JoinedCommunicator, outcome: Outcome, memory: DriverMemory | None
    ) -> None:
        result = front_pb2.DriverResult(
            epoch=comm.epoch, sequence=outcome.sequence, completed=outcome.completed, nothing=outcome.nothing
        )
        tensors = list(outcome.tensors)
        if outcome.describes is not None:
            result.description.CopyFrom(describe(outcome.describes))
            tensors.append(encoded_view(outcome.describes))
        metas, places, frames = write_tensors(tensors, memory)
        response = front_pb2.FrontResponse(tensors=metas, places=places, driver_result=result)
        incoming.answer(response, frames)


class _Memory:
    """The memory shared with the newest driver that has some. Usable from any thread."""

    def __init__(self, fetch: Callable[[bytes], DriverMemory]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()  # guards what follows
        self._number = 0
        self._memory: DriverMemory | None = None

    def of(self, number: int, call: front_pb2.DriverCall) -> DriverMemory | None:
        """The memory of the driver that made `call`, `None` where it has none."""
        if not call.shared_memory:
            return None
        with self._lock:
            if self._memory is None or self._number < number:
                self._drop()
                self._memory, self._number = self._fetch(call.token), number
            return self._memory

    def close(self) -> None:
        """Unmaps it."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory = None
