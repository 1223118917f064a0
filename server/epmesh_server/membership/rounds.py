"""How a view is committed: prepare, cut, finish, commit; tried again under the next epoch when somebody drops out."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from epmesh.errors import EpmeshError, MeshUnavailable, StaleEpoch
from epmesh.view import NodeInfo, RankInfo, RankMode, View
from epmesh_server.membership.actions import (
    Action,
    Append,
    Command,
    Commit,
    Done,
    Evict,
    Finish,
    Note,
    Prepare,
    Publish,
    Reply,
    Send,
)
from epmesh_server.membership.compose import Draft, compose
from epmesh_server.membership.declarations import GroupProgress, RankKey
from epmesh_server.membership.nodes import Node, NodeStatus, NodeTable
from epmesh_server.membership.operations import Operation, Operations
from epmesh_server.membership.records import EpochUsed, RanksLost, Snapshot, ViewCommitted
from epmesh_server.membership.settings import MembershipSettings

Progress = Mapping[int, GroupProgress]
Bury = Callable[[Node, str], None]
_MODES = tuple(RankMode)


class Phase(enum.Enum):
    """What a round waits for."""

    PREPARING = enum.auto()
    FINISHING = enum.auto()
    COMMITTING = enum.auto()


@dataclass(slots=True, eq=False)
class Round:
    """One attempt to commit a view.

    Attributes:
        waiting: slots that did not answer yet.
        progress: what the nodes answered in this phase, by slot.
        cuts: group id -> cut, once everybody is prepared.
    """

    epoch: int
    draft: Draft
    phase: Phase
    waiting: set[int]
    deadline: float
    progress: dict[int, Progress] = field(default_factory=dict)
    cuts: dict[int, int] = field(default_factory=dict)
    broken: bool = False


class Rounds:
    """Decides when to commit and carries a commit through, one at a time."""

    def __init__(
        self, settings: MembershipSettings, snapshot: Snapshot, nodes: NodeTable, out: list[Action], bury: Bury
    ) -> None:
        """`out` takes the actions; `bury` declares a node dead that did not answer."""
        self._settings = settings
        self._nodes = nodes
        self._out = out
        self._bury = bury
        self.view = snapshot.view or View(snapshot.mesh_id, 0, 0, snapshot.stride)
        self.operations = Operations()
        self._used_epoch = snapshot.used_epoch
        self._next_group_id = snapshot.next_group_id
        self._round: Round | None = None
        self._due: float | None = None
        self._urgent = False
        self._latest = 0.0
        self._finish_by: float | None = None
        self._tensor_parallel_size = 0
        # Processes of the last view that nodes were told are lost: they do not come back, committed or not.
        self._said_lost = {key for lost in snapshot.lost.values() for key in lost if self._is_member(key)}
        # An epoch that was prepared and never committed has left fences up.
        if self._used_epoch > self.view.epoch and self.view.nodes:
            self._due, self._urgent = float("-inf"), True

    # What the machine tells --------------------------------------------------------------------------------------

    def want(self, now: float, *, urgent: bool = False) -> None:
        """Something changed: commit soon, or at once."""
        if urgent:
            self._due, self._urgent = now, True
        elif self._due is None:
            self._open_window(now)
        else:
            self.more_may_come(now)

    def more_may_come(self, now: float) -> None:
        """Somebody is about to join: a commit that is not due yet waits a little for them."""
        if self._due is not None and self._due > now:
            quiet_s, _ = self._settings.batch_s(len(self._nodes))
            self._due = min(now + quiet_s, self._latest)

    def _open_window(self, now: float) -> None:
        quiet_s, longest_s = self._settings.batch_s(len(self._nodes))
        self._due, self._latest = now + quiet_s, now + longest_s

    def set_tensor_parallel_size(self, size: int) -> None:
        """The size that living ranks agree on; 0 if none is in a tensor-parallel group."""
        self._tensor_parallel_size = size

    def lost_rank(self, key: RankKey) -> bool:
        """A process is gone; returns whether the last view or the running round counts on it."""
        info = self.view.ranks.get(key[0])
        counts = info is not None and info.incarnation == key[1]
        if self._round is not None:
            drafted = any((*key, mode) in self._round.draft.members for mode in _MODES)
            self._round.broken |= drafted
            counts |= drafted
        return counts

    def lost_node(self, node: Node) -> None:
        """A node is gone."""
        running = self._round
        if running is None:
            return
        running.waiting.discard(node.slot)
        running.broken |= (node.slot, node.registration.incarnation) in running.draft.incarnations

    def may_return(self, node: Node) -> bool:
        """Whether a dead node is in the last view still and nobody was told that its ranks are lost."""
        found = next((info for info in self.view.nodes if info.slot == node.slot), None)
        if found is None or found.incarnation != node.registration.incarnation:
            return False
        return self._said_lost.isdisjoint((info.rank, info.incarnation) for info in found.ranks)

    def committed_ranks(self, slot: int) -> tuple[RankInfo, ...]:
        """The ranks that the last view has on a node."""
        return next((node.ranks for node in self.view.nodes if node.slot == slot), ())

    def reopened(self, node: Node) -> None:
        """A node's control stream is open (again): it gets the view and what the running round waits for."""
        running = self._round
        if running is None or node.slot not in running.waiting or running.phase is Phase.COMMITTING:
            return
        command = self._prepare(running) if running.phase is Phase.PREPARING else self._finish(running, 0.0)
        self._send(node, command)

    def answered(self, node: Node, phase: Phase, epoch: int, progress: Iterable[GroupProgress] = ()) -> None:
        """A node answered; answers to an earlier attempt or phase are late and mean nothing."""
        running = self._round
        if running is None or (running.phase, running.epoch) != (phase, epoch) or node.slot not in running.waiting:
            return
        running.waiting.discard(node.slot)
        running.progress[node.slot] = {entry.group_id: entry for entry in progress}

    def stalled(self, now: float) -> None:
        """Nobody could be heard for a while: everybody has as long again."""
        if self._round is not None:
            least = now + self._settings.answer_s(len(self._round.waiting))
            self._round.deadline = max(self._round.deadline, least)

    def next_deadline(self) -> float | None:
        """When `advance` has something to do if nothing happens before."""
        if self._round is not None and not self._round.broken:
            return self._round.deadline
        if self._nodes.unsettled:
            return None  # their leases end first
        return self._due

    # Driving -----------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Does what is due."""
        while self._step(now):
            pass

    def _step(self, now: float) -> bool:
        """One transition; returns whether there may be another."""
        running = self._round
        if running is None:
            return self._due is not None and self._due <= now and self._begin(now)
        if running.phase is Phase.COMMITTING:
            if running.waiting and now < running.deadline and not (self._urgent and running.broken):
                return False
            self._conclude(running, now)
            return True
        if running.broken:
            return self._begin(now)
        if not running.waiting:
            self._enter_finishing(running, now) if running.phase is Phase.PREPARING else self._commit(running, now)
            return True
        if now >= running.deadline:
            self._leave_out(running)
            return True
        return False

    def _begin(self, now: float) -> bool:
        """Starts a round, or the next attempt of one that broke; returns whether it did or there was nothing to do."""
        if self._nodes.unsettled:
            return False  # a node of the last view may still come back: nothing is decided without it
        draft = self._compose()
        for operation, error in draft.refused:
            self._answer(operation, error)
        self._due, self._urgent = None, False
        if not draft.changed and self._used_epoch == self.view.epoch:
            self._give_up(draft, Done(self.view.epoch))
            return True
        shortage = self._shortage(draft)
        if shortage is not None:
            self._out.append(Note(f"epoch {self.view.epoch} stays: {shortage}", warning=True))
            self._give_up(draft, MeshUnavailable(shortage))
            return True
        self._enter_preparing(draft, now)
        return True

    def _compose(self) -> Draft:
        members = self._nodes.members()
        waiting = self.operations.waiting
        left = frozenset[RankKey]().union(*(node.left for node in self._nodes))
        return compose(self.view, members, waiting, self._next_group_id, self._tensor_parallel_size, left)

    def _give_up(self, draft: Draft, answer: Done | EpmeshError) -> None:
        self._round = self._finish_by = None
        for operation in draft.done:
            self._answer(operation, answer)

    def _shortage(self, draft: Draft) -> str | None:
        """Why the draft has too few nodes, if so; nodes that left by themselves are not missed."""
        slots = {node.slot for node in draft.nodes}
        last = [node.slot for node in self.view.nodes if node.slot in slots or not self._left(node)]
        least = self._settings.least_nodes(len(last))
        if len(slots) >= least:
            return None
        return (
            f"only {len(slots)} of the {len(last)} nodes of epoch {self.view.epoch} are left, and a view with fewer "
            f"than {least} is never committed; start nodes again, or the coordinator with --min-nodes {len(slots)}"
        )

    def _left(self, info: NodeInfo) -> bool:
        node = self._nodes.get(info.slot)
        return node is not None and node.orderly and node.registration.incarnation == info.incarnation

    # The phases --------------------------------------------------------------------------------------------------

    def _enter_preparing(self, draft: Draft, now: float) -> None:
        self._used_epoch += 1
        self._next_group_id = draft.next_group_id
        used = EpochUsed(self._used_epoch, self._next_group_id)
        lost = tuple(key for key in map(self._key, draft.dead) if key not in self._said_lost)
        self._said_lost.update(lost)
        self._out.append(Append((used, RanksLost(lost)) if lost else (used,)))
        waiting = {node.slot for node in draft.nodes}
        deadline = now + self._settings.answer_s(len(waiting))
        self._round = Round(self._used_epoch, draft, Phase.PREPARING, waiting, deadline)
        self._tell(self._prepare(self._round), waiting)

    def _prepare(self, running: Round) -> Prepare:
        return Prepare(running.epoch, running.draft.dead)

    def _enter_finishing(self, running: Round, now: float) -> None:
        running.cuts = {group.group_id: group.sequence for group in self.view.groups}
        for progress in running.progress.values():
            for group_id in running.cuts.keys() & progress.keys():
                running.cuts[group_id] = max(running.cuts[group_id], progress[group_id].begun)
        # However often it is tried again, a commit never holds the data plane longer than this.
        if self._finish_by is None:
            self._finish_by = now + self._wait_s()
        timeout_s = 0.0 if running.draft.dead else max(0.0, self._finish_by - now)
        running.phase = Phase.FINISHING
        running.waiting = {node.slot for node in running.draft.nodes}
        running.progress = {}
        running.deadline = now + timeout_s + self._settings.answer_s(len(running.waiting))
        self._tell(self._finish(running, timeout_s), running.waiting)

    def _wait_s(self) -> float:
        """How long ranks of the last view wait for each other at most."""
        known = (self._nodes.rank(rank) for rank in self.view.ranks)
        return max((declared.wait_s for declared in known if declared is not None), default=0.0)

    def _finish(self, running: Round, timeout_s: float) -> Finish:
        cuts = tuple(sorted(running.cuts.items()))
        return Finish(running.epoch, cuts, bool(running.draft.dead), running.draft.members_unchanged, timeout_s)

    def _commit(self, running: Round, now: float) -> None:
        base, draft = self.view, running.draft
        view = draft.view(base, running.epoch, self._counters(running))
        gone = tuple(key for key in map(self._key, draft.lost) if key not in self._said_lost)
        records = (RanksLost(gone), ViewCommitted(view)) if gone else (ViewCommitted(view),)
        self._out.append(Append(records))
        self.view = view
        self._said_lost.clear()
        self._out.append(Publish(view))
        running.phase = Phase.COMMITTING
        running.waiting = {node.slot for node in draft.nodes}
        running.deadline = now + self._settings.answer_s(len(running.waiting))
        commit = Commit(view)  # one object for all: it is encoded once
        for node in self._nodes:
            self._send(node, commit)
        self._tell_the_lost()
        self._out.append(Note(_summary(base, draft, view)))

    def _counters(self, running: Round) -> dict[int, tuple[int, int]]:
        """Group id -> (cut, what every survivor completed) of the groups of the last view."""
        members = {(rank, incarnation) for rank, incarnation, _ in running.draft.members}
        staying = {group.group_id: frozenset(group.ranks) for group in running.draft.groups}
        counters = {}
        for group in self.view.groups:
            cut = running.cuts[group.group_id]
            stay = staying.get(group.group_id, frozenset())
            alive = (rank for rank in group.ranks if rank in stay and self._key(rank) in members)
            slots = {self.view.slot_of(rank) for rank in alive}
            answers = [_completed(running.progress, slot, group.group_id, group.sequence) for slot in slots]
            completed = min(answers, default=group.completed)
            counters[group.group_id] = (cut, max(group.completed, min(completed, cut)))
        return counters

    def _key(self, rank: int) -> RankKey:
        return rank, self.view.ranks[rank].incarnation

    def _tell_the_lost(self) -> None:
        """Processes that are still reported and were left out hear it from here too."""
        for node in self._nodes.members():
            self.tell_gone(node, StaleEpoch(self.view.epoch, f"left out of epoch {self.view.epoch}; join again"))

    def tell_gone(self, node: Node, error: EpmeshError) -> None:
        """Evicts what a node still lists although it left, once a session; what the view has waits for the commit."""
        if not node.gone:
            return
        keys = (key for key in node.listed if key in node.gone and key not in node.told and not self._is_member(key))
        ranks = tuple(sorted(keys))
        if ranks:
            node.told.update(ranks)
            self._send(node, Evict(error, ranks))

    def _is_member(self, key: RankKey) -> bool:
        info = self.view.ranks.get(key[0])
        return info is not None and info.incarnation == key[1]

    def _leave_out(self, running: Round) -> None:
        """Whoever did not answer in time is dead, and it is tried again without them."""
        running.broken = True
        what = "Prepare" if running.phase is Phase.PREPARING else "Finish"
        for slot in sorted(running.waiting):
            node = self._nodes.get(slot)
            if node is not None and node.status is NodeStatus.LIVE:
                self._bury(node, f"did not answer {what} of epoch {running.epoch} in time")

    def _conclude(self, running: Round, now: float) -> None:
        if running.waiting:
            late = ", ".join(map(str, sorted(running.waiting)[:16]))
            self._out.append(
                Note(f"epoch {running.epoch}: slots {late} did not say yet that they have it", warning=True)
            )
        self._give_up(running.draft, Done(running.epoch))
        if self._due is not None and not self._urgent:
            self._open_window(now)  # who joined meanwhile waits for those who could not while this kept all busy

    # Telling -----------------------------------------------------------------------------------------------------

    def _answer(self, operation: Operation, answer: Done | EpmeshError) -> None:
        self._out.extend(Reply(call, answer) for call in self.operations.finish(operation, answer))

    def _tell(self, command: Command, slots: Iterable[int]) -> None:
        for slot in sorted(slots):
            if node := self._nodes.get(slot):
                self._send(node, command)

    def _send(self, node: Node, command: Command) -> None:
        if node.session is not None:
            self._out.append(Send(node.session, command))


def _completed(progress: Mapping[int, Progress], slot: int, group_id: int, unbegun: int) -> int:
    """What a node completed in a group; one that never began anything there counts as being at the view's number."""
    entry = progress.get(slot, {}).get(group_id)
    return unbegun if entry is None else entry.completed


def _summary(base: View, draft: Draft, view: View) -> str:
    lost = f", lost {list(draft.lost)[:16]}" if draft.lost else ""
    what = "same members" if draft.members_unchanged else f"{len(base.ranks)} -> {len(view.ranks)} ranks"
    return f"epoch {view.epoch} committed: {len(view.nodes)} nodes, {what}{lost}"
