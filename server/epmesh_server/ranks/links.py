"""Links: messages between ranks over ZeroMQ, with nothing left to its defaults.

One ROUTER takes everything that comes in, one DEALER a peer sends. Peers are told apart from their frames alone:
(source, incarnation, epoch), and each sender numbers its messages per receiver. No DEALER has a routing id: of two
connections with one name, a ROUTER has the earlier one starve or take the name back, and libzmq 4.3.5 ends the process
at the next heartbeat over a starved one that breaks (assertion in `out_event`). A reconnecting socket drops messages
without a word, so senders keep them until receipts come back on the same connection, and send what is missing again
(`link_window` decides, `link_watcher` tells of reconnects). What cannot be mended is a lost message, and a typed error.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import zmq

from epmesh.curve import secure_client
from epmesh.errors import InvalidRequest, Unauthenticated
from epmesh.frames import Buffer, Message, decode, encode
from epmesh.v1 import frame_pb2
from epmesh_server.curve_users import Domain
from epmesh_server.ranks.curve_door import CurveDoor
from epmesh_server.ranks.inbox import MAX_INBOX_BYTES, Inbox
from epmesh_server.ranks.link_watcher import WATCHED, LinkWatcher, Peer
from epmesh_server.ranks.link_window import (
    MAX_RANGES,
    Held,
    Question,
    Range,
    ReceiveWindow,
    Report,
    SendWindow,
)
from epmesh_server.refusals import RefusalLog

_log = logging.getLogger(__name__)

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 200, 600
HANDSHAKE_MS = 5000  # who connects and does not shake hands is cut off; ZeroMQ's own is 30 s
RECONNECT_MS, RECONNECT_MAX_MS = 25, 100  # several attempts within the watcher's grace
HOLE_PATIENCE_S = 5.0  # how long a missing message is waited for; a sender asks at once after a reconnect
_FOLLOWER_POLL_MS = 5
_MEND_POLL_S, _TEND_POLL_S = 0.01, 0.25
_TEND_BYTES = 16 << 20  # a sender that keeps more looks for receipts even when it sends nothing

MAX_EARLY_SENDERS = 16_384  # in memberships that this rank has no view of yet: as many as ranks a mesh can have
MAX_EARLY_INBOXES = 256  # of groups that this rank has not adopted yet; their messages share one MAX_INBOX_BYTES

Sender = tuple[int, int, int]  # source, incarnation, epoch
Standing = Callable[[Sender], bool | None]
"""Whether a sender is a member; `None` where that cannot be known yet."""


class LinkHub:
    """All links of one rank. Sending is safe from any thread; one thread at a time receives, for all groups."""

    def __init__(
        self,
        host: str,
        incarnation: int,
        on_unreachable: Callable[[frozenset[Peer]], None],
        door: CurveDoor | None = None,
    ) -> None:
        """Binds the receiving socket at a free port of `host`.

        Args:
            incarnation: of this rank.
            on_unreachable: called from the watching thread with all peers out of reach, whenever that changes.
            door: encrypts links and admits members alone; `None`: everybody, in the clear.
        """
        self.mesh_id = ""
        self.rank = -1
        self.incarnation = incarnation
        self.bytes_sent = 0
        self.receipt_bytes = 0  # sent, besides
        self.bytes_received = 0
        self.resent = 0  # messages
        self.refused = 0
        self.unreachable: frozenset[Peer] = frozenset()
        self._on_unreachable = on_unreachable
        self._door = door
        self._junk = RefusalLog(_log, "frame.refused")
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        _configure(self._router)
        if door is not None:
            door.guard(self._context, self._router, Domain.LINK)
        self._router.bind(f"tcp://{host}:0")
        self.endpoint: str = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._receive_lock = threading.Lock()
        self._send_lock = threading.Lock()  # guards _dealers, _sending, _tending, bytes_sent and all use of dealers
        self._dealers: dict[Peer, zmq.Socket[bytes]] = {}
        self._sending: dict[tuple[Peer, int], SendWindow[list[Buffer]]] = {}  # by (peer, epoch)
        self._tending = False
        self._oldest = 0  # epochs before it are over for good
        self._standing: Standing = lambda _: None
        self._receiving: dict[Sender, ReceiveWindow[Message]] = {}  # this and the rest under the receive lock
        self._early: set[Sender] = set()  # those that were no members yet when they began to send
        self._held = Held()
        self._holes: dict[Sender, tuple[int, float]] = {}  # number of the missing message, and since when
        self._lost: dict[int, dict[int, str]] = {}  # epoch -> source -> what is lost
        self._inboxes: dict[tuple[int, int], Inbox] = {}  # (group, epoch); also of epochs not adopted yet
        self._current: dict[int, int] = {}  # group -> adopted epoch
        self._pollers: dict[tuple[int, ...], zmq.Poller] = {}
        self._watcher = LinkWatcher(self._set_unreachable, self._ask, self._tend)

    def identify(self, mesh_id: str, rank: int, standing: Standing) -> None:
        """Says who this rank is, and whose frames it takes; before the first send."""
        self.mesh_id, self.rank, self._standing = mesh_id, rank, standing

    def inbox(self, group_id: int, epoch: int) -> Inbox:
        """The inbox of a group in one membership epoch; those of older epochs of the group are dropped."""
        with self._receive_lock:
            self._current[group_id] = epoch
            for key in [key for key in self._inboxes if key[0] == group_id and key[1] < epoch]:
                del self._inboxes[key]
            return self._inbox(group_id, epoch)

    def drop_inbox(self, group_id: int) -> None:
        """Forgets a group."""
        with self._receive_lock:
            self._current.pop(group_id, None)
            for key in [key for key in self._inboxes if key[0] == group_id]:
                del self._inboxes[key]

    def send(self, peer: int, endpoint: str, header: frame_pb2.FrameHeader, tensors: Sequence[Buffer] = ()) -> int:
        """Queues a message for `peer` (global rank) and returns its bytes; never blocks.

        `tensors` must not change any more: they are kept until the peer has them.
        """
        header.mesh_id, header.source, header.incarnation = self.mesh_id, self.rank, self.incarnation
        to = (peer, endpoint)
        with self._send_lock:
            window = self._sending.get((to, header.epoch))
            if window is None:
                window = self._sending[(to, header.epoch)] = SendWindow()
            header.link_sequence = window.number()
            frames = encode(header, tensors)
            size = _size(frames)
            window.keep(frames, size)
            self.bytes_sent += size
            self._dealer(to).send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
            if window.wants_reports:
                self._read_receipts(to)
                self._tend_later(window)
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
            if self._holes:
                self._give_up_holes()
        finally:
            self._receive_lock.release()

    @property
    def inbox_bytes(self) -> int:
        """What came and was not asked for yet, of all groups."""
        return sum(inbox.num_bytes for inbox in list(self._inboxes.values()))

    def wake_others(self, mine: Inbox) -> None:
        """Wakes the threads that wait in other groups."""
        for inbox in list(self._inboxes.values()):
            if inbox is not mine and inbox.wake_fd is not None:
                os.eventfd_write(inbox.wake_fd, 1)

    def forget_epochs_before(self, epoch: int, peers: Iterable[Peer]) -> None:
        """After a change of members: closes links to all but `peers`, drops old numbering."""
        keep = set(peers)
        if self._door is not None:
            self._door.forget_all_but(endpoint for _, endpoint in keep)
        with self._send_lock:
            for key in [key for key in self._dealers if key not in keep]:
                self._close_dealer(key)
            for old in [key for key in self._sending if key[1] < epoch]:
                del self._sending[old]
        with self._receive_lock:
            self._oldest = max(self._oldest, epoch)
            for past in [key for key in self._receiving if key[2] < epoch]:
                self._receiving.pop(past).close()
                self._early.discard(past)
                self._holes.pop(past, None)
            for over in [key for key in self._lost if key < epoch]:
                del self._lost[over]
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
        key = self._door.key_at(*peer) if self._door is not None else b""
        socket = self._context.socket(zmq.DEALER)
        _configure(socket)
        if self._door is not None:
            secure_client(socket, self._door.pair, key)
        self._watcher.watch(peer, socket.get_monitor_socket(WATCHED))
        socket.connect(peer[1])
        self._dealers[peer] = socket
        return socket

    def _close_dealer(self, peer: Peer, linger_ms: int = 0) -> None:
        socket = self._dealers.pop(peer)
        socket.disable_monitor()  # while the watcher still reads: ZeroMQ's I/O thread blocks on a monitor nobody reads
        self._watcher.unwatch(peer)
        socket.close(linger=linger_ms)
        for key in [key for key in self._sending if key[0] == peer]:
            del self._sending[key]

    def _poller(self, fds: tuple[int, ...]) -> zmq.Poller:
        poller = self._pollers.get(fds)
        if poller is None:
            poller = self._pollers[fds] = zmq.Poller()
            poller.register(self._router, zmq.POLLIN)
            for fd in fds:
                poller.register(fd, zmq.POLLIN)
        return poller

    # Receiving -------------------------------------------------------------------------------------------------

    def _drain(self, mine: Inbox) -> None:
        while True:
            try:
                frames = self._router.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self.bytes_received += sum(map(len, frames))
            try:
                self._take_in(frames[0], decode([frame.buffer for frame in frames[1:]]), mine)
            except InvalidRequest as exc:
                self._refuse(exc)
            except Unauthenticated:  # the door has said so
                self.refused += 1

    def _refuse(self, error: InvalidRequest) -> None:
        self.refused += 1
        self._junk.note("", f"rank {self.rank}: {error}")

    def _take_in(self, route: zmq.Frame, message: Message, mine: Inbox) -> None:
        header = message.header
        if self._door is not None:
            self._door.check_link(route, header)
        self._check_mesh(header)
        sender = (header.source, header.incarnation, header.epoch)
        if header.kind == frame_pb2.FRAME_KIND_PROBE:
            self._answer(route, sender, header.link, mine)
            return
        if header.kind == frame_pb2.FRAME_KIND_RECEIPT:
            raise InvalidRequest(f"a receipt from rank {header.source}, which this rank sent nothing to here")
        window = self._window_of(sender)
        self._deliver(window.accept(header.link_sequence, message, sum(map(len, message.tensors))), mine)
        if window.has_hole or self._holes:
            self._note_hole(sender, window)
        if window.report_due:
            self._send_receipt(route, header.epoch, window.report())

    def _check_mesh(self, header: frame_pb2.FrameHeader) -> None:
        if header.mesh_id != self.mesh_id:
            raise InvalidRequest(f"a frame of mesh {header.mesh_id[:32]!r}; this is {self.mesh_id!r}")

    def _window_of(self, sender: Sender) -> ReceiveWindow[Message]:
        window = self._receiving.get(sender)
        if window is None:
            self._check_sender(sender)
            window = self._receiving[sender] = ReceiveWindow(self._held)
        return window

    def _check_sender(self, sender: Sender) -> None:
        """Refuses who is no member; keeps those few that may be members of a view that is on its way here."""
        source, incarnation, epoch = sender
        if epoch < self._oldest:
            raise _over(epoch, source)
        standing = self._standing(sender)
        if standing is None and len(self._early) < MAX_EARLY_SENDERS:
            self._early.add(sender)
        elif not standing:
            who = f"rank {source}, incarnation {incarnation}"
            raise InvalidRequest(f"a frame of epoch {epoch} from {who}: no member of it, or it is over")

    def _deliver(self, messages: Sequence[Message], mine: Inbox) -> None:
        for message in messages:
            header = message.header
            if header.epoch < self._current.get(header.group_id, 0):
                self._refuse(_over(header.epoch, header.source))
                continue
            inbox = self._inbox(header.group_id, header.epoch)
            early = self._current.get(header.group_id) != header.epoch
            if (early and self._early_bytes() > MAX_INBOX_BYTES) or not inbox.put(message):
                inbox.lost_messages[header.source] = f"message {header.link_sequence} (no room)"
            if inbox is not mine:
                _wake(inbox)

    def _inbox(self, group_id: int, epoch: int) -> Inbox:
        inbox = self._inboxes.get((group_id, epoch))
        if inbox is None:
            self._forget_early_inboxes()
            inbox = self._inboxes[(group_id, epoch)] = Inbox()
            inbox.lost_messages.update(self._lost.get(epoch, {}))
        return inbox

    def _early_inboxes(self) -> list[tuple[int, int]]:
        """Those that no communicator has asked for, the oldest first."""
        return [key for key in self._inboxes if self._current.get(key[0]) != key[1]]

    def _early_bytes(self) -> int:
        return sum(self._inboxes[key].num_bytes for key in self._early_inboxes())

    def _forget_early_inboxes(self) -> None:
        """Makes room for one more: what was left for groups that were destroyed, or that never were, goes first."""
        for group_id, epoch in self._early_inboxes()[: 1 - MAX_EARLY_INBOXES]:
            del self._inboxes[(group_id, epoch)]

    def _answer(self, route: zmq.Frame, sender: Sender, link: frame_pb2.LinkState, mine: Inbox) -> None:
        """Tells a sender that reconnected what is missing, once what it cannot send again is given up."""
        epoch = sender[2]
        if epoch < self._oldest:
            self._send_receipt(route, epoch, Report(link.last, (), link.probe))
            return
        window = self._window_of(sender)
        lost, messages = window.skip(link.first_kept)
        self._deliver(messages, mine)
        if lost is not None:
            self._lose(sender, lost)
        self._note_hole(sender, window)
        self._send_receipt(route, epoch, window.report(Question(link.probe, link.first_kept, link.last)))

    def _send_receipt(self, route: zmq.Frame, epoch: int, report: Report) -> None:
        """Goes back the way the message came; where that is gone, the sender will ask again."""
        missing = [frame_pb2.NumberRange(first=first, last=last) for first, last in report.missing]
        link = frame_pb2.LinkState(acknowledged=report.acknowledged, missing=missing, probe=report.answers)
        header = self._link_header(frame_pb2.FRAME_KIND_RECEIPT, epoch, link)
        self.receipt_bytes += len(header)
        self._router.send_multipart([route.bytes, header], flags=zmq.NOBLOCK)

    def _note_hole(self, sender: Sender, window: ReceiveWindow[Message]) -> None:
        if not window.has_hole:
            self._holes.pop(sender, None)
        elif self._holes.get(sender, (0, 0.0))[0] != window.expected:
            self._holes[sender] = (window.expected, time.monotonic())

    def _give_up_holes(self) -> None:
        """No sender mends these: it is gone, or what it sent was no message."""
        now = time.monotonic()
        for sender, (number, since) in list(self._holes.items()):
            if now - since > HOLE_PATIENCE_S:
                del self._holes[sender]
                self._lose(sender, (number, number))

    def _lose(self, sender: Sender, numbers: Range) -> None:
        source, _, epoch = sender
        text = f"messages {numbers[0]} to {numbers[1]}"
        _log.warning("rank=%d epoch=%d link.failed: rank %d: lost %s", self.rank, epoch, source, text)
        self._lost.setdefault(epoch, {})[source] = text
        for (_, of_epoch), inbox in self._inboxes.items():
            if of_epoch == epoch:
                inbox.lost_messages[source] = text
                _wake(inbox)

    # Mending: what a sender does about receipts ------------------------------------------------------------------

    def _ask(self, peer: Peer) -> None:
        """A connection was made anew: asks what arrived of what is not acknowledged."""
        with self._send_lock:
            for (to, epoch), window in self._sending.items():
                if to == peer:
                    self._send_question(peer, epoch, window.ask())

    def _send_question(self, peer: Peer, epoch: int, question: Question | None) -> None:
        if question is not None:
            _log.info("rank=%d epoch=%d link.mend.started: rank %d: %s", self.rank, epoch, peer[0], question)
            link = frame_pb2.LinkState(probe=question.number, first_kept=question.first_kept, last=question.last)
            header = self._link_header(frame_pb2.FRAME_KIND_PROBE, epoch, link)
            self._dealers[peer].send_multipart([header], flags=zmq.NOBLOCK)

    def _read_receipts(self, peer: Peer) -> None:
        dealer = self._dealers[peer]
        while int(dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            try:
                self._heed(peer, decode(dealer.recv_multipart(flags=zmq.NOBLOCK)).header)
            except InvalidRequest as exc:
                self._refuse(exc)

    def _heed(self, peer: Peer, header: frame_pb2.FrameHeader) -> None:
        self._check_mesh(header)
        window = self._sending.get((peer, header.epoch))
        if window is None or header.kind != frame_pb2.FRAME_KIND_RECEIPT:
            return
        missing = tuple((each.first, each.last) for each in header.link.missing[:MAX_RANGES])
        mend = window.take(Report(header.link.acknowledged, missing, header.link.probe))
        self.resent += len(mend.again)
        for frames in mend.again:
            self.bytes_sent += _size(frames)
            self._dealers[peer].send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        self._send_question(peer, header.epoch, mend.question)

    def _tend_later(self, window: SendWindow[list[Buffer]]) -> None:
        if window.kept_bytes > _TEND_BYTES and not self._tending:
            self._tending = True
            self._watcher.wake()

    def _tend(self) -> float | None:
        """Looks for receipts that are awaited, or of much that is kept; when to look again."""
        with self._send_lock:
            for peer in {to for (to, _), window in self._sending.items() if _needs_tending(window)}:
                self._read_receipts(peer)
            self._tending = any(map(_needs_tending, self._sending.values()))
            mending = any(window.mending for window in self._sending.values())
        return _MEND_POLL_S if mending else _TEND_POLL_S if self._tending else None

    def _link_header(self, kind: frame_pb2.FrameKind, epoch: int, link: frame_pb2.LinkState) -> bytes:
        return frame_pb2.FrameHeader(
            mesh_id=self.mesh_id, epoch=epoch, kind=kind, source=self.rank, incarnation=self.incarnation, link=link
        ).SerializeToString()

    def _set_unreachable(self, peers: frozenset[Peer]) -> None:
        self.unreachable = peers
        self._on_unreachable(peers)


def _size(frames: Sequence[Buffer]) -> int:
    return sum(memoryview(frame).nbytes for frame in frames)


def _needs_tending(window: SendWindow[list[Buffer]]) -> bool:
    return window.mending or window.kept_bytes > _TEND_BYTES


def _over(epoch: int, source: int) -> InvalidRequest:
    return InvalidRequest(f"a frame of epoch {epoch} from rank {source}; it is over")


def _wake(inbox: Inbox) -> None:
    if inbox.wake_fd is not None:
        os.eventfd_write(inbox.wake_fd, 1)


def _configure(socket: zmq.Socket[bytes]) -> None:
    """Nothing unbounded but the queues, whose bytes the exchange itself bounds (two are open at most)."""
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_INBOX_BYTES)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)


def _poll_fds(fds: Iterable[int], timeout_ms: float) -> None:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    poller.poll(timeout_ms)
