"""A discovery service in this process that says what a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from types import TracebackType
from typing import Any, Self

import grpc

from epmesh.v1 import discovery_service_pb2 as pb
from epmesh.v1 import discovery_service_pb2_grpc as rpc
from epmesh.v1 import view_pb2
from epmesh.version import VERSION
from epmesh.view import is_newer
from epmesh_server.node.rpc import TCP_SERVER_OPTIONS
from epmesh_server.testing.ports import Port

WAIT_S = 20.0


def view(epoch: int, mesh_id: str = "m", address: str = "127.0.0.1:1") -> view_pb2.View:
    """A view with one node, at `address`, whose one rank is in two groups."""
    rank = view_pb2.Rank(rank=16, incarnation=1, device="cpu", mode=view_pb2.RANK_MODE_EXCHANGE)
    node = view_pb2.Node(slot=2, node_id="node-2", incarnation=1, address=address, ranks=[rank])
    groups = [
        view_pb2.Group(name=name, id=i + 1, ranks=[16], declared_ranks=[16]) for i, name in enumerate(["w", "ep"])
    ]
    return view_pb2.View(mesh_id=mesh_id, epoch=epoch, stride=8, nodes=[node], groups=groups)


class FakeService(rpc.DiscoveryServiceServicer):
    """Listens between `start` and `stop`, on the same port every time.

    Attributes:
        view: what it answers with; `publish` changes it for watches too.
        version: what it says it is.
        watches: the requests of all watches so far.
        asked: how often `GetView` was called.
    """

    def __init__(self, first: view_pb2.View | None = None, *, version: str = VERSION) -> None:
        self.view = first or view_pb2.View()
        self.version = version
        self.watches: list[pb.WatchViewsRequest] = []
        self.asked = 0
        self.ends_watches = False
        self._changed = threading.Condition()
        self._port = Port()
        self._server: grpc.Server | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._port.close()

    @property
    def address(self) -> str:
        return self._port.address

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=TCP_SERVER_OPTIONS)
        rpc.add_DiscoveryServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            stopped = server.stop(None)
            self._notify()
            assert stopped.wait(WAIT_S)

    def publish(self, new: view_pb2.View) -> None:
        """Answers with `new` from now on, to watches too."""
        with self._changed:
            self.view = new
            self._changed.notify_all()

    def wait(self, condition: Any) -> None:
        """Waits until `condition` holds, which is asked after every call."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S)

    def GetView(self, request: pb.GetViewRequest, context: grpc.ServicerContext) -> pb.GetViewResponse:
        with self._changed:
            self.asked += 1
            self._changed.notify_all()
            return pb.GetViewResponse(view=self.view, version=self.version)

    def WatchViews(
        self, request: pb.WatchViewsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchViewsResponse]:
        context.add_callback(self._notify)
        with self._changed:
            self.watches.append(request)
            sent = None if is_newer(self.view, request.after_epoch, request.mesh_id) else self.view
            self._changed.notify_all()
        while not self.ends_watches and (new := self._other_than(sent, context)) is not None:
            yield pb.WatchViewsResponse(view=new, version=self.version)
            sent = new

    def _other_than(self, sent: view_pb2.View | None, context: grpc.ServicerContext) -> view_pb2.View | None:
        """What was published since, later or not: what to believe is the client's to know. `None`: the call is over."""
        with self._changed:
            self._changed.wait_for(lambda: self.view is not sent or not context.is_active(), WAIT_S)
            return self.view if context.is_active() else None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
