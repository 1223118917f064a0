"""The ranks of this node: one record for every living session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
from collections.abc import Callable, Iterable

from epmesh.curve import check_key
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.placement import MAX_EXPERTS
from epmesh.v1 import membership_service_pb2, rank_service_pb2, view_pb2
from epmesh.view import View
from epmesh_server.node.progress import Member, is_member
from epmesh_server.shared_memory import ControlPage

_log = logging.getLogger(__name__)
_TOKEN_BYTES = 32
_MAX_TEXT_CHARS = 256
_MAX_DECLARATIONS = 4096


class LocalRank:
    """One rank with a living session: its page, its eventfd, and what its session is still to be told.

    Attributes:
        rank: global rank.
        local_rank: index on the node.
        declaration: what the view will show, with the global rank filled in.
        token: secret for the descriptor socket.
        page, page_fd, wake_fd: control page and the eventfd that wakes who waits on it.
        admitted: whether a committed view had this incarnation.
        left: whether the rank said that it leaves.
        error: why the session is over; `None` while it lives.
        failures: peers that the rank's links cannot reach.
    """

    def __init__(self, local_rank: int, pid: int, declaration: membership_service_pb2.RankDeclaration) -> None:
        self.rank = declaration.rank.rank
        self.local_rank = local_rank
        self.pid = pid
        self.declaration = declaration
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self.page_fd = ControlPage.create()
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.page = ControlPage(self.page_fd)
        self.admitted = False
        self.left = False
        self.error: EpmeshError | None = None
        self.failures: tuple[membership_service_pb2.LinkFailure, ...] = ()
        self.ended = asyncio.Event()

    @property
    def member(self) -> Member:
        """Global rank and incarnation."""
        return self.rank, self.declaration.rank.incarnation

    def wake(self) -> None:
        """Wakes who waits on the page; never blocks, a counter that is full is as good as another wake."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.wake_fd, 1)

    def end(self, error: EpmeshError) -> None:
        """Ends the membership: the page first, then the session. Idempotent."""
        if self.error is not None:
            return
        self.page.mark_closed()
        self.wake()
        self.error = error
        self.ended.set()

    def release(self) -> None:
        """Closes page and eventfd here; the rank's own descriptors live on."""
        self.page.close()
        for fd in (self.page_fd, self.wake_fd):
            os.close(fd)


