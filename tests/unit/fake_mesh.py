"""A mesh without sockets: the membership machine, a log in memory, and nodes that answer as node services do."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from epmesh.errors import EpmeshError
from epmesh.view import RankInfo, RankMode, View
from epmesh_server.membership import (
    ExpertDeclaration,
    GroupProgress,
    LinkFailure,
    Membership,
    MembershipSettings,
    MeshCreated,
    RankDeclaration,
    RankKey,
    Record,
    Registration,
    Snapshot,
)
from epmesh_server.membership.actions import (
    Action,
    Append,
    Command,
    Commit,
    Done,
    EndSession,
    Evict,
    Finish,
    HeartbeatAck,
    NodeGranted,
    Note,
    Prepare,
    Publish,
    Reply,
    Send,
)
from epmesh_server.membership.events import (
    CloseSession,
    Committed,
    Event,
    Finished,
    Heartbeat,
    OpenSession,
    OperationEvent,
    Prepared,
    RegisterNode,
    ReportLinks,
    ReportRanks,
    Tick,
)

VERSION = "0.1.0"
SETTINGS = MembershipSettings(version=VERSION)


def rank(
    number: int,
    incarnation: int = 1,
    *,
    mode: RankMode = RankMode.EXCHANGE,
    world_size: int = 1,
    tensor_parallel_size: int = 0,
    experts: Iterable[ExpertDeclaration] = (),
    exchange_timeout_s: float = 5.0,
) -> RankDeclaration:
    """A rank as its node service reports it."""
    info = RankInfo(number, incarnation, "cpu", mode, f"tcp://127.0.0.1:{10_000 + number}")
    return RankDeclaration(info, world_size, tensor_parallel_size, tuple(experts), exchange_timeout_s)


def linear(num_experts: int, layer: int | None = None) -> ExpertDeclaration:
    return ExpertDeclaration(layer, num_experts, (), linear=True)


def explicit(num_experts: int, experts: Iterable[int], layer: int | None = None) -> ExpertDeclaration:
    return ExpertDeclaration(layer, num_experts, tuple(experts), linear=False)


def fold(records: Iterable[Record]) -> Snapshot:
    snapshot = Snapshot()
    for record in records:
        snapshot.apply(record)
    return snapshot


@dataclass
class FakeNode:
    """A node service and its ranks.

    Attributes:
        begun, completed: (rank, incarnation, group id) -> sequence number; where there is none, the view's.
        silent: commands that it does not answer.
        errors: why ranks were evicted, by process.
    """

    node_id: str
    incarnation: int
    slot: int = -1
    session: int | None = None
    view: View | None = None
    ranks: dict[int, RankDeclaration] = field(default_factory=dict)
    begun: dict[tuple[int, int, int], int] = field(default_factory=dict)
    completed: dict[tuple[int, int, int], int] = field(default_factory=dict)
    fence: int = 0
    lost: frozenset[int] = frozenset()
    silent: set[type] = field(default_factory=set)
    errors: dict[RankKey, EpmeshError] = field(default_factory=dict)
    heard: list[Command] = field(default_factory=list)
    ended: EpmeshError | None = None

    @property
    def epoch(self) -> int:
        return self.view.epoch if self.view else 0

    @property
    def living(self) -> set[RankKey]:
        return {declared.key for declared in self.ranks.values()}

    def hear(self, command: Command) -> Event | None:
        """Does what a command says; returns the answer."""
        assert self.session is not None
        self.heard.append(command)
        answer: Event | None = None
        match command:
            case Prepare():
                self.fence = max(self.fence, command.epoch)
                self.lost = frozenset(command.lost_ranks)
                answer = Prepared(self.session, command.epoch, self.progress())
            case Finish():
                self.finish(command)
                answer = Finished(self.session, command.epoch, self.progress())
            case Commit():
                self.adopt(command.view)
                answer = Committed(self.session, command.view.epoch)
            case Evict():
                self.evict(command)
            case HeartbeatAck():
                pass
        return None if type(command) in self.silent else answer

    def progress(self) -> tuple[GroupProgress, ...]:
        found = []
        for group in self.view.groups if self.view else ():
            members = [self.ranks[number] for number in group.ranks if number in self.ranks]
            if members:
                begun = max(self.begun.get((*member.key, group.group_id), group.sequence) for member in members)
                completed = min(self.completed.get((*member.key, group.group_id), group.sequence) for member in members)
                found.append(GroupProgress(group.group_id, begun, completed))
        return tuple(found)

    def finish(self, command: Finish) -> None:
        """Ranks that may finish do."""
        if command.abort:
            return
        cuts = dict(command.cuts)
        for key, begun in self.begun.items():
            if begun <= cuts.get(key[2], 0):
                self.completed[key] = begun

    def adopt(self, view: View) -> None:
        if view.epoch <= self.epoch:
            return
        known = self.view
        for number, declared in list(self.ranks.items()):
            was = known is not None and _has(known, declared.key)
            if was and not _has(view, declared.key):
                del self.ranks[number]
        unchanged = known is not None and view.membership_epoch == known.membership_epoch
        if not unchanged:  # counters are opened anew, at the view's
            self.begun, self.completed = {}, {}
        self.view, self.lost = view, frozenset()

    def evict(self, command: Evict) -> None:
        keys = set(command.ranks) or self.living
        for key in keys:
            self.errors[key] = command.error
            if key in self.living:
                del self.ranks[key[0]]


def _has(view: View, key: RankKey) -> bool:
    return key[0] in view.ranks and view.ranks[key[0]].incarnation == key[1]


class FakeMesh:
    """Drives the machine: `step` one event, `settle` what follows from it, `advance` the time."""

    def __init__(
        self,
        settings: MembershipSettings = SETTINGS,
        *,
        records: Iterable[Record] = (),
        now: float = 100.0,
        **changed: Any,
    ) -> None:
        self.settings = replace(settings, **changed)
        self.records = list(records) or [MeshCreated("mesh", self.settings.stride)]
        self.now = now
        self.machine = Membership(self.settings, fold(self.records), now)
        self.nodes: dict[int, FakeNode] = {}
        self.numbers = itertools.count(1)
        self.replies: dict[int, NodeGranted | Done | EpmeshError] = {}
        self.views: list[View] = []
        self.notes: list[str] = []
        self.inbox: deque[tuple[int, Command]] = deque()
        if not records:
            self.step(Tick())

    @property
    def view(self) -> View:
        return self.machine.view

    def step(self, event: Event) -> list[Action]:
        """One event; what it does to the nodes waits in `inbox`."""
        actions = self.machine.step(event, self.now)
        for action in actions:
            match action:
                case Append():
                    self.records.extend(action.records)
                case Reply():
                    self.replies[action.call] = action.result
                case Send():
                    self.inbox.append((action.session, action.command))
                case EndSession():
                    self._end(action)
                case Publish():
                    self.views.append(action.view)
                case Note():
                    self.notes.append(action.text)
        return actions

    def _end(self, action: EndSession) -> None:
        if node := self.nodes.pop(action.session, None):
            for session, command in [entry for entry in self.inbox if entry[0] == action.session]:
                node.hear(command)
                self.inbox.remove((session, command))
            node.session, node.ended = None, action.error

    def settle(self) -> None:
        """Lets nodes answer until nobody has anything to say at this time."""
        while True:
            while self.inbox:
                self.deliver()
            deadline = self.machine.next_deadline()
            if deadline is None or deadline > self.now:
                return
            self.step(Tick())
            if not self.inbox and self.machine.next_deadline() == deadline:
                return

    def deliver(self) -> None:
        """One command to its node, and its answer back."""
        session, command = self.inbox.popleft()
        node = self.nodes.get(session)
        if node is None or node.session != session:
            return
        answer = node.hear(command)
        if answer is not None:
            self.step(answer)
        if isinstance(command, Commit | Evict):
            self.report(node)

    def advance(self, seconds: float) -> None:
        """Lets time go by, stopping wherever the machine wants to; nodes send heartbeats, but for silent ones."""
        until = self.now + seconds
        self.settle()
        while self.now < until:
            deadline = self.machine.next_deadline()
            self.now = max(self.now, min(until, self.now + 0.5, until if deadline is None else deadline))
            for session, node in list(self.nodes.items()):
                if HeartbeatAck not in node.silent:
                    self.machine.step(Heartbeat(session, 1), self.now)
            self.step(Tick())
            self.settle()

    # What nodes do -----------------------------------------------------------------------------------------------

    def register(self, node: FakeNode, **options: Any) -> NodeGranted | EpmeshError:
        call = next(self.numbers)
        fields = {"address": f"10.0.0.1:{7400 + node.incarnation}", "version": VERSION} | options
        claim = fields.pop("slot", None)
        self.step(RegisterNode(call, Registration(node.node_id, node.incarnation, **fields), claim))
        answer = self.replies[call]
        assert not isinstance(answer, Done)
        if isinstance(answer, NodeGranted):
            node.slot = answer.slot
        return answer

    def open(self, node: FakeNode) -> None:
        node.session = next(self.numbers)
        self.nodes[node.session] = node
        self.step(OpenSession(node.session, node.slot, node.incarnation, node.epoch))

    def report(self, node: FakeNode) -> None:
        if node.session is not None:
            self.step(ReportRanks(node.session, tuple(node.ranks.values())))

    def report_links(self, node: FakeNode, *failures: tuple[int, int]) -> None:
        assert node.session is not None
        incarnations = {number: info.incarnation for number, info in self.view.ranks.items()}
        links = tuple(LinkFailure(a, b, incarnations.get(b, 1)) for a, b in failures)
        self.step(ReportLinks(node.session, links))

    def break_session(self, node: FakeNode, *, orderly: bool = False) -> None:
        assert node.session is not None
        session, node.session = node.session, None
        del self.nodes[session]
        self.step(CloseSession(session, orderly))

    def start(self, node_id: str, incarnation: int = 1, *, num_ranks: int = 0, slot: int | None = None) -> FakeNode:
        """Registers a node, opens its session and reports ranks of incarnation 1."""
        node = FakeNode(node_id, incarnation)
        granted = self.register(node, slot=slot)
        if isinstance(granted, EpmeshError):
            raise granted
        first = node.slot * self.settings.stride
        node.ranks = {number: rank(number, incarnation) for number in range(first, first + num_ranks)}
        self.open(node)
        self.report(node)
        return node

    def kill_rank(self, node: FakeNode, number: int) -> None:
        del node.ranks[number]
        self.report(node)

    def ask(self, event: type, *fields: object, request_id: str = "") -> int:
        """Submits an operation; returns the call whose reply to look for."""
        call = next(self.numbers)
        operation: OperationEvent = event(call, request_id, *fields)
        self.step(operation)
        return call

    def restarted(self, *, down_s: float = 0.5) -> FakeMesh:
        """A new coordinator over the same log; nodes keep what they have, and are not connected."""
        later = FakeMesh(self.settings, records=self.records, now=self.now + down_s)
        later.numbers = self.numbers
        return later


def two_nodes(num_ranks: int = 2, **settings: Any) -> tuple[FakeMesh, FakeNode, FakeNode]:
    """A committed mesh of two nodes."""
    mesh = FakeMesh(**settings)
    a, b = mesh.start("a", 1, num_ranks=num_ranks), mesh.start("b", 2, num_ranks=num_ranks)
    mesh.advance(0.1)
    assert len(mesh.view.nodes) == 2
    return mesh, a, b
