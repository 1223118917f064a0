"""Random deaths, restarts, lost messages and coordinator crashes; what must hold in every history.

Messages of one control stream arrive in order, as TCP has it, each whenever the search likes; a broken stream loses
what is on its way. A crash comes between any two actions: what was appended before stays, nothing after it happened.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epmesh.errors import EpmeshError, MeshUnavailable
from epmesh.placement import Placement
from epmesh.view import RankMode, View
from epmesh_server.membership import (
    EpochUsed,
    LinkFailure,
    Membership,
    MeshCreated,
    RankKey,
    Record,
    Registration,
    ViewCommitted,
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
    NodeGranted,
    Prepare,
    Publish,
    Reply,
    Send,
)
from epmesh_server.membership.events import (
    CloseSession,
    CreateGroup,
    DestroyGroup,
    Event,
    Heartbeat,
    OpenSession,
    Prepared,
    RegisterNode,
    ReportLinks,
    ReportRanks,
    SetPlacement,
    Tick,
)
from epmesh_server.membership.groups import EP, WORLD
from epmesh_server.membership.records import FIRST_USER_GROUP_ID
from tests.unit.fake_mesh import SETTINGS, VERSION, FakeNode, explicit, fold, linear, rank

STRIDE = SETTINGS.stride
NODE_IDS = ("a", "b", "c", "d")


@dataclass
class Stream:
    """One control stream: what is on its way down to the node and up to the coordinator."""

    node: FakeNode
    down: deque[Command] = field(default_factory=deque)
    up: deque[Event] = field(default_factory=deque)


class Crash(Exception):
    """The coordinator dies between two actions."""


class History:
    """Everything that was ever decided, checked as it comes."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.views: dict[int, View] = {}
        self.last: View | None = None
        self.dead: set[RankKey] = set()
        self.dead_at_prepare: dict[int, frozenset[RankKey]] = {}
        self.begun: dict[int, dict[int, int]] = {}
        self.cuts: dict[int, dict[int, int]] = {}
        self.group_ids: dict[int, tuple[str, tuple[int, ...]]] = {}
        self.orderly: set[tuple[int, int]] = set()

    def written(self, record: Record) -> None:
        if isinstance(record, EpochUsed):
            assert record.epoch > max(self.epochs, default=0), "an epoch was prepared twice, or fell"
            self.epochs.append(record.epoch)
        elif isinstance(record, ViewCommitted):
            self.committed(record.view)

    def prepare(self, command: Prepare) -> None:
        assert command.epoch == self.epochs[-1], "prepared before it was written"
        if self.last is not None:
            lost = ((number, self.last.ranks[number].incarnation) for number in command.lost_ranks)
            self.dead.update(lost)
        self.dead_at_prepare.setdefault(command.epoch, frozenset(self.dead))

    def prepared(self, event: Prepared) -> None:
        begun = self.begun.setdefault(event.epoch, {})
        for entry in event.progress:
            begun[entry.group_id] = max(begun.get(entry.group_id, 0), entry.begun)

    def finish(self, command: Finish) -> None:
        cuts = dict(command.cuts)
        for group_id, begun in self.begun.get(command.epoch, {}).items():
            if group_id in cuts:
                assert cuts[group_id] >= begun, "a cut below what an acknowledged node had begun"
        self.cuts[command.epoch] = cuts

    def committed(self, view: View) -> None:
        assert view.epoch == self.epochs[-1], "committed without being prepared last"
        assert view.epoch not in self.views, "two views in one epoch"
        living = {(info.rank, info.incarnation) for info in view.ranks.values()}
        assert living.isdisjoint(self.dead_at_prepare.get(view.epoch, ())), "a dead process is in the view"
        self.views[view.epoch] = view
        check_view(view)
        if self.last is not None:
            check_successor(self.last, view, self.cuts.get(view.epoch, {}), self.orderly)
            self.dead.update((info.rank, info.incarnation) for info in self.last.ranks.values())
            self.dead -= living
        for group in view.groups:
            if group.group_id >= FIRST_USER_GROUP_ID:
                declared = (group.name, group.declared_ranks)
                assert self.group_ids.setdefault(group.group_id, declared) == declared, "a group's id was used again"
        self.last = view


