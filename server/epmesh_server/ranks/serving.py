"""``comm.serve``: a rank answers routers until it is told to stop.

Three threads: the front's takes requests in, the desk's hands shares out and adds up, and the one that called `serve`
computes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from epmesh.communicator import Stop
from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.view import RankMode, View
from epmesh_server.ranks.front import DEFAULT_BUDGET_BYTES, Front
from epmesh_server.ranks.serving_batch import BatchLimits
from epmesh_server.ranks.serving_desk import Desk
from epmesh_server.ranks.serving_experts import ExpertCalls, Experts, ServeStats, ShareQueue

if TYPE_CHECKING:
    from epmesh_server.ranks.rank import RankProcess

_log = logging.getLogger(__name__)

_LOOK_S = 0.05  # how often a quiet rank looks whether to stop
_QUIET_S = 0.15  # a rank that leaves: how long after the last request it believes that no more come
_END_WITHIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How a rank serves.

    Attributes:
        limits: of batches and of the queue before them.
        budget_bytes: most bytes of requests that were taken in and not answered yet.
        drain_s: longest time that a rank which stops goes on answering.
    """

    limits: BatchLimits = field(default_factory=BatchLimits)
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    drain_s: float = 5.0

    def __post_init__(self) -> None:
        if self.budget_bytes < 1 or self.drain_s < 0:
            raise InvalidRequest(
                f"budget_bytes={self.budget_bytes} must be 1 or more, drain_s={self.drain_s} not negative"
            )


class ExpertServer:
    """One call of `serve`."""

    def __init__(self, rank: RankProcess, experts: Experts, options: ServeOptions, stats: ServeStats) -> None:
        """Binds the front; nobody is told of it yet."""
        self._rank = rank
        self._options = options
        self._queue = ShareQueue(options.limits)
        self._calls = ExpertCalls(experts, rank.session.rank, rank.device, self._queue, stats)
        self._front = Front(_host_of(rank.hub.endpoint), budget_bytes=options.budget_bytes, door=rank.door)
        self._desk = Desk(rank.session, self._queue, stats, rank.door.pair if rank.door is not None else None)
        self._ended = threading.Event()
        self._ending = False
        self._thread = threading.current_thread()

    @property
    def front(self) -> Front:
        """Where requests come in."""
        return self._front

    def run(self, stop: Stop | None) -> None:
        """Serves until `stop` is set, then takes leave of the routers.

        Raises:
            EpmeshError: the membership ended, or the mode could not be changed.
        """
        rank, before = self._rank, self._rank.mode
        error: EpmeshError = MeshUnavailable(f"rank {rank.session.rank} stopped serving")
        try:
            view = rank.session.view
            assert view is not None
            self._front.handle(self._desk.take_in)
            self._front.identify(view.mesh_id, rank.session.rank, rank.incarnation)
            rank.become(RankMode.SERVE, self._front.endpoint)
            _log.info("rank=%d epoch=%d serve.started at %s", rank.session.rank, view.epoch, self._front.endpoint)
            self._compute_until(lambda: self._ending or (stop is not None and stop.is_set()))
            if not self._ending:
                self._take_leave(before)
        except EpmeshError as exc:
            error = exc
            raise
        finally:
            self._close(error)
            rank.mode = before
            rank.front_endpoint = ""
            _log.info("rank=%d serve.complete", rank.session.rank)

    def end(self) -> None:
        """Ends `run`, from another thread, at once; returns when it is over."""
        self._ending = True
        self._queue.wake()
        if threading.current_thread() is not self._thread:
            self._ended.wait(_END_WITHIN_S)

    def _compute_until(self, done: Callable[[], bool]) -> None:
        session = self._rank.session
        while not done():
            if session.error is not None:
                raise session.error
            self._calls.run(_LOOK_S)

    def _take_leave(self, mode: RankMode) -> None:
        """Answers what came, and what comes from routers that have not heard yet that this rank leaves."""
        session, until = self._rank.session, time.monotonic() + self._options.drain_s
        session.update_rank(mode, "")

        def left() -> bool:
            view, now = session.view, time.monotonic()
            if now > until or self._ending:
                return True
            quiet = self._desk.idle and len(self._queue) == 0 and self._front.open_requests == 0
            return quiet and now - self._desk.last_request > _QUIET_S and not self._shown(view)

        self._compute_until(left)

    def _shown(self, view: View | None) -> bool:
        """Whether `view` has routers send requests here."""
        info = view.ranks.get(self._rank.session.rank) if view is not None else None
        return info is not None and bool(info.front_endpoint)

    def _close(self, error: EpmeshError) -> None:
        self._desk.close(error)
        for share in self._queue.drain():
            share.deliver(error)
        self._front.close()
        self._ended.set()


def _host_of(endpoint: str) -> str:
    """The host of ``tcp://host:port``."""
    return endpoint.removeprefix("tcp://").rpartition(":")[0]