class RankTable:
    """All living ranks of the node. Used on the event loop only.

    Attributes:
        on_change: called after the set of ranks, or what they declare, changed.
    """

    def __init__(self, *, curve: bool = False) -> None:
        """No ranks yet; `curve` says whether they must have a key, or must have none."""
        self.on_change: Callable[[], None] = lambda: None
        self._curve = curve
        self._by_local: dict[int, LocalRank] = {}
        self._left: set[Member] = set()

    def __len__(self) -> int:
        return len(self._by_local)

    def all(self) -> list[LocalRank]:
        """Living ranks, ascending."""
        return [self._by_local[local_rank] for local_rank in sorted(self._by_local)]

    def open(self, request: rank_service_pb2.OpenRank, *, slot: int, stride: int) -> LocalRank:
        """Gives a local rank to a process.

        Raises:
            InvalidRequest: the rank asked for is taken or out of range, the node is full, or the declaration is wrong.
        """
        declaration = membership_service_pb2.RankDeclaration()
        declaration.CopyFrom(request.declaration)
        check_declaration(declaration)
        self._check_key(declaration.rank.curve_key)
        local_rank = self._choose(request.local_rank if request.HasField("local_rank") else None, stride)
        declaration.rank.rank = slot * stride + local_rank
        entry = self._by_local[local_rank] = LocalRank(local_rank, request.pid, declaration)
        self.on_change()
        return entry

    def update(self, entry: LocalRank, request: rank_service_pb2.UpdateRank) -> None:
        """Gives a living rank another mode and front endpoint.

        Raises:
            InvalidRequest: no view could show them; nothing was changed.
        """
        rank = view_pb2.Rank()
        rank.CopyFrom(entry.declaration.rank)
        rank.mode, rank.front_endpoint = request.mode, request.front_endpoint
        _check_rank(rank)
        if entry.error is None and rank != entry.declaration.rank:
            entry.declaration.rank.CopyFrom(rank)
            self.on_change()

    def remove(self, entry: LocalRank, error: EpmeshError) -> bool:
        """Ends a rank and frees its number; says whether it was there. The page is closed before anything else."""
        entry.end(error)
        if self._by_local.get(entry.local_rank) is not entry:
            return False
        del self._by_local[entry.local_rank]
        if entry.left and entry.admitted:
            self._left.add(entry.member)
        self.on_change()
        return True

    def by_token(self, token: bytes) -> LocalRank | None:
        """The living rank that was given `token`."""
        return next((entry for entry in self.all() if secrets.compare_digest(entry.token, token)), None)

    def members(self) -> list[Member]:
        """Global rank and incarnation of all living ranks."""
        return [entry.member for entry in self.all()]

    def report(self) -> membership_service_pb2.RankReport:
        """The complete list for the coordinator."""
        report = membership_service_pb2.RankReport(ranks=[entry.declaration for entry in self.all()])
        for rank, incarnation in sorted(self._left):
            report.left.add(rank=rank, incarnation=incarnation)
        return report

    def left(self) -> frozenset[Member]:
        """Global rank and incarnation of ranks that left in good order and may be in the committed view still."""
        return frozenset(self._left)

    def forget_left(self, view: View) -> None:
        """Forgets ranks that left, once a view is without them."""
        self._left = {member for member in self._left if is_member(view, *member)}

    def links(self) -> membership_service_pb2.LinkReport:
        """All links that the ranks hold for broken."""
        return membership_service_pb2.LinkReport(failures=[one for entry in self.all() for one in entry.failures])

    def _check_key(self, key: bytes) -> None:
        if self._curve:
            check_key(key, "the rank's CURVE key")
            if any(entry.declaration.rank.curve_key == key for entry in self.all()):
                raise InvalidRequest("the rank's CURVE key is another rank's; make a pair for every process")
        elif key:
            raise InvalidRequest("the rank has a CURVE key, and this node's ranks exchange in the clear")

    def _choose(self, wanted: int | None, stride: int) -> int:
        if wanted is None:
            free = next((number for number in range(stride) if number not in self._by_local), None)
            if free is None:
                raise InvalidRequest(f"all {stride} ranks of this node are taken; {self._holders()}")
            return free
        if wanted >= stride:
            raise InvalidRequest(
                f"local rank {wanted} is out of range: a node of this mesh has at most {stride} ranks, 0 to "
                f"{stride - 1} (the coordinator's --stride)"
            )
        if wanted in self._by_local:
            raise InvalidRequest(f"local rank {wanted} is taken by process {self._by_local[wanted].pid}")
        return wanted

    def _holders(self) -> str:
        return ", ".join(f"{entry.local_rank} by process {entry.pid}" for entry in self.all()[:16])


def check_declaration(declaration: membership_service_pb2.RankDeclaration) -> None:
    """Refuses a declaration that no view could show.

    Raises:
        InvalidRequest: names the value.
    """
    _check_rank(declaration.rank)
    timeout_s = declaration.exchange_timeout_s
    if not (math.isfinite(timeout_s) and timeout_s >= 0):
        raise InvalidRequest(f"exchange_timeout_s is {timeout_s}; it must be a positive number of seconds")
    _check_experts(declaration.experts)


def _check_rank(rank: view_pb2.Rank) -> None:
    if rank.mode not in (view_pb2.RANK_MODE_EXCHANGE, view_pb2.RANK_MODE_SERVE):
        raise InvalidRequest(f"rank mode is {rank.mode}; it must be EXCHANGE or SERVE")
    if rank.incarnation == 0:
        raise InvalidRequest("rank incarnation is 0; draw one at random")
    endpoints = (("link endpoint", rank.link_endpoint), ("front endpoint", rank.front_endpoint))
    for name, text in (("device", rank.device), *endpoints):
        if len(text) > _MAX_TEXT_CHARS:
            raise InvalidRequest(f"{name} has {len(text)} characters; at most {_MAX_TEXT_CHARS} are taken")
    for name, text in endpoints:
        if text and not text.startswith("tcp://"):
            raise InvalidRequest(f"{name} is {text!r}; it must be tcp://host:port")


def _check_experts(experts: Iterable[membership_service_pb2.ExpertDeclaration]) -> None:
    declared = list(experts)
    if len(declared) > _MAX_DECLARATIONS:
        raise InvalidRequest(f"experts are declared {len(declared)} times; at most {_MAX_DECLARATIONS} are taken")
    for entry in declared:
        if not 0 < entry.num_experts <= MAX_EXPERTS:
            raise InvalidRequest(f"num_experts is {entry.num_experts}; it must be 1 to {MAX_EXPERTS}")
        bad = next((expert for expert in entry.experts if expert >= entry.num_experts), None)
        if bad is not None:
            raise InvalidRequest(f"expert {bad} is declared; ids are 0 to {entry.num_experts - 1}")
