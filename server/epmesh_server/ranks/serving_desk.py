"""The desk of a rank that serves: takes requests in, hands shares out, adds results up, answers.

One thread does all of it; others only post jobs. It also hears what the node service tells (views, losses), so that a
request whose neighbour died is answered at once.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypedDict

from epmesh.curve import KeyPair
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, Overloaded, PeerLost, StaleEpoch
from epmesh.frames import Buffer, num_bytes
from epmesh.front import INLINE, FrontClient, FrontPeer
from epmesh.hold_offs import HoldOffs
from epmesh.layout import Ints
from epmesh.v1 import front_pb2
from epmesh.view import View
from epmesh_server.ranks.front import Incoming
from epmesh_server.ranks.serve_memory import ServeMemories, ServeMemory, Slab
from epmesh_server.ranks.serving_batch import Coming
from epmesh_server.ranks.serving_experts import Outcome, QueuedShare, ServeStats, ShareQueue
from epmesh_server.ranks.serving_request import (
    NeighbourShare,
    RouterRequest,
    blamed,
    give_up_at,
    is_done,
    result_room,
)
from epmesh_server.ranks.serving_rows import Bytes, Holders, RouterRows, Rows, announced, parse_router_rows, parse_rows
from epmesh_server.ranks.session import RankSession
from epmesh_server.ranks.tensors import as_rows, dtype_from_name, meta_of

_log = logging.getLogger(__name__)

_ALIGNMENT = 64
_TICK_S = 0.01
_VIEW_PATIENCE_S = 1.0  # how long a request waits for a view that its router knows and this rank does not yet

Job = Callable[[], None]


class Desk:
    """See the module."""

    def __init__(self, session: RankSession, queue: ShareQueue, stats: ServeStats, pair: KeyPair | None = None) -> None:
        """Starts its thread; `pair` is the rank's, which neighbours' fronts admit."""
        self.last_request = time.monotonic()
        self._session = session
        self._me = session.rank
        self._pair = pair
        self._queue = queue
        self._stats = stats
        self._memories = ServeMemories(session)
        self._held_off = HoldOffs()  # by neighbour and client
        self._client: FrontClient | None = None
        self._holders: Holders | None = None
        self._requests: set[RouterRequest] = set()
        self._early: list[tuple[Incoming, float]] = []  # requests of an epoch that is not known here yet, until when
        self._jobs: deque[Job] = deque()
        self._closing = False
        self._lock = threading.Lock()  # guards _closed, and what may be written to while it is not set
        self._closed = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="epmesh-serve", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no request is being worked on."""
        return not (self._requests or self._early or self._jobs)

    def take_in(self, incoming: Incoming) -> None:
        """Takes a request from the front; returns at once.

        Raises:
            InvalidRequest: it asks for something else.
            Overloaded: by its header alone it will not be answered in time.
        """
        kind = incoming.request.WhichOneof("request")
        if kind not in ("serve_rows", "serve_share"):
            raise InvalidRequest(f"rank {self._me} serves routers; it takes no {kind}")
        self.last_request = time.monotonic()
        take = self._take_rows if kind == "serve_rows" else self._take_share
        coming = self._expect(incoming)
        self._post(lambda: self._look_into(incoming, take, coming))

    def _expect(self, incoming: Incoming) -> Coming | None:
        """Refuses what will not be in time, before anybody works for it: else a rank that is asked for too much would
        spend its time on what it then refuses (Mogul and Ramakrishnan, "Eliminating receive livelock", 1996)."""
        request, now = incoming.request, time.monotonic()
        asked: front_pb2.ServeRows | front_pb2.ServeShare = request.serve_share
        ranks, deadline = [self._me], incoming.deadline
        if request.HasField("serve_rows"):
            asked = request.serve_rows
            ranks, deadline = list(request.serve_rows.ranks), give_up_at(now, deadline)
        layer = asked.layer if asked.HasField("layer") else None
        found = announced(layer, ranks, request.tensors)
        if found is None:
            return None
        try:
            self._check_held_off(incoming, ranks, now)
            if self._me not in ranks:
                return None
            coming = Coming(found[0], incoming.client, found[1], deadline)
            self._queue.expect(coming, now)
        except Overloaded:
            self._stats.refused_unseen += 1
            raise
        return coming

    def _check_held_off(self, incoming: Incoming, ranks: Sequence[int], now: float) -> None:
        """Whether a neighbour refused as much a moment ago."""
        for rank in ranks:
            wait_s = self._held_off.wait_s((rank, incoming.client), now=now, **_effort(incoming))
            if wait_s:
                raise Overloaded(wait_s, f"rank {rank} refused as many rows of this client a moment ago")

    def _look_into(self, incoming: Incoming, take: Callable[[Incoming], None], coming: Coming | None) -> None:
        if coming is not None:
            self._queue.arrived(coming)
        self._answered_if_wrong(incoming, take)

    def close(self, error: EpmeshError) -> None:
        """Refuses what is open, and ends."""

        def end() -> None:
            self._closing = True
            for request in list(self._requests):
                self._fail(request, error)
            for incoming, _ in self._early:
                incoming.refuse(error)

        self._post(end)
        self._thread.join()
        if self._client is not None:
            self._client.close()
        self._memories.close()
        with self._lock:
            self._closed = True
            os.close(self._wake_fd)

    # The thread ------------------------------------------------------------------------------------------------

    def _post(self, job: Job) -> None:
        with self._lock:
            if self._closed:  # nobody needs it any more; and the descriptor's number may be another one's by now
                return
            self._jobs.append(job)
            os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        poller.register(self._session.wake_fd, select.POLLIN)
        looked_at = 0.0
        while not self._closing:
            busy = self._requests or self._early
            poller.poll(_TICK_S * 1000 if busy else 500)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            if self._session.calm():
                self._job(self._membership_changed)
            while self._jobs and not self._closing:
                self._job(self._jobs.popleft())
            now = time.monotonic()
            if now - looked_at >= _TICK_S:
                looked_at = now
                self._job(functools.partial(self._expire, now))

    def _job(self, job: Job) -> None:
        try:
            job()
        except Exception:  # noqa: BLE001 - one bad job must not end the desk
            _log.exception("rank=%d serve.failed", self._me)

    def _answered_if_wrong(self, incoming: Incoming, take: Callable[[Incoming], None]) -> None:
        try:
            take(incoming)
        except EpmeshError as exc:
            self._count(exc)
            incoming.refuse(exc)
        except Exception as exc:  # noqa: BLE001 - the router hears of it
            _log.exception("rank=%d serve.failed", self._me)
            self._stats.failures += 1
            incoming.refuse(EpmeshError(f"rank {self._me} failed: {type(exc).__name__}: {exc}"))

    def _count(self, error: EpmeshError) -> None:
        if isinstance(error, Overloaded):
            self._stats.overloaded += 1
        else:
            self._stats.failures += 1

    def _expire(self, now: float) -> None:
        for request in [request for request in self._requests if request.deadline <= now]:
            late = min(request.waiting, default=self._me)
            self._fail(request, DeadlineExceeded(late, 0, f"rank {late} had no results in time"))
        for early in [early for early in self._early if early[1] <= now]:
            self._early.remove(early)
            self._answered_if_wrong(early[0], functools.partial(self._take_rows, patient=False))

    def _membership_changed(self) -> None:
        self._queue.wake()
        view, gone = self._session.view, self._session.page.lost()
        if view is None:
            return
        self._memories.newest()  # before neighbours name it
        for request in list(self._requests):
            lost = {
                share.rank
                for share in request.neighbours
                if share.rank in request.waiting and (share.rank in gone or not _alive(view, share))
            }
            if lost:
                self._fail(request, PeerLost(lost, view.epoch))
        early, self._early = self._early, []
        for incoming, until in early:
            self._answered_if_wrong(incoming, functools.partial(self._take_rows, until=until))

    # Routers' requests -----------------------------------------------------------------------------------------

    def _take_rows(self, incoming: Incoming, *, patient: bool = True, until: float | None = None) -> None:
        if incoming.cancelled:
            self._forget(incoming)
            return
        view, wanted = self._session.view, incoming.request.serve_rows
        assert view is not None
        now = time.monotonic()
        if wanted.epoch > view.epoch and patient:
            self._early.append((incoming, until or min(incoming.deadline, now + _VIEW_PATIENCE_S)))
            return
        self._stats.requests += 1
        layer = wanted.layer if wanted.HasField("layer") else None
        router_rows = parse_router_rows(layer, wanted.ranks, incoming.request.tensors, incoming.tensors)
        self._holders_of(view).check(router_rows, self._me)
        request = RouterRequest(incoming, router_rows, view, give_up_at(now, incoming.deadline))
        if not router_rows.wanted:
            request.answer(request.sum())
            return
        request.waiting.update(router_rows.wanted)
        self._requests.add(request)
        incoming.on_cancel(lambda: self._post(lambda: self._give_up(request)))
        try:
            self._hand_out(request)
        except EpmeshError as exc:
            self._fail(request, exc)

    def _hand_out(self, request: RouterRequest) -> None:
        """Gives every rank its share; this one first, so that nobody works for a request that it refuses."""
        wanted = request.router_rows.wanted
        if self._me in wanted:
            index = request.router_rows.index(self._me)
            rows = request.router_rows.share(self._me, index)
            self._stats.shares += 1
            self._queue.put(
                QueuedShare(
                    rows,
                    request.deadline,
                    lambda: request.abandoned,
                    lambda outcome: self._post_own(request, index, outcome),
                    request.incoming.client,
                )
            )
        for rank in wanted:
            if rank != self._me:
                self._announce(request, rank)

    def _announce(self, request: RouterRequest, rank: int, *, as_frames: bool = False) -> None:
        index = request.router_rows.index(rank)
        memory = None if as_frames else self._memories.newest()
        message, frames, slab, result_at = self._written(request.router_rows, rank, index, memory)
        message.serve_share.client = request.incoming.client
        info = request.view.ranks[rank]
        peer = FrontPeer(rank, info.incarnation, info.front_endpoint, info.curve_key)
        timeout_s = max(request.deadline - time.monotonic(), 0.001)
        share = NeighbourShare(rank, info.incarnation, index, slab, result_at)

        def on_answer(response: front_pb2.FrontResponse) -> None:  # it may come while `call` runs
            if is_done(response):
                self._post(share.neighbour_is_done)

        answer = self._caller(request.view).call(peer, message, frames, timeout_s=timeout_s, on_answer=on_answer)
        share.answer = answer
        request.neighbours.append(share)
        answer.add_done_callback(lambda _: self._post(lambda: self._take_answer(request, share)))

    def _written(
        self, router_rows: RouterRows, rank: int, index: Ints, memory: ServeMemory | None
    ) -> tuple[front_pb2.FrontRequest, list[Buffer], Slab | None, int]:
        """The announcement of a share: its rows in the section of this rank, or as frames where there is no room."""
        key = router_rows.rows.key
        message = front_pb2.FrontRequest()
        message.serve_share.source = self._me
        if key.layer is not None:
            message.serve_share.layer = key.layer
        sizes = [len(index) * width for width in router_rows.rows.row_bytes]
        starts, end = _places(sizes)
        room = result_room(dtype_from_name(key.hidden_dtype).itemsize, len(index), key.hidden)
        slab = memory.take(end + room) if memory is not None else None
        if memory is None or slab is None:
            rows = router_rows.share(rank, index)
            message.tensors.extend(rows.metas)
            return message, [array.data for array in rows.arrays], None, 0
        into = [slab.data[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        message.tensors.extend(router_rows.share(rank, index, into).metas)
        self._session.page.barrier()
        message.places.extend(slab.start + start for start in starts)
        message.serve_share.membership_epoch = memory.membership_epoch
        message.serve_share.result_offset = slab.start + end
        message.serve_share.result_bytes = room
        return message, [], slab, end

    def _caller(self, view: View) -> FrontClient:
        if self._client is None:
            self._client = FrontClient(view.mesh_id, pair=self._pair)
        return self._client

    def _take_answer(self, request: RouterRequest, share: NeighbourShare) -> None:
        """A neighbour's call is over."""
        answer, share.answer = share.answer, None  # its callbacks know share and request
        if answer is None or answer.cancelled():
            return
        error = answer.exception()  # not raised: a traceback would keep everything until the next garbage collection
        if request.over:
            share.release()
            return
        try:
            if isinstance(error, StaleEpoch) and share.slab is not None:
                share.release()  # a neighbour may come too late to map that memory; frames never come too late
                self._announce(request, share.rank, as_frames=True)
                return
            if isinstance(error, EpmeshError):
                self._hold_off(request.incoming, share.rank, error)
                self._fail(request, blamed(error, share.rank, request.view.epoch))
                return
            results = share.results(answer.result())
        except EpmeshError as exc:
            self._fail(request, blamed(exc, share.rank, request.view.epoch))
        else:
            if request.add(share.rank, share.index, results):
                self._finish(request)

    def _hold_off(self, incoming: Incoming, rank: int, error: EpmeshError) -> None:
        if isinstance(error, Overloaded):
            who, now = (rank, incoming.client), time.monotonic()
            self._held_off.note(who, retry_after_s=error.retry_after_s, now=now, **_effort(incoming))

    def _post_own(self, request: RouterRequest, index: Ints, outcome: Outcome) -> None:
        """This rank's own results are there; on the computing thread, so they are copied."""
        own = outcome if isinstance(outcome, EpmeshError) else outcome.clone()
        self._post(lambda: self._take_own(request, index, own))

    def _take_own(self, request: RouterRequest, index: Ints, outcome: Outcome) -> None:
        if request.over:
            return
        if isinstance(outcome, EpmeshError):
            self._fail(request, outcome)
        elif request.add(self._me, index, outcome):
            self._finish(request)

    def _finish(self, request: RouterRequest) -> None:
        """All results are there."""
        try:
            request.answer(request.sum())
        except EpmeshError as exc:
            self._fail(request, exc)
            return
        self._end(request)

    def _fail(self, request: RouterRequest, error: EpmeshError) -> None:
        """Answers with an error; what is still computed for the request is given up."""
        if request.over:
            return
        self._count(error)
        request.incoming.refuse(error)
        self._end(request)

    def _give_up(self, request: RouterRequest) -> None:
        """Its router waits no longer."""
        if not request.over:
            self._forget(request.incoming)
            self._end(request)

    def _end(self, request: RouterRequest) -> None:
        request.over = True
        self._requests.discard(request)
        for share in request.neighbours:
            answer, share.answer = share.answer, None
            if answer is not None and not answer.cancel() and answer.exception() is None:
                share.answered = True  # `neighbour_is_done` may wait for us
            share.release()

    # Neighbours' shares ----------------------------------------------------------------------------------------

    def _take_share(self, incoming: Incoming) -> None:
        if incoming.cancelled:
            self._forget(incoming)
            return
        wanted = incoming.request.serve_share
        view = self._session.view
        assert view is not None
        if wanted.source == self._me or view.slot_of(wanted.source) != view.slot_of(self._me):
            raise InvalidRequest(f"rank {wanted.source} is no neighbour of rank {self._me}")
        memory = self._memories.of(wanted.membership_epoch) if incoming.request.places else None
        if memory is not None:
            memory.at(wanted.source, wanted.result_offset, wanted.result_bytes)  # refused here, not once computed
        rows = self._share_rows(incoming, memory)
        self._holders_of(view).check_share(rows.key.layer, rows.topk_ids[rows.topk_ids >= 0], self._me)
        self._stats.shares += 1

        def deliver(outcome: Outcome) -> None:
            _answer_share(incoming, memory, outcome)

        self._queue.put(QueuedShare(rows, incoming.deadline, lambda: incoming.cancelled, deliver, incoming.client))
        # Where results may be on their way into memory, the answer is what says that they are not: `deliver` gives it.
        forget = self._count_cancelled if memory is not None else functools.partial(self._forget, incoming)
        incoming.on_cancel(lambda: self._post(forget))

    def _count_cancelled(self) -> None:
        self._stats.cancelled += 1

    def _forget(self, incoming: Incoming) -> None:
        """A request is given up."""
        self._count_cancelled()
        incoming.refuse(DeadlineExceeded(self._me))  # nobody hears it; the front forgets the request

    def _share_rows(self, incoming: Incoming, memory: ServeMemory | None) -> Rows:
        request, wanted = incoming.request, incoming.request.serve_share
        frames = iter(incoming.tensors)
        tensors: list[memoryview | Bytes] = []
        for meta, place in zip(request.tensors, request.places or [INLINE] * len(request.tensors), strict=True):
            if memory is None or place == INLINE:
                tensors.append(next(frames))
            else:
                tensors.append(memory.at(wanted.source, place, num_bytes(meta)))
        return parse_rows(wanted.layer if wanted.HasField("layer") else None, request.tensors, tensors)

    def _holders_of(self, view: View) -> Holders:
        if self._holders is None or self._holders.view is not view:
            self._holders = Holders(view)
        return self._holders


class _Effort(TypedDict):
    rows: int
    left_s: float


def _effort(incoming: Incoming) -> _Effort:
    """What a request asks for, as `HoldOffs` compares it."""
    rows = incoming.request.tensors[0].shape[0] if incoming.request.tensors else 0
    return _Effort(rows=rows, left_s=incoming.request.deadline_ms / 1000)


def _answer_share(incoming: Incoming, memory: ServeMemory | None, outcome: Outcome) -> None:
    """Writes results where the neighbour wants them; on the computing thread."""
    if isinstance(outcome, EpmeshError):
        incoming.refuse(outcome)
        return
    if incoming.cancelled:
        incoming.refuse(DeadlineExceeded())
        return
    wanted, data = incoming.request.serve_share, as_rows(outcome).reshape(-1)
    response = front_pb2.FrontResponse(tensors=[meta_of(outcome)])
    if memory is None or data.nbytes > wanted.result_bytes:
        incoming.answer(response, [data.tobytes()])
        return
    memory.at(wanted.source, wanted.result_offset, data.nbytes)[:] = data
    response.places.append(wanted.result_offset)
    incoming.answer(response)


def _alive(view: View, share: NeighbourShare) -> bool:
    info = view.ranks.get(share.rank)
    return info is not None and info.incarnation == share.incarnation


def _places(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of these sizes start in a slab, and where they end, aligned."""
    starts = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    return starts[:-1], starts[-1]
