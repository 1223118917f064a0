"""Membership as a pure state machine: events and the time in, actions out. No clock, no sockets, no threads."""

from __future__ import annotations

from collections.abc import Callable

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, StaleEpoch
from epmesh.version import check_compatible
from epmesh.view import View
from epmesh_server.membership.actions import (
    Action,
    Append,
    Commit,
    EndSession,
    Evict,
    HeartbeatAck,
    NodeGranted,
    Note,
    Reply,
    Send,
)
from epmesh_server.membership.agreement import Agreement
from epmesh_server.membership.declarations import RankDeclaration, RankKey
from epmesh_server.membership.events import (
    CloseSession,
    Committed,
    CreateGroup,
    DestroyGroup,
    Event,
    Finished,
    Heartbeat,
    OpenSession,
    OperationEvent,
    Prepared,
    RegisterNode,
    ReportEvent,
    ReportLinks,
    ReportRanks,
    SetPlacement,
    Stalled,
    Tick,
)
from epmesh_server.membership.links import greedy_removal
from epmesh_server.membership.nodes import Node, NodeStatus, NodeTable
from epmesh_server.membership.operations import check_operation
from epmesh_server.membership.records import NodeRegistered, Snapshot
from epmesh_server.membership.rounds import Phase, Rounds
from epmesh_server.membership.settings import MembershipSettings


