"""More than a mesh can do, and clients that take more than their part, read nothing, or say nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from epmesh import DeadlineExceeded, InvalidRequest, Overloaded, Router
from epmesh.addresses import split_address
from epmesh.channels import open_channel
from epmesh.errors import from_rpc_error
from epmesh.testing import LocalMesh
from epmesh.v1 import (
    discovery_service_pb2,
    discovery_service_pb2_grpc,
    group_service_pb2,
    group_service_pb2_grpc,
    router_service_pb2,
    router_service_pb2_grpc,
)
from epmesh_server.open_files import allow_open_files
from tests.integration import serve_works
from tests.integration.serve_works import some_rows, wait_serving
from tests.processes import eventually, open_descriptors

EXPERTS = 4
BATCH_S, BATCH_ROWS, ROWS = 0.05, 16, 4


@pytest.fixture
def slow_mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    """Two ranks of one node; each call of the experts takes its time."""
    stop = tmp_path / "stop"
    with LocalMesh(1, 2, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve, stop, BATCH_S, BATCH_ROWS)
        wait_serving(mesh.view, [0, 1])
        yield mesh
        stop.touch()
        done.result(30)


class Greedy:
    """Threads that ask again as soon as they are answered, or refused, until closed."""

    def __init__(self, router: Router, threads: int) -> None:
        self.refused = self.done = 0
        self._router = router
        self._over = threading.Event()
        self.under_way = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        given = some_rows(ROWS, EXPERTS, 2, seed=1)
        while not self._over.is_set():
            try:
                self._router.forward(*given, layer=None, timeout=1.0)
                self.done += 1
            except (Overloaded, DeadlineExceeded) as exc:
                self.refused += 1
                self.under_way.set()
                self._over.wait(getattr(exc, "retry_after_s", 0.0) / 4)  # less than it was asked to


def test_a_router_that_asks_for_far_too_much_does_not_take_another_s_part(slow_mesh: LocalMesh) -> None:
    given = some_rows(ROWS, EXPERTS, 2, seed=1)
    with Router(slow_mesh.addresses) as modest, Router(slow_mesh.addresses) as other:
        modest.forward(*given, layer=None, timeout=20)
        greedy = Greedy(other, threads=120)
        try:
            assert greedy.under_way.wait(20)
            for _ in range(30):  # none is refused
                modest.forward(*given, layer=None, timeout=4.0)
        finally:
            greedy.close()
    assert greedy.done > 30  # nor is the greedy one cut off


# Deadlines ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    """Two nodes with a rank each, which are not asked to serve."""
    with LocalMesh(2, 1) as mesh:
        yield mesh


@pytest.mark.parametrize("method", ["GetView", "ListGroups", "ForwardRows"])
@pytest.mark.parametrize("service", ["node", "coordinator"])
def test_a_call_over_tcp_needs_a_deadline(mesh: LocalMesh, service: str, method: str) -> None:
    if (service, method) == ("coordinator", "ForwardRows"):
        pytest.skip("a coordinator has no such method")
    with open_channel(mesh.address if service == "node" else mesh.coordinator_address) as channel:
        call: Callable[[], object] = {
            "GetView": lambda: discovery_service_pb2_grpc.DiscoveryServiceStub(channel).GetView(
                discovery_service_pb2.GetViewRequest()
            ),
            "ListGroups": lambda: group_service_pb2_grpc.GroupServiceStub(channel).ListGroups(
                group_service_pb2.ListGroupsRequest()
            ),
            "ForwardRows": lambda: next(
                router_service_pb2_grpc.RouterServiceStub(channel).ForwardRows(
                    iter([router_service_pb2.ForwardRowsRequest()])
                )
            ),
        }[method]
        with pytest.raises(grpc.RpcError) as refused:
            call()
    error = from_rpc_error(refused.value, "the call")
    assert isinstance(error, InvalidRequest)
    assert f"{method} needs a deadline" in str(error)


def test_views_are_watched_without_one(mesh: LocalMesh) -> None:
    with open_channel(mesh.address) as channel:
        watch = discovery_service_pb2_grpc.DiscoveryServiceStub(channel).WatchViews(
            discovery_service_pb2.WatchViewsRequest()
        )
        assert next(watch).view.epoch > 0
        watch.cancel()


# Connections that say nothing --------------------------------------------------------------------------------------

SILENT = 1000
ZEROMQ, HTTP2 = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03", b"PRI * HTTP/2.0\r\n"  # halves of greetings


@pytest.fixture(scope="module", autouse=True)
def enough_descriptors() -> None:
    allow_open_files()


@pytest.mark.parametrize(
    ("port", "beginning"),
    [(port, half) for half in (b"", HTTP2) for port in ("node", "coordinator")]
    + [(port, half) for half in (b"", ZEROMQ) for port in ("link", "front")],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_a_thousand_connections_that_say_no_more_hurt_nobody_and_are_cut_off(
    serving_mesh: LocalMesh, port: str, beginning: bytes
) -> None:
    rank = serving_mesh.view().ranks[0]
    address = {
        "node": serving_mesh.address,
        "coordinator": serving_mesh.coordinator_address,
        "link": rank.link_endpoint.removeprefix("tcp://"),
        "front": rank.front_endpoint.removeprefix("tcp://"),
    }[port]
    given = some_rows(ROWS, EXPERTS, 2, seed=1)
    with contextlib.ExitStack() as stack, Router(serving_mesh.addresses) as router:
        silent = [stack.enter_context(connected(address, beginning)) for _ in range(SILENT)]
        for _ in range(20):
            router.forward(*given, layer=None, timeout=20)
        assert serving_mesh.view().ranks.keys() == {0, 1}
        with Router(serving_mesh.addresses) as late:  # who comes now gets in, too
            late.forward(*given, layer=None, timeout=20)
        assert eventually(lambda: all(map(over, silent)))


@pytest.fixture(scope="module")
def serving_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    stop = tmp_path_factory.mktemp("serve") / "stop"
    with LocalMesh(1, 2, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve, stop)
        wait_serving(mesh.view, [0, 1])
        yield mesh
        stop.touch()
        done.result(30)


def connected(address: str, beginning: bytes) -> socket.socket:
    host, port = split_address(address, "address")
    made = socket.create_connection((host, port), timeout=10)
    made.sendall(beginning)
    made.setblocking(False)
    return made


def over(connection: socket.socket) -> bool:
    """Whether the other side has closed it."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def test_connections_that_come_and_go_leave_nothing_behind(serving_mesh: LocalMesh) -> None:
    front = serving_mesh.view().ranks[0].front_endpoint.removeprefix("tcp://")
    given = some_rows(ROWS, EXPERTS, 2, seed=1)
    with Router(serving_mesh.addresses) as router:
        for _ in range(20):  # by either rank, so that all that is there to stay is there
            router.forward(*given, layer=None, timeout=20)
        before = sum(map(open_descriptors, descendants(os.getpid())))
        for address in (front, serving_mesh.address, serving_mesh.coordinator_address):
            for _ in range(500):
                connected(address, b"").close()
            router.forward(*given, layer=None, timeout=20)
        assert eventually(lambda: sum(map(open_descriptors, descendants(os.getpid()))) <= before + 8)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    children = [int(each) for path in Path(f"/proc/{pid}/task").glob("*/children") for each in path.read_text().split()]
    return children + [each for child in children for each in descendants(child)]
