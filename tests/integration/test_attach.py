"""Drivers come and go: who has a rank, what they are told, how tensors travel, and what happens when somebody dies."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

import epmesh
from epmesh import Communicator, InvalidRequest, MeshUnavailable, PeerLost, Unauthenticated
from epmesh.channels import NodeAddress
from epmesh.driver_session import DriverSession, open_session
from epmesh.front import FrontClient, FrontPeer
from epmesh.testing import LocalMesh
from epmesh.v1 import front_pb2
from epmesh_server.processes.child import Child
from tests.integration import refusals
from tests.integration.hosted_mesh import HostedMesh
from tests.integration.refusals import COLLECTIVE, Refused

KILLED_S, STOPPED_S, STRETCH = 0.5, 2.0, 4
TRANSPORTS = ("shm", "zmq", "grpc")


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture(scope="module")
def mesh() -> Iterator[HostedMesh]:
    """Two nodes with one hosted rank each, which every test leaves as it found them."""
    with HostedMesh(2, 1) as mesh:
        yield mesh


def total(comm: Communicator, value: float = 1.0) -> float:
    tensor: Any = np.full(3, value, np.float32)
    return float(comm.all_reduce(tensor)[0])


def both(pool: ThreadPoolExecutor, comms: list[Communicator], work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work` on every rank at once."""
    return [future.result(30) for future in [pool.submit(work, comm, *args) for comm in comms]]


