"""One forward of a router, as a state machine: rows become calls to nodes, answers become sums. Pure, no clock.

::

    forward = Forward(tokens)
    for call in forward.plan(routes, turn, pick, now): ...   # send them
    forward.succeed(number, sums) | forward.fail(number, error, now) | forward.follow(view)   # as things happen
    forward.done -> forward.result()

Each id of each row is in one of three states: open, with a call that is under way, or done. A call that fails opens
its ids again, and nothing else; its late answer finds no call and is dropped. So every id is computed once in the
result, whatever happens on the way.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epmesh.arrays import Ints, Rows, check_summable, sum_rows, zero_rows
from epmesh.errors import EpmeshError, ExpertUnavailable, MeshUnavailable, NotReady, PeerLost, StaleEpoch
from epmesh.routes import ELSEWHERE, Identity, NodeRows, Routes, identity
from epmesh.view import RankInfo, View

CONFIRM_S = 1.0
"""How long a rank that seems lost is left to the next view, before it is asked once more: a connection may break
without a death, and a view follows a death sooner than this."""
_BACKOFF_S, _MAX_BACKOFF_S = 0.005, 0.1

Pick = Callable[[tuple[RankInfo, ...]], RankInfo]
"""Chooses the rank of a node that takes a call and hands its neighbours their share."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a caller gives: ``[num_tokens, hidden]``, and ``[num_tokens, num_topk]`` weights and ids."""

    hidden: Rows
    weights: Rows
    ids: npt.NDArray[np.signedinteger[Any]]
    layer: int | None = None

    @property
    def id_rows(self) -> Rows:
        """The ids as bytes."""
        return Rows.of(self.ids)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row with its weights and ids."""
        return self.hidden.row_bytes + self.weights.row_bytes + self.id_rows.row_bytes


@dataclass(frozen=True, eq=False)
class NodeCall:
    """Rows for one node, to be sent.

    Attributes:
        number: of the call in its forward; answers carry it.
        entry: the rank that takes the call.
        part: the rows, and who computes what.
        view: what it was decided by.
        layer: as the caller gave it.
    """

    number: int
    entry: RankInfo
    part: NodeRows
    view: View
    layer: int | None


@dataclass
class _Suspicion:
    """Until when a rank is avoided, and how often it seemed lost."""

    until: float = -math.inf
    times_lost: int = 0


class Forward:
    """The rows of one forward on their way.

    Attributes:
        failure: what the caller gets instead of sums, once it is decided.
        retries: calls that failed and whose ids were planned anew.
        refusal: why the last of them failed.
        after_epoch: no plan is made by a view with a lower epoch.
        wake_at: when `plan` may do more, though nothing has happened; inf: only something that happens will.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self._mesh_id = ""
        self.failure: EpmeshError | None = None
        self.retries = 0
        self.after_epoch = 0
        self.wake_at = math.inf
        self.refusal: EpmeshError | None = None
        self._open = tokens.ids >= 0
        self._any_open = bool(self._open.any())
        self._calls: dict[int, NodeCall] = {}
        self._parts: list[tuple[int, int, Ints, Rows]] = []
        self._suspects: dict[Identity, _Suspicion] = {}
        self._next_number = 0
        self._backoff_s = _BACKOFF_S

    @property
    def done(self) -> bool:
        """Whether `result` can be asked for: all sums are there, or it failed."""
        return self.failure is not None or not (self._any_open or self._calls)

    @property
    def under_way(self) -> tuple[NodeCall, ...]:
        """Calls without an answer."""
        return tuple(self._calls.values())

    @property
    def waits(self) -> bool:
        """Whether ids are open that no call carries."""
        return self._any_open and self.failure is None

    def plan(
        self,
        routes: Routes,
        turn: int,
        pick: Pick,
        now: float,
        shunned: Set[Identity] = frozenset(),
        *,
        follows: bool = True,
    ) -> list[NodeCall]:
        """The calls that carry all open ids; none where it has to wait for a view, or for `wake_at`.

        Args:
            routes: of the newest view.
            turn: where the turns among replicas start.
            pick: the entry of a node; may be asked for several.
            now: of the clock that `fail` is told, in seconds.
            shunned: ranks to avoid where there are others.
            follows: whether somebody is there who would tell of a later view. Where nobody is, the view may be an old
                one, and no rank of it is given up for good.
        """
        self.wake_at = math.inf
        if not self.waits or routes.view.epoch < self.after_epoch:
            return []
        try:
            parts = self._split(routes, turn, now, shunned, follows)
        except EpmeshError as exc:
            self.failure = exc
            return []
        calls = [self._new_call(part, pick, routes.view) for part in parts]
        if calls:
            self._open[:] = False
            self._any_open = False
        return calls

    def succeed(self, number: int, sums: Rows) -> None:
        """A node's sums ``[rows, hidden]`` came; those of a call that failed before are dropped."""
        call = self._calls.get(number)
        if call is None or self.failure is not None:
            return
        try:
            check_summable(sums.dtype)
        except EpmeshError as exc:
            self.failure = exc
            return
        if len(sums) != len(call.part.rows):
            self.failure = EpmeshError(
                f"rank {call.entry.rank} answered {len(sums)} rows for {len(call.part.rows)}; see its log"
            )
            return
        del self._calls[number]
        self._parts.append((call.part.node.slot, number, call.part.rows, sums))

    def fail(self, number: int, error: EpmeshError, now: float) -> None:
        """A call failed: its ids are open again where another rank or view may help, else the forward failed."""
        call = self._calls.pop(number, None)
        if call is None or self.failure is not None:
            return
        if isinstance(error, PeerLost):
            self._suspect_lost(call, error, now)
        elif isinstance(error, StaleEpoch) and error.epoch > call.view.epoch:
            self.after_epoch = max(self.after_epoch, error.epoch)
        elif isinstance(error, StaleEpoch | NotReady | MeshUnavailable):  # it starts, leaves, or has not seen this view
            self._suspects.setdefault(identity(call.entry), _Suspicion()).until = now + self._next_backoff()
        else:
            self.failure = error
            return
        self.retries += 1
        self.refusal = error
        self._reopen(call)

    def follow(self, view: View) -> list[int]:
        """A view was committed: gives up the calls to ranks that it does not have any more.

        Returns:
            Their numbers; nobody needs to answer them.
        """
        if view.mesh_id != self._mesh_id:  # its epochs have nothing to do with those before
            self._mesh_id, self.after_epoch = view.mesh_id, 0
        if not self._calls:
            return []
        alive = {identity(info) for info in view.ranks.values()}
        gone = [number for number, call in self._calls.items() if identity(call.entry) not in alive]
        for number in gone:
            self.retries += 1
            self._reopen(self._calls.pop(number))
        return gone

    def result(self) -> Rows:
        """The sums ``[num_tokens, hidden]``: of nodes in slot order, in fp32, rounded once; zeros where no id was.

        Raises:
            EpmeshError: the forward failed.
        """
        if self.failure is not None:
            raise self.failure
        tokens = self.tokens
        if not self._parts:
            return zero_rows(len(tokens.hidden), tokens.hidden.width, tokens.hidden.dtype)
        ordered = sorted(self._parts, key=lambda part: part[:2])
        return sum_rows([(rows, sums) for _, _, rows, sums in ordered], len(tokens.hidden))

    def _new_call(self, part: NodeRows, pick: Pick, view: View) -> NodeCall:
        self._next_number += 1
        call = self._calls[self._next_number] = NodeCall(
            self._next_number, pick(part.ranks), part, view, self.tokens.layer
        )
        return call

    def _split(self, routes: Routes, turn: int, now: float, shunned: Set[Identity], follows: bool) -> list[NodeRows]:
        """Routes of all open ids; nothing, and `wake_at`, where only ranks under suspicion are left for some."""
        ids = np.where(self._open, self.tokens.ids, -1).astype(np.int64, copy=False)
        avoided = {one for one, suspicion in self._suspects.items() if suspicion.until > now}
        if shunned:
            with contextlib.suppress(ExpertUnavailable):
                return routes.avoiding(avoided | shunned).split(ids, self.tokens.layer, turn)
        try:
            return routes.avoiding(avoided).split(ids, self.tokens.layer, turn)
        except ExpertUnavailable:
            routes.split(ids, self.tokens.layer, turn)  # raises where the view itself has nobody
            if not follows:
                self._suspect_anew(avoided, now)
            self.wake_at = min((self._suspects[one].until for one in avoided), default=math.inf)
            if self.wake_at == math.inf:
                raise
            return []

    def _suspect_lost(self, call: NodeCall, error: PeerLost, now: float) -> None:
        for info in lost_ranks(call, error):
            known = self._suspects.setdefault(identity(info), _Suspicion())
            known.times_lost += 1
            known.until = now + CONFIRM_S if known.times_lost == 1 else math.inf

    def _suspect_anew(self, given_up: Set[Identity], now: float) -> None:
        """As after a first loss, so that those who were given up are asked again."""
        for one in given_up:
            if self._suspects[one].until == math.inf:
                self._suspects[one] = _Suspicion(now + CONFIRM_S, 1)

    def _next_backoff(self) -> float:
        backoff, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, _MAX_BACKOFF_S)
        return backoff

    def _reopen(self, call: NodeCall) -> None:
        self._open[call.part.rows] |= call.part.targets != ELSEWHERE
        self._any_open = True


def lost_ranks(call: NodeCall, error: PeerLost) -> list[RankInfo]:
    """The ranks that a failed call says are lost; its entry where it names none."""
    return [call.view.ranks[rank] for rank in error.ranks if rank in call.view.ranks] or [call.entry]
