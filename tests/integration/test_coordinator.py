"""The coordinator over its real wire: sockets, streams, processes, a log on disk."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from epmesh.errors import InvalidRequest, MeshUnavailable, StaleEpoch
from epmesh.v1 import discovery_service_pb2 as discovery
from epmesh.v1 import group_service_pb2 as groups
from epmesh.v1 import membership_service_pb2 as pb
from epmesh.v1 import view_pb2
from epmesh_server.coordinator import CoordinatorSettings, run_coordinator, service
from epmesh_server.coordinator.log import LOG_NAME, FileStore
from tests.integration.raw_node import TIMEOUT_S, Client, RawNode, Running, coordinator, rank, typed

Test = Callable[[Running], Coroutine[Any, Any, None]]
TOGETHER_S = 0.5  # what a busy machine may have between two messages that are to be committed together


def run(data_dir: Path, test: Test, **settings: Any) -> None:
    """Runs `test` beside a coordinator."""

    async def main() -> None:
        async with asyncio.timeout(100), coordinator(data_dir, **settings) as running:
            await test(running)

    asyncio.run(main())


async def joined(address: str, *sizes: int) -> list[RawNode]:
    """Nodes with ranks of incarnation 1, all in one committed view, answering whatever comes."""
    nodes = [RawNode(address, f"node-{number}", number + 1) for number in range(len(sizes))]
    for node, size in zip(nodes, sizes, strict=True):
        await node.register()
        node.open()
        node.report(*(rank(node.slot * 8 + local) for local in range(size)))
        node.serving = asyncio.create_task(node.serve())
    await nodes[0].client.view_where(lambda view: count(view) == sum(sizes) and len(view.nodes) == len(sizes))
    return nodes


def count(view: view_pb2.View) -> int:
    return sum(len(node.ranks) for node in view.nodes)


# The protocol ----------------------------------------------------------------------------------------------------


def test_a_node_registers_reports_and_is_committed_step_by_step(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        node = RawNode(running.address, "a")
        granted = await node.register()
        assert (granted.slot, granted.stride, granted.heartbeat_interval_s, granted.lease_s) == (0, 8, 1.0, 3.0)
        assert (await node.client.view()).epoch == 0
        node.open()
        node.report(rank(0), rank(1))
        node.say(heartbeat=pb.Heartbeat(number=7))
        assert (await node.hear()).heartbeat.number == 7
        assert (await node.hear()).prepare == pb.Prepare(epoch=1)
        node.say(prepared=pb.Prepared(epoch=1))
        finish = (await node.hear()).finish
        assert (finish.epoch, list(finish.cuts), finish.abort, finish.members_unchanged) == (1, [], False, False)
        assert (await node.client.view()).epoch == 0
        node.say(finished=pb.Finished(epoch=1))
        view = (await node.hear()).commit.view
        assert (view.mesh_id, view.epoch, view.membership_epoch) == (granted.mesh_id, 1, 1)
        assert [(group.name, list(group.ranks)) for group in view.groups] == [("world", [0, 1]), ("ep", [0, 1])]
        assert await node.client.view() == view

    run(tmp_path, test, batch_window_s=TOGETHER_S)


def test_a_killed_rank_is_cut_out_at_the_cut(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        a, b = RawNode(running.address, "a", 1), RawNode(running.address, "b", 2)
        await a.join(rank(0))
        await b.join(rank(8), rank(9))
        assert count((await asyncio.gather(a.commit(), b.commit()))[0]) == 3
        b.report(rank(8))
        for node, begun, completed in ((a, 11, 9), (b, 12, 10)):
            command = await node.hear()
            assert command.prepare == pb.Prepare(epoch=2, lost_ranks=[9])
            node.answer(command, pb.GroupProgress(group_id=1, begun=begun, completed=completed))
        for node, completed in ((a, 11), (b, 10)):
            command = await node.hear()
            assert list(command.finish.cuts) == [pb.GroupCut(), pb.GroupCut(group_id=1, sequence=12)]
            assert command.finish.abort
            node.answer(command, pb.GroupProgress(group_id=1, begun=12, completed=completed))
        view = (await a.hear()).commit.view
        assert [(group.sequence, group.completed) for group in view.groups] == [(0, 0), (12, 10)]
        assert view.membership_epoch == 2

    run(tmp_path, test, batch_window_s=TOGETHER_S)


def test_a_broken_stream_is_a_dead_node(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        a, b = await joined(running.address, 2, 2)
        began = time.monotonic()
        b.break_off()
        view = await a.client.view_where(lambda view: count(view) == 2)
        assert time.monotonic() - began < 2.0  # four times what survivors are promised
        assert [node.node_id for node in view.nodes] == ["node-0"]
        assert any(command.prepare.lost_ranks == [8, 9] for command in a.heard)

    run(tmp_path, test)


@pytest.mark.fault
def test_a_killed_process_is_dead_and_did_not_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def test(running: Running) -> None:
        (a,) = await joined(running.address, 1)
        for number in range(3):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _NODE, running.address, str(number + 100), stdout=subprocess.PIPE
            )
            await a.client.view_where(lambda view: len(view.nodes) == 2)
            child.send_signal(signal.SIGKILL)
            await child.wait()
            await a.client.view_where(lambda view: len(view.nodes) == 1)

    run(tmp_path, test)
    assert sum("control stream broke" in record.message for record in caplog.records) == 3
    assert not any("left" in record.message for record in caplog.records)


_NODE = """
import asyncio, sys
from tests.integration.raw_node import RawNode

