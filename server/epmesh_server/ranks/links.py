"""Links: messages between ranks over ZeroMQ, with nothing left to its defaults.

One ROUTER takes everything that comes in, one DEALER a peer sends. Peers are told apart from their frames alone:
(source, incarnation, epoch), and each sender numbers its messages per receiver, so that a frame which a reconnecting
socket dropped is noticed. ZeroMQ's own heartbeats are answered by its I/O thread, which needs no GIL: a peer that does
not answer them is stopped or cut off, not merely busy.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from epmesh.errors import InvalidRequest
from epmesh.frames import Buffer, Message, decode, encode
from epmesh.v1 import frame_pb2

_log = logging.getLogger(__name__)

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 200, 600
RECONNECT_GRACE_S, CONNECT_GRACE_S = 0.3, 1.5
MAX_INBOX_BYTES = 1 << 32
_FOLLOWER_POLL_MS = 5
_WATCHED = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED

Key = tuple[int, int, int, int]  # kind, sequence, step, source
Peer = tuple[int, str]  # global rank and link endpoint: a replacement has another endpoint


class Inbox:
    """Messages for one group in one membership epoch, until somebody asks for them. Guarded by the hub's receive lock
    while messages come in; reads are single dictionary or deque operations."""

    def __init__(self) -> None:
        self.wake_fd: int | None = None
        self.lost_messages: dict[int, str] = {}  # source -> what is missing
        self.abandoned: dict[int, Message] = {}  # sequence -> why
        self.point_to_point: dict[int, deque[Message]] = {}  # source -> in order
        self.taken: dict[int, int] = {}  # receiver -> highest number it took
        self._messages: dict[Key, Message] = {}
        self._bytes = 0
        self._lock = threading.Lock()  # one thread puts, for all groups; another takes

    def put(self, message: Message) -> bool:
        """Files a message; False where the budget is spent."""
        with self._lock:
            return self._put(message)

    def _put(self, message: Message) -> bool:
        header = message.header
        if header.kind == frame_pb2.FRAME_KIND_ABANDON:
            self.abandoned.setdefault(header.sequence, message)
        elif header.kind == frame_pb2.FRAME_KIND_TAKEN:
            self.taken[header.source] = max(self.taken.get(header.source, 0), header.sequence)
        else:
            size = sum(map(len, message.tensors))
            if self._bytes + size > MAX_INBOX_BYTES:
                return False
            self._bytes += size
            if header.kind == frame_pb2.FRAME_KIND_POINT_TO_POINT:
                self.point_to_point.setdefault(header.source, deque()).append(message)
            else:
                self._messages[(header.kind, header.sequence, header.step, header.source)] = message
        return True

    def take(self, kind: int, sequence: int, step: int, source: int) -> Message | None:
        """Removes and returns a message, if it is there."""
        with self._lock:
            return self._released(self._messages.pop((kind, sequence, step, source), None))

    def peek(self, kind: int, sequence: int, step: int, source: int) -> Message | None:
        """A message, if it is there; it stays."""
        return self._messages.get((kind, sequence, step, source))

    def take_point_to_point(self, source: int) -> Message | None:
        """Removes and returns the next message that `source` sent."""
        with self._lock:
            waiting = self.point_to_point.get(source)
            return self._released(waiting.popleft()) if waiting else None

    def forget(self, sequence: int) -> None:
        """Drops what belongs to `sequence` and to exchanges before it."""
        with self._lock:
            for key in [key for key in self._messages if key[1] <= sequence]:
                self._released(self._messages.pop(key))
            for old in [number for number in self.abandoned if number <= sequence]:
                del self.abandoned[old]

    def _released(self, message: Message | None) -> Message | None:
        if message is not None:
            self._bytes -= sum(map(len, message.tensors))
        return message


class LinkHub:
    """All links of one rank. Sending is safe from any thread; one thread at a time receives, for all groups."""

    def __init__(self, host: str, incarnation: int, on_unreachable: Callable[[frozenset[Peer]], None]) -> None:
        """Binds the receiving socket at a free port of `host`.

        Args:
            incarnation: of this rank.
            on_unreachable: called from the watching thread with all peers out of reach, whenever that changes.
        """
        self.mesh_id = ""
        self.rank = -1
        self.incarnation = incarnation
        self.bytes_sent = 0
        self.refused = 0
        self.unreachable: frozenset[Peer] = frozenset()
        self._on_unreachable = on_unreachable
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        _configure(self._router)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.bind(f"tcp://{host}:0")
        self.endpoint: str = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._receive_lock = threading.Lock()
        self._send_lock = threading.Lock()  # guards _dealers, _numbers, bytes_sent and every send
        self._dealers: dict[Peer, zmq.Socket[bytes]] = {}
        self._numbers: dict[tuple[int, int], itertools.count[int]] = {}  # (peer, epoch) -> next message's number
        self._expected: dict[tuple[int, int, int], int] = {}  # (source, incarnation, epoch) -> next number
        self._inboxes: dict[tuple[int, int], Inbox] = {}  # (group, epoch); also of epochs not adopted yet
        self._current: dict[int, int] = {}  # group -> adopted epoch
        self._pollers: dict[tuple[int, ...], zmq.Poller] = {}
        self._names = itertools.count()
        self._watcher = _Watcher(self._set_unreachable)

    def identify(self, mesh_id: str, rank: int) -> None:
        """Says who this rank is; before the first send."""
        self.mesh_id, self.rank = mesh_id, rank

    def inbox(self, group_id: int, epoch: int) -> Inbox:
        """The inbox of a group in one membership epoch; those of older epochs of the group are dropped."""
        with self._receive_lock:
            self._current[group_id] = epoch
            for key in [key for key in self._inboxes if key[0] == group_id and key[1] < epoch]:
                del self._inboxes[key]
            return self._inboxes.setdefault((group_id, epoch), Inbox())

    def drop_inbox(self, group_id: int) -> None:
        """Forgets a group."""
        with self._receive_lock:
            self._current.pop(group_id, None)
            for key in [key for key in self._inboxes if key[0] == group_id]:
                del self._inboxes[key]

    def send(self, peer: int, endpoint: str, header: frame_pb2.FrameHeader, tensors: Sequence[Buffer] = ()) -> int:
        """Queues a message for `peer` (global rank) and returns its bytes; never blocks. `tensors` must not change."""
        header.mesh_id, header.source, header.incarnation = self.mesh_id, self.rank, self.incarnation
        with self._send_lock:
            numbers = self._numbers.setdefault((peer, header.epoch), itertools.count(1))
            header.link_sequence = next(numbers)
            frames = encode(header, tensors)
            size = sum(memoryview(frame).nbytes for frame in frames)
            self.bytes_sent += size
            self._dealer((peer, endpoint)).send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        return size

    def wait(self, inbox: Inbox, fds: tuple[int, ...], timeout_s: float) -> None:
        """Returns when messages came in, one of `fds` can be read, or time is up; spuriously too."""
        if not self._receive_lock.acquire(blocking=False):
            _poll_fds(fds, min(timeout_s * 1000, _FOLLOWER_POLL_MS))
            return
        try:
            events = self._poller(fds).poll(max(0, int(timeout_s * 1000 + 0.999)))
            if any(source is self._router for source, _ in events):
                self._drain(inbox)
        finally:
            self._receive_lock.release()

    def wake_others(self, mine: Inbox) -> None:
        """Wakes the threads that wait in other groups."""
        for inbox in list(self._inboxes.values()):
            if inbox is not mine and inbox.wake_fd is not None:
                os.eventfd_write(inbox.wake_fd, 1)

    def forget_epochs_before(self, epoch: int, peers: Iterable[Peer]) -> None:
        """After a change of members: closes links to all but `peers`, drops old numbering."""
        keep = set(peers)
        with self._send_lock:
            for key in [key for key in self._dealers if key not in keep]:
                self._close_dealer(key)
            for old in [key for key in self._numbers if key[1] < epoch]:
                del self._numbers[old]
        with self._receive_lock:
            for past in [key for key in self._expected if key[2] < epoch]:
                del self._expected[past]
            current = self._current.items()
            for stray in [key for key in self._inboxes if key[1] < epoch and key not in current]:
                del self._inboxes[stray]
            self._pollers.clear()

    def close(self, linger_s: float = 1.0) -> None:
        """Ends all links; what was sent before gets up to `linger_s` to leave."""
        with self._send_lock:
            for key in list(self._dealers):
                self._close_dealer(key, linger_ms=int(linger_s * 1000))
        self._watcher.close()
        with self._receive_lock:
            self._router.close(linger=0)
        self._context.term()

    def _dealer(self, peer: Peer) -> zmq.Socket[bytes]:
        found = self._dealers.get(peer)
        if found is not None:
            return found
        socket = self._context.socket(zmq.DEALER)
        _configure(socket)
        socket.setsockopt(zmq.ROUTING_ID, f"{self.rank}:{self.incarnation:x}:{next(self._names)}".encode())
        self._watcher.watch(peer, socket.get_monitor_socket(_WATCHED))
        socket.connect(peer[1])
        self._dealers[peer] = socket
        return socket

    def _close_dealer(self, peer: Peer, linger_ms: int = 0) -> None:
        socket = self._dealers.pop(peer)
        socket.disable_monitor()  # while the watcher still reads: ZeroMQ's I/O thread blocks on a monitor nobody reads
        self._watcher.unwatch(peer)
        socket.close(linger=linger_ms)

    def _poller(self, fds: tuple[int, ...]) -> zmq.Poller:
        poller = self._pollers.get(fds)
        if poller is None:
            poller = self._pollers[fds] = zmq.Poller()
            poller.register(self._router, zmq.POLLIN)
            for fd in fds:
                poller.register(fd, zmq.POLLIN)
        return poller

    def _drain(self, mine: Inbox) -> None:
        while True:
            try:
                frames = self._router.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._deliver(decode([frame.buffer for frame in frames[1:]]), mine)
            except InvalidRequest as exc:
                self.refused += 1
                _log.warning("rank=%d frame.refused: %s", self.rank, exc)

    def _deliver(self, message: Message, mine: Inbox) -> None:
        header = message.header
        if header.mesh_id != self.mesh_id:
            raise InvalidRequest(f"a frame of mesh {header.mesh_id[:32]!r}; this is {self.mesh_id!r}")
        if header.epoch < self._current.get(header.group_id, 0):
            raise InvalidRequest(f"a frame of epoch {header.epoch} from rank {header.source}; it is over")
        inbox = self._inboxes.setdefault((header.group_id, header.epoch), Inbox())
        sender = (header.source, header.incarnation, header.epoch)
        expected = self._expected.get(sender, 1)
        self._expected[sender] = header.link_sequence + 1
        if header.link_sequence != expected:
            inbox.lost_messages[header.source] = f"messages {expected} to {header.link_sequence - 1}"
        if not inbox.put(message):
            inbox.lost_messages[header.source] = f"message {header.link_sequence} (no room)"
        if inbox is not mine and inbox.wake_fd is not None:
            os.eventfd_write(inbox.wake_fd, 1)

    def _set_unreachable(self, peers: frozenset[Peer]) -> None:
        self.unreachable = peers
        self._on_unreachable(peers)


class _Watcher:
    """A thread that follows the connections of all links by ZeroMQ's monitors."""

    def __init__(self, on_change: Callable[[frozenset[Peer]], None]) -> None:
        self._on_change = on_change
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._monitors: dict[Peer, zmq.Socket[bytes]] = {}  # the rest is the thread's alone
        self._down_at: dict[Peer, float] = {}  # when the peer counts as out of reach
        self._told: frozenset[Peer] = frozenset()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="epmesh-links", daemon=True)
        self._thread.start()

    def watch(self, peer: Peer, monitor: zmq.Socket[bytes]) -> None:
        def add() -> None:
            self._monitors[peer] = monitor
            self._down_at[peer] = time.monotonic() + CONNECT_GRACE_S

        self._do(add)

    def unwatch(self, peer: Peer) -> None:
        def remove() -> None:
            monitor = self._monitors.pop(peer, None)
            self._down_at.pop(peer, None)
            if monitor is not None:
                monitor.close(linger=0)

        self._do(remove)

    def close(self) -> None:
        def stop() -> None:
            self._closing = True

        self._do(stop)
        self._thread.join()
        os.close(self._wake_fd)

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        while not self._closing:
            poller = zmq.Poller()
            poller.register(self._wake_fd, zmq.POLLIN)
            for monitor in self._monitors.values():
                poller.register(monitor, zmq.POLLIN)
            ready = dict(poller.poll(self._timeout_ms()))
            if self._wake_fd in ready:
                self._run_commands()
            for key, monitor in list(self._monitors.items()):
                if monitor in ready:
                    self._follow(key, monitor)
            self._tell()
        for monitor in self._monitors.values():
            monitor.close(linger=0)

    def _run_commands(self) -> None:
        os.eventfd_read(self._wake_fd)
        while not self._commands.empty():
            self._commands.get_nowait()()

    def _timeout_ms(self) -> int | None:
        now = time.monotonic()
        if any(at <= now and peer not in self._told for peer, at in self._down_at.items()):
            return 0
        pending = [at for at in self._down_at.values() if at > now]
        return int((min(pending) - now) * 1000) + 1 if pending else None

    def _follow(self, key: Peer, monitor: zmq.Socket[bytes]) -> None:
        while monitor.poll(0):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._down_at.pop(key, None)
            elif event == zmq.EVENT_DISCONNECTED:
                self._down_at.setdefault(key, time.monotonic() + RECONNECT_GRACE_S)
            elif event == zmq.EVENT_MONITOR_STOPPED:
                return

    def _tell(self) -> None:
        now = time.monotonic()
        unreachable = frozenset(peer for peer, at in self._down_at.items() if at <= now)
        if unreachable != self._told:
            self._told = unreachable
            self._on_change(unreachable)


def _configure(socket: zmq.Socket[bytes]) -> None:
    """Nothing unbounded but the queues, whose bytes the exchange itself bounds (two are open at most)."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_INBOX_BYTES)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)


def _poll_fds(fds: Iterable[int], timeout_ms: float) -> None:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    poller.poll(timeout_ms)