def check_view(view: View) -> None:
    """What must hold in a view by itself."""
    slots = [node.slot for node in view.nodes]
    assert slots == sorted(set(slots))
    for node in view.nodes:
        numbers = [info.rank for info in node.ranks]
        assert numbers == sorted(set(numbers))
        assert all(number // STRIDE == node.slot for number in numbers)
    exchange = tuple(number for number, info in view.ranks.items() if info.mode is RankMode.EXCHANGE)
    assert view.group(WORLD).ranks == tuple(view.ranks)
    assert view.group(EP).ranks == exchange
    ids = [group.group_id for group in view.groups]
    assert ids == sorted(set(ids))
    for group in view.groups:
        assert 0 <= group.completed <= group.sequence
        assert set(group.ranks) <= set(view.ranks)
        if group.group_id >= FIRST_USER_GROUP_ID:
            assert group.ranks == tuple(number for number in group.declared_ranks if number in exchange)
    for placement in view.placements.values():
        Placement(placement.num_experts, placement.experts_of)  # checks itself


def check_successor(before: View, view: View, cuts: dict[int, int], orderly: set[tuple[int, int]]) -> None:
    """What must hold from one view to the next."""
    assert view.epoch > before.epoch
    same = members(before) == members(view)
    assert view.membership_epoch == (before.membership_epoch if same else view.epoch)
    known = {group.group_id: group for group in before.groups}
    for group in view.groups:
        was = known.get(group.group_id)
        if was is not None:
            assert group.sequence == cuts.get(group.group_id, was.sequence) >= was.sequence
            assert group.completed >= was.completed
        else:
            assert (group.sequence, group.completed) == (0, 0)
    slots = {node.slot for node in view.nodes}
    missed = [n for n in before.nodes if n.slot in slots or (n.slot, n.incarnation) not in orderly]
    assert 2 * len(view.nodes) >= len(missed), "fewer than half"


def members(view: View) -> set[tuple[int, int, RankMode]]:
    return {(info.rank, info.incarnation, info.mode) for info in view.ranks.values()}


class MeshMachine(RuleBasedStateMachine):
    """The search: its rules are what may happen at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.now = 100.0
        self.records: list[Record] = [MeshCreated("mesh", STRIDE)]
        self.history = History()
        self.machine = Membership(SETTINGS, fold(self.records), self.now)
        self.nodes: dict[str, FakeNode] = {}
        self.slots: dict[str, int] = {}
        self.streams: dict[int, Stream] = {}
        self.unnoticed: list[tuple[int, bool]] = []
        self.calls: dict[int, object] = {}
        self.crash_after: int | None = None

    # The coordinator ---------------------------------------------------------------------------------------------

    def step(self, event: Event) -> None:
        if isinstance(event, Prepared):
            self.history.prepared(event)
        try:
            for count, action in enumerate(self.machine.step(event, self.now)):
                if self.crash_after is not None and count >= self.crash_after:
                    raise Crash
                self.carry_out(action)
        except Crash:
            self.restart()

    def carry_out(self, action: Action) -> None:
        match action:
            case Append():
                for record in action.records:
                    self.history.written(record)
                self.records.extend(action.records)
            case Send():
                self.send(action)
            case Reply():
                self.calls[action.call] = action.result
            case EndSession():
                self.end(action)
            case Publish():
                assert self.history.views[action.view.epoch] is action.view, "published before it was written"

    def send(self, action: Send) -> None:
        match action.command:
            case Prepare():
                self.history.prepare(action.command)
            case Finish():
                self.history.finish(action.command)
                if stream := self.streams.get(action.session):
                    assert stream.node.fence >= action.command.epoch, "a cut for a node whose fences are down"
            case Commit():
                view = action.command.view
                assert self.history.views[view.epoch] == view, "sent before it was written"
        if stream := self.streams.get(action.session):
            stream.down.append(action.command)

    def end(self, action: EndSession) -> None:
        if stream := self.streams.pop(action.session, None):
            while stream.down:
                stream.node.hear(stream.down.popleft())
            stream.node.session = None

    def restart(self) -> None:
        self.crash_after = None
        for stream in self.streams.values():
            stream.node.session = None
        self.streams.clear()
        self.unnoticed.clear()
        self.now += 0.2
        self.machine = Membership(SETTINGS, fold(self.records), self.now)
        self.step(Tick())

    # Nodes -------------------------------------------------------------------------------------------------------

    def connect(self, node: FakeNode) -> None:
        call = next(self.numbers)
        self.step(RegisterNode(call, Registration(node.node_id, node.incarnation, "h:1", VERSION)))
        answer = self.calls.get(call)
        if not isinstance(answer, NodeGranted):
            # A crash; or the node's old self lives, for all that is known.
            assert answer is None or isinstance(answer, MeshUnavailable) or self.unnoticed, answer
            return
        assert self.slots.setdefault(node.node_id, answer.slot) == answer.slot, "a slot moved"
        node.slot = answer.slot
        node.session = next(self.numbers)
        stream = self.streams[node.session] = Stream(node)
        stream.up.append(OpenSession(node.session, node.slot, node.incarnation, node.epoch))
        self.report(node)

    def report(self, node: FakeNode) -> None:
        if node.session is not None:
            self.streams[node.session].up.append(ReportRanks(node.session, tuple(node.ranks.values())))

    def hang_up(self, node: FakeNode, *, orderly: bool, noticed: bool) -> None:
        session, node.session = node.session, None
        if session is None:
            return
        stream = self.streams.pop(session)
        if orderly:  # everything before the end of the stream arrives
            for event in stream.up:
                self.deliver_up(event)
            self.history.orderly.add((node.slot, node.incarnation))
        if noticed:
            self.step(CloseSession(session, orderly))
        else:
            self.unnoticed.append((session, orderly))

    def deliver_up(self, event: Event) -> None:
        if isinstance(event, ReportRanks) and (stream := self.streams.get(event.session)):
            living = {known.key for known in event.ranks}
            gone = {(number, i) for number, i in self.known_processes(stream.node.slot) if (number, i) not in living}
            self.history.dead |= gone
        self.step(event)

    def known_processes(self, slot: int) -> set[RankKey]:
        view = self.machine.view
        return {(info.rank, info.incarnation) for info in view.ranks.values() if info.rank // STRIDE == slot}

    # What may happen ---------------------------------------------------------------------------------------------

    @initialize(num_ranks=st.lists(st.integers(0, 3), min_size=2, max_size=4))
    def begin_with_a_mesh(self, num_ranks: list[int]) -> None:
        for node_id, count in zip(NODE_IDS, num_ranks, strict=False):
            self.start_node(node_id, count)
        self.calm()

    @rule()
    def calm(self) -> None:
        """Nothing goes wrong for a while, if nothing is about to; nodes come back."""
        for node in self.nodes.values():
            if node.session is None:
                self.connect(node)
        for _ in range(3):
            self.wait(0.1, beating=True)
            self.deliver_many(300)

    @rule()
    def calm_again(self) -> None:
        self.calm()

    @rule(rounds=st.integers(1, 12))
    def calm_and_slow(self, rounds: int) -> None:
        """Time goes by, and some of what is on its way arrives."""
        self.wait(0.05, beating=True)
        self.deliver_many(rounds)

    @rule(node_id=st.sampled_from(NODE_IDS), num_ranks=st.integers(0, 2))
    def start_node(self, node_id: str, num_ranks: int) -> None:
        if node_id in self.nodes:
            return
        node = self.nodes[node_id] = FakeNode(node_id, next(self.numbers))
        self.connect(node)
        for local in range(num_ranks):
            self.add_rank(node_id, local, RankMode.EXCHANGE)

    @rule(node_id=st.sampled_from(NODE_IDS))
    def reconnect(self, node_id: str) -> None:
        node = self.nodes.get(node_id)
        if node is not None and node.session is None:
            self.connect(node)

    @rule(node_id=st.sampled_from(NODE_IDS), noticed=st.booleans())
    def kill_node(self, node_id: str, noticed: bool) -> None:
        node = self.nodes.pop(node_id, None)
        if node is not None:
            self.hang_up(node, orderly=False, noticed=noticed)

    @rule(node_id=st.sampled_from(NODE_IDS))
    def stop_node(self, node_id: str) -> None:
        node = self.nodes.pop(node_id, None)
        if node is not None:
            self.hang_up(node, orderly=True, noticed=True)

    @rule(node_id=st.sampled_from(NODE_IDS), noticed=st.booleans())
    def break_stream(self, node_id: str, noticed: bool) -> None:
        node = self.nodes.get(node_id)
        if node is not None:
            self.hang_up(node, orderly=False, noticed=noticed)

    @precondition(lambda self: self.unnoticed)
    @rule()
    def notice(self) -> None:
        self.step(CloseSession(*self.unnoticed.pop(0)))

    @rule(
        node_id=st.sampled_from(NODE_IDS),
        local=st.integers(0, 2),
        mode=st.sampled_from([RankMode.EXCHANGE, RankMode.EXCHANGE, RankMode.SERVE]),
        declared=st.sampled_from([(), (linear(4),), (explicit(4, (0, 3)),), (explicit(6, (5,)),)]),
        tensor_parallel_size=st.sampled_from([0, 0, 2]),
    )
    def add_rank(
        self, node_id: str, local: int, mode: RankMode, declared: tuple[object, ...] = (), tensor_parallel_size: int = 0
    ) -> None:
        node = self.nodes.get(node_id)
        if node is None or node.slot < 0:
            return
        number = node.slot * STRIDE + local
        node.ranks[number] = rank(
            number,
            next(self.numbers),
            mode=mode,
            world_size=2,
            experts=declared,  # type: ignore[arg-type]
            tensor_parallel_size=tensor_parallel_size,
        )
        self.report(node)

    @rule(node_id=st.sampled_from(NODE_IDS), local=st.integers(0, 2))
    def kill_rank(self, node_id: str, local: int) -> None:
        node = self.nodes.get(node_id)
        if node is not None and node.ranks.pop(node.slot * STRIDE + local, None) is not None:
            self.report(node)

    @rule(node_id=st.sampled_from(NODE_IDS), local=st.integers(0, 2), group=st.integers(0, 5), done=st.booleans())
    def exchange(self, node_id: str, local: int, group: int, done: bool) -> None:
        """A rank begins the next exchange of a group, unless its fence is up, or completes what it has begun."""
        node = self.nodes.get(node_id)
        if node is None or node.view is None or group >= len(node.view.groups):
            return
        known, declared = node.view.groups[group], node.ranks.get(node.slot * STRIDE + local)
        if declared is not None and declared.info.rank in known.ranks:
            self.go_on(node, (*declared.key, known.group_id), known.sequence, done)

    def go_on(self, node: FakeNode, key: tuple[int, int, int], sequence: int, done: bool) -> None:
        begun = node.begun.get(key, sequence)
        if done:
            node.completed[key] = begun
        elif node.fence <= node.epoch:
            node.begun[key] = begun + 1

    @rule(data=st.data())
    def work(self, data: st.DataObject) -> None:
        """All ranks go on a bit in all groups."""
        for node in self.nodes.values():
            for group in node.view.groups if node.view else ():
                for number in set(group.ranks) & node.ranks.keys():
                    key = (*node.ranks[number].key, group.group_id)
                    self.go_on(node, key, group.sequence, done=False)
                    self.go_on(node, key, group.sequence, done=data.draw(st.booleans()))

    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """The next message of some stream arrives."""
        ready = [session for session, stream in self.streams.items() if stream.down or stream.up]
        if ready:
            self.deliver_one(data.draw(st.sampled_from(ready)), data.draw(st.booleans()))

    def deliver_one(self, session: int, downwards: bool) -> None:
        stream = self.streams[session]
        if stream.down and (downwards or not stream.up):
            command = stream.down.popleft()
            answer = stream.node.hear(command)
            if answer is not None:
                stream.up.append(answer)
            if isinstance(command, Commit | Evict):
                self.report(stream.node)
        else:
            self.deliver_up(stream.up.popleft())

    @rule(rounds=st.integers(1, 60))
    def deliver_many(self, rounds: int) -> None:
        for turn in range(rounds):
            ready = [session for session, stream in self.streams.items() if stream.down or stream.up]
            if not ready:
                break
            self.deliver_one(ready[turn % len(ready)], downwards=turn % 3 > 0)

    @rule(seconds=st.sampled_from([0.01, 0.03, 0.2, 1.1, 3.5]), beating=st.sampled_from([True, True, False]))
    def wait(self, seconds: float, beating: bool) -> None:
        self.now += seconds
        if beating:
            for session in self.streams:
                self.machine.step(Heartbeat(session, 1), self.now)
        self.step(Tick())

    @rule(name=st.sampled_from("xy"), locals_=st.sets(st.integers(0, 20), min_size=1, max_size=3), again=st.booleans())
    def create_group(self, name: str, locals_: set[int], again: bool) -> None:
        request_id = f"{name}-{sorted(locals_)}" if again else ""
        self.step(CreateGroup(next(self.numbers), request_id, name, tuple(sorted(locals_, reverse=True))))

    @rule(name=st.sampled_from("xy"))
    def destroy_group(self, name: str) -> None:
        self.step(DestroyGroup(next(self.numbers), "", name))

    @rule(number=st.integers(0, 20), num_experts=st.sampled_from([4, 6]))
    def set_placement(self, number: int, num_experts: int) -> None:
        self.step(SetPlacement(next(self.numbers), "", None, Placement(num_experts, {number: (0, 1)})))

    @rule(node_id=st.sampled_from(NODE_IDS), local=st.integers(0, 2), unreachable=st.integers(0, 20))
    def break_link(self, node_id: str, local: int, unreachable: int) -> None:
        node = self.nodes.get(node_id)
        info = self.machine.view.ranks.get(unreachable)
        if node is not None and node.session is not None and info is not None:
            failure = LinkFailure(node.slot * STRIDE + local, unreachable, info.incarnation)
            self.streams[node.session].up.append(ReportLinks(node.session, (failure,)))

    @rule()
    def crash(self) -> None:
        self.restart()

    @rule(after=st.integers(0, 3))
    def crash_soon(self, after: int) -> None:
        """The coordinator dies in its next step that does more than `after` things."""
        self.crash_after = after

    @rule()
    def compact(self) -> None:
        self.records = list(fold(self.records).records())

    # What must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def the_view_is_the_last_one_written(self) -> None:
        written = self.history.last
        assert self.machine.view.epoch == (written.epoch if written else 0)

    @invariant()
    def deadlines_are_in_the_future_or_due_now(self) -> None:
        deadline = self.machine.next_deadline()
        assert deadline is None or deadline < self.now + 10.0

    def teardown(self) -> None:
        """Left alone, the mesh settles: every node that lives is in the view, with every rank that was not evicted."""
        self.crash_after = None
        while self.unnoticed:
            self.notice()
        call = next(self.numbers)
        for _ in range(8):
            for node in self.nodes.values():
                if node.session is None:
                    self.connect(node)
            self.deliver_many(10_000)
            for _ in range(5):
                self.wait(0.2, beating=True)
                self.deliver_many(10_000)
        self.step(DestroyGroup(call, "", "nobody"))
        for _ in range(10):
            self.wait(0.1, beating=True)
            self.deliver_many(10_000)
        answer = self.calls[call]
        assert isinstance(answer, Done | MeshUnavailable), answer
        if isinstance(answer, MeshUnavailable):
            assert isinstance(answer, EpmeshError)
            assert len(self.nodes) * 2 < len(self.machine.view.nodes)
            return
        view = self.machine.view
        assert {node.node_id for node in view.nodes} == set(self.nodes)
        shown = {(info.rank, info.incarnation) for info in view.ranks.values()}
        living = [known for node in self.nodes.values() for known in node.ranks.values() if known.key in node.living]
        exchanging = [known for known in living if known.info.mode is RankMode.EXCHANGE]
        waiting = {known.key for known in exchanging} if len(exchanging) < 2 else set()  # each waits for another one
        assert {known.key for known in living} - waiting <= shown <= {known.key for known in living}
        for node in self.nodes.values():
            assert node.view == view
            assert node.fence <= view.epoch


MeshMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestMeshMachine = MeshMachine.TestCase


def walk(mesh: MeshMachine, draw: random.Random) -> None:
    """One step of a long history."""
    node_id, local, number, coin = draw.choice(NODE_IDS), draw.randrange(3), draw.randrange(27), draw.random() < 0.5
    mode = RankMode.SERVE if draw.random() < 0.1 else RankMode.EXCHANGE
    node = mesh.nodes.get(node_id)
    actions: list[tuple[int, Callable[[], None]]] = [
        (30, mesh.calm),
        (60, lambda: mesh.calm_and_slow(local + 1)),
        (40, lambda: everyone_goes_on(mesh, coin)),
        (10, lambda: mesh.start_node(node_id, local)),
        (10, lambda: mesh.reconnect(node_id)),
        (3, lambda: mesh.kill_node(node_id, coin)),
        (2, lambda: mesh.stop_node(node_id)),
        (3, lambda: mesh.break_stream(node_id, coin)),
        (5, lambda: mesh.notice() if mesh.unnoticed else None),
        (15, lambda: mesh.add_rank(node_id, local, mode) if node and len(node.ranks) < 3 else None),
        (6, lambda: mesh.kill_rank(node_id, local)),
        (10, lambda: mesh.wait(draw.choice([0.01, 0.2, 1.1]), True)),
        (2, lambda: mesh.wait(draw.choice([0.2, 1.1, 3.5]), False)),
        (5, lambda: mesh.create_group(draw.choice("xy"), {number, local}, coin)),
        (3, lambda: mesh.destroy_group(draw.choice("xy"))),
        (3, lambda: mesh.set_placement(number, 4)),
        (3, lambda: mesh.break_link(node_id, local, number)),
        (3, mesh.crash),
        (4, lambda: mesh.crash_soon(local)),
        (2, mesh.compact),
    ]
    draw.choices([action for _, action in actions], [weight for weight, _ in actions])[0]()


def everyone_goes_on(mesh: MeshMachine, done: bool) -> None:
    for node_id, local, group in itertools.product(NODE_IDS, range(3), range(4)):
        mesh.exchange(node_id, local, group, done)


def long_history(seed: int, steps: int) -> MeshMachine:
    """A long walk; the search above is thorough with short ones."""
    draw = random.Random(seed)
    mesh = MeshMachine()
    mesh.begin_with_a_mesh([draw.randrange(4) for _ in NODE_IDS])
    for _ in range(steps):
        walk(mesh, draw)
        mesh.the_view_is_the_last_one_written()
        mesh.deadlines_are_in_the_future_or_due_now()
    mesh.teardown()
    return mesh


@pytest.mark.parametrize("seed", range(6))
def test_a_long_history_breaks_no_rule(seed: int) -> None:
    mesh = long_history(seed, 400)
    assert len(mesh.history.views) > 10
