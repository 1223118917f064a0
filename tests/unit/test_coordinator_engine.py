"""The shell around the machine: nothing is heard before it is on disk, and nobody slow holds anybody up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, Overloaded, StaleEpoch
from epmesh.placement import Placement
from epmesh.v1 import discovery_service_pb2 as discovery
from epmesh.view import View
from epmesh_server.coordinator.engine import Engine
from epmesh_server.coordinator.log import MemoryStore
from epmesh_server.coordinator.outbox import MAX_COMMANDS, Outbox
from epmesh_server.coordinator.watch import ViewBoard
from epmesh_server.membership import (
    Membership,
    MeshCreated,
    NodeRegistered,
    Record,
    Registration,
)
from epmesh_server.membership.actions import Command, Commit, Done, Evict, Finish, HeartbeatAck, NodeGranted, Prepare
from epmesh_server.membership.events import (
    Event,
    Finished,
    Heartbeat,
    Prepared,
    RegisterNode,
    SetPlacement,
    Stalled,
    Tick,
)
from tests.unit.fake_mesh import SETTINGS, VERSION, fold


class Disk(MemoryStore):
    """A store whose writes wait until a test lets them go."""

    def __init__(self) -> None:
        super().__init__([MeshCreated("mesh", SETTINGS.stride)])
        self.writes: list[list[Record]] = []
        self.free = threading.Event()
        self.free.set()
        self.failure: EpmeshError | None = None

    def append(self, records: Sequence[Record]) -> None:
        assert self.free.wait(10)
        if self.failure:
            raise self.failure
        self.writes.append(list(records))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def running(disk: Disk, clock: Clock) -> AsyncIterator[Engine]:
    engine = Engine(Membership(SETTINGS, fold(disk.load()), clock()), disk, clock)
    task = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        disk.free.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def run(test: Callable[[Engine, Disk, Clock], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        disk, clock = Disk(), Clock()
        async with asyncio.timeout(20), running(disk, clock) as engine:
            await test(engine, disk, clock)

    asyncio.run(main())


def registering(number: int) -> Callable[[int], Event]:
    return lambda call: RegisterNode(call, Registration(f"n{number}", number + 1, "h:1", VERSION))


# The engine ------------------------------------------------------------------------------------------------------


def test_no_answer_goes_out_before_its_record_is_on_disk() -> None:
    async def test(engine: Engine, disk: Disk, clock: Clock) -> None:
        disk.free.clear()
        call = asyncio.create_task(engine.call(registering(0)))
        done, _ = await asyncio.wait((call,), timeout=0.05)
        assert not done
        disk.free.set()
        assert await call == NodeGranted(0)
        assert [type(record) for record in disk.writes[0]] == [NodeRegistered]

    run(test)


def test_what_comes_while_the_disk_is_busy_is_written_together() -> None:
    async def test(engine: Engine, disk: Disk, clock: Clock) -> None:
        disk.free.clear()
        calls = [asyncio.create_task(engine.call(registering(number))) for number in range(50)]
        await asyncio.wait(calls, timeout=0.05)
        disk.free.set()
        assert await asyncio.gather(*calls) == [NodeGranted(number) for number in range(50)]
        assert len(disk.writes) <= 3
        assert sum(map(len, disk.writes)) == 50

    run(test)


def test_a_heartbeat_is_answered_while_the_disk_is_busy() -> None:
    async def test(engine: Engine, disk: Disk, clock: Clock) -> None:
        await engine.call(registering(0))
        session, outbox = engine.open_session(0, 1, 0)
        disk.free.clear()
        call = asyncio.create_task(engine.call(registering(1)))
        await asyncio.sleep(0)
        engine.submit(Heartbeat(session, 5))
        assert await outbox.get() == HeartbeatAck(5)
        assert not call.done()
        disk.free.set()
        await call

    run(test)


async def held_back(engine: Engine, disk: Disk, outbox: Outbox, event: Event) -> Command | EpmeshError:
    """What `event` leads to; nobody hears of it while the disk is busy."""
    disk.free.clear()
    engine.submit(event)
    waiting = asyncio.create_task(outbox.get())
    done, _ = await asyncio.wait((waiting,), timeout=0.05)
    assert not done
    assert engine.view.epoch == 0
    disk.free.set()
    return await waiting


def test_nobody_hears_of_an_epoch_or_a_view_that_is_not_on_disk() -> None:
    async def test(engine: Engine, disk: Disk, clock: Clock) -> None:
        await engine.call(registering(0))
        session, outbox = engine.open_session(0, 1, 0)
        clock.now += 0.1
        prepare = await held_back(engine, disk, outbox, Tick())
        engine.submit(Prepared(session, 1))
        finish = await outbox.get()
        commit = await held_back(engine, disk, outbox, Finished(session, 1))
        heard = (prepare, finish, commit)
        assert [type(command) for command in heard] == [Prepare, Finish, Commit]
        assert engine.view.epoch == 1

    run(test)


def test_a_caller_that_goes_away_is_forgotten() -> None:
    async def test(engine: Engine, disk: Disk, clock: Clock) -> None:
        disk.free.clear()
        call = asyncio.create_task(engine.call(registering(0)))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        disk.free.set()
        assert await engine.call(registering(0)) == NodeGranted(0)
        assert not engine._calls

    run(test)


def test_a_refusal_is_raised_where_it_was_called() -> None:
    async def test(engine: Engine, disk: Disk, clock: Clock) -> None:
        with pytest.raises(InvalidRequest, match="global ranks are"):
            await engine.call(lambda call: SetPlacement(call, "", None, Placement(2, {99_999: (0,)})))

    run(test)


def test_time_goes_by_by_itself() -> None:
    async def main() -> None:
        disk = Disk()
        engine = Engine(Membership(SETTINGS, fold(disk.load()), asyncio.get_running_loop().time()), disk)
        task = asyncio.create_task(engine.run())
        answer = await asyncio.wait_for(
            engine.call(lambda call: SetPlacement(call, "", None, Placement(2, {0: (0, 1)}))), 10
        )
        assert answer == Done(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())


def test_a_standstill_is_noticed_before_anything_else_is_believed() -> None:
    async def test(engine: Engine, disk: Disk, clock: Clock) -> None:
        events: list[Event] = []
        step = engine._machine.step

        def recorded(event: Event, now: float) -> Any:
            events.append(event)
            return step(event, now)

        engine._machine.step = recorded  # type: ignore[method-assign]
        clock.now += 1.1
        engine.submit(Tick())
        assert events == [Tick()]
        clock.now += 0.2
        engine.submit(Tick())
        assert events == [Tick(), Stalled(), Tick()]

    run(test)


@pytest.mark.parametrize("broken", ["disk", "machine"])
def test_after_a_failure_nothing_goes_on(broken: str) -> None:
    async def main() -> None:
        disk, clock = Disk(), Clock()
        engine = Engine(Membership(SETTINGS, fold(disk.load()), clock()), disk, clock)
        task = asyncio.create_task(engine.run())
        _, outbox = engine.open_session(9, 9, 9)
        await asyncio.sleep(0)
        if broken == "disk":
            disk.failure = MeshUnavailable("disk full")
        else:
            engine._machine.step = _fail  # type: ignore[method-assign]
        with pytest.raises(MeshUnavailable, match="stopping"):
            await engine.call(registering(0))
        with pytest.raises((MeshUnavailable, ZeroDivisionError)):
            await task
        with pytest.raises(MeshUnavailable, match="stopping"):
            await engine.call(registering(1))
        with pytest.raises(MeshUnavailable, match="stopping"):
            await engine.board.after(0)
        assert isinstance(await outbox.get(), EpmeshError)

    asyncio.run(main())


def _fail(event: Event, now: float) -> Any:
    raise ZeroDivisionError


# On its way to a node --------------------------------------------------------------------------------------------


def queued(*commands: Command) -> list[Command]:
    outbox = Outbox()
    for command in commands:
        outbox.put(command)
    return outbox._commands


def view(epoch: int) -> View:
    return View("mesh", epoch, epoch, 8)


def test_a_node_that_reads_gets_everything_in_order() -> None:
    async def main() -> None:
        outbox = Outbox()
        commands: list[Command] = [Prepare(1, ()), Finish(1, (), False, False, 1.0), Commit(view(1)), HeartbeatAck(1)]
        for command in commands:
            outbox.put(command)
            assert await outbox.get() is command

    asyncio.run(main())


def test_a_node_that_does_not_read_gets_only_what_still_matters() -> None:
    finish = Finish(3, (), False, False, 1.0)
    assert queued(Prepare(2, ()), Prepare(3, (1,)), finish) == [finish]
    assert queued(Commit(view(1)), Prepare(2, ()), Commit(view(2))) == [Commit(view(2))]
    assert queued(Commit(view(1)), Prepare(2, ())) == [Commit(view(1)), Prepare(2, ())]
    assert queued(Prepare(5, ()), Commit(view(4))) == [Prepare(5, ()), Commit(view(4))]
    assert queued(HeartbeatAck(1), Commit(view(1)), HeartbeatAck(2)) == [Commit(view(1)), HeartbeatAck(2)]
    evict = Evict(StaleEpoch(1), ((8, 1),))
    other = Evict(StaleEpoch(1), ((9, 1),))
    assert queued(evict, other, Commit(view(1)), evict) == [other, Commit(view(1)), evict]


def test_a_node_that_never_reads_is_ended() -> None:
    async def main() -> None:
        outbox = Outbox()
        for number in range(MAX_COMMANDS + 1):
            outbox.put(Evict(StaleEpoch(1), ((number, 1),)))
        assert isinstance(await outbox.get(), Overloaded)

    asyncio.run(main())


def test_what_was_sent_before_the_end_still_arrives() -> None:
    async def main() -> None:
        outbox = Outbox()
        outbox.put(HeartbeatAck(1))
        outbox.end(StaleEpoch(1))
        outbox.end(InvalidRequest("too late"))
        assert await outbox.get() == HeartbeatAck(1)
        assert isinstance(await outbox.get(), StaleEpoch)
        assert isinstance(await outbox.ended(), StaleEpoch)

    asyncio.run(main())


# Watching --------------------------------------------------------------------------------------------------------


def test_a_watcher_that_was_busy_gets_the_newest_view_alone() -> None:
    async def main() -> None:
        board = ViewBoard(view(0))
        seen: list[int] = []
        saw = asyncio.Event()

        async def watch() -> None:
            while not seen or seen[-1] < 4:
                await board.after(seen[-1] if seen else 0)
                seen.append(discovery.WatchViewsResponse.FromString(board.encoded).view.epoch)
                saw.set()

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0)
        for epoch in (1, 2, 3):
            board.publish(view(epoch))
        await saw.wait()
        board.publish(view(4))
        await watching
        assert seen == [3, 4]

    asyncio.run(main())


def test_a_view_is_encoded_once_for_all() -> None:
    board = ViewBoard(view(7))
    assert board.encoded is board.encoded
    assert discovery.GetViewResponse.FromString(board.encoded).view == view(7).to_proto()
