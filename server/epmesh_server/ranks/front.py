"""A rank's front: where routers, neighbours that serve with it, and its driver send requests.

One ROUTER and one thread, which checks what comes in, hands it to a handler, and sends answers; it never waits for the
handler's work. What was taken in and not answered yet is bounded in bytes and in number, in all and for each client;
answers that were not read yet count, too. Who reads nothing for `UNREAD_S` is cut off by the kernel.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import zmq
from google.protobuf.message import DecodeError

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, NotReady, Overloaded, StaleEpoch
from epmesh.frames import MAX_HEADER_BYTES, MAX_TENSORS, Buffer
from epmesh.front import check_frames, configure_front_socket
from epmesh.v1 import front_pb2
from epmesh_server.curve_users import Domain
from epmesh_server.fair_budget import FairBudget
from epmesh_server.ranks.clients import client_key
from epmesh_server.ranks.curve_door import CurveDoor
from epmesh_server.refusals import RefusalLog

_log = logging.getLogger(__name__)

DEFAULT_BUDGET_BYTES = 1 << 30
MAX_OPEN_REQUESTS = 65_536
UNREAD_S = 10.0
UNREAD_PART = 8  # beyond an eighth of the budget in unread answers a connection is refused until it has read some
UNREAD_ANSWERS = 1024  # that wait for one connection; small ones are bounded by this alone
_SMALL_BYTES = 1 << 14  # frames of fewer are copied, and ZeroMQ does not tell when they have left
_LOOK_MS = 20  # how often it is looked whether answers have left
_RETRY_AFTER_S = 0.05
_MAX_DEADLINE_S = 3600.0
_REQUESTS_A_TURN = (
    64  # taken in before answers are sent again; answers cannot outrun requests, so they need no such bound
)

_NOBLOCK, _SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)  # as enumerations they cost more than the call

_Key = tuple[bytes, int]  # the sender's connection, and its number for the request
_Account = tuple[bytes, str]  # a connection, and for whom


class Incoming:
    """One request, until it is answered; usable from any thread.

    Attributes:
        request: its header.
        tensors: the bytes of those of ``request.tensors`` that came as frames, in order; valid for as long as this is.
        deadline: ``time.monotonic()`` after which nobody waits for the answer.
        num_bytes: what it counts for in the front's budget.
        client: for whom.
    """

    def __init__(
        self, front: Front, key: _Key, request: front_pb2.FrontRequest, tensors: tuple[memoryview, ...], client: str
    ) -> None:
        self.request = request
        self.tensors = tensors
        self.deadline = time.monotonic() + min(request.deadline_ms / 1000, _MAX_DEADLINE_S)
        self.num_bytes = sum(map(len, tensors))
        self.client = client
        self._front = front
        self._key = key
        self._lock = threading.Lock()  # guards what follows
        self._callbacks: list[Callable[[], None]] = []
        self._given_up = self._over = False

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for the answer any more: its sender said so, or the deadline passed."""
        return self._given_up or time.monotonic() > self.deadline

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Has `callback` called, on the front's thread, when the sender gives up; at once if it did already.

        Not after the answer: then nobody gives up any more.
        """
        with self._lock:
            if not self._given_up:
                if not self._over:
                    self._callbacks.append(callback)
                return
        callback()

    def answer(self, response: front_pb2.FrontResponse | None = None, tensors: Sequence[Buffer] = ()) -> None:
        """Sends the answer; a second one, or one that nobody waits for, goes nowhere. `tensors` must not change."""
        response = response or front_pb2.FrontResponse()
        response.request_id = self._key[1]
        self._front._answer(self._key, [response.SerializeToString(), *tensors])

    def refuse(self, error: EpmeshError) -> None:
        """Sends a typed error as the answer."""
        self.answer(front_pb2.FrontResponse(error=error.to_proto()))

    def _end(self) -> None:
        """It is answered. Callbacks know the request: kept, they would keep it until the next garbage collection."""
        with self._lock:
            self._callbacks.clear()
            self._over = True

    def give_up(self) -> None:
        """The sender waits no longer."""
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
            self._given_up = True
        for callback in callbacks:
            callback()


Handler = Callable[[Incoming], None]


class _Answer:
    """What goes back over one connection."""

    def __init__(self, sender: bytes, client: str, frames: list[Buffer]) -> None:
        self.sender = sender
        self.client = client
        self.frames: list[Buffer] = frames
        self.num_bytes = sum(memoryview(frame).nbytes for frame in frames[1:])
        self._trackers: list[zmq.MessageTracker] = []

    def leave(self, frames: Sequence[zmq.Frame]) -> None:
        """ZeroMQ has `frames` now, and tells when it needs them no more."""
        self.frames = []
        self._trackers = [frame.tracker for frame in frames if frame.tracker is not None]

    @property
    def left(self) -> bool:
        """Whether the kernel has it, or it was dropped."""
        return all(tracker.done for tracker in self._trackers)


class Front:
    """The endpoint of one rank. `identify` and `handle` before anybody is told of it.

    Attributes:
        refused: requests that the front itself refused.
        unread: answers that were dropped because too many waited for their connection.
    """

    def __init__(
        self,
        host: str,
        *,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        on_request: Handler | None = None,
        door: CurveDoor | None = None,
    ) -> None:
        """Binds a free port of `host`.

        Args:
            budget_bytes: most bytes of requests that were taken in and not answered yet; beyond, or beyond a client's
                part of it, `Overloaded`.
            on_request: the handler; see `handle`.
            door: encrypts connections and admits known keys alone; `None`: everybody, in the clear.
        """
        self.refused = self.unread = 0
        self._door = door
        self._junk = RefusalLog(_log, "front.refused")
        self._handler: Handler = on_request or _not_ready
        self._who: tuple[str, int, int] | None = None
        self._lock = threading.Lock()  # guards _open, _bytes, _places, _closing
        self._open: dict[_Key, Incoming] = {}
        self._bytes = FairBudget(budget_bytes)
        self._places = FairBudget(MAX_OPEN_REQUESTS)
        self._unread_bytes: Counter[_Account] = Counter()  # the thread's alone
        self._closing = False
        self._answers: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        self._leaving: dict[bytes, deque[_Answer]] = {}  # by connection; the thread's alone
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        configure_front_socket(self._router)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.SNDHWM, UNREAD_ANSWERS)
        self._router.setsockopt(zmq.TCP_MAXRT, int(UNREAD_S * 1000))
        self._router.copy_threshold = _SMALL_BYTES
        if door is not None:
            door.guard(self._context, self._router, Domain.FRONT)
        self._router.bind(f"tcp://{host}:0")
        self.endpoint: str = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="epmesh-front", daemon=True)
        self._thread.start()

    @property
    def open_requests(self) -> int:
        """Requests that were taken in and not answered yet."""
        return len(self._open)

    @property
    def open_bytes(self) -> int:
        """Bytes of those, and of answers that were not read yet."""
        return self._bytes.held

    def identify(self, mesh_id: str, rank: int, incarnation: int) -> None:
        """Says whose front it is; requests for somebody else are refused. Before that all are `NotReady`."""
        self._who = (mesh_id, rank, incarnation)

    def handle(self, on_request: Handler) -> None:
        """Sets what is called with every request, on the front's thread; it must not wait. What it raises is sent."""
        self._handler = on_request

    def close(self, linger_s: float = 1.0) -> None:
        """Refuses what was not answered, and ends; answers get up to `linger_s` to leave. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            left = list(self._open.values())
        for incoming in left:
            incoming.refuse(MeshUnavailable("the rank is leaving"))
        self._answers.put(None)
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join()
        self._router.close(linger=int(linger_s * 1000))
        self._context.term()
        os.close(self._wake_fd)

    def _answer(self, key: _Key, frames: list[Buffer]) -> None:
        with self._lock:
            incoming = self._release(key)
            if incoming is None:
                return
            answer = _Answer(key[0], incoming.client, frames)
            self._bytes.hold(answer.client, answer.num_bytes)  # it is made already
            self._answers.put(answer)
            os.eventfd_write(self._wake_fd, 1)

    def _release(self, key: _Key) -> Incoming | None:
        """Makes room for others; whoever calls it holds the lock. `None`: the request is not open any more."""
        incoming = self._open.pop(key, None)
        if incoming is not None:
            self._bytes.release(incoming.client, incoming.num_bytes)
            self._places.release(incoming.client, 1)
            incoming._end()
        return incoming

    # The thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        poller.register(self._router, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(_LOOK_MS if self._leaving else None))
            self._let_go()
            if self._wake_fd in ready and not self._send_answers():
                return
            if self._router in ready:
                self._receive()

    def _send_answers(self) -> bool:
        """Sends what is there to send; False once that was the last."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while not self._answers.empty():
            answer = self._answers.get_nowait()
            if answer is None:
                return False
            answer.leave(self._send(answer.sender, answer.frames))
            self._unread_bytes[answer.sender, answer.client] += answer.num_bytes
            self._leaving.setdefault(answer.sender, deque()).append(answer)
        self._let_go()
        return True

    def _let_go(self) -> None:
        """Gives back the bytes of answers that have left."""
        for sender, answers in list(self._leaving.items()):
            while answers and answers[0].left:
                answer = answers.popleft()
                account = (sender, answer.client)
                self._unread_bytes[account] -= answer.num_bytes
                if not self._unread_bytes[account]:
                    del self._unread_bytes[account]
                with self._lock:
                    self._bytes.release(answer.client, answer.num_bytes)
            if not answers:
                del self._leaving[sender]

    def _send(self, sender: bytes, frames: Sequence[Buffer]) -> list[zmq.Frame]:
        """Hands a message to ZeroMQ, which does not wait; frames that it needs for longer."""
        made = [zmq.Frame(frame, track=True, copy=False, copy_threshold=_SMALL_BYTES) for frame in frames]
        try:
            self._router.send_multipart([sender, *made], flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._note_unread()
            return []
        except zmq.ZMQError:
            return []  # the sender is gone
        return made

    def _note_unread(self) -> None:
        self.unread += 1
        if self.unread & (self.unread - 1) == 0:  # the first, the second, the fourth ...
            _log.warning("rank=%s front.unread: %d answers dropped, nobody reads them", self._name, self.unread)

    def _receive(self) -> None:
        """Takes in what is there, as far as one turn goes: under a flood answers would otherwise never leave."""
        for _ in range(_REQUESTS_A_TURN):
            try:
                sender, *frames = self._next_message()
            except zmq.Again:
                return
            try:
                self._take_in(sender, [frame.buffer for frame in frames])
            except InvalidRequest as exc:
                self.refused += 1
                self._junk.note("", f"rank {self._name}: {exc}")

    def _next_message(self) -> list[zmq.Frame]:
        """As `recv_multipart`, which asks the socket after every frame whether there are more."""
        frames = [self._router.recv(_NOBLOCK, copy=False)]
        while frames[-1].more:
            frames.append(self._router.recv(_NOBLOCK, copy=False))
        return frames

    def _take_in(self, route: zmq.Frame, frames: list[Buffer]) -> None:
        request, sender = _parse(frames), route.bytes
        key = (sender, request.request_id)
        if request.WhichOneof("request") == "cancel":
            cancelled = self._open.get((sender, request.cancel.request_id))
            if cancelled is not None:
                cancelled.give_up()
            return
        try:
            if self._door is not None:
                self._door.check_front(route, request)
            self._check(request)
            tensors = check_frames(request, frames[1:])
            incoming = Incoming(self, key, request, tensors, client_key(route, request))
            self._admit(key, incoming)
        except EpmeshError as exc:
            self.refused += 1
            self._refuse(key, exc)
            return
        try:
            self._handler(incoming)
        except EpmeshError as exc:  # before all answers that wait to be sent
            with self._lock:
                still_open = self._release(key) is not None
            if still_open:
                self._refuse(key, exc)
        except Exception as exc:  # noqa: BLE001 - the thread must go on, whatever a handler does
            _log.exception("rank=%d front.failed", request.rank)
            incoming.refuse(EpmeshError(f"rank {request.rank} failed: {type(exc).__name__}: {exc}"))

    def _refuse(self, key: _Key, error: EpmeshError) -> None:
        response = front_pb2.FrontResponse(request_id=key[1], error=error.to_proto())
        try:
            self._router.send(key[0], _NOBLOCK | _SNDMORE)
            self._router.send(response.SerializeToString(), _NOBLOCK)
        except zmq.Again:
            self._note_unread()
        except zmq.ZMQError:
            pass  # the sender is gone

    @property
    def _name(self) -> str:
        return str(self._who[1]) if self._who else "?"

    def _check(self, request: front_pb2.FrontRequest) -> None:
        if self._who is None:
            raise NotReady("this rank is not in a mesh yet")
        if (request.mesh_id, request.rank, request.incarnation) != self._who:
            mesh_id, rank, incarnation = self._who
            asked = f"rank {request.rank} of mesh {request.mesh_id[:64]!r}, incarnation {request.incarnation:x}"
            raise StaleEpoch(0, f"this is rank {rank} of mesh {mesh_id!r}, incarnation {incarnation:x}, not {asked}")
        if request.deadline_ms == 0:
            raise InvalidRequest("deadline_ms is 0; every request needs a deadline")

    def _admit(self, key: _Key, incoming: Incoming) -> None:
        with self._lock:
            if self._closing:
                raise MeshUnavailable("the rank is leaving")
            if key in self._open:
                raise InvalidRequest(f"request {key[1]} is open already; number requests anew")
            unread = self._unread_bytes.get((key[0], incoming.client), 0)
            if unread > self._bytes.limit // UNREAD_PART:
                raise Overloaded(_RETRY_AFTER_S, f"{unread} bytes of answers wait to be read; read them first")
            if not self._places.fits(incoming.client, 1) or not self._bytes.fits(incoming.client, incoming.num_bytes):
                raise self._overloaded(incoming)
            self._open[key] = incoming
            self._bytes.hold(incoming.client, incoming.num_bytes)
            self._places.hold(incoming.client, 1)

    def _overloaded(self, incoming: Incoming) -> Overloaded:
        own, client = self._bytes.held_by(incoming.client), incoming.client
        return Overloaded(
            _RETRY_AFTER_S,
            f"{len(self._open)} requests of {self._bytes.held} bytes wait here, {self._places.held_by(client)} of "
            f"{own} bytes this client's; {incoming.num_bytes} more do not fit into its part of {self._bytes.limit}",
        )


def _parse(frames: Sequence[Buffer]) -> front_pb2.FrontRequest:
    """The header of a message.

    Raises:
        InvalidRequest: there is none, so nobody can be answered.
    """
    if not 1 <= len(frames) <= MAX_TENSORS + 1:
        raise InvalidRequest(f"a message of {len(frames)} frames; it has 1 to {MAX_TENSORS + 1}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise InvalidRequest(f"a header of {len(frames[0])} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        return front_pb2.FrontRequest.FromString(bytes(frames[0]))
    except DecodeError as exc:
        raise InvalidRequest("the first frame is no FrontRequest") from exc


def _not_ready(_: Incoming) -> None:
    raise NotReady("this rank takes no requests yet")
