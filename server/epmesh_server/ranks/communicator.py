"""The communicator of a joined rank: one group of its mesh, in the newest view that it adopted."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from epmesh.communicator import Communicator, Stop
from epmesh.errors import InvalidRequest, MeshUnavailable, NotReady
from epmesh.placement import Placement
from epmesh.view import RankMode, View
from epmesh_server.ranks import arguments as args
from epmesh_server.ranks.all2all import All2AllManager
from epmesh_server.ranks.calls import describe
from epmesh_server.ranks.checked_communicator import CheckedCommunicator
from epmesh_server.ranks.collectives import Collectives
from epmesh_server.ranks.exchange import Exchange
from epmesh_server.ranks.front import DEFAULT_BUDGET_BYTES
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.point_to_point import PointToPoint
from epmesh_server.ranks.serving import ServeOptions
from epmesh_server.ranks.serving_batch import BatchLimits
from epmesh_server.ranks.serving_experts import Experts, ServeStats
from epmesh_server.ranks.waits import WaitLedger

if TYPE_CHECKING:
    from epmesh_server.ranks.rank import RankProcess

_READY_POLL_S = 0.05


class JoinedCommunicator(CheckedCommunicator):
    """One group of a rank that lives in this process. One thread at a time may be inside a group.

    Attributes:
        waits: for whom this rank waited in the group.
    """

    _collectives: Collectives

    def __init__(self, rank: RankProcess, name: str, view: View) -> None:
        """Takes the rank's place in the group `name` of `view`."""
        super().__init__(name, rank.device)
        self._rank_process = rank
        self.max_tokens_per_rank = rank.max_tokens_per_rank
        self.load = rank.load
        self.global_rank = rank.session.rank
        self.waits = WaitLedger()
        self._take_place(view)

    def _take_place(self, view: View) -> None:
        """Adopts a view whose set of ranks is another one: new numbers, new buffers, new device group."""
        self._member = GroupMember(
            self._rank_process.session,
            self._rank_process.hub,
            view,
            view.group(self.unique_name),
            self._rank_process.exchange_timeout_s,
            self.waits,
        )
        exchange = self._exchange = self._new_exchange()
        self._collectives = self._new_collectives(exchange)
        self._point_to_point = PointToPoint(self._member)
        self._routings = {}
        topology = self._topology = self._member.topology
        self.rank = self.rank_in_group = topology.me
        self.world_size = topology.world_size
        self.ranks = list(topology.ranks)
        self.global_world_size = len(view.ranks)
        self.use_all2all = self.is_ep_communicator and self.world_size > 1
        self.all2all_manager = All2AllManager(self, view.tensor_parallel_size)

    def _new_exchange(self) -> Exchange:
        """The object that runs this group's exchanges until the set of ranks changes."""
        return Exchange(self._member, self._stats, self._turn)

    def _new_collectives(self, exchange: Exchange) -> Collectives:
        """The object that runs this group's collectives until the set of ranks changes."""
        return Collectives(exchange)

    @property
    def cpu_group(self) -> Any:
        """Gloo group of this node's members; formed when first asked for, by all of them."""
        self._check_mode()
        return self._collectives.process_group()

    @property
    def device_group(self) -> Any:
        """The device's group of this node's members; on CPU the same as `cpu_group`."""
        return self.cpu_group

    # Membership ------------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        return self._member.view

    def begin_anew(self) -> None:
        """Ends what is open, and passes over calls that others gave up waiting for: another driver begins."""
        with self._turn(collective=False):
            self._exchange.forget_open()
            self._member.resynchronise()

    def wait_ready(self, timeout_s: float | None = None) -> tuple[View, int]:
        with self._turn(collective=False):
            view = self._await_view(self._rank_process.timeout_s if timeout_s is None else timeout_s)
            group = view.group(self.unique_name)
            if self.global_rank not in group.ranks:
                raise InvalidRequest(f"rank {self.global_rank} is not in group {self.unique_name!r} any more")
            if view.membership_epoch == self._member.membership_epoch:
                self._exchange.forget_open()
                self._member.resynchronise()
                self._member.view = view
                return view, self._member.row.completed
            self._let_go()
            peers = ((info.rank, info.link_endpoint) for info in view.ranks.values())
            self._rank_process.hub.forget_epochs_before(view.membership_epoch, peers)
            self._take_place(view)
            return view, group.completed

    def _await_view(self, timeout_s: float) -> View:
        """The newest view, once nothing known speaks against it."""
        session, deadline = self._rank_process.session, time.monotonic() + timeout_s
        while True:
            self._member.poll_links()
            if session.error is not None:
                raise session.error
            view = session.view
            if view is not None and view.epoch > self.view.epoch and not self._rank_process.is_in(view):
                raise MeshUnavailable(f"rank {self.global_rank} was removed by epoch {view.epoch}; join again")
            if view is not None and self._member.usable(view):
                return view
            left = deadline - time.monotonic()
            if left <= 0:
                raise MeshUnavailable(f"no usable view within {timeout_s:g} s; the last one is epoch {self.view.epoch}")
            session.wait_change(min(left, _READY_POLL_S))

    def check(self) -> None:
        with self._turn(collective=False):
            self._member.poll_links()
            self._member.check(0)

    def group(self, name: str) -> Communicator:
        if name == self.unique_name:
            return self
        return self._rank_process.communicator(name)

    def create_group(self, name: str, ranks: Iterable[int]) -> Communicator | None:
        wanted = list(ranks)
        with self._turn():
            self._checked("create_group", lambda: args.check_new_group(name, wanted, self.ranks))
            request_id = self._agree("create_group", f"name={name} ranks={wanted}")
            self._rank_process.create_group(request_id, name, wanted)
            self._member.adopt_change()
        return self._rank_process.communicator(name) if self.global_rank in wanted else None

    def destroy_group(self, name: str) -> None:
        with self._turn():
            self._checked("destroy_group", lambda: args.check_group_name(name))
            request_id = self._agree("destroy_group", f"name={name}")
            self._rank_process.destroy_group(request_id, name)
            self._member.adopt_change()

    def _commit_placement(self, placement: Placement, layer: int | None) -> None:
        request_id = self._agree("set_expert_placement", "loaded", self._rank_process.timeout_s)
        self._rank_process.set_placement(request_id, placement, layer)
        self._member.adopt_change()

    def serve(
        self,
        experts: Experts,
        *,
        stop: Stop | None = None,
        max_batch_rows: int = 4096,
        max_wait_s: float = 0.0005,
        max_queued_bytes: int = 1 << 30,
        drain_s: float = 5.0,
    ) -> None:
        limits = BatchLimits(max_batch_rows=max_batch_rows, max_wait_s=max_wait_s, max_queued_bytes=max_queued_bytes)
        budget_bytes = max(max_queued_bytes, DEFAULT_BUDGET_BYTES)
        options = ServeOptions(limits=limits, budget_bytes=budget_bytes, drain_s=drain_s)
        if not callable(experts):
            raise InvalidRequest(f"experts is {experts!r:.80}; it must be callable")
        self._rank_process.check_not_serving()
        with self._turn(collective=False):
            self._rank_process.serve(experts, stop, options)

    @property
    def serving_stats(self) -> ServeStats:
        """What `serve` did so far."""
        return self._rank_process.serving_stats

    def destroy(self) -> None:
        if self._destroyed:
            return
        self._destroyed = True
        self._rank_process.end_serving()
        self._let_go()
        self._rank_process.left(self.unique_name)

    def _let_go(self) -> None:
        self._collectives.close()
        self._member.close()

    def _check_mode(self) -> None:
        if self._rank_process.mode is RankMode.SERVE:
            raise InvalidRequest(
                f"rank {self.global_rank} serves routers and takes part in no collective call; for that, join in mode "
                f"'exchange', or end serve() first"
            )

    def _agree(self, method: str, what: str, timeout_s: float | None = None) -> str:
        """Makes sure that all ranks call the same; returns an id of the call that is the same on all."""
        sequence, _ = self._collectives.agree(describe(method, what), timeout_s)
        return f"{self.view.mesh_id}/{self._member.group_id}/{self._member.membership_epoch}/{sequence}"


def new_communicator(rank: RankProcess, name: str, view: View) -> JoinedCommunicator:
    """The communicator of the group `name`.

    Raises:
        InvalidRequest: there is no such group, or this rank is not in it.
        NotReady: a tensor-parallel group lacks members.
    """
    group = view.group(name)
    if rank.mode is RankMode.SERVE and name != rank.home:
        raise InvalidRequest(f"rank {rank.session.rank} serves routers and is in no group but {rank.home!r}")
    if rank.session.rank not in group.ranks:
        raise InvalidRequest(f"rank {rank.session.rank} is not in group {name!r}, which has {list(group.ranks)}")
    if name.startswith("tp:") and not group.complete:
        missing = sorted(set(group.declared_ranks) - set(group.ranks))
        raise NotReady(f"group {name!r} lacks ranks {missing}; wait until they have joined")
    if rank.device.type == "cuda":
        from epmesh_server.ranks.cuda_communicator import CudaCommunicator  # not above: it needs Triton

        return CudaCommunicator(rank, name, view)
    return JoinedCommunicator(rank, name, view)
