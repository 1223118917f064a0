"""What the node does in each step of a commit: fences, cuts and epochs on its ranks' control pages.

The decisions are in `progress`; here they are written to the pages. One event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from epmesh.errors import StaleEpoch
from epmesh.v1 import membership_service_pb2, view_pb2
from epmesh.view import View
from epmesh_server.node.buffers import BufferPool
from epmesh_server.node.progress import Member, evicted_ranks, is_member, lost_ranks, node_progress, past_cut
from epmesh_server.node.ranks import LocalRank, RankTable
from epmesh_server.node.store import KeyValueStore
from epmesh_server.node.views import ViewBoard

_log = logging.getLogger(__name__)
_POLL_S = (0.001, 0.002, 0.005, 0.01)
MAX_FINISH_S = 600.0


class EpochFollower:
    """Follows the coordinator through prepare, finish and commit.

    Attributes:
        slot: this node's slot, once registered.
    """

    def __init__(self, table: RankTable, board: ViewBoard, store: KeyValueStore, pool: BufferPool) -> None:
        self.slot = -1
        self._table = table
        self._board = board
        self._store = store
        self._pool = pool
        self._prepared = 0
        self._told: frozenset[int] = frozenset()
        self._publisher: asyncio.Task[None] | None = None

    def adopt(self, entry: LocalRank) -> None:
        """Brings the page of a rank that just opened to where the others' are."""
        entry.page.raise_fence(max(self._prepared, self._board.epoch))
        entry.page.commit(self._board.epoch)

    def rank_died(self) -> None:
        """Shows the neighbours of a rank that just died that it is lost."""
        self._show_lost()

    def prepare(self, command: membership_service_pb2.Prepare) -> membership_service_pb2.Prepared:
        """Raises the fences; then what has begun is final, so the answer is read after that."""
        self._stop_publishing()
        self._prepared = max(self._prepared, command.epoch)
        self._told = frozenset(command.lost_ranks)
        for entry in self._table.all():
            entry.page.raise_fence(command.epoch)
        self._show_lost()
        return membership_service_pb2.Prepared(epoch=command.epoch, progress=self._progress())

    async def finish(self, command: membership_service_pb2.Finish) -> membership_service_pb2.Finished:
        """Publishes the cuts and waits until the ranks got there, gave up, or the time is over."""
        self._stop_publishing()
        cuts = {cut.group_id: cut.sequence for cut in command.cuts}
        publish = self._cut_publisher(command.epoch, cuts)
        if command.abort:
            for entry in self._table.all():
                entry.page.abort_exchanges(command.epoch)
        publish()
        self._wake()
        if not command.abort:
            await self._wait_for_cut(publish, cuts, command)
        # A rank that was idle may still open a row and begin what its peers have begun: it must find the cut.
        self._publisher = asyncio.create_task(_repeat(publish))
        return membership_service_pb2.Finished(epoch=command.epoch, progress=self._progress())

    def evicted_by(self, message: view_pb2.View) -> list[tuple[LocalRank, StaleEpoch]]:
        """Ranks here that are members now and not of this view, with what to tell them."""
        view = View.from_proto(message)
        if view.epoch <= self._board.epoch:
            return []
        admitted = {entry.rank: entry for entry in self._table.all() if entry.admitted}
        return [
            (admitted[rank], StaleEpoch(view.epoch, f"rank {rank} is no member of epoch {view.epoch}; join again"))
            for rank in evicted_ranks(view, [entry.member for entry in admitted.values()])
        ]

    def commit(self, message: view_pb2.View) -> View:
        """Adopts a view: shows the epoch, drops what belongs to older memberships. Evicted ranks must be gone.

        Raises:
            InvalidRequest: the view contradicts itself; nothing was changed.
        """
        view = View.from_proto(message)
        if view.epoch <= self._board.epoch:
            return view
        self._stop_publishing()
        self._told = frozenset()
        self._table.forget_left(view)
        lost = lost_ranks(view, self.slot, self._present(), ())
        for entry in self._table.all():
            entry.admitted = entry.admitted or is_member(view, *entry.member)
            entry.page.set_lost(lost)
            entry.page.raise_fence(max(self._prepared, view.epoch))
            entry.page.commit(view.epoch)
        self._store.drop_before(view.membership_epoch)
        self._pool.keep_only(view)
        self._wake()
        self._board.publish(message)
        return view

    def forget(self) -> None:
        """Forgets views, keys and buffers: the node belongs to another mesh now. Its ranks must be gone."""
        self._stop_publishing()
        self._prepared = 0
        self._told = frozenset()
        self._store.clear()
        self._pool.keep_only(None)
        self._board.reset()

    def close(self) -> None:
        """Stops what runs in the background and closes the buffers; idempotent."""
        self._stop_publishing()
        self._pool.keep_only(None)

    def _show_lost(self) -> None:
        lost = lost_ranks(self._board.view, self.slot, self._present(), self._told)
        for entry in self._table.all():
            entry.page.set_lost(lost)
        self._wake()

    def _present(self) -> frozenset[Member]:
        """Ranks whose absence nobody's exchange is given up for: the living, and those that left in good order."""
        return self._table.left().union(self._table.members())

    def _wake(self) -> None:
        for entry in self._table.all():
            entry.wake()

    def _progress(self) -> list[membership_service_pb2.GroupProgress]:
        return node_progress(self._board.view, {entry.rank: entry.page.progress() for entry in self._table.all()})

    def _cut_publisher(self, epoch: int, cuts: dict[int, int]) -> Callable[[], None]:
        """A function that writes the cuts to every page, and wakes ranks with rows it had not seen before."""
        rows: dict[bytes, int] = {}

        def publish() -> None:
            for entry in self._table.all():
                entry.page.publish_cuts(epoch, cuts)
                count = len(entry.page.progress())
                if rows.get(entry.token) != count:
                    rows[entry.token] = count
                    entry.wake()

        return publish

    async def _wait_for_cut(
        self, publish: Callable[[], None], cuts: dict[int, int], command: membership_service_pb2.Finish
    ) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(command.timeout_s, MAX_FINISH_S)
        polls = iter(_POLL_S)
        pause_s = next(polls)
        while not self._all_past(command, cuts):
            if loop.time() >= deadline:
                _log.warning("epoch %d: ranks did not reach the cut in %.1f s", command.epoch, command.timeout_s)
                return
            await asyncio.sleep(pause_s)
            pause_s = next(polls, pause_s)
            publish()

    def _all_past(self, command: membership_service_pb2.Finish, cuts: dict[int, int]) -> bool:
        view, unchanged = self._board.view, command.members_unchanged
        return all(
            entry.page.blocked == command.epoch or past_cut(view, entry.page.progress(), cuts, dispatched=unchanged)
            for entry in self._table.all()
        )

    def _stop_publishing(self) -> None:
        if self._publisher is not None:
            self._publisher.cancel()
            self._publisher = None


async def _repeat(publish: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(_POLL_S[-1])
        publish()