@contextlib.contextmanager
def attached(mesh: HostedMesh, **options: Any) -> Iterator[list[Communicator]]:
    """A driver for every rank."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(mesh.attach(rank, **options)) for rank in range(mesh.world_size)]


# Who has the rank ---------------------------------------------------------------------------------------------------


def test_a_second_driver_is_refused_and_told_who_has_the_rank_and_since_when(mesh: HostedMesh) -> None:
    told = r"rank 0 .*'worker-7', since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    with mesh.attach(0, driver="worker-7"), pytest.raises(InvalidRequest, match=told):
        mesh.attach(0, driver="worker-8")
    mesh.attach(0, driver="worker-8").destroy()


def test_the_address_of_any_node_will_do(mesh: HostedMesh) -> None:
    for address in mesh.addresses:
        for rank in range(2):
            with epmesh.attach(address, rank=rank, timeout_s=5.0) as comm:
                assert comm.global_rank == rank


def test_a_node_service_says_where_another_nodes_rank_is(mesh: HostedMesh) -> None:
    with pytest.raises(InvalidRequest, match=f"rank 1 .*{mesh.addresses[1]}"):
        DriverSession(NodeAddress(mesh.addresses[0]), 1, "somebody", 5.0, tls=None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": -1}, "rank is -1"),
        ({"rank": 0, "world_size": 0}, "world_size is 0"),
        ({"rank": "0"}, "rank is '0'"),
        ({"rank": 0, "world_size": 1.5}, "world_size is 1.5"),
        ({"rank": 0, "timeout_s": 0}, "timeout_s is 0"),
        ({"rank": 0, "timeout_s": float("inf")}, "timeout_s is inf"),
        ({"rank": 0, "timeout_s": float("nan")}, "timeout_s is nan"),
        ({"rank": 0, "timeout_s": "soon"}, "timeout_s is 'soon'"),
        ({"rank": 0, "transport": "pigeon"}, "transport is 'pigeon'.*shm, zmq, grpc"),
    ],
)
def test_wrong_arguments_are_named(mesh: HostedMesh, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        epmesh.attach(mesh.addresses[0], **options)


def test_the_longest_limit_is_taken_as_it_is(mesh: HostedMesh) -> None:
    with epmesh.attach(mesh.addresses[0], rank=0, timeout_s=3600) as comm:
        comm.wait_ready()


def test_a_coordinators_address_is_refused_at_once(mesh: HostedMesh) -> None:
    with pytest.raises(InvalidRequest, match="is no node service"):
        epmesh.attach(mesh.coordinator, rank=0)


def test_a_rank_that_nobody_has_is_waited_for_and_then_named(mesh: HostedMesh) -> None:
    with pytest.raises(MeshUnavailable, match=r"rank 9 not .* within 0\.3 s.*slot 9"):
        epmesh.attach(mesh.addresses[0], rank=9, timeout_s=0.3)


def test_too_few_ranks_are_waited_for_and_the_rank_is_free_afterwards(mesh: HostedMesh) -> None:
    with pytest.raises(MeshUnavailable, match=r"2 ranks, .*not 3"):
        mesh.attach(0, world_size=3, timeout_s=0.5)
    mesh.attach(0).destroy()


def test_a_rank_that_joined_by_itself_cannot_be_driven() -> None:
    with LocalMesh(1, 1) as local, pytest.raises(InvalidRequest, match=r"rank 0 is process \d+, which joined"):
        epmesh.attach(local.address, rank=0, timeout_s=5.0)


def test_detached_ranks_stay_in_the_mesh_and_exchanges_left_open_are_forgotten(
    mesh: HostedMesh, pool: ThreadPoolExecutor
) -> None:
    epochs = set()
    for _ in range(3):
        with attached(mesh) as comms:
            both(pool, comms, leave_open)
            assert both(pool, comms, total) == [2.0, 2.0]
            world = [comm.group("world") for comm in comms]
            assert both(pool, world, total) == [2.0, 2.0]
            epochs.add(comms[0].epoch)
    assert len(epochs) == 1


def leave_open(comm: Communicator) -> None:
    ids: Any = np.zeros((2, 1), np.int64)
    weights: Any = np.ones((2, 1), np.float32)
    comm.dispatch(weights, weights, ids, True)
    comm.dispatch_async(weights, weights, ids, True)


def test_a_group_that_waits_does_not_keep_another_from_going_on(mesh: HostedMesh, pool: ThreadPoolExecutor) -> None:
    with attached(mesh) as comms:
        worlds = [comm.group("world") for comm in comms]
        early = pool.submit(total, comms[0])
        assert both(pool, worlds, total) == [2.0, 2.0]
        assert not early.done()
        assert (total(comms[1]), early.result(30)) == (2.0, 2.0)


@pytest.mark.fault
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_rank_that_is_left_in_the_middle_of_a_call_is_given_up_and_not_waited_for(
    transport: str, pool: ThreadPoolExecutor
) -> None:
    with HostedMesh(1, 2) as mesh:
        comms = [mesh.attach(rank, transport) for rank in range(2)]
        assert both(pool, comms, total) == [2.0, 2.0]
        left = pool.submit(waiting_sum, comms[0])
        while not comms[0]._rank.session._under_way:  # type: ignore[attr-defined]
            time.sleep(0.001)
        comms[0].destroy()
        assert isinstance(left.result(30)[0], MeshUnavailable)
        comms[0] = mesh.attach(0, transport, world_size=1, timeout_s=STRETCH * 2.0)
        assert resumed(comms, pool) == [2.0, 2.0]


def test_calls_after_the_end_say_so(mesh: HostedMesh) -> None:
    comm = mesh.attach(0)
    world = comm.group("world")
    comm.destroy()
    comm.destroy()
    for each in (comm, world):
        with pytest.raises(InvalidRequest, match=f"group '{each.unique_name}' was destroyed"):
            each.check()


def test_a_call_that_comes_second_to_the_end_is_not_made(mesh: HostedMesh) -> None:
    session = open_session(mesh.addresses[0], 0, "leaves", 20.0)
    session.detach()
    with pytest.raises(MeshUnavailable, match="rank 0 was given back"), session.calling():
        pytest.fail("the rank may have another driver by now")


def test_the_calls_of_an_earlier_driver_are_refused(mesh: HostedMesh) -> None:
    earlier = open_session(mesh.addresses[0], 0, "earlier", 20.0)
    earlier.detach()
    with mesh.attach(0) as comm, contextlib.closing(FrontClient(earlier.granted.mesh_id)) as client:
        comm.check()
        request = front_pb2.FrontRequest(driver_call=front_pb2.DriverCall(token=earlier.granted.token, group="ep"))
        request.driver_call.arguments.check.SetInParent()
        peer = FrontPeer(0, earlier.granted.incarnation, earlier.granted.front_endpoint)
        with pytest.raises(Unauthenticated, match="attach again"):
            client.call(peer, request, timeout_s=5.0).result(5.0)
        request.driver_call.token = b"guess" * 12
        with pytest.raises(Unauthenticated, match="attach"):
            client.call(peer, request, timeout_s=5.0).result(5.0)


# How tensors travel -------------------------------------------------------------------------------------------------


def test_the_best_transport_is_taken_that_works_from_here(
    mesh: HostedMesh, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far_away(_: DriverSession) -> None:
        raise MeshUnavailable("another host")

    found = []
    with attached(mesh) as comms:
        found.append((comms[0].transport, both(pool, comms, total)))  # type: ignore[attr-defined]
    monkeypatch.setattr(DriverSession, "open_memory", far_away)
    with attached(mesh) as comms:
        found.append((comms[0].transport, both(pool, comms, total)))  # type: ignore[attr-defined]
    assert found == [("shm", [2.0, 2.0]), ("zmq", [2.0, 2.0])]
    with pytest.raises(MeshUnavailable, match="shm: another host"):
        mesh.attach(0, "shm")


def test_grpc_is_taken_where_nothing_else_gets_through(
    mesh: HostedMesh, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("epmesh.driver_transports.FrontPeer", lambda rank, number, *_: FrontPeer(rank, number, NOBODY))
    with attached(mesh) as comms:
        assert comms[0].transport == "grpc"  # type: ignore[attr-defined]
        assert both(pool, comms, total) == [2.0, 2.0]
    with pytest.raises(MeshUnavailable, match="zmq: "):
        mesh.attach(0, "zmq", timeout_s=5.0)


NOBODY = "tcp://127.0.0.1:1"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_tensors_larger_than_the_shared_memory_travel_too(transport: str, pool: ThreadPoolExecutor) -> None:
    with HostedMesh(1, 2, buffer_bytes=1 << 16) as small, attached(small, transport=transport) as comms:
        for size in (10, 1 << 15, 1 << 18, 1 << 15):
            if transport != "grpc" or 4 * size <= 4 << 16:
                gathered = both(pool, comms, gather, size)
                assert all(np.array_equal(each, np.arange(2 * size, dtype=np.float32)) for each in gathered)


def gather(comm: Communicator, size: int) -> Any:
    rows: Any = np.arange(comm.rank * size, (comm.rank + 1) * size, dtype=np.float32)
    return comm.all_gather(rows, dim=0)


def test_more_bytes_than_the_node_takes_over_grpc_are_refused_and_the_rank_goes_on(pool: ThreadPoolExecutor) -> None:
    with HostedMesh(1, 1, buffer_bytes=1 << 16) as small, small.attach(0, "grpc") as comm:
        with pytest.raises(InvalidRequest, match="1048576 bytes"):
            gather(comm, 1 << 18)
        assert total(comm) == 1.0


# Refusals -----------------------------------------------------------------------------------------------------------


def all_refusals(comm: Communicator) -> dict[str, Refused]:
    refusals.hold_some(comm)
    return {name: refusals.attempt(comm, name) for name in COLLECTIVE}


@pytest.mark.slow
@pytest.mark.parametrize(("joined", "transport"), [(0, "zmq"), (1, "grpc"), (2, "shm")])
def test_joined_and_attached_ranks_of_one_group_get_the_words_that_joined_ones_get(
    joined: int, transport: str, pool: ThreadPoolExecutor
) -> None:
    """The last rank is the one that does it wrong: once it is attached, once joined."""
    with LocalMesh(1, 3, exchange_timeout_s=20.0, max_tokens_per_rank=16) as local:
        expected = local.run(all_refusals)[0]
    hosted = [rank for rank in range(3) if rank != joined]
    with HostedMesh(1, 3, hosted=hosted) as mesh, contextlib.ExitStack() as stack:
        makers = [
            pool.submit(epmesh.join, mesh.addresses[0], local_rank=rank, world_size=3, exchange_timeout_s=20.0)
            if rank == joined
            else pool.submit(mesh.attach, rank, transport)
            for rank in range(3)
        ]
        comms = [stack.enter_context(maker.result(20)) for maker in makers]
        for found in both(pool, comms, all_refusals):
            assert found == expected


# Deaths -------------------------------------------------------------------------------------------------------------


def driver_main(pipe: Connection[Any, Any], address: str, rank: int, world_size: int, transport: str) -> None:
    """A driver in a process of its own: sums once, says so, and then does nothing."""
    with epmesh.attach(address, rank=rank, world_size=world_size, transport=transport, timeout_s=20.0) as comm:
        total(comm)
        pipe.send_bytes(b"attached")
        threading.Event().wait()


def busy_main(pipe: Connection[Any, Any], address: str, seconds: float) -> None:
    """A driver that holds its interpreter lock for a while between two sums."""
    with epmesh.attach(address, rank=0, timeout_s=20.0) as comm:
        first = total(comm)
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL calls with the lock held
        pipe.send_bytes(str((first, total(comm))).encode())


@pytest.mark.fault
def test_a_driver_that_holds_its_interpreter_lock_keeps_its_rank() -> None:
    with HostedMesh(1, 1) as mesh:
        child = Child("driver", busy_main, mesh.addresses[0], 3.0)
        try:
            assert child.pipe.poll(30)
            assert child.pipe.recv_bytes() == b"(1.0, 1.0)"
        finally:
            child.close()


def waiting_sum(comm: Communicator) -> tuple[BaseException | None, float]:
    """A sum that a rank stays away from: the error, and when it came."""
    try:
        total(comm)
    except epmesh.EpmeshError as exc:
        return exc, time.monotonic()
    return None, time.monotonic()


def resumed(comms: list[Communicator], pool: ThreadPoolExecutor) -> list[float]:
    """A sum in a view with all ranks."""
    deadline = time.monotonic() + 20.0
    while True:
        views = [comm.wait_ready(20.0)[0] for comm in comms]
        if all(list(view.ranks) == list(range(len(comms))) for view in views):
            return both(pool, comms, total)
        assert time.monotonic() < deadline, views
        time.sleep(0.01)


@pytest.mark.fault
@pytest.mark.parametrize(("strike", "bound_s"), [("kill", KILLED_S), ("pause", STOPPED_S)])
def test_a_group_loses_a_rank_whose_driver_dies_or_is_stopped_and_the_rank_can_be_driven_again(
    strike: str, bound_s: float, pool: ThreadPoolExecutor
) -> None:
    with HostedMesh(2, 1) as mesh:
        child = Child("driver", driver_main, mesh.addresses[1], 1, 2, "shm")
        try:
            comm = mesh.attach(0)
            assert total(comm) == 2.0
            assert child.pipe.recv_bytes() == b"attached"
            waiting: Future[Any] = pool.submit(waiting_sum, comm)
            struck_at = time.monotonic()
            getattr(child, strike)()
            error, at = waiting.result(30)
            assert isinstance(error, PeerLost)
            assert error.ranks == (1,)
            assert at - struck_at < STRETCH * bound_s
            other = mesh.attach(1, timeout_s=20.0, world_size=1)
            assert resumed([comm, other], pool) == [2.0, 2.0]
        finally:
            child.close()


@pytest.mark.fault
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_drivers_hear_at_once_that_their_rank_or_a_peer_was_killed(transport: str, pool: ThreadPoolExecutor) -> None:
    with HostedMesh(1, 2) as mesh:
        comms = [mesh.attach(rank, transport) for rank in range(2)]
        assert both(pool, comms, total) == [2.0, 2.0]
        waiting = pool.submit(waiting_sum, comms[0])
        struck_at = time.monotonic()
        mesh.kill_rank(1)
        error, at = waiting.result(30)
        assert isinstance(error, PeerLost)
        assert error.ranks == (1,)
        assert at - struck_at < STRETCH * KILLED_S
        with pytest.raises(MeshUnavailable, match=r"rank 1.*attach again"):
            total(comms[1])
        comms[1].destroy()
        mesh.start_rank(1)
        comms[1] = mesh.attach(1, transport, world_size=1)
        assert resumed(comms, pool) == [2.0, 2.0]


def test_a_hosted_rank_that_is_ended_gives_up_the_call_that_it_is_in(pool: ThreadPoolExecutor) -> None:
    with HostedMesh(1, 2) as mesh:
        comms = [mesh.attach(rank) for rank in range(2)]
        waiting = pool.submit(waiting_sum, comms[0])
        while not comms[0]._rank.session._under_way:  # type: ignore[attr-defined]
            time.sleep(0.001)
        ended_at = time.monotonic()
        mesh.end_rank(0)
        error, at = waiting.result(30)
        assert isinstance(error, MeshUnavailable)
        assert at - ended_at < STRETCH * KILLED_S
        view, _ = comms[1].wait_ready(20.0)
        assert (list(view.ranks), total(comms[1])) == ([1], 1.0)


def wait_unavailable(comm: Communicator, deadline: float) -> None:
    """Returns when a rank, or its driver, has noticed that the node service is gone: each does so by itself."""
    while True:
        try:
            comm.check()
        except MeshUnavailable:
            return
        except PeerLost:  # the other rank noticed first, and left
            pass
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("strike", "transport"), [("kill", "shm"), ("kill", "zmq"), ("kill", "grpc"), ("pause", "shm"), ("pause", "grpc")]
)
def test_a_node_service_that_dies_or_stops_fails_calls_soon_and_its_ranks_can_be_driven_again(
    strike: str, transport: str, pool: ThreadPoolExecutor
) -> None:
    with HostedMesh(1, 2) as mesh:
        comms = [mesh.attach(rank, transport) for rank in range(2)]
        waiting = pool.submit(waiting_sum, comms[0])
        while not waiting.running():
            time.sleep(0.001)
        struck_at = time.monotonic()
        getattr(mesh, f"{strike}_service")(0)
        error, at = waiting.result(30)
        assert isinstance(error, MeshUnavailable | PeerLost)
        assert at - struck_at < STRETCH * STOPPED_S
        for comm in comms:
            wait_unavailable(comm, struck_at + STRETCH * STOPPED_S)
            comm.destroy()
        mesh.kill_service(0)
        mesh.start_service(0)
        with attached(mesh, transport=transport) as comms:
            assert both(pool, comms, total) == [2.0, 2.0]


def test_nobody_listening_is_said_with_the_address() -> None:
    with pytest.raises(MeshUnavailable, match=re.escape("127.0.0.1:1")):
        epmesh.attach("127.0.0.1:1", rank=0, timeout_s=0.3)