class Membership:
    """Who is in the mesh, decided in one place.

    The same events at the same times give the same actions. The owner carries the actions out in order, nothing after
    an `Append` before its records are on disk, and calls `step` with a `Tick` at `next_deadline` at the latest.
    Times are seconds of one clock that never goes back.
    """

    def __init__(self, settings: MembershipSettings, snapshot: Snapshot, now: float) -> None:
        """Starts from what the log holds; for a new mesh, a snapshot with nothing but its constants.

        Raises:
            InvalidRequest: the log is of a mesh with another stride.
        """
        if snapshot.stride != settings.stride:
            raise InvalidRequest(
                f"stride is {settings.stride}, the log's mesh was made with {snapshot.stride}; "
                f"start with --stride {snapshot.stride}, or with an empty data directory"
            )
        self._settings = settings
        self._out: list[Action] = []
        self._nodes = NodeTable.recovered(settings, snapshot, now)
        self._rounds = Rounds(settings, snapshot, self._nodes, self._out, self._left_out)
        self._agreement = Agreement(settings.stride)
        self._links_due: float | None = None
        self._now = now

    @property
    def view(self) -> View:
        """The last committed view; epoch 0 before the first."""
        return self._rounds.view

    def node_id(self, slot: int) -> str | None:
        """The id of the node that `slot` was given to last; `None` where it never was."""
        node = self._nodes.get(slot)
        return node.registration.node_id if node is not None else None

    @property
    def nodes(self) -> NodeTable:
        """All slots ever given; to be looked at only."""
        return self._nodes

    @property
    def lease_s(self) -> float:
        """How long a sign of life holds."""
        return self._settings.lease_s

    def knows(self, node_id: str) -> bool:
        """Whether a node of that id, alive or dead, has a slot."""
        return self._nodes.knows(node_id)

    def next_deadline(self) -> float | None:
        """When something happens although nobody says anything; a `Tick` that comes early does no harm."""
        times = (self._nodes.next_lease_end(), self._rounds.next_deadline(), self._links_due)
        return min((time for time in times if time is not None), default=None)

    def step(self, event: Event, now: float) -> list[Action]:
        """Takes one event in and returns what is to be done, in order."""
        self._now = now
        if isinstance(event, Heartbeat):
            self._heartbeat(event)
        else:
            self._handle(event)
            self._advance()
        actions = self._out.copy()
        self._out.clear()
        return actions

    def _handle(self, event: Event) -> None:
        match event:
            case RegisterNode():
                self._answered(event.call, lambda: self._register(event))
            case CreateGroup() | DestroyGroup() | SetPlacement():
                self._answered(event.call, lambda: self._operate(event))
            case OpenSession():
                self._open(event)
            case CloseSession():
                self._close(event)
            case Stalled():
                self._stalled()
            case ReportRanks() | ReportLinks() | Prepared() | Finished() | Committed():
                self._report(event)
            case Heartbeat() | Tick():
                pass

    def _advance(self) -> None:
        for node in self._nodes.expire(self._now):
            self._expired(node)
        if self._links_due is not None and self._links_due <= self._now:
            self._links_due = None
            self._evict_unreachable()
        self._rounds.set_tensor_parallel_size(self._agreement.tensor_parallel_size)
        self._rounds.advance(self._now)

    # Unary calls -------------------------------------------------------------------------------------------------

    def _answered(self, call: int, handle: Callable[[], None]) -> None:
        try:
            handle()
        except EpmeshError as error:
            self._out.append(Reply(call, error))

    def _register(self, event: RegisterNode) -> None:
        wanted = event.registration
        check_compatible(self._settings.version, wanted.version, f"node {wanted.node_id!r}", here="the coordinator")
        slot = self._nodes.choose_slot(wanted, event.slot, self._now)
        known = self._nodes.get(slot)
        if known is not None and known.registration.identity != wanted.identity:
            self._bury(known)
        if known is None or known.registration != wanted:
            self._out.append(Append((NodeRegistered(wanted, slot),)))
        if known is not None and known.registration.identity == wanted.identity:
            self._welcome_back(known)
        self._nodes.admit(slot, wanted, self._now)
        self._rounds.more_may_come(self._now)
        self._out.append(Reply(event.call, NodeGranted(slot)))

    def _operate(self, event: OperationEvent) -> None:
        if not self._rounds.operations.knows(event.request_id):
            check_operation(event, self._nodes.rank)
        answer = self._rounds.operations.submit(event)
        if answer is not None:
            self._out.append(Reply(event.call, answer))
        else:
            self._rounds.want(self._now)

    # Control streams ---------------------------------------------------------------------------------------------

    def _open(self, event: OpenSession) -> None:
        node = self._nodes.get(event.slot)
        error = self._refusal(event, node)
        if node is None or error is not None:
            self._out.append(EndSession(event.session, error or InvalidRequest(f"slot {event.slot} was never given")))
            return
        if node.session is not None:
            self._out.append(EndSession(node.session, StaleEpoch(self.view.epoch, "a newer session took its place")))
        self._welcome_back(node)
        joins = node.status in (NodeStatus.REGISTERED, NodeStatus.DEAD)
        self._nodes.open(node, event.session, self._now)
        if 0 < self.view.epoch != event.epoch:
            self._out.append(Send(event.session, Commit(self.view)))
        if joins:
            self._rounds.want(self._now)
        self._rounds.reopened(node)

    def _refusal(self, event: OpenSession, node: Node | None) -> EpmeshError | None:
        if node is None:
            return InvalidRequest(f"slot {event.slot} was never given; register first")
        if node.registration.incarnation != event.incarnation:
            holder = node.registration
            return InvalidRequest(
                f"slot {event.slot} has node {holder.node_id!r} at {holder.address} now, with another incarnation; "
                f"stop it first, or use another --node-id"
            )
        if event.epoch > self.view.epoch:
            return InvalidRequest(
                f"node {node.registration.node_id!r} is in epoch {event.epoch}, this coordinator's last is "
                f"{self.view.epoch}: it lost its log, or is another mesh's; restart the node"
            )
        return None

    def _close(self, event: CloseSession) -> None:
        node = self._nodes.by_session(event.session)
        if node is None:
            return
        if self._now < node.grace_until and not event.orderly:
            self._nodes.miss(node)
            return
        node.orderly = event.orderly
        what = "left" if event.orderly else "is dead: its control stream broke"
        self._note(node, what, warning=not event.orderly, cause="left" if event.orderly else "stream")
        self._bury(node)

    def _heartbeat(self, event: Heartbeat) -> None:
        node = self._nodes.by_session(event.session)
        if node is not None:
            self._nodes.renew(node, self._now)
            self._out.append(Send(event.session, HeartbeatAck(event.number)))

    def _report(self, event: ReportEvent) -> None:
        node = self._nodes.by_session(event.session)
        if node is None:
            return  # of a session that was ended from here
        self._nodes.renew(node, self._now)
        match event:
            case ReportRanks():
                self._report_ranks(node, event.ranks, event.left)
            case ReportLinks():
                self._report_links(node, event)
            case Prepared():
                self._rounds.answered(node, Phase.PREPARING, event.epoch, event.progress)
            case Finished():
                self._rounds.answered(node, Phase.FINISHING, event.epoch, event.progress)
            case Committed():
                self._rounds.answered(node, Phase.COMMITTING, event.epoch)

    def _stalled(self) -> None:
        """Streams may have broken and heartbeats may be unread, all for this process's own fault."""
        self._out.append(Note("the coordinator stood still; every node has a new lease", warning=True))
        for node in self._nodes:
            if node.status is not NodeStatus.DEAD:
                self._nodes.renew(node, self._now)
                node.grace_until = max(node.grace_until, self._now + self._settings.answer_timeout_s)
        self._rounds.stalled(self._now)

    def _welcome_back(self, node: Node) -> None:
        """Forgives everybody where a node comes back that was dead here and was never said to be: too few were left.

        So it was this coordinator that was cut off, and the others have a lease of grace to come back too.
        """
        if node.status is not NodeStatus.DEAD or not self._rounds.may_return(node):
            return
        for other in self._nodes:
            if other.status is NodeStatus.DEAD and not other.orderly and self._rounds.may_return(other):
                self._nodes.forgive(other, self._rounds.committed_ranks(other.slot), self._now)

    # Ranks -------------------------------------------------------------------------------------------------------

    def _report_ranks(self, node: Node, declared: tuple[RankDeclaration, ...], left: frozenset[RankKey]) -> None:
        listed = {rank.info.rank: rank for rank in declared}
        keys = frozenset(rank.key for rank in listed.values())
        node.listed, node.left = keys, left - keys
        for known in list(node.ranks.values()):
            if known.key not in keys:
                self._lose(node, known.key)
        for rank in listed.values():
            self._accept(node, rank)
        self._nodes.settle(node)
        self._rounds.tell_gone(node, StaleEpoch(self.view.epoch, "left out of an earlier epoch; join again"))

    def _accept(self, node: Node, rank: RankDeclaration) -> None:
        known = node.ranks.get(rank.info.rank)
        if known == rank or rank.key in node.gone:
            return
        if known is not None:
            self._agreement.remove(known)  # nothing where `known` was a guess
        try:
            if known is None or known.key != rank.key:  # a process is not judged again for what it declared once
                self._check_rank(node, rank)
        except InvalidRequest as error:
            self._refuse(node, rank.key, error)
            return
        self._agreement.add(rank)
        node.ranks[rank.info.rank] = rank
        self._rounds.want(self._now)

    def _check_rank(self, node: Node, rank: RankDeclaration) -> None:
        number, stride = rank.info.rank, self._settings.stride
        if number // stride != node.slot:
            raise InvalidRequest(
                f"node {node.registration.node_id!r} in slot {node.slot} reports rank {number}; with stride {stride} "
                f"its ranks are {node.slot * stride} to {node.slot * stride + stride - 1}: start at most {stride} "
                f"ranks on a node, or the coordinator with a larger --stride"
            )
        self._agreement.check(rank, self.view.placements, self._survives)

    def _survives(self, number: int) -> bool:
        """Whether the process that the last view has behind a rank lives."""
        info = self.view.ranks.get(number)
        return info is not None and self._lives(number, info.incarnation)

    def _refuse(self, node: Node, key: RankKey, error: EpmeshError) -> None:
        if node.ranks.pop(key[0], None) is not None:
            self._rounds.want(self._now, urgent=self._rounds.lost_rank(key))
        node.gone.add(key)
        node.told.add(key)
        self._note(node, f"rank {key[0]} refused: {error}", warning=True, cause="refused")
        if node.session is not None:
            self._out.append(Send(node.session, Evict(error, (key,))))

    def _lose(self, node: Node, key: RankKey) -> None:
        """A process is gone and does not come back."""
        self._agreement.remove(node.ranks.pop(key[0]))
        node.gone.add(key)
        self._rounds.want(self._now, urgent=self._rounds.lost_rank(key))

    # Links -------------------------------------------------------------------------------------------------------

    def _report_links(self, node: Node, event: ReportLinks) -> None:
        node.links = event.failures
        if event.failures and self._links_due is None:
            self._links_due = self._now + self._settings.link_grace_s

    def _evict_unreachable(self) -> None:
        """Takes ranks away until no link among the others is broken."""
        edges = [
            (failure.reporter, failure.target)
            for node in self._nodes
            for failure in node.links
            if failure.reporter in node.ranks and self._lives(failure.target, failure.target_incarnation)
        ]
        for rank in greedy_removal(edges):
            node = self._nodes.get(rank // self._settings.stride)
            declared = self._nodes.rank(rank)
            if node is not None and declared is not None:
                self._note(node, f"rank {rank} is evicted: others cannot reach it", warning=True, cause="links")
                self._lose(node, declared.key)

    def _lives(self, rank: int, incarnation: int) -> bool:
        declared = self._nodes.rank(rank)
        return declared is not None and declared.info.incarnation == incarnation

    # Deaths ------------------------------------------------------------------------------------------------------

    def _expired(self, node: Node) -> None:
        if node.status is NodeStatus.REGISTERED:
            self._nodes.bury(node)
            return
        self._left_out(node, f"showed no sign of life for {self._settings.lease_s:g} s", cause="lease")

    def _left_out(self, node: Node, why: str, cause: str = "unanswered") -> None:
        """Declares a node dead that may not know it."""
        self._note(node, f"is dead: it {why}", warning=True, cause=cause)
        if node.session is not None:
            text = f"node {node.registration.node_id!r} {why} and was left out; its ranks must join again"
            self._out.append(Send(node.session, Evict(StaleEpoch(self.view.epoch, text))))
            self._out.append(EndSession(node.session, MeshUnavailable(text)))
        self._bury(node)

    def _bury(self, node: Node) -> None:
        counted = node.status in (NodeStatus.LIVE, NodeStatus.ABSENT)
        for declared in list(node.ranks.values()):
            self._lose(node, declared.key)
        self._nodes.bury(node)
        if counted:
            self._rounds.lost_node(node)
            self._rounds.want(self._now, urgent=True)

    def _note(self, node: Node, what: str, *, warning: bool, cause: str = "") -> None:
        text = f"node {node.registration.node_id!r} (slot {node.slot}) {what}"
        self._out.append(Note(text, warning=warning, cause=cause))