async def main():
    node = RawNode(sys.argv[1], "child", int(sys.argv[2]))
    await node.join()
    await node.serve()

asyncio.run(main())
"""


@pytest.mark.fault
def test_a_stopped_process_is_noticed_before_its_lease_ends_and_a_busy_one_is_left_alone(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _BUSY_NODE, running.address, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        client = Client(running.address)
        await client.view_where(lambda view: len(view.nodes) == 1)
        assert await child.stdout.readline() == b"was busy\n"
        assert len((await client.view()).nodes) == 1
        child.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        await client.view_where(lambda view: not view.nodes)
        assert time.monotonic() - began < 8.0  # four times what is promised
        child.kill()
        await child.wait()

    run(tmp_path, test, min_nodes=0, lease_s=60.0)


# Holds its interpreter lock for longer than a ping may take.
_BUSY_NODE = """
import asyncio, ctypes, sys
from tests.integration.raw_node import RawNode

async def main():
    node = RawNode(sys.argv[1], "child")
    await node.join()
    await node.commit()
    ctypes.PyDLL(None).sleep(3)
    print("was busy", flush=True)
    await node.serve()

asyncio.run(main())
"""


def test_a_node_that_ends_its_side_leaves_in_good_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def test(running: Running) -> None:
        (a,) = await joined(running.address, 1)
        epoch = (await a.client.view()).epoch
        a.leave()
        await a.ended()
        assert (await Client(running.address).view_where(lambda view: not view.nodes)).epoch == epoch + 1

    run(tmp_path, test)
    assert any("node 'node-0' (slot 0) left" in record.message for record in caplog.records)


def test_a_node_without_heartbeats_is_told_that_it_is_dead(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        node = RawNode(running.address, "a")
        await node.join(rank(0))
        await node.commit()
        while (command := await node.hear()).WhichOneof("command") != "evict":
            pass
        assert "no sign of life for 1 s" in command.evict.error.message
        assert not command.evict.ranks
        with pytest.raises(MeshUnavailable, match="must join again"):
            await node.ended()

    run(tmp_path, test, lease_s=1.0, heartbeat_interval_s=0.1)


def test_a_refused_rank_is_named_with_the_reason(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        node = RawNode(running.address, "a")
        declared = [pb.ExpertDeclaration(num_experts=8, linear=True)]
        other = [pb.ExpertDeclaration(num_experts=6, linear=True)]
        await node.join(rank(0, experts=declared), rank(1, 5, experts=other))
        evict = (await node.hear()).evict
        assert list(evict.ranks) == [pb.RankIncarnation(rank=1, incarnation=5)]
        assert "num_experts=6" in evict.error.message
        assert count(await node.commit()) == 1

    run(tmp_path, test, batch_window_s=TOGETHER_S)


# Watching --------------------------------------------------------------------------------------------------------


def test_a_watch_begins_after_the_epoch_it_knows(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        a, _ = await joined(running.address, 1, 1)
        epoch = (await a.client.view()).epoch
        watch = a.client.discovery.WatchViews(discovery.WatchViewsRequest(after_epoch=epoch), timeout=TIMEOUT_S)
        waiting = asyncio.ensure_future(watch.read())
        await typed(a.client.groups.CreateGroup(groups.CreateGroupRequest(name="g", ranks=[8, 0]), timeout=TIMEOUT_S))
        first = await waiting
        assert isinstance(first, discovery.WatchViewsResponse)
        assert first.view.epoch == epoch + 1
        assert first.view.membership_epoch == epoch
        assert list(first.view.groups[-1].ranks) == [8, 0]

    run(tmp_path, test)


def test_health_is_answered_for_both_names(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        stub: Any = health_pb2_grpc.HealthStub(Client(running.address).channel)
        for name in ("", "epmesh.coordinator"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    run(tmp_path, test)


# Groups ----------------------------------------------------------------------------------------------------------


def test_groups_and_placements_are_answered_when_they_are_committed(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        a, _ = await joined(running.address, 2, 2)
        stub = a.client.groups
        request = groups.CreateGroupRequest(request_id="all", name="odd", ranks=[9, 1])
        answers = await asyncio.gather(*(stub.CreateGroup(request, timeout=TIMEOUT_S) for _ in range(4)))
        assert {answer.epoch for answer in answers} == {(await a.client.view()).epoch}
        listed = await stub.ListGroups(groups.ListGroupsRequest(), timeout=TIMEOUT_S)
        assert [group.name for group in listed.groups] == ["world", "ep", "odd"]

        placement = view_pb2.Placement(layer=3, num_experts=4)
        placement.holders.add(rank=0, experts=[0, 1, 2, 3])
        wanted = groups.SetExpertPlacementRequest(request_id="p", placement=placement)
        placed = await stub.SetExpertPlacement(wanted, timeout=TIMEOUT_S)
        view = await a.client.view()
        assert (view.epoch, list(view.placements)) == (placed.epoch, [placement])

        gone = await stub.DestroyGroup(groups.DestroyGroupRequest(request_id="d", name="odd"), timeout=TIMEOUT_S)
        assert gone.epoch == placed.epoch + 1
        assert view.membership_epoch == (await a.client.view()).membership_epoch

    run(tmp_path, test)


def test_a_refusal_comes_out_typed(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        (a,) = await joined(running.address, 1)
        with pytest.raises(InvalidRequest, match="rank 77 is not in the mesh"):
            await typed(a.client.groups.CreateGroup(groups.CreateGroupRequest(name="g", ranks=[77]), timeout=20))
        bad = view_pb2.Placement(num_experts=2)
        bad.holders.add(rank=0, experts=[5])
        with pytest.raises(InvalidRequest, match="expert 5"):
            await typed(a.client.groups.SetExpertPlacement(groups.SetExpertPlacementRequest(placement=bad), timeout=20))

    run(tmp_path, test)


def test_too_few_nodes_fail_calls_and_the_mesh_recovers(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        a, b = await joined(running.address, 1, 1)
        b.break_off()
        with pytest.raises(MeshUnavailable, match="only 1 of the 2 nodes"):
            await place_until_refused(a.client)
        again = RawNode(running.address, "node-1", 9)
        await again.join(rank(8, 9))
        serving = asyncio.create_task(again.serve())
        await a.client.view_where(lambda view: count(view) == 2 and view.nodes[1].incarnation == 9)
        serving.cancel()

    run(tmp_path, test, min_nodes=2)


async def place_until_refused(client: Client) -> None:
    """Sets ever new placements."""
    for num_experts in range(1, 10_000):
        request = groups.SetExpertPlacementRequest(placement=view_pb2.Placement(num_experts=num_experts))
        await typed(client.groups.SetExpertPlacement(request, timeout=TIMEOUT_S))


# Bad input -------------------------------------------------------------------------------------------------------


def test_a_second_node_with_a_live_nodes_id_is_refused(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        await joined(running.address, 1)
        with pytest.raises(InvalidRequest, match=r"live node 'node-0' at 127.0.0.1:7400 has slot 0"):
            await RawNode(running.address, "node-0", 99).register()

    run(tmp_path, test)


def test_a_node_of_another_version_is_refused(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        with pytest.raises(InvalidRequest, match=r"99\.1"):
            await RawNode(running.address, "a").register(version="99.1.0")

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("first", "text"),
    [
        ({"heartbeat": pb.Heartbeat(number=1)}, "first message"),
        ({"hello": pb.Hello(slot=9, incarnation=1)}, "slot 9 was never given"),
        ({"hello": pb.Hello(slot=0, incarnation=2)}, "another incarnation"),
        ({"hello": pb.Hello(slot=0, incarnation=1, epoch=5)}, "lost its log"),
    ],
)
def test_a_stream_that_begins_wrongly_is_refused(tmp_path: Path, first: dict[str, Any], text: str) -> None:
    async def test(running: Running) -> None:
        node = RawNode(running.address, "a")
        await node.register()
        node.open_raw()
        node.say(**first)
        with pytest.raises(InvalidRequest, match=text):
            await node.hear()

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("report", "text"),
    [
        ({"hello": pb.Hello(slot=0, incarnation=1)}, "one hello"),
        ({"ranks": pb.RankReport(ranks=[rank(0, mode=77)])}, "mode 77"),
        ({"ranks": pb.RankReport(ranks=[pb.RankDeclaration()] * 16_385)}, "16385 ranks"),
    ],
)
def test_garbage_on_a_stream_ends_it(tmp_path: Path, report: dict[str, Any], text: str) -> None:
    async def test(running: Running) -> None:
        node = RawNode(running.address, "a")
        await node.join()
        await node.commit()
        node.say(**report)
        with pytest.raises(InvalidRequest, match=text):
            await node.hear()

    run(tmp_path, test)


def test_a_stream_that_says_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_HELLO_TIMEOUT_S", 0.05)

    async def test(running: Running) -> None:
        node = RawNode(running.address, "a")
        node.open_raw()
        with pytest.raises(InvalidRequest, match="must be hello, sent at once"):
            await node.hear()

    run(tmp_path, test)


def test_a_port_in_use_is_named_with_the_mend(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = CoordinatorSettings(data_dir=tmp_path, port=port)
        with pytest.raises(InvalidRequest, match=rf"127.0.0.1:{port}: port {port} is in use; .*--port"):
            asyncio.run(run_coordinator(settings, asyncio.Event(), pytest.fail))
    FileStore(tmp_path).close()  # and nothing is held


def test_an_address_of_another_machine_is_named_with_the_mend(tmp_path: Path) -> None:
    settings = CoordinatorSettings(data_dir=tmp_path, port=0, host="192.0.2.1", insecure=True)
    with pytest.raises(InvalidRequest, match=r"192\.0\.2\.1.*--host"):
        asyncio.run(run_coordinator(settings, asyncio.Event(), pytest.fail))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "some-host"])
def test_a_host_that_others_reach_needs_to_be_asked_for(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidRequest, match="--insecure"):
        CoordinatorSettings(data_dir=tmp_path, host=host)
    assert CoordinatorSettings(data_dir=tmp_path, host=host, insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_nothing(tmp_path: Path, host: str) -> None:
    assert CoordinatorSettings(data_dir=tmp_path, host=host).address(5).endswith(":5")


@pytest.mark.parametrize("wrong", [{"port": -1}, {"port": 65_536}, {"stride": 0}, {"lease_s": 0.0}, {"min_nodes": -2}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        CoordinatorSettings(data_dir=tmp_path, **wrong)


def test_two_coordinators_never_share_a_directory(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        settings = CoordinatorSettings(data_dir=tmp_path, port=0)
        with pytest.raises(InvalidRequest, match=f"process {os.getpid()}"):
            await run_coordinator(settings, asyncio.Event(), pytest.fail)

    run(tmp_path, test)


def test_a_log_of_another_stride_is_refused(tmp_path: Path) -> None:
    async def nothing(running: Running) -> None:
        pass

    run(tmp_path, nothing)
    with pytest.raises(InvalidRequest, match="--stride 8"):
        run(tmp_path, nothing, stride=4)


# Starting and stopping -------------------------------------------------------------------------------------------


def test_a_restart_goes_on_where_the_log_ends(tmp_path: Path) -> None:
    views: list[view_pb2.View] = []

    async def first(running: Running) -> None:
        (a,) = await joined(running.address, 2)
        views.append(await a.client.view())

    async def second(running: Running) -> None:
        assert await Client(running.address).view() == views[0]
        node = RawNode(running.address, "node-0", 1)
        granted = await node.register()
        assert (granted.slot, granted.mesh_id) == (0, views[0].mesh_id)
        node.open(epoch=views[0].epoch)
        node.report(rank(0), rank(1))
        serving = asyncio.create_task(node.serve())
        answer = await typed(
            node.client.groups.CreateGroup(groups.CreateGroupRequest(name="g", ranks=[1, 0]), timeout=20)
        )
        assert answer.epoch == views[0].epoch + 1
        assert (await node.client.view()).membership_epoch == views[0].membership_epoch
        serving.cancel()

    run(tmp_path, first)
    run(tmp_path, second)


def test_a_node_that_missed_a_view_gets_it_with_its_stream(tmp_path: Path) -> None:
    async def test(running: Running) -> None:
        (a,) = await joined(running.address, 1)
        view = await a.client.view()
        late = RawNode(running.address, "late", 50)
        await late.register()
        late.open()
        assert (await late.hear()).commit.view == view

    run(tmp_path, test)


def test_stopping_ends_everything_within_a_second_and_tells_everybody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(running: Running) -> None:
        node = RawNode(running.address, "a")
        await node.join(rank(0))
        await node.commit()
        watch = node.client.discovery.WatchViews(discovery.WatchViewsRequest())
        await watch.read()
        pending = asyncio.create_task(
            typed(node.client.groups.CreateGroup(groups.CreateGroupRequest(name="g", ranks=[0]), timeout=20))
        )
        assert (await node.hear()).prepare.epoch == 2  # and it is never answered
        began = time.monotonic()
        running.stop.set()
        await running.task
        assert time.monotonic() - began < 4 * 1.0
        with pytest.raises(MeshUnavailable, match="stopping"):
            await pending
        with pytest.raises(MeshUnavailable, match="stopping"):
            await node.hear()
        with pytest.raises(grpc.aio.AioRpcError, match="stopping"):
            await watch.read()

    run(tmp_path, test, batch_window_s=TOGETHER_S)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    # gRPC's poller may still tell of calls of an earlier test, whose event loop is closed.
    assert [record for record in errors if "PollerCompletionQueue" not in record.getMessage()] == []


def test_a_log_that_cannot_be_written_stops_the_coordinator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(running: Running) -> None:
        await RawNode(running.address, "a").register()
        monkeypatch.setattr(FileStore, "append", _full)
        with pytest.raises(MeshUnavailable):
            await RawNode(running.address, "b").register()
        with pytest.raises(MeshUnavailable, match="No space left"):
            await running.task

    run(tmp_path, test)


def _full(self: FileStore, records: object) -> None:
    raise MeshUnavailable("log cannot be written: No space left on device")


@pytest.mark.fault
@pytest.mark.parametrize("acknowledged", [1, 7, 23])
def test_no_acknowledged_registration_is_lost_when_the_coordinator_is_killed(tmp_path: Path, acknowledged: int) -> None:
    async def main() -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _COORDINATOR, str(tmp_path), stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        address = (await asyncio.wait_for(child.stdout.readline(), 30)).decode().strip()
        slots: dict[int, int] = {}

        async def register(number: int) -> None:
            granted = await RawNode(address, f"node-{number}", number + 1).register()
            slots[number] = granted.slot
            if len(slots) == acknowledged:
                child.send_signal(signal.SIGKILL)

        await asyncio.gather(*(register(number) for number in range(40)), return_exceptions=True)
        await child.wait()
        assert len(slots) >= acknowledged
        async with coordinator(tmp_path) as running:
            for number, slot in slots.items():
                assert (await RawNode(running.address, f"node-{number}", number + 1).register()).slot == slot

    asyncio.run(main())


_COORDINATOR = """
import asyncio, sys
from pathlib import Path
from epmesh_server.coordinator import CoordinatorSettings, run_coordinator

