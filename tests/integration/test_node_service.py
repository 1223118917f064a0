"""The node service over its real sockets: a fake coordinator on one side, raw ranks on the other."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, StaleEpoch, Unauthenticated
from epmesh.v1 import (
    discovery_service_pb2,
    discovery_service_pb2_grpc,
    group_service_pb2,
    group_service_pb2_grpc,
    membership_service_pb2,
    rank_service_pb2,
    rank_service_pb2_grpc,
    store_service_pb2,
    store_service_pb2_grpc,
)
from epmesh_server.testing.ports import Port
from tests.integration.fake_coordinator import EP, FakeCoordinator, serving
from tests.integration.node_under_test import mesh, node_service, typed
from tests.integration.rank_process import rank_process
from tests.integration.raw_rank import RawRank
from tests.integration.waiting import PATIENCE_S, on_event_loop, soon, until

STOPPED_BOUND_S = 4 * 2.0  # four times what is promised for a stopped process
KILLED_BOUND_S = 4 * 0.5  # ... and for a killed one
STOP_BOUND_S = 4 * 2.0  # ... and for the end of everything


# Ranks ------------------------------------------------------------------------------------------------------------


@on_event_loop
async def test_ranks_get_the_lowest_free_number_and_a_closed_one_is_free_again() -> None:
    async with mesh() as m:
        first, second = await m.rank(1), await m.rank(2)
        assert (first.opened.rank, second.opened.rank) == (0, 1)
        await m.session.expect_ranks([0, 1])
        await first.send(close=rank_service_pb2.CloseRank())
        await m.session.expect_ranks([1])
        third = await m.rank(3)
        assert third.opened.rank == 0
        assert [entry.rank.incarnation for entry in await m.session.expect_ranks([0, 1])] == [3, 2]


@on_event_loop
async def test_global_ranks_count_from_the_slot() -> None:
    fake = FakeCoordinator(slot=3)
    async with serving(fake) as coordinator, node_service(coordinator) as node, node.rank(local_rank=2) as rank:
        assert (rank.opened.rank, rank.opened.local_rank) == (3 * 4 + 2, 2)


@pytest.mark.parametrize(("local_rank", "said"), [(0, f"taken by process {os.getpid()}"), (4, "at most 4 ranks")])
@on_event_loop
async def test_a_local_rank_that_is_taken_or_too_large_is_refused(local_rank: int, said: str) -> None:
    async with mesh() as m:
        await m.rank(1)
        with pytest.raises(InvalidRequest, match=said):
            await m.rank(2, local_rank=local_rank)


@on_event_loop
async def test_a_full_node_says_who_has_its_ranks() -> None:
    async with mesh() as m:
        for incarnation in range(1, 5):
            await m.rank(incarnation)
        with pytest.raises(InvalidRequest, match=f"all 4 ranks of this node are taken; 0 by process {os.getpid()}"):
            await m.rank(5)


@on_event_loop
async def test_a_rank_may_open_its_session_before_the_coordinator_is_there() -> None:
    fake = FakeCoordinator()
    with contextlib.closing(Port()) as port:
        async with node_service(port.address) as node:
            rank = RawRank(await node.describe())
            assert not rank.node.registered
            opening = asyncio.create_task(rank.open())
            async with serving(fake, port.number):
                await soon(opening)
                assert rank.opened.rank == 0
                await node.stop()
            await rank.hang_up()


@on_event_loop
async def test_sessions_and_stores_are_refused_over_tcp() -> None:
    async with mesh() as m, grpc.aio.insecure_channel(m.node.address) as channel:
        session = rank_service_pb2_grpc.RankServiceStub(channel).RankSession()
        assert "only served on this host" in await typed(session.read(), InvalidRequest)
        store = store_service_pb2_grpc.StoreServiceStub(channel)
        await typed(store.SetValue(store_service_pb2.SetValueRequest(key="1/a")), InvalidRequest)


@on_event_loop
async def test_a_session_must_start_with_open() -> None:
    async with mesh() as m:
        rank = RawRank(await m.node.describe())
        await rank.send(close=rank_service_pb2.CloseRank())
        assert "must be `open`" in await typed(rank.notice("opened"), InvalidRequest)
        await rank.hang_up()


@on_event_loop
async def test_a_session_that_breaks_is_a_lost_rank_at_once() -> None:
    async with mesh() as m:
        first, second = await m.rank(1), await m.rank(2)
        await m.commit(1, [0, 1])
        await first.view(1)
        page, lost_page = await first.page(), await second.page()
        os.eventfd_read(first.wake_fd)
        await second.hang_up()
        await until(lambda: page.lost() == {1})
        assert lost_page.closed
        assert os.eventfd_read(first.wake_fd) > 0
        await m.session.expect_ranks([0])


@on_event_loop
async def test_a_rank_that_no_view_has_yet_is_lost_to_nobody() -> None:
    async with mesh() as m:
        first = await m.rank(1)
        await m.commit(1, [0])
        page = await first.page()
        second = await m.rank(2)
        await m.session.expect_ranks([0, 1])
        await second.hang_up()
        await m.session.expect_ranks([0])
        assert page.lost() == frozenset()


@pytest.mark.fault
@on_event_loop
async def test_a_killed_process_is_shown_as_lost_and_reported() -> None:
    async with mesh() as m:
        first = await m.rank(1)
        async with rank_process(await m.node.describe(), incarnation=2) as other:
            await m.commit(1, [0, 1])
            page = await first.page()
            started = time.monotonic()
            other.signal(signal.SIGKILL)
            await until(lambda: page.lost() == {other.rank})
            assert time.monotonic() - started < KILLED_BOUND_S
            await m.session.expect_ranks([0])


@pytest.mark.fault
@on_event_loop
async def test_a_stopped_process_is_lost_and_finds_itself_shut_out_when_it_goes_on() -> None:
    async with mesh() as m:
        first = await m.rank(1)
        async with rank_process(await m.node.describe(), incarnation=2) as other:
            await m.commit(1, [0, 1])
            page = await first.page()
            started = time.monotonic()
            other.signal(signal.SIGSTOP)
            await until(lambda: page.lost() == {other.rank})
            assert time.monotonic() - started < STOPPED_BOUND_S
            await m.session.expect_ranks([0])
            other.signal(signal.SIGCONT)
            assert "its process is stopped" in await other.ask("error")


@pytest.mark.fault
@pytest.mark.slow
@on_event_loop
async def test_a_process_that_holds_its_gil_is_late_not_dead() -> None:
    async with mesh() as m:
        first = await m.rank(1)
        async with rank_process(await m.node.describe(), incarnation=2) as other:
            await m.commit(1, [0, 1])
            page = await first.page()
            assert await other.ask("hold 3") == "released"
            assert page.lost() == frozenset()
            assert [entry.rank.rank for entry in m.session.ranks] == [0, 1]


# Store, discovery, groups, health ---------------------------------------------------------------------------------


@on_event_loop
async def test_the_store_is_shared_by_the_nodes_ranks_and_dropped_with_the_membership() -> None:
    async with mesh() as m:
        await m.rank(1)
        node = await m.node.describe()
        async with grpc.aio.insecure_channel(f"unix:{node.grpc_socket}") as channel:
            store = store_service_pb2_grpc.StoreServiceStub(channel)
            waiting = store.GetValue(store_service_pb2.GetValueRequest(key="1/key"), timeout=PATIENCE_S)
            await store.SetValue(store_service_pb2.SetValueRequest(key="1/key", value=b"value"))
            assert (await soon(waiting)).value == b"value"
            await m.commit(2, [0])
            stale = store.GetValue(store_service_pb2.GetValueRequest(key="1/key"), timeout=PATIENCE_S)
            assert "membership epoch 2" in await typed(stale, StaleEpoch)


@on_event_loop
async def test_views_are_watched_at_the_node() -> None:
    async with mesh() as m, grpc.aio.insecure_channel(m.node.address) as channel:
        stub = discovery_service_pb2_grpc.DiscoveryServiceStub(channel)
        assert (await stub.GetView(discovery_service_pb2.GetViewRequest(), timeout=10)).view.epoch == 0
        watch = stub.WatchViews(discovery_service_pb2.WatchViewsRequest())
        await m.session.commit(m.session.make_view(1))
        assert (await soon(watch.read())).view.epoch == 1
        await m.session.commit(m.session.make_view(4))
        assert (await soon(watch.read())).view.epoch == 4
        assert (await stub.GetView(discovery_service_pb2.GetViewRequest(), timeout=10)).view.epoch == 4
        watch.cancel()


@on_event_loop
async def test_groups_are_known_here_and_changed_at_the_coordinator() -> None:
    async with mesh() as m, grpc.aio.insecure_channel(m.node.address) as channel:
        stub = group_service_pb2_grpc.GroupServiceStub(channel)
        assert not (await stub.ListGroups(group_service_pb2.ListGroupsRequest(), timeout=10)).groups
        await m.session.commit(m.session.make_view(1))
        known = await stub.ListGroups(group_service_pb2.ListGroupsRequest(), timeout=10)
        assert [group.name for group in known.groups] == ["world", "ep"]
        # The fake has no GroupService: its refusal comes through typed.
        await typed(stub.CreateGroup(group_service_pb2.CreateGroupRequest(name="pair"), timeout=20), InvalidRequest)


@on_event_loop
async def test_changes_fail_typed_while_the_coordinator_is_away() -> None:
    async with (
        node_service("127.0.0.1:9") as node,
        grpc.aio.insecure_channel(node.address) as channel,
    ):
        stub = group_service_pb2_grpc.GroupServiceStub(channel)
        call = stub.CreateGroup(group_service_pb2.CreateGroupRequest(name="pair"), timeout=PATIENCE_S)
        assert "127.0.0.1:9" in await typed(call, MeshUnavailable)


@on_event_loop
async def test_health_says_serving_once_there_is_a_view() -> None:
    async with mesh() as m, grpc.aio.insecure_channel(m.node.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="epmesh.node"))
        assert (await soon(watch.read())).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await m.session.commit(m.session.make_view(1))
        assert (await soon(watch.read())).status == health_pb2.HealthCheckResponse.SERVING
        overall = await stub.Check(health_pb2.HealthCheckRequest())
        assert overall.status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


# The coordinator goes and comes -----------------------------------------------------------------------------------


@on_event_loop
async def test_the_node_comes_back_after_the_coordinator_with_what_it_had() -> None:
    fake = FakeCoordinator()
    async with serving(fake) as coordinator, node_service(coordinator) as node:
        port = int(coordinator.rpartition(":")[2])
        async with node.rank(incarnation=1) as rank:
            session = await fake.session()
            await session.expect_ranks([0])
            await session.commit(session.make_view(3))
            page = await rank.page()
            session.commands.put_nowait(None)  # the coordinator ends the stream
            again = await fake.session()
            first, second = await soon(fake.registrations.get()), await soon(fake.registrations.get())
            assert first.incarnation == second.incarnation
            assert again.hello.epoch == 3
            await again.expect_ranks([0])
            assert port
            assert not page.closed


@on_event_loop
async def test_a_new_mesh_shuts_out_the_ranks_of_the_old_one() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(3, [0])
        page = await rank.page()
        m.fake.mesh_id = "another"
        m.session.commands.put_nowait(None)
        again = await m.fake.session()
        assert again.hello.epoch == 0
        assert page.closed
        with pytest.raises(StaleEpoch, match="new mesh"):
            await rank.view(4)
        fresh = await m.rank(2)
        await again.expect_ranks([0])
        await again.commit(again.make_view(1))
        assert (await fresh.view(1)).epoch == 1


@on_event_loop
async def test_a_silent_coordinator_is_given_up_and_asked_again() -> None:
    fake = FakeCoordinator(lease_s=0.6)
    async with serving(fake) as coordinator, node_service(coordinator):
        session = await fake.session()
        session.answer_heartbeats = False
        await soon(session.broken.wait())
        await fake.session()


@on_event_loop
async def test_a_node_that_is_cut_off_fences_itself_when_its_lease_ends() -> None:
    fake = FakeCoordinator(lease_s=0.6)
    async with serving(fake) as coordinator, node_service(coordinator) as node, node.rank(incarnation=1) as rank:
        session = await fake.session()
        await session.expect_ranks([0])
        await session.commit(session.make_view(1))
        page = await rank.page()
        session.answer_heartbeats = False
        fake.refusal = MeshUnavailable("away")
        await soon(session.broken.wait())
        assert not page.closed  # only the coordinator is away
        failure = membership_service_pb2.LinkFailure(target=4, target_incarnation=4)
        await rank.send(unreachable=rank_service_pb2.UnreachablePeers(failures=[failure]))
        await until(lambda: page.closed)


@pytest.mark.parametrize(
    "refusal", [InvalidRequest("node n is alive elsewhere"), Unauthenticated("who are you?")], ids=["id", "identity"]
)
@on_event_loop
async def test_a_final_refusal_ends_the_node_service_with_its_text(refusal: EpmeshError) -> None:
    fake = FakeCoordinator()
    fake.refusal = refusal
    async with serving(fake) as coordinator:
        with pytest.raises(type(refusal), match=str(refusal)):
            async with node_service(coordinator) as node:
                await soon(asyncio.shield(node.task))


@on_event_loop
async def test_a_recovering_coordinator_is_asked_again() -> None:
    fake = FakeCoordinator()
    fake.refusal = MeshUnavailable("recovering")
    async with serving(fake) as coordinator, node_service(coordinator) as node:
        for _ in range(2):
            await soon(fake.registrations.get())
        fake.refusal = None
        assert (await node.registered()).registered


# The end ----------------------------------------------------------------------------------------------------------


@on_event_loop
async def test_stopping_tells_ranks_and_coordinator_and_leaves_nothing() -> None:
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        page = await rank.page()
        started = time.monotonic()
        await m.node.stop()
        assert time.monotonic() - started < STOP_BOUND_S
        assert page.closed
        assert m.session.left.is_set()
        with pytest.raises(MeshUnavailable, match="shutting down"):
            await rank.view(2)
        assert not Path(rank.node.grpc_socket).parent.exists()


@on_event_loop
async def test_open_watches_and_waiting_readers_do_not_hold_up_the_end() -> None:
    async with mesh() as m, grpc.aio.insecure_channel(m.node.address) as channel:
        watch = discovery_service_pb2_grpc.DiscoveryServiceStub(channel).WatchViews(
            discovery_service_pb2.WatchViewsRequest()
        )
        await m.session.commit(m.session.make_view(1))
        await soon(watch.read())
        node = await m.node.describe()
        async with grpc.aio.insecure_channel(f"unix:{node.grpc_socket}") as local:
            store = store_service_pb2_grpc.StoreServiceStub(local)
            waiting = store.GetValue(store_service_pb2.GetValueRequest(key="1/never"), timeout=PATIENCE_S)
            started = time.monotonic()
            await m.node.stop()
            assert time.monotonic() - started < STOP_BOUND_S
            with pytest.raises(grpc.aio.AioRpcError):
                await soon(waiting)


@on_event_loop
async def test_stopping_closes_every_descriptor() -> None:
    before = shared_files()
    async with mesh() as m:
        rank = await m.rank(1)
        await m.commit(1, [0])
        await rank.buffers(EP, 1)
        await m.session.commit(m.session.make_view(2))
        await rank.buffers(EP, 2)
        assert len(shared_files()) > len(before)
    await until(lambda: shared_files() == before)  # a session that ends closes its page last


@on_event_loop
async def test_a_port_in_use_is_refused_by_name() -> None:
    async with mesh() as m:
        port = int(m.node.address.rpartition(":")[2])
        with pytest.raises(InvalidRequest, match=f"cannot listen at 127.0.0.1:{port}"):
            async with node_service("127.0.0.1:9", port=port):
                pass


@on_event_loop
async def test_a_runtime_directory_serves_one_node_and_survives_a_killed_one(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    for name in ("grpc.sock", "descriptors.sock"):  # what a killed one leaves
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(directory / name))
    async with mesh(runtime_dir=directory) as m:
        await m.rank(1)
        with pytest.raises(InvalidRequest, match="in use by another node service"):
            async with node_service("127.0.0.1:9", runtime_dir=directory):
                pass
    assert list(directory.iterdir()) == []


def shared_files() -> list[str]:
    """Names and numbers of this process's descriptors that lead to something of ours."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            if "epmesh" in str(link.readlink()):
                found.append(f"{link.name} {link.readlink()}")
    return sorted(found)
