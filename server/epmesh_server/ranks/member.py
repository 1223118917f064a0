"""A rank's membership in one group for as long as the set of ranks stays the same: numbers, fences, waiting.

This is where every call begins and where every wait is bounded. A call takes the group's next sequence number under the
fence protocol (DESIGN: Membership 3); a wait ends when what is waited for is there, when a member is lost, when the
mesh went on, when a member gave the exchange up, or at the deadline. Nothing waits for ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from epmesh import errors
from epmesh.errors import DeadlineExceeded, EpmeshError, MeshUnavailable, PeerLost, StaleEpoch
from epmesh.frames import Buffer, Message
from epmesh.layout import Topology
from epmesh.v1 import frame_pb2
from epmesh.view import GroupInfo, View
from epmesh_server.ranks.buffers import GroupBuffers, stamp
from epmesh_server.ranks.links import LinkHub
from epmesh_server.ranks.session import RankSession
from epmesh_server.ranks.waits import WaitLedger
from epmesh_server.shared_memory import BufferLayout

_log = logging.getLogger(__name__)

_POLL_S = 0.05  # longest sleep between two looks at what no descriptor announces
_FENCE_POLL_S = 0.005
_HEARSAY_S = 5.0  # how long another member's word for a loss is taken; the coordinator decides long before
_COMMIT_S = 5.0  # what a commit may take besides waiting for the cut
_BLAME_GRACE_S = 0.1  # a remote member names the late rank better than this one can


class GroupMember:
    """One rank in one group in one membership epoch; used by one thread at a time."""

    def __init__(
        self,
        session: RankSession,
        hub: LinkHub,
        view: View,
        group: GroupInfo,
        timeout_s: float,
        waits: WaitLedger | None = None,
    ) -> None:
        """Takes this rank's place in `group` as `view` has it.

        Args:
            timeout_s: how long a call waits for other ranks.
            waits: to note in for whom this rank waits; it outlives changes of the set of ranks.
        """
        self.session = session
        self.hub = hub
        self.view = view
        self.timeout_s = timeout_s
        self.waits = waits if waits is not None else WaitLedger()
        self.group_id = group.group_id
        self.name = group.name
        self.topology = Topology(
            group.ranks, tuple(view.slot_of(rank) for rank in group.ranks), group.ranks.index(session.rank)
        )
        self.agreed: EpmeshError | None = None  # the last error that all members found by comparing their calls
        self.abandoned = 0  # highest sequence number given up, as far as known
        self.meanwhile: Callable[[], None] = _nothing  # called after every event of every wait; it raises nothing
        self._heard_lost: dict[int, float] = {}  # global rank -> until when another member's word is taken for it
        self.inbox = hub.inbox(group.group_id, view.membership_epoch)
        self.row = session.page.open_group(group.group_id, group.sequence)
        self._done = group.sequence
        self._open: set[int] = set()

    @cached_property
    def buffers(self) -> GroupBuffers:
        """The symmetric buffers of the group on this node; fetched when first needed."""
        answer, fds = self.session.group_buffers(self.group_id, self.view.membership_epoch)
        layout = BufferLayout(self.topology.world_size, answer.region_bytes)
        buffers = GroupBuffers(layout, self.topology.awaited, self.topology.me, fds)
        self.inbox.wake_fd = buffers.wake_fd
        return buffers

    @property
    def membership_epoch(self) -> int:
        """The epoch that frames and flags carry."""
        return self.view.membership_epoch

    def flag(self, sequence: int) -> int:
        """The flag of an exchange in this membership epoch."""
        return stamp(self.membership_epoch, sequence)

    def global_rank(self, position: int) -> int:
        """The global rank of a member."""
        return self.topology.ranks[position]

    # Sequence numbers ------------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Takes the next sequence number, once no commit is in its way; adopts views that change no rank.

        Raises:
            PeerLost, StaleEpoch: the members changed; `wait_ready` goes on.
        """
        deadline = time.monotonic() + self.timeout_s + _COMMIT_S
        sequence = self._done_or_open() + 1
        while True:
            self.row.begun = sequence
            self.session.page.barrier()
            may_begin = False
            try:
                may_begin = self._may_begin(sequence)
            finally:
                if not may_begin:
                    self.row.begun = sequence - 1
            if may_begin:
                self._open.add(sequence)
                return sequence
            if time.monotonic() > deadline:
                waited_s = self.timeout_s + _COMMIT_S
                raise MeshUnavailable(f"no commit of epoch {self.session.page.fence} within {waited_s:g} s")
            self._sleep(_FENCE_POLL_S)

    def adopt_change(self) -> None:
        """Adopts the newest view at the end of a collective change, so that its caller sees what it asked for."""
        newest = self.session.view
        if newest is not None and newest.epoch > self.view.epoch:
            self._adopt_or_raise(newest)

    def dispatched(self, sequence: int) -> None:
        """The first half of an exchange is done."""
        self.row.dispatched = max(self.row.dispatched, sequence)

    def complete(self, sequence: int) -> None:
        """An exchange or a collective is over, well or refused on all ranks."""
        self._open.discard(sequence)
        self._done = max(self._done, sequence)
        self.row.dispatched = max(self.row.dispatched, sequence)
        self.row.completed = min(self._open) - 1 if self._open else self._done
        self.inbox.forget(self.row.completed)

    def pass_over(self, sequence: int, error: EpmeshError | None = None) -> None:
        """Ends a call that this rank never made. With `error`, only if others gave it up for that."""
        given_up = self.inbox.abandoned.get(sequence)
        if error is not None and (given_up is None or given_up.header.error.message != str(error)):
            return
        if self.row.begun < sequence:
            self.abandoned = max(self.abandoned, sequence)
            self.row.begun = sequence
            self.complete(sequence)

    def resynchronise(self) -> None:
        """Ends whatever is open, and passes over calls that this rank never made and others gave up waiting for."""
        for sequence in sorted(self._open):
            self.complete(sequence)
        newest = max(dict(self.inbox.abandoned), default=0)
        if newest > self._done:
            self.abandoned = max(self.abandoned, newest)
            self.row.begun = newest
            self.complete(newest)

    def usable(self, view: View) -> bool:
        """Whether nothing known speaks against going on in `view`."""
        page = self.session.page
        peers = {(info.rank, info.link_endpoint) for info in view.ranks.values()}
        evidence = page.lost() & view.ranks.keys() or self.hub.unreachable & peers
        broken = self.inbox.lost_messages and view.membership_epoch == self.membership_epoch
        heard = view.membership_epoch == self.membership_epoch and self._heard_lost_lately()
        newest = max(page.committed, page.abort_epoch, self.view.epoch)
        return not evidence and not broken and not heard and view.epoch >= newest

    def _heard_lost_lately(self) -> bool:
        return any(until > time.monotonic() for until in self._heard_lost.values())

    def _done_or_open(self) -> int:
        return max(self._done, *self._open) if self._open else self._done

    def _may_begin(self, sequence: int) -> bool:
        self.check(0)
        page = self.session.page
        fence = page.fence
        if fence <= self.view.epoch:
            return True
        if page.cut_epoch == fence:
            if sequence <= self.row.cut:
                return True  # in the old epoch, and by its placement, as the others
            page.mark_blocked(fence)
        newest = self.session.view
        if newest is not None and newest.epoch > self.view.epoch and newest.epoch >= page.committed:
            self._adopt_or_raise(newest)
            return fence <= self.view.epoch
        return False

    def _adopt_or_raise(self, newest: View) -> None:
        if newest.membership_epoch != self.view.membership_epoch:
            raise self._changed(newest)
        if not newest.has_group(self.name) or newest.group(self.name).group_id != self.group_id:
            raise StaleEpoch(newest.epoch, f"group {self.name!r} was destroyed by epoch {newest.epoch}")
        self.view = newest

    # Waiting ---------------------------------------------------------------------------------------------------

    def wait_until(
        self,
        ready: Callable[[], bool],
        sequence: int,
        deadline: float,
        late: Callable[[], Iterable[int]],
        poll_s: float = _POLL_S,
    ) -> None:
        """Waits until `ready`, which is called after every event.

        Args:
            sequence: the exchange that waits; 0 for waits outside of any.
            deadline: ``time.monotonic`` value.
            late: positions to blame at the deadline; the lowest is named. Where all are on other nodes, those get a
                moment longer to name the one that they wait for.
            poll_s: longest time between two calls of `ready`, where what it looks at announces nothing.

        Raises:
            PeerLost, StaleEpoch, DeadlineExceeded, MeshUnavailable: as the class says; with `sequence`, members are
                told that this rank gave it up.
        """
        while True:
            self.meanwhile()
            if ready():
                return
            self.check(sequence)
            now = time.monotonic()
            left, awaited = deadline - now, late()
            if left <= 0:
                positions = sorted(awaited)
                left += 0 if set(positions) & set(self.topology.local) else _BLAME_GRACE_S
                if left <= 0:
                    raise self.give_up(sequence, positions)
            kept_by = [self.global_rank(position) for position in awaited]
            self._sleep(min(left, poll_s))
            self.waits.share(kept_by, time.monotonic() - now)

    def poll_links(self) -> None:
        """Takes in what has come, without waiting."""
        self.hub.wait(self.inbox, (), 0)

    def check(self, sequence: int) -> None:
        """Raises what ends a wait for `sequence`: a loss, a commit, an abandonment."""
        page = self.session.page
        if self.session.error is not None:
            raise self.session.error
        if page.closed:
            raise MeshUnavailable(f"rank {self.session.rank} is no member any more; join again")
        lost = self._lost()
        if lost:
            raise PeerLost(lost, self.view.epoch)
        if self.inbox.lost_messages:
            raise self._frames_lost()
        newest = self.session.view
        if newest is not None and newest.membership_epoch > self.view.membership_epoch:
            raise self._changed(newest)
        if page.abort_epoch > self.view.epoch and page.abort_epoch > page.committed:
            raise StaleEpoch(page.abort_epoch, f"epoch {page.abort_epoch} is being committed without some rank")
        if sequence and sequence in self.inbox.abandoned:
            raise self._abandoned(sequence)

    def _sleep(self, timeout_s: float) -> None:
        self.hub.wait(self.inbox, self._fds, timeout_s)
        self.buffers.calm()
        if self.session.calm():
            self.hub.wake_others(self.inbox)

    @property
    def _fds(self) -> tuple[int, ...]:
        return (self.buffers.wake_fd, self.session.wake_fd)

    def _lost(self) -> frozenset[int]:
        lost = self.session.page.lost()
        if self.hub.unreachable:
            lost |= {
                rank
                for rank, endpoint in self.hub.unreachable
                if rank in self.view.ranks and self.view.ranks[rank].link_endpoint == endpoint
            }
        return lost & frozenset(self.topology.ranks) if lost else lost

    def _frames_lost(self) -> EpmeshError:
        source, missing = min(dict(self.inbox.lost_messages).items())
        if source in self.view.ranks:
            peer = (source, self.view.ranks[source].link_endpoint)
            self.session.report_unreachable(self.hub.unreachable | {peer})
        return PeerLost([source], self.view.epoch, f"the link from rank {source} lost {missing}; call wait_ready()")

    def _changed(self, newest: View) -> EpmeshError:
        """What a new set of ranks means to this group: members lost, or only the epoch over."""
        gone = [
            rank
            for rank in self.topology.ranks
            if rank not in newest.ranks or newest.ranks[rank].incarnation != self.view.ranks[rank].incarnation
        ]
        if self.session.rank in gone:
            return MeshUnavailable(f"rank {self.session.rank} was removed by epoch {newest.epoch}; join again")
        return PeerLost(gone, self.view.epoch) if gone else StaleEpoch(newest.epoch)

    # Giving up -------------------------------------------------------------------------------------------------

    def give_up(self, sequence: int, late: Sequence[int]) -> EpmeshError:
        """Tells every member that a wait took too long; returns the error, which names the first position of `late`."""
        rank = self.global_rank(late[0]) if late else -1
        error = DeadlineExceeded(
            rank,
            sequence,
            f"rank {rank} did not arrive at sequence {sequence} of {self.name} within {self.timeout_s:g} s",
        )
        if sequence:
            self.abandon(sequence, error)
        return error

    def abandon(self, sequence: int, error: EpmeshError) -> None:
        """Tells every member that this rank gave up an exchange; they raise `error` too."""
        self.abandoned = max(self.abandoned, sequence)
        for position in range(self.topology.world_size):
            if position != self.topology.me:
                header = self.header(frame_pb2.FRAME_KIND_ABANDON, sequence)
                header.error.CopyFrom(error.to_proto())
                self.send(position, header)

    def _abandoned(self, sequence: int) -> EpmeshError:
        self.abandoned = max(self.abandoned, sequence)
        error = errors.from_proto(self.inbox.abandoned[sequence].header.error)
        if isinstance(error, PeerLost):
            for rank in error.ranks:
                self._heard_lost.setdefault(rank, time.monotonic() + _HEARSAY_S)
        return error

    # Messages --------------------------------------------------------------------------------------------------

    def header(self, kind: frame_pb2.FrameKind, sequence: int, step: int = 0) -> frame_pb2.FrameHeader:
        """A header of this group and epoch."""
        return frame_pb2.FrameHeader(
            epoch=self.membership_epoch,
            group_id=self.group_id,
            sequence=sequence,
            kind=kind,
            step=step,
            deadline_ms=int(self.timeout_s * 1000),
        )

    def send(self, position: int, header: frame_pb2.FrameHeader, tensors: Sequence[Buffer] = ()) -> int:
        """Queues a message for a member; returns its bytes."""
        rank = self.global_rank(position)
        return self.hub.send(rank, self.view.ranks[rank].link_endpoint, header, tensors)

    def take(self, kind: frame_pb2.FrameKind, sequence: int, position: int, step: int = 0) -> Message | None:
        """A message of a member, if it is there; one of another incarnation is dropped."""
        rank = self.global_rank(position)
        message = self.inbox.take(kind, sequence, step, rank)
        if message is not None and message.header.incarnation != self.view.ranks[rank].incarnation:
            _log.warning("rank=%d epoch=%d frame.refused: rank %d's old self", self.hub.rank, self.view.epoch, rank)
            return None
        return message

    def peek(self, kind: frame_pb2.FrameKind, sequence: int, position: int) -> Message | None:
        """A message of a member, if it is there; it stays."""
        return self.inbox.peek(kind, sequence, 0, self.global_rank(position))

    def close(self) -> None:
        """Leaves the group; idempotent."""
        self.row.close()
        if "buffers" in self.__dict__:
            self.inbox.wake_fd = None
            self.buffers.close()


def _nothing() -> None:
    """Is done at once."""
