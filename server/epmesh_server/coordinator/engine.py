"""Runs the membership machine: events in, actions out in order, nothing before its records are on disk."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from epmesh.errors import EpmeshError, MeshUnavailable
from epmesh.view import View
from epmesh_server.coordinator.log import Store
from epmesh_server.coordinator.metrics import CommitCounters
from epmesh_server.coordinator.outbox import Outbox
from epmesh_server.coordinator.watch import ViewBoard
from epmesh_server.membership import Membership, Record, ViewCommitted
from epmesh_server.membership.actions import (
    Action,
    Append,
    Done,
    EndSession,
    HeartbeatAck,
    NodeGranted,
    Note,
    Publish,
    Reply,
    Send,
)
from epmesh_server.membership.events import CloseSession, Event, Heartbeat, OpenSession, Stalled, Tick

_log = logging.getLogger(__name__)
_BEAT_S = 0.2
# Keepalive of nodes gives up after 1.5 s without an answer.
_STALL_S = 1.0

Answer = NodeGranted | Done


class Engine:
    """One machine, its store, and everybody who waits for something. One event loop only.

    The machine may be ahead of the disk; nobody hears of what is not durable. Events that come while records are
    written are taken in at once, and their records are written together with the next ones.
    """

    def __init__(self, machine: Membership, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._machine = machine
        self._store = store
        self._clock = clock
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._waiting: deque[Action] = deque()
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._beat_at = clock()
        self._closed = False
        self._failure: Exception | None = None
        self.board = ViewBoard(machine.view)
        self.counters = CommitCounters(machine.view)

    # What the services call --------------------------------------------------------------------------------------

    async def call(self, event: Callable[[int], Event]) -> Answer:
        """Takes a unary call in, `event` made of the number it gets, and waits for the answer.

        Raises:
            EpmeshError: it was refused.
        """
        number = next(self._numbers)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        if self._closed:
            future.set_exception(_stopping())
        try:
            self.submit(event(number))
            return await future
        finally:
            del self._calls[number]

    def node_id(self, slot: int) -> str | None:
        """The id of the node that a slot was given to, if it was."""
        return self._machine.node_id(slot)

    def knows(self, node_id: str) -> bool:
        """Whether a node of that id, alive or dead, has a slot."""
        return self._machine.knows(node_id)

    def open_session(self, slot: int, incarnation: int, epoch: int) -> tuple[int, Outbox]:
        """A node's control stream; returns its number and what is to be sent on it."""
        session = next(self._numbers)
        outbox = self._outboxes[session] = Outbox()
        self.submit(OpenSession(session, slot, incarnation, epoch))
        return session, outbox

    def close_session(self, session: int, *, orderly: bool) -> None:
        """The control stream ended."""
        del self._outboxes[session]
        self.submit(CloseSession(session, orderly))

    def submit(self, event: Event) -> None:
        """Takes one event in; never waits."""
        if self._closed or self._failure is not None:
            return
        now = self._clock()
        try:
            if now - self._beat_at > _BEAT_S + _STALL_S:
                self._beat_at = now
                self._take_in(Stalled(), now)
            self._take_in(event, now)
        except Exception as exc:  # noqa: BLE001 - half a step must not be gone on from; the log holds what was decided
            self._failure = exc
            self._wake.set()
            return
        if not isinstance(event, Heartbeat):  # that makes no deadline earlier, and there are many
            self._arm(now)

    # Running -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Writes records and keeps time until cancelled.

        Raises:
            MeshUnavailable: the log cannot be written.
            Exception: the machine failed, which is a bug; a restart goes on from the log.
        """
        self.submit(Tick())
        beat = asyncio.create_task(self._beat())
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                if self._failure is not None:
                    raise self._failure
                while self._waiting:
                    await self._write_some()
        finally:
            beat.cancel()
            self._close()

    def _close(self) -> None:
        """Nothing is decided any more: whoever waits is told."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_stopping())
        for outbox in self._outboxes.values():
            outbox.end(_stopping())
        self.board.close()

    async def _beat(self) -> None:
        """Notices when this process stood still: then the silence of others means nothing."""
        while True:
            await asyncio.sleep(_BEAT_S)
            self.submit(Tick())
            self._beat_at = self._clock()

    def _take_in(self, event: Event, now: float) -> None:
        for action in self._machine.step(event, now):
            if isinstance(action, Send) and isinstance(action.command, HeartbeatAck):
                self._carry_out(action)  # a lease does not wait for the disk
            elif self._waiting or isinstance(action, Append):
                self._waiting.append(action)
            else:
                self._carry_out(action)
        if self._waiting:
            self._wake.set()

    async def _write_some(self) -> None:
        """Writes what can be written together, then does all that waited for it."""
        records, count = _written_together(self._waiting)
        if records:
            await _to_the_end(asyncio.to_thread(self._store.append, records))
        for _ in range(count):
            action = self._waiting.popleft()
            if not isinstance(action, Append):
                self._carry_out(action)

    def _arm(self, now: float) -> None:
        """Sets the timer for the machine's next deadline."""
        deadline = self._machine.next_deadline()
        loop = asyncio.get_running_loop()
        when = None if deadline is None else loop.time() + max(0.0, deadline - now)
        if self._timer is not None:
            if when is not None and self._timer.when() <= when:
                return  # it comes early enough, and a tick that comes early does no harm
            self._timer.cancel()
        self._timer = None if when is None else loop.call_at(when, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.submit(Tick())

    # Carrying out ------------------------------------------------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
        self.counters.observe(action, self._clock())
        match action:
            case Send():
                if outbox := self._outboxes.get(action.session):
                    outbox.put(action.command)
            case Reply():
                self._reply(action)
            case EndSession():
                if outbox := self._outboxes.get(action.session):
                    outbox.end(action.error)
            case Publish():
                self.board.publish(action.view)
            case Note():
                _log.log(logging.WARNING if action.warning else logging.INFO, "%s", action.text)

    def _reply(self, action: Reply) -> None:
        future = self._calls.get(action.call)
        if future is None or future.done():
            return  # the caller went away
        if isinstance(action.result, EpmeshError):
            future.set_exception(action.result)
        else:
            future.set_result(action.result)

    @property
    def view(self) -> View:
        """The last committed view that is on disk."""
        return self.board.view


def _stopping() -> MeshUnavailable:
    return MeshUnavailable("the coordinator is stopping; the mesh goes on in its last epoch until one is back")


async def _to_the_end(writing: Coroutine[Any, Any, None]) -> None:
    """Waits for a write even when cancelled: the store must not be closed under it."""
    task = asyncio.create_task(writing)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise


def _written_together(waiting: deque[Action]) -> tuple[list[Record], int]:
    """Records for one write, at most one view among them, and how many actions are done with it."""
    records: list[Record] = []
    for count, action in enumerate(waiting):
        if isinstance(action, Append):
            if any(isinstance(record, ViewCommitted) for record in records):
                return records, count
            records.extend(action.records)
    return records, len(waiting)
