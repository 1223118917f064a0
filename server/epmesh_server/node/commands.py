"""Carries out what the coordinator's control stream says, on this node's ranks."""

from __future__ import annotations

import logging

from epmesh.errors import StaleEpoch, from_proto
from epmesh.v1 import membership_service_pb2 as wire
from epmesh_server.node.follower import EpochFollower
from epmesh_server.node.hosting import RankHosting
from epmesh_server.node.ranks import RankTable
from epmesh_server.node.registration import Enrolment, Registration
from epmesh_server.node.views import ViewBoard

_log = logging.getLogger(__name__)


class Commands:
    """`coordinator_link.NodeCommands` over the node's parts."""

    def __init__(
        self,
        table: RankTable,
        board: ViewBoard,
        follower: EpochFollower,
        hosting: RankHosting,
        enrolment: Enrolment,
    ) -> None:
        self._table = table
        self._board = board
        self._follower = follower
        self._hosting = hosting
        self._enrolment = enrolment

    def registered(self, registration: Registration) -> None:
        """Another mesh or slot than before means that nothing of before holds any more."""
        before = self._enrolment.current
        if before and (before.mesh_id, before.slot) != (registration.mesh_id, registration.slot):
            _log.warning("slot %d of a new mesh now; all ranks must join again", registration.slot)
            self._hosting.end_all(StaleEpoch(0, "the coordinator has started a new mesh; join again"))
            self._follower.forget()
        self._follower.slot = registration.slot
        self._enrolment.grant(registration)

    def committed_epoch(self) -> int:
        """The last epoch the node committed; 0 if none."""
        return self._board.epoch

    def rank_report(self) -> wire.RankReport:
        """The complete list of living ranks."""
        return self._table.report()

    def link_report(self) -> wire.LinkReport:
        """The complete list of broken links."""
        return self._table.links()

    def prepare(self, command: wire.Prepare) -> wire.Prepared:
        """Raises the fences."""
        return self._follower.prepare(command)

    async def finish(self, command: wire.Finish) -> wire.Finished:
        """Lets the ranks reach the cut."""
        return await self._follower.finish(command)

    def commit(self, command: wire.Commit) -> wire.Committed:
        """Adopts the view."""
        for entry, error in self._follower.evicted_by(command.view):
            self._hosting.end(entry.member, error)
        self._follower.commit(command.view)
        return wire.Committed(epoch=command.view.epoch)

    def evict(self, command: wire.Evict) -> None:
        """Ends the membership of these ranks; of all where none is named."""
        error = from_proto(command.error)
        if not command.ranks:
            _log.warning("epoch %d: node evicted: %s", self._board.epoch, error)
            self._hosting.end_all(error)
        for one in command.ranks:
            _log.warning("rank %d, epoch %d: evicted: %s", one.rank, self._board.epoch, error)
            self._hosting.end((one.rank, one.incarnation), error)

    def lease_ended(self) -> bool:
        """Fences the ranks if they are cut off from other nodes too; says whether it did."""
        view = self._board.view
        if view is None:
            return False
        own = self._follower.slot
        if all(view.slot_of(failure.target) == own for failure in self._table.links().failures):
            return False
        self._hosting.end_all(StaleEpoch(view.epoch, "this node was cut off from the mesh; join again"))
        return True
