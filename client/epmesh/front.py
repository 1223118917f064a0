"""The front of a rank: requests from whoever is no member of its groups, and how to make them.

A request is one ZeroMQ message, `FrontRequest` and a frame a tensor; so is its answer. `FrontClient` makes requests to
any number of ranks; nothing waits for ever: each has a deadline, and what was sent over a connection that broke fails
at once, because an answer to it could not come back.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import zmq
from google.protobuf.message import DecodeError
from zmq.utils.monitor import recv_monitor_message

from epmesh import errors
from epmesh.channels import NodeAddress
from epmesh.curve import KeyPair, secure_client
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, PeerLost, Unauthenticated
from epmesh.frames import MAX_HEADER_BYTES, MAX_TENSORS, Buffer, num_bytes
from epmesh.key_leases import KeyLeases
from epmesh.tls import TlsFiles
from epmesh.v1 import front_pb2

_log = logging.getLogger(__name__)

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 200, 600
HANDSHAKE_MS = 5000  # who connects and does not shake hands is cut off; ZeroMQ's own is 30 s
MAX_FRAME_BYTES = 1 << 32
OnAnswer = Callable[[front_pb2.FrontResponse], None]

INLINE = -1  # in `places`: the tensor is a frame of the message
_CONNECT_WITHIN_S = 1.5
MAX_TIMEOUT_S = 3600.0
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | _REFUSED | _LOST


@dataclass(frozen=True)
class FrontPeer:
    """A rank's front: global rank, incarnation, and ZeroMQ endpoint.

    `curve_key` is its public key, empty without CURVE; `node` is its node service, where a client leases its own key.
    """

    rank: int
    incarnation: int
    endpoint: str
    curve_key: bytes = b""
    node: NodeAddress | None = None


@dataclass(frozen=True)
class FrontReply:
    """An answer: the message, and the bytes of those of its tensors that came as frames, in order."""

    response: front_pb2.FrontResponse
    tensors: tuple[memoryview, ...]


def configure_front_socket(socket: zmq.Socket[bytes]) -> None:
    """Nothing left to ZeroMQ's defaults: heartbeats, bounded frames, no lingering; requests bound what queues."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)


def check_frames(
    message: front_pb2.FrontRequest | front_pb2.FrontResponse, frames: Sequence[Buffer]
) -> tuple[memoryview, ...]:
    """The bytes of the tensors that came as frames, in order.

    Raises:
        InvalidRequest: they are not what the message says.
    """
    metas, places = message.tensors, message.places
    if len(metas) > MAX_TENSORS:
        raise InvalidRequest(f"{len(metas)} tensors; at most {MAX_TENSORS} can travel together")
    if places and len(places) != len(metas):
        raise InvalidRequest(f"{len(places)} places for {len(metas)} tensors; give one each, or none")
    inline = [meta for index, meta in enumerate(metas) if not places or places[index] == INLINE]
    if len(inline) != len(frames):
        raise InvalidRequest(f"the message describes {len(inline)} frames; {len(frames)} came")
    views = tuple(memoryview(frame).cast("B") for frame in frames)
    for index, (meta, view) in enumerate(zip(inline, views, strict=True)):
        if num_bytes(meta) != len(view):
            expected = f"{meta.dtype}{list(meta.shape)}, {num_bytes(meta)} bytes"
            raise InvalidRequest(f"frame {index} is {expected}; {len(view)} came")
    return views