settings = CoordinatorSettings(data_dir=Path(sys.argv[1]), port=0)
asyncio.run(run_coordinator(settings, asyncio.Event(), lambda address: print(address, flush=True)))
"""


def test_what_a_killed_node_had_evicted_stays_out_after_a_restart(tmp_path: Path) -> None:
    async def first(running: Running) -> None:
        a, b = await joined(running.address, 1, 1)
        b.break_off()
        await a.client.view_where(lambda view: count(view) == 1)

    async def second(running: Running) -> None:
        nodes = [RawNode(running.address, f"node-{number}", number + 1) for number in range(2)]
        await nodes[0].register()
        nodes[0].open(epoch=2)
        nodes[0].report(rank(0))
        await nodes[1].register()
        nodes[1].open(epoch=1)
        nodes[1].report(rank(8))
        while (command := await nodes[1].hear()).WhichOneof("command") != "evict":
            nodes[1].answer(command)
        assert list(command.evict.ranks) == [pb.RankIncarnation(rank=8, incarnation=1)]
        assert StaleEpoch(0).to_proto().code == command.evict.error.code

    run(tmp_path, first)
    run(tmp_path, second)
    assert (tmp_path / LOG_NAME).stat().st_size > 0


def test_the_coordinator_needs_no_torch() -> None:
    code = "import sys, epmesh_server.coordinator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=200, check=False).returncode == 0
