"""The coordinator's table of nodes: slots, leases, sessions, ranks."""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from epmesh.errors import InvalidRequest, MeshUnavailable
from epmesh.view import NodeInfo, RankInfo
from epmesh_server.membership.declarations import LinkFailure, RankDeclaration, RankKey, Registration
from epmesh_server.membership.records import Remembered, Snapshot
from epmesh_server.membership.settings import MembershipSettings


class NodeStatus(enum.Enum):
    """What the coordinator knows of a node."""

    REGISTERED = enum.auto()
    """It has a slot and a lease, and no control stream yet."""
    LIVE = enum.auto()
    """Its control stream is open."""
    ABSENT = enum.auto()
    """It is in the last view and has a lease of grace to open its stream again: this coordinator was away."""
    DEAD = enum.auto()
    """Its slot is kept for it."""


@dataclass(slots=True, eq=False)
class Node:
    """One slot.

    Attributes:
        lease_until: when it is dead unless it shows life before.
        grace_until: up to then a broken control stream proves nothing.
        session: number of the open control stream.
        orderly: whether it left by itself.
        ranks: living ranks that were accepted.
        listed: every process of its last report, accepted or not.
        left: ranks of the last view that left in good order.
        links: the links its ranks hold for broken.
        gone: processes that left or were refused, and stay out.
        told: those of them that this session was told about.
    """

    slot: int
    registration: Registration
    status: NodeStatus
    lease_until: float
    grace_until: float = 0.0
    session: int | None = None
    orderly: bool = False
    queued: bool = False
    ranks: dict[int, RankDeclaration] = field(default_factory=dict)
    listed: frozenset[RankKey] = frozenset()
    left: frozenset[RankKey] = frozenset()
    links: tuple[LinkFailure, ...] = ()
    gone: Remembered = field(default_factory=Remembered)
    told: set[RankKey] = field(default_factory=set)

    @property
    def info(self) -> NodeInfo:
        """The node as a view shows it."""
        known = self.registration
        ranks = tuple(self.ranks[rank].info for rank in sorted(self.ranks))
        return NodeInfo(self.slot, known.node_id, known.incarnation, known.address, ranks)


