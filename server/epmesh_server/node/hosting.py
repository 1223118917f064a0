"""Hosts ranks: opens and ends them, watches their processes, and passes on what they report."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq.asyncio

from epmesh.curve import KeyPair, secure_client
from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, StaleEpoch
from epmesh.v1 import rank_service_pb2
from epmesh_server.node.follower import EpochFollower
from epmesh_server.node.liveness import LivenessSettings, watch_process
from epmesh_server.node.progress import Member
from epmesh_server.node.rank_stats import StatsBook
from epmesh_server.node.ranks import LocalRank, RankTable
from epmesh_server.node.registration import Enrolment
from epmesh_server.node.views import ViewBoard

_log = logging.getLogger(__name__)


class RankHosting:
    """The node's side of all rank sessions. Used on the event loop only.

    Attributes:
        on_links: called after the list of broken links changed.
    """

    def __init__(
        self,
        table: RankTable,
        follower: EpochFollower,
        board: ViewBoard,
        enrolment: Enrolment,
        liveness: LivenessSettings | None = None,
        pair: KeyPair | None = None,
        stats: StatsBook | None = None,
    ) -> None:
        """Hosts nobody yet; `pair` is the node service's, where ranks use CURVE."""
        self._table = table
        self._follower = follower
        self._board = board
        self._enrolment = enrolment
        self.on_links: Callable[[], None] = lambda: None
        self._stats = stats or StatsBook()
        self._liveness = liveness or LivenessSettings()
        self._pair = pair
        self._probes: dict[LocalRank, asyncio.Task[None]] = {}
        self._context = zmq.asyncio.Context(io_threads=1)
        self._closing: EpmeshError | None = None

    async def open_rank(self, request: rank_service_pb2.OpenRank) -> LocalRank:
        """Gives out a rank, as soon as the node is registered.

        Raises:
            InvalidRequest: the declaration or the local rank asked for.
            MeshUnavailable: the node service is shutting down.
        """
        registration = await self._enrolment.granted()
        if self._closing:
            raise self._closing
        entry = self._table.open(request, slot=registration.slot, stride=registration.stride)
        self._follower.adopt(entry)
        _log.info("rank %d, epoch %d: session.opened by process %d", entry.rank, self._board.epoch, entry.pid)
        if entry.declaration.rank.link_endpoint:
            self._probes[entry] = asyncio.create_task(self._watch(entry))
        return entry

    def unreachable(self, entry: LocalRank, report: rank_service_pb2.UnreachablePeers) -> None:
        """The rank's links cannot reach these peers; all of them, every time."""
        if entry.error is not None:
            return
        for failure in report.failures:
            failure.reporter = entry.rank
        entry.failures = tuple(report.failures)
        self.on_links()

    def update(self, entry: LocalRank, request: rank_service_pb2.UpdateRank) -> None:
        """The rank has another mode or front endpoint; one that no view could show ends its session."""
        try:
            self._table.update(entry, request)
        except InvalidRequest as exc:
            self._remove(entry, exc)

    def stats(self, entry: LocalRank, report: rank_service_pb2.RankStats) -> None:
        """What the rank counted."""
        if entry.error is None:
            self._stats.take(entry, report)

    def left(self, entry: LocalRank) -> None:
        """The rank left in good order: its neighbours hear of it with the next view."""
        entry.left = True
        if self._remove(entry, MeshUnavailable(f"rank {entry.rank} left")):
            _log.info("rank %d, epoch %d: session.closed", entry.rank, self._board.epoch)

    def died(self, entry: LocalRank, reason: str) -> None:
        """The rank's process is gone, or as good as gone: its neighbours hear of it at once."""
        error = StaleEpoch(self._board.epoch, f"rank {entry.rank} was given up: {reason}; join again")
        if self._remove(entry, error):
            _log.warning("rank %d, epoch %d: process %d lost: %s", entry.rank, self._board.epoch, entry.pid, reason)
            self._follower.rank_died()

    def end_all(self, error: EpmeshError) -> None:
        """Ends the membership of every rank."""
        for entry in self._table.all():
            self._remove(entry, error)

    def end(self, member: Member, error: EpmeshError) -> None:
        """Ends the membership of one process, if it is here."""
        for entry in self._table.all():
            if entry.member == member:
                self._remove(entry, error)

    async def close(self, error: EpmeshError) -> None:
        """Ends every rank and takes no more; idempotent."""
        self._closing = error
        self.end_all(error)
        probes = list(self._probes.values())
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        self._context.destroy(0)

    def _remove(self, entry: LocalRank, error: EpmeshError) -> bool:
        if not self._table.remove(entry, error):
            return False
        self._stats.forget(entry)
        if entry.failures:
            entry.failures = ()
            self.on_links()
        probe = self._probes.pop(entry, None)
        if probe is not None and probe is not asyncio.current_task():
            probe.cancel()
        return True

    async def _watch(self, entry: LocalRank) -> None:
        rank, pair = entry.declaration.rank, self._pair

        def secure(probe: zmq.asyncio.Socket) -> None:
            assert pair is not None
            secure_client(probe, pair, rank.curve_key)

        why = await watch_process(self._context, rank.link_endpoint, self._liveness, secure if pair else None)
        self.died(entry, why)
