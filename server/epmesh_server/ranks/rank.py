"""The rank that this process is: its session, its links, and the communicators of its groups."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from epmesh import errors
from epmesh.communicator import Stop
from epmesh.errors import InvalidRequest
from epmesh.placement import Placement
from epmesh.v1 import group_service_pb2, group_service_pb2_grpc
from epmesh.view import RankMode, View
from epmesh_server.ranks.checked_communicator import Load
from epmesh_server.ranks.communicator import JoinedCommunicator, new_communicator
from epmesh_server.ranks.curve_door import CurveDoor
from epmesh_server.ranks.front import Front
from epmesh_server.ranks.links import LinkHub
from epmesh_server.ranks.serving import ExpertServer, ServeOptions
from epmesh_server.ranks.serving_experts import Experts, ServeStats
from epmesh_server.ranks.session import RankSession
from epmesh_server.ranks.stats_reporter import StatsReporter


@dataclass
class RankProcess:
    """What all communicators of one rank share.

    Attributes:
        mode: what the rank is there for; views show it with a commit's delay.
        front_endpoint: where it takes FrontRequest messages; empty: nowhere.
        door: secures links and front; `None` in a mesh without CURVE.
        home: the group whose communicator ``join`` gave out; with it the rank leaves the mesh.
        serving_stats: what `serve` did so far.
    """

    session: RankSession
    hub: LinkHub
    incarnation: int
    device: torch.device
    exchange_timeout_s: float
    timeout_s: float
    max_tokens_per_rank: int | None
    load: Load | None
    mode: RankMode = RankMode.EXCHANGE
    front_endpoint: str = ""
    door: CurveDoor | None = None
    home: str = field(init=False)
    serving_stats: ServeStats = field(default_factory=ServeStats)
    _server: ExpertServer | None = None  # guarded by _lock
    _communicators: dict[str, JoinedCommunicator] = field(default_factory=dict)  # guarded by _lock
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._reporter = StatsReporter(self)
        self.home = "ep" if self.mode is RankMode.EXCHANGE else "world"

    def become(self, mode: RankMode, front_endpoint: str) -> View:
        """Changes mode and front endpoint; returns in the first view that shows both.

        Raises:
            MeshUnavailable: there was none within `timeout_s`.
        """

        def shown(view: View) -> bool:
            info = view.ranks.get(self.session.rank) if self.is_in(view) else None
            return info is not None and (info.mode, info.front_endpoint) == (mode, front_endpoint)

        self.mode, self.front_endpoint = mode, front_endpoint
        self.session.update_rank(mode, front_endpoint)
        what = f"a view with rank {self.session.rank} in mode {mode.name.lower()}"
        return self.session.wait_view(shown, self.timeout_s, what)

    def serve(self, experts: Experts, stop: Stop | None, options: ServeOptions) -> None:
        """Answers routers until `stop` is set; returns in the mode from before.

        Raises:
            InvalidRequest: this rank serves already.
            EpmeshError: the membership ended.
        """
        with self._lock:
            self.check_not_serving()
            server = self._server = ExpertServer(self, experts, options, self.serving_stats)
        try:
            server.run(stop)
        finally:
            self._server = None

    def check_not_serving(self) -> None:
        """Raises `InvalidRequest` while another thread is in `serve`."""
        if self._server is not None:
            raise InvalidRequest(f"rank {self.session.rank} serves already")

    def end_serving(self) -> None:
        """Ends `serve`, if another thread is in it."""
        server = self._server
        if server is not None:
            server.end()

    @property
    def front(self) -> Front | None:
        """Where requests come in while it serves."""
        server = self._server
        return server.front if server is not None else None

    @property
    def communicators(self) -> dict[str, JoinedCommunicator]:
        """Those that were asked for, by the names of their groups."""
        with self._lock:
            return dict(self._communicators)

    def is_in(self, view: View) -> bool:
        """Whether `view` has this rank, in this incarnation."""
        info = view.ranks.get(self.session.rank)
        return info is not None and info.incarnation == self.incarnation

    def communicator(self, name: str) -> JoinedCommunicator:
        """The communicator of a group of the newest view; the same object every time."""
        view = self.session.view
        assert view is not None
        with self._lock:
            found = self._communicators.get(name)
            if found is None:
                found = self._communicators[name] = new_communicator(self, name, view)
            return found

    def left(self, name: str) -> None:
        """A communicator was destroyed; with that of `home` the rank leaves the mesh."""
        with self._lock:
            self._communicators.pop(name, None)
            rest = list(self._communicators.values()) if name == self.home else []
        for communicator in rest:
            communicator.destroy()
        if name == self.home:
            self._reporter.close()
            self.session.close()  # first: peers need the links until a view is without this rank
            self.hub.close()

    def create_group(self, request_id: str, name: str, ranks: list[int]) -> None:
        """Asks for a group, and waits until its view is here."""
        request = group_service_pb2.CreateGroupRequest(request_id=request_id, name=name, ranks=ranks)
        self._change("CreateGroup", request)

    def destroy_group(self, request_id: str, name: str) -> None:
        """Asks for a group's end, and waits until its view is here."""
        with self._lock:
            found = self._communicators.get(name)
        self._change("DestroyGroup", group_service_pb2.DestroyGroupRequest(request_id=request_id, name=name))
        if found is not None:
            found.destroy()
            self.hub.drop_inbox(found._member.group_id)

    def set_placement(self, request_id: str, placement: Placement, layer: int | None) -> None:
        """Asks for a placement, and waits until its view is here."""
        request = group_service_pb2.SetExpertPlacementRequest(
            request_id=request_id, placement=placement.to_proto(layer)
        )
        self._change("SetExpertPlacement", request)

    def _change(self, method: str, request: Any) -> None:
        stub = group_service_pb2_grpc.GroupServiceStub(self.session.channel)
        try:
            response = getattr(stub, method)(request, timeout=self.timeout_s)
        except grpc.RpcError as exc:
            raise errors.from_rpc_error(exc, method) from exc
        what = f"the view of epoch {response.epoch}"
        self.session.wait_view(lambda view: view.epoch >= response.epoch, self.timeout_s, what)

    def abandon(self) -> None:
        """Ends a rank that has no communicator yet."""
        self._reporter.close()
        with contextlib.suppress(errors.EpmeshError):
            self.hub.close(linger_s=0)
            self.session.close()