def check_timeout(value: object, name: str, most_s: float = MAX_TIMEOUT_S) -> None:
    """Refuses what is no deadline.

    Raises:
        InvalidRequest: it is not a number of seconds above 0, or larger than `most_s`, or than every number.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not 0 < value <= most_s:  # type: ignore[operator]
        most = f" and at most {most_s:g}" if math.isfinite(most_s) else ""
        raise InvalidRequest(f"{name} is {value!r}; it must be above 0{most} seconds")


class FrontClient:
    """Makes requests to ranks' fronts. Any thread may call; one thread of its own does all that waits."""

    def __init__(self, mesh_id: str, *, pair: KeyPair | None = None, tls: TlsFiles | None = None) -> None:
        """Connects to nobody yet.

        Args:
            pair: keys that fronts with CURVE admit anyway; `None`: a pair of its own, leased where it connects to.
            tls: what this process shows itself with there.
        """
        self._core = _Core(mesh_id, pair, tls)
        self._finalizer = weakref.finalize(self, _Core.close, self._core)

    def call(
        self,
        peer: FrontPeer,
        request: front_pb2.FrontRequest,
        tensors: Sequence[Buffer] = (),
        *,
        timeout_s: float,
        on_answer: OnAnswer | None = None,
    ) -> Future[FrontReply]:
        """Sends a request and returns at once.

        Args:
            peer: whose front it is for; sender, number and deadline of `request` are filled in here.
            tensors: the bytes of those of ``request.tensors`` that travel as frames; they must not change before the
                answer.
            timeout_s: how long an answer is waited for.
            on_answer: called at most once, on this client's thread and before the future is done, when the rank has
                answered, however long ago the request was given up; with an empty answer where it never left. Not where
                the connection broke: the rank may be at it still.

        Returns:
            A future of the answer. It fails with the typed error that came back, with `DeadlineExceeded`, with
            `PeerLost` where the connection broke or none came about, with `InvalidRequest` for an answer that is none,
            and with `MeshUnavailable` after `close`. Its ``cancel()`` tells the rank to give the request up.
        """
        check_timeout(timeout_s, "timeout_s")
        return self._core.call(peer, request, tensors, timeout_s, on_answer)

    def close(self) -> None:
        """Fails what is pending, and ends the thread; idempotent."""
        self._finalizer()


@dataclass(eq=False)
class _Pending:
    """A request that was not answered yet."""

    number: int
    peer: FrontPeer
    future: Future[FrontReply]
    deadline: float
    on_answer: OnAnswer | None
    frames: list[Buffer] = field(default_factory=list)


class _Connection:
    """One DEALER with its monitor."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], peer: FrontPeer, pair: KeyPair | None) -> None:
        self.peer = peer
        self.refused = False  # whether the front does not admit our key
        self.pending: dict[int, _Pending] = {}
        self.given_up: dict[int, OnAnswer] = {}  # requests that nobody waits for, but for the rank's being done with it
        self.up_by: float | None = time.monotonic() + _CONNECT_WITHIN_S  # None once hands were shaken
        self.socket = context.socket(zmq.DEALER)
        try:
            configure_front_socket(self.socket)
            if pair is not None:
                secure_client(self.socket, pair, peer.curve_key)
            self.monitor = self.socket.get_monitor_socket(_WATCHED)
        except (zmq.ZMQError, InvalidRequest):
            self.socket.close(0)
            raise
        try:
            self.socket.connect(peer.endpoint)
        except zmq.ZMQError as exc:
            self.close()
            raise InvalidRequest(f"front endpoint {peer.endpoint!r} of rank {peer.rank} is no address: {exc}") from exc

    def lost(self) -> bool:
        """Takes in what the monitor tells; whether the connection is gone, or was refused."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.up_by = None
            else:
                self.refused = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
                return True
        return False

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)