class NodeTable:
    """All slots ever given. Renewing a lease costs nothing; leases are looked at when the earliest may have ended."""

    def __init__(self, settings: MembershipSettings) -> None:
        self._settings = settings
        self._nodes: dict[int, Node] = {}
        self._slots_by_id: dict[str, int] = {}
        self._slots_by_session: dict[int, int] = {}
        self._leases: list[tuple[float, int]] = []
        self._next_slot = 0
        self.unsettled: set[int] = set()
        """Slots of nodes that may come back, and whose ranks are a guess up to then."""

    @classmethod
    def recovered(cls, settings: MembershipSettings, snapshot: Snapshot, now: float) -> NodeTable:
        """The table after a restart: nodes of the last view are absent, the others' leases run from now."""
        table = cls(settings)
        in_view = {node.slot: node for node in snapshot.view.nodes} if snapshot.view else {}
        for slot in sorted(snapshot.nodes):
            node = table.admit(slot, snapshot.nodes[slot], now)
            node.gone = Remembered(snapshot.lost.get(slot, ()))
            info = in_view.get(slot)
            if info is not None and (info.node_id, info.incarnation) == node.registration.identity:
                living = [rank for rank in info.ranks if (rank.rank, rank.incarnation) not in node.gone]
                table.forgive(node, living, now)
        return table

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, slot: int) -> Node | None:
        """The node in a slot."""
        return self._nodes.get(slot)

    def knows(self, node_id: str) -> bool:
        """Whether a node of that id, alive or dead, has a slot."""
        return node_id in self._slots_by_id

    def by_session(self, session: int) -> Node | None:
        """The node whose open control stream this is."""
        slot = self._slots_by_session.get(session)
        return None if slot is None else self._nodes[slot]

    def rank(self, rank: int) -> RankDeclaration | None:
        """The living process behind a global rank."""
        node = self._nodes.get(rank // self._settings.stride)
        return node.ranks.get(rank) if node else None

    def members(self) -> list[Node]:
        """Nodes that a view would show, ascending by slot."""
        shown = (NodeStatus.LIVE, NodeStatus.ABSENT)
        return sorted((node for node in self if node.status in shown), key=lambda node: node.slot)

    def choose_slot(self, wanted: Registration, claim: int | None, now: float) -> int:
        """The slot a registering node gets.

        Raises:
            InvalidRequest: a live node has its id or the slot it claims, the mesh is full, or its nodes use CURVE and
                this one does not, or the other way round.
            MeshUnavailable: whether the node that has it lives is not known yet.
        """
        self._check_curve(wanted)
        own = self._slots_by_id.get(wanted.node_id)
        if own is not None:
            if claim not in (None, own):
                raise InvalidRequest(
                    f"node {wanted.node_id!r} has slot {own}, it cannot claim slot {claim}; "
                    f"leave the slot out, or start it under another --node-id"
                )
            self._check_free(self._nodes[own], wanted, f"node id {wanted.node_id!r}", "another --node-id", now)
            return own
        if claim is None:
            return self._unused_slot()
        if not 0 <= claim < self._settings.max_slots:
            raise InvalidRequest(f"slot {claim} does not exist; slots are 0 to {self._settings.max_slots - 1}")
        if claim in self._nodes:
            self._check_free(self._nodes[claim], wanted, f"slot {claim}", "another slot", now)
        return claim

    def _check_curve(self, wanted: Registration) -> None:
        """One node in the clear would make ranks of all others send in the clear, or not at all."""
        for node in self:
            known = node.registration
            if node.status is NodeStatus.DEAD or known.node_id == wanted.node_id:
                continue
            if known.curve == wanted.curve:
                return  # as all others that live
            text = (
                f"node {wanted.node_id!r} has CURVE {_on(wanted.curve)}, and node {known.node_id!r} in slot "
                f"{node.slot} has it {_on(known.curve)}; all nodes of a mesh are secured, or none"
            )
            if node.status is NodeStatus.ABSENT:
                raise MeshUnavailable(f"{text}; whether that one lives shows within {self._settings.lease_s:g} s")
            raise InvalidRequest(text)

    def _check_free(self, holder: Node, wanted: Registration, what: str, other: str, now: float) -> None:
        known = holder.registration
        if known.identity == wanted.identity:
            return
        if holder.status is NodeStatus.ABSENT or self._is_silent(holder, now):
            raise MeshUnavailable(
                f"{what} is node {known.node_id!r}'s at {known.address} in slot {holder.slot}, which has not been "
                f"heard of lately; whether it lives shows within {self._settings.lease_s:g} s: try again"
            )
        # A different id must wait for the lease; the same id is a restart as soon as its stream is broken.
        held = holder.status is NodeStatus.REGISTERED and known.node_id != wanted.node_id
        if held or holder.status is NodeStatus.LIVE:
            raise InvalidRequest(
                f"{what} is taken: live node {known.node_id!r} at {known.address} has slot {holder.slot}; "
                f"stop it first, or use {other}"
            )

    def _is_silent(self, node: Node, now: float) -> bool:
        """Whether a live node missed a heartbeat, as one does whose host went down without a word."""
        silent_s = now + self._settings.lease_s - node.lease_until
        return node.status is NodeStatus.LIVE and silent_s > 1.5 * self._settings.heartbeat_interval_s

    def _unused_slot(self) -> int:
        while self._next_slot in self._nodes:
            self._next_slot += 1
        if self._next_slot >= self._settings.max_slots:
            raise InvalidRequest(
                f"the mesh has {self._settings.max_slots} slots and all were given; claim a dead node's with --slot"
            )
        return self._next_slot

    def admit(self, slot: int, registration: Registration, now: float) -> Node:
        """Puts a node into a slot with a fresh lease; a former one there must be dead or the same."""
        node = self._nodes.get(slot)
        lease_until = now + self._settings.lease_s
        if node is None or node.registration.identity != registration.identity:
            if node is not None and self._slots_by_id.get(node.registration.node_id) == slot:
                del self._slots_by_id[node.registration.node_id]
            queued = node is not None and node.queued
            node = Node(slot, registration, NodeStatus.REGISTERED, lease_until, queued=queued)
            self._nodes[slot] = node
            self._slots_by_id[registration.node_id] = slot
        node.registration = registration
        if node.status is NodeStatus.DEAD:
            node.status = NodeStatus.REGISTERED
        if node.status is NodeStatus.REGISTERED:
            self.renew(node, now)
        self._watch_lease(node)
        return node

    def open(self, node: Node, session: int, now: float) -> None:
        """Notes a node's new control stream."""
        self.close(node)
        node.session, node.status, node.orderly = session, NodeStatus.LIVE, False
        node.told.clear()
        self._slots_by_session[session] = node.slot
        self.renew(node, now)
        self._watch_lease(node)

    def close(self, node: Node) -> None:
        """Forgets a node's control stream, if it has one."""
        if node.session is not None:
            del self._slots_by_session[node.session]
            node.session = None

    def miss(self, node: Node) -> None:
        """The node's control stream broke in its time of grace."""
        self.close(node)
        node.status = NodeStatus.ABSENT
        self.unsettled.add(node.slot)

    def forgive(self, node: Node, ranks: Iterable[RankInfo], now: float) -> None:
        """Gives a node a lease of grace to come back with its ranks."""
        self.renew(node, now)
        node.grace_until = node.lease_until
        node.ranks = {rank.rank: RankDeclaration(rank) for rank in ranks}
        for declared in node.ranks.values():
            node.gone.discard(declared.key)
        self.miss(node)
        self._watch_lease(node)

    def settle(self, node: Node) -> None:
        """The node's ranks are known (again)."""
        if node.slot in self.unsettled:
            self.unsettled.discard(node.slot)
            node.grace_until = 0.0

    def bury(self, node: Node) -> None:
        """The node is dead; its slot is kept."""
        self.close(node)
        self.settle(node)
        node.status = NodeStatus.DEAD
        node.ranks, node.listed, node.links = {}, frozenset(), ()

    def renew(self, node: Node, now: float) -> None:
        """A sign of life."""
        node.lease_until = now + self._settings.lease_s

    def expire(self, now: float) -> list[Node]:
        """Nodes whose lease ended; each is returned once."""
        expired = []
        while self._leases and self._leases[0][0] <= now:
            _, slot = heapq.heappop(self._leases)
            node = self._nodes[slot]
            node.queued = False
            if node.status is NodeStatus.DEAD:
                continue
            if node.lease_until > now:
                self._watch_lease(node)
            else:
                expired.append(node)
        return expired

    def next_lease_end(self) -> float | None:
        """When to call `expire` next: the earliest time at which a lease may have ended."""
        return self._leases[0][0] if self._leases else None

    def _watch_lease(self, node: Node) -> None:
        """Keeps exactly one entry for every node that is not dead."""
        if not node.queued:
            node.queued = True
            heapq.heappush(self._leases, (node.lease_until, node.slot))


def _on(curve: bool) -> str:
    return "on" if curve else "off"