class _Core:
    """The thread behind a `FrontClient`. Other threads only queue commands."""

    def __init__(self, mesh_id: str, pair: KeyPair | None, tls: TlsFiles | None) -> None:
        self._mesh_id = mesh_id
        self._tls = tls
        self._pair = pair
        self._leases: KeyLeases | None = None  # the thread's; where the keys are of our own making
        self._numbers = itertools.count(1)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _closed, and the thread's start
        self._closed = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, self._context.get(zmq.SOCKET_LIMIT))  # a rank takes three; 1,023 otherwise
        self._poller = zmq.Poller()  # this and what follows is the thread's alone
        self._connections: dict[FrontPeer, _Connection] = {}
        # Not the requests themselves: answers behind one that is long in coming would be kept until it comes.
        self._deadlines: list[tuple[float, int, FrontPeer]] = []
        self._ending = False

    def call(
        self,
        peer: FrontPeer,
        request: front_pb2.FrontRequest,
        tensors: Sequence[Buffer],
        timeout_s: float,
        on_answer: OnAnswer | None,
    ) -> Future[FrontReply]:
        future: Future[FrontReply] = Future()
        number = next(self._numbers)
        request.mesh_id, request.rank, request.incarnation = self._mesh_id, peer.rank, peer.incarnation
        request.request_id, request.deadline_ms = number, max(1, int(timeout_s * 1000))
        pending = _Pending(number, peer, future, time.monotonic() + timeout_s, on_answer)
        pending.frames = [request.SerializeToString(), *tensors]
        # By number: a callback that held `pending` would keep future and answer until the next garbage collection.
        future.add_done_callback(lambda done: self._cancel(peer, number) if done.cancelled() else None)
        self._do(lambda: self._send(pending))
        return future

    def close(self) -> None:
        def end() -> None:
            self._ending = True

        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            if thread is None:
                self._release()
                return
            self._commands.put(end)
            os.eventfd_write(self._wake_fd, 1)
        if thread is not threading.current_thread():  # where the last reference went away in a callback
            thread.join()

    def _release(self) -> None:
        os.close(self._wake_fd)
        self._context.term()

    def _do(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise MeshUnavailable("this client was closed; make another one")
            self._commands.put(command)
            os.eventfd_write(self._wake_fd, 1)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="epmesh-front-client", daemon=True)
                self._thread.start()

    def _cancel(self, peer: FrontPeer, number: int) -> None:
        with contextlib.suppress(MeshUnavailable):
            self._do(lambda: self._give_up(peer, number))

    # The thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._poller.register(self._wake_fd, zmq.POLLIN)
        while not self._ending:
            ready = dict(self._poller.poll(self._timeout_ms()))
            if self._wake_fd in ready:
                self._run_commands()
            for connection in list(self._connections.values()):
                if connection.socket in ready:
                    self._receive(connection)
                here = connection.peer in self._connections  # an answer may have ended it
                if here and connection.monitor in ready and connection.lost():
                    self._drop(connection, "its connection broke", self._refusal(connection))
            if self._leases is not None:
                self._leases.tend(time.monotonic())
            self._expire(time.monotonic())
            self._drop_unanswered(time.monotonic())
        for connection in list(self._connections.values()):
            self._drop(connection, "", MeshUnavailable("this client was closed"))
        while not self._commands.empty():  # requests that were queued before the end
            self._commands.get_nowait()()
        if self._leases is not None:
            self._leases.close()
        with self._lock:  # `close` has written to the descriptor by then
            self._release()

    def _timeout_ms(self) -> int | None:
        soonest = [self._deadlines[0][0]] if self._deadlines else []
        soonest += [connection.up_by for connection in self._connections.values() if connection.up_by is not None]
        lease_due = self._leases.due() if self._leases is not None else None
        soonest += [] if lease_due is None else [lease_due]
        return max(0, int((min(soonest) - time.monotonic()) * 1000) + 1) if soonest else None

    def _run_commands(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while not self._commands.empty():
            self._commands.get_nowait()()

    def _send(self, pending: _Pending) -> None:
        if pending.future.cancelled():
            _never_left(pending)
            return
        if self._ending:
            _fail(pending.future, MeshUnavailable("this client was closed"))
            return
        try:
            connection = self._connections.get(pending.peer) or self._connect(pending.peer)
            connection.socket.send_multipart(pending.frames, flags=zmq.NOBLOCK, copy=False)
        except EpmeshError as exc:
            _never_left(pending)
            _fail(pending.future, exc)
            return
        except zmq.ZMQError as exc:  # no descriptors are left, say: this request's trouble, not the thread's
            rank = pending.peer.rank
            _never_left(pending)
            _fail(pending.future, MeshUnavailable(f"no connection to rank {rank} from here: {exc}; see `ulimit -n`"))
            return
        pending.frames = []  # ZeroMQ holds them for as long as it needs them
        connection.pending[pending.number] = pending
        heapq.heappush(self._deadlines, (pending.deadline, pending.number, pending.peer))

    def _connect(self, peer: FrontPeer) -> _Connection:
        pair = self._keys_for(peer)
        self._lease(peer)
        try:
            connection = self._connections[peer] = _Connection(self._context, peer, pair)
        except BaseException:
            self._unlease(peer)
            raise
        self._poller.register(connection.socket, zmq.POLLIN)
        self._poller.register(connection.monitor, zmq.POLLIN)
        return connection

    def _keys_for(self, peer: FrontPeer) -> KeyPair | None:
        """The keys to connect with; `None` to one without CURVE."""
        if not peer.curve_key:
            return None
        if self._pair is None:
            self._pair = KeyPair.generate()
            self._leases = KeyLeases(self._pair, f"process {os.getpid()} on {socket.gethostname()}", self._tls)
        return self._pair

    def _lease(self, peer: FrontPeer) -> None:
        if self._leases is not None and peer.curve_key and peer.node is not None:
            self._leases.use(peer.node)

    def _unlease(self, peer: FrontPeer) -> None:
        if self._leases is not None and peer.curve_key and peer.node is not None:
            self._leases.unuse(peer.node)

    def _refusal(self, connection: _Connection) -> EpmeshError | None:
        """What it means that a front does not admit our key; `None` where it may in a moment: no lease came about."""
        if not connection.refused:
            return None
        peer = connection.peer
        leases, node = self._leases, peer.node
        error = leases.error(node) if leases is not None and node is not None else None
        if error is not None:
            return None if isinstance(error, MeshUnavailable | DeadlineExceeded) else error
        return Unauthenticated(f"rank {peer.rank} at {peer.endpoint} does not admit this client's CURVE key")

    def _receive(self, connection: _Connection) -> None:
        while connection.peer in self._connections:
            try:
                frames = connection.socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._take_in(connection, [frame.buffer for frame in frames])

    def _take_in(self, connection: _Connection, frames: list[Buffer]) -> None:
        try:
            response = _parse(frames[0])
        except InvalidRequest as exc:
            _log.warning("rank %d answered with garbage: %s", connection.peer.rank, exc)
            return
        pending = connection.pending.pop(response.request_id, None)
        on_answer = pending.on_answer if pending is not None else connection.given_up.pop(response.request_id, None)
        if on_answer is not None:
            on_answer(response)
        if pending is None:
            return  # given up before
        if response.HasField("error"):
            error = errors.from_proto(response.error)
            _fail(pending.future, error)
            if isinstance(error, Unauthenticated) and connection.peer.curve_key:
                self._drop(connection, "it holds this client's lease for over")  # the next connection has a new one
            return
        try:
            reply = FrontReply(response, check_frames(response, frames[1:]))
        except InvalidRequest as exc:
            _fail(pending.future, exc)
        else:
            with contextlib.suppress(InvalidStateError):
                pending.future.set_result(reply)

    def _give_up(self, peer: FrontPeer, number: int) -> None:
        """Forgets a request and tells its rank, if it was sent."""
        connection = self._connections.get(peer)
        pending = connection.pending.pop(number, None) if connection is not None else None
        if connection is None or pending is None:
            return
        if pending.on_answer is not None:
            connection.given_up[number] = pending.on_answer
        cancel = front_pb2.CancelRequest(request_id=number)
        request = front_pb2.FrontRequest(
            mesh_id=self._mesh_id,
            rank=peer.rank,
            incarnation=peer.incarnation,
            request_id=next(self._numbers),
            deadline_ms=1000,
            cancel=cancel,
        )
        connection.socket.send(request.SerializeToString(), flags=zmq.NOBLOCK)

    def _expire(self, now: float) -> None:
        while self._deadlines:
            deadline, number, peer = self._deadlines[0]
            connection = self._connections.get(peer)
            pending = connection.pending.get(number) if connection is not None else None
            if pending is not None and deadline > now:
                return
            heapq.heappop(self._deadlines)
            if pending is not None:
                self._give_up(peer, number)
                _fail(pending.future, DeadlineExceeded(peer.rank, 0, f"rank {peer.rank} did not answer in time"))

    def _drop_unanswered(self, now: float) -> None:
        for connection in list(self._connections.values()):
            if connection.up_by is not None and connection.up_by <= now:
                self._drop(connection, f"nothing answers at {connection.peer.endpoint}")

    def _drop(self, connection: _Connection, why: str, error: EpmeshError | None = None) -> None:
        """Closes a connection; the next request makes a new one."""
        peer = connection.peer
        del self._connections[peer]
        self._unlease(peer)
        self._poller.unregister(connection.socket)
        self._poller.unregister(connection.monitor)
        connection.close()
        lost = error or PeerLost([peer.rank], 0, f"rank {peer.rank} cannot be reached: {why}")
        for pending in connection.pending.values():
            _fail(pending.future, lost)


def _parse(frame: Buffer) -> front_pb2.FrontResponse:
    if len(frame) > MAX_HEADER_BYTES:
        raise InvalidRequest(f"a header of {len(frame)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        return front_pb2.FrontResponse.FromString(bytes(frame))
    except DecodeError as exc:
        raise InvalidRequest("the first frame is no FrontResponse") from exc


def _never_left(pending: _Pending) -> None:
    if pending.on_answer is not None:
        pending.on_answer(front_pb2.FrontResponse())


def _fail(future: Future[FrontReply], error: EpmeshError) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
