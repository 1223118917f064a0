"""What `Router` and `AsyncRouter` share: views, the budget, the transport, and one run a forward.

A run decides nothing itself: `Forward` does. It is advanced by whoever waits for it, a thread or a task, which hands it
what others put into its inbox: answers, views, room in the budget.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from epmesh.arrays import as_ids, as_rows, in_kind, is_floating
from epmesh.byte_budget import ByteBudget, Claim
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, Overloaded, PeerLost
from epmesh.forward import CONFIRM_S, Forward, NodeCall, Tokens, lost_ranks
from epmesh.front import check_timeout
from epmesh.hold_offs import HoldOffs
from epmesh.router_stats import RouterStats, StatsRecorder
from epmesh.routes import Identity, Routes, identity, serves
from epmesh.row_transport import FrontRows, GrpcRows, RowTransport, call_parts, check_transport, fronts_reachable
from epmesh.tls import TlsFiles
from epmesh.view import RankInfo, View

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_MAX_INFLIGHT_BYTES = 256 << 20
_MAX_LAYER = (1 << 32) - 1
_RETRY_AFTER_S = 0.05
_PROBED = 4


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """How a router works.

    Attributes:
        transport: "zmq", "grpc", or `None`: ZeroMQ where it gets through, else gRPC.
        timeout_s: deadline of a forward that names none.
        max_inflight_bytes: most bytes that are on their way at once, answers included.

    Raises:
        InvalidRequest: a value is out of range.
    """

    transport: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S
    max_inflight_bytes: int = DEFAULT_MAX_INFLIGHT_BYTES

    def __post_init__(self) -> None:
        check_transport(self.transport)
        check_timeout(self.timeout_s, "timeout_s")
        ByteBudget(self.max_inflight_bytes)


class ViewSource(Protocol):
    """What a router needs of a `Mesh`."""

    @property
    def view(self) -> View:
        """The newest view."""

    @property
    def connected(self) -> bool:
        """Whether later views would come now."""

    @property
    def tls(self) -> TlsFiles | None:
        """What this process shows itself with."""

    def on_view(self, callback: Callable[[View], None]) -> Callable[[], None]:
        """Has `callback` called with every later view."""

    def close(self) -> None:
        """Ends the watch."""


@dataclass(frozen=True, eq=False)
class _Answer:
    """A call to a node ended."""

    call: NodeCall
    future: Future[Any]


@dataclass(frozen=True, eq=False)
class _Something:
    """A view came, there is room in the budget, or the router was closed: look."""


Event = _Answer | _Something
_LOOK = _Something()


class RouterCore:
    """Everything of a router that is neither a thread's nor a task's. Any thread."""

    def __init__(
        self,
        mesh: ViewSource,
        options: RouterOptions,
        make_transport: Callable[[str], RowTransport] | None = None,
        first_turn: int | None = None,
    ) -> None:
        """Follows the mesh's views from now on; `close` closes the mesh, too."""
        self.options = options
        self.stats = StatsRecorder()
        self.budget = ByteBudget(options.max_inflight_bytes)
        self.held_off = HoldOffs()  # by the ranks that were to compute
        self._mesh = mesh
        self._make_transport = make_transport or (
            lambda name: FrontRows(mesh.tls) if name == "zmq" else GrpcRows(mesh.tls)
        )
        self._lock = threading.Lock()  # guards what follows
        self._closed = False
        self._runs: set[Run] = set()
        self._outstanding: dict[Identity, int] = {}
        self._shunned: dict[Identity, float] = {}
        self._transport: RowTransport | None = None
        self._opening = threading.Lock()  # held while a transport is chosen, which may take a second
        start = random.randrange(1 << 16) if first_turn is None else first_turn  # routers must not go in step
        self._turns = itertools.count(start)
        self.routes = Routes(View("", 0, 0, 1))
        self._forget = mesh.on_view(partial(_tell, weakref.ref(self)))
        self._follow(mesh.view)

    # Views -----------------------------------------------------------------------------------------------------

    def _follow(self, view: View) -> None:
        routes = Routes(view)
        with self._lock:
            old = self.routes.view
            if view.mesh_id == old.mesh_id and view.epoch <= old.epoch and old.epoch:
                return
            self.routes = routes
            self._shunned.clear()  # the view knows better
            runs = list(self._runs)
        for run in runs:
            run.post(_LOOK)

    @property
    def follows(self) -> bool:
        """Whether a service is there that tells of later views."""
        return self._mesh.connected

    # Transport -------------------------------------------------------------------------------------------------

    @property
    def transport_name(self) -> str | None:
        """Which transport is used; `None` as long as that is open."""
        transport = self._transport
        return transport.name if transport else self.options.transport

    def transport(self) -> RowTransport:
        """The transport; chosen when it is first needed, by whether a front of the newest view can be reached.

        Raises:
            MeshUnavailable: the router was closed.
        """
        if self._transport is not None:
            return self._transport
        with self._opening:
            if self._transport is None:
                name = self.options.transport or self._reachable_transport()
                made = self._make_transport(name)
                with self._lock:
                    closed = self._closed
                    self._transport = None if closed else made
                if closed:
                    made.close()
                    raise closed_error()
            assert self._transport is not None
            return self._transport

    def choose_transport(self) -> None:
        """Chooses the transport now if some rank serves, so that the first forward does not have to."""
        if any(serves(info) for info in self.routes.view.ranks.values()):
            self.transport()

    def _reachable_transport(self) -> str:
        """One rank of each of a few nodes stands for all."""
        first = {self.routes.view.slot_of(info.rank): info for info in self.routes.view.ranks.values() if serves(info)}
        return "zmq" if fronts_reachable(list(first.values())[:_PROBED]) else "grpc"

    # Runs ------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def begin(
        self,
        hidden_states: Any,
        topk_weights: Any,
        topk_ids: Any,
        layer: int | None,
        timeout: float | None,
        post: Callable[[Event], None],
    ) -> Run:
        """Checks the input and makes a run of it; nothing is sent before it is advanced. End it in any case.

        Args:
            post: takes what the run is to be handed; called from any thread, must not wait.

        Raises:
            InvalidRequest: the input is wrong.
            MeshUnavailable: the router was closed.
        """
        timeout_s = self.options.timeout_s if timeout is None else timeout
        check_timeout(timeout_s, "timeout")
        tokens = make_tokens(hidden_states, topk_weights, topk_ids, layer)
        run = Run(self, tokens, hidden_states, timeout_s, post)
        with self._lock:
            if self._closed:
                raise closed_error()
            self._runs.add(run)
        return run

    def forget(self, run: Run) -> None:
        """A run ended."""
        with self._lock:
            self._runs.discard(run)

    def next_turn(self) -> int:
        """Where a forward starts to take turns."""
        return next(self._turns)

    def pick(self, ranks: tuple[RankInfo, ...], turn: int) -> RankInfo:
        """The rank with the fewest calls of this router under way; among equals, they take turns."""
        with self._lock:
            loads = [self._outstanding.get(identity(info), 0) for info in ranks]
        order = range(len(ranks))
        return ranks[min(order, key=lambda index: (loads[index], (index - turn) % len(ranks)))]

    def count(self, rank: RankInfo, change: int) -> None:
        """A call to `rank` began (1) or ended (-1)."""
        with self._lock:
            left = self._outstanding.pop(identity(rank), 0) + change
            if left:
                self._outstanding[identity(rank)] = left

    def shun(self, ranks: Iterable[RankInfo], now: float) -> None:
        """Ranks that one forward lost are avoided by all, where they can, until the next view or for a moment."""
        with self._lock:
            self._shunned.update((identity(info), now + CONFIRM_S) for info in ranks)

    def shunned(self, now: float) -> frozenset[Identity]:
        """Whom to avoid."""
        if not self._shunned:
            return frozenset()
        with self._lock:
            return frozenset(one for one, until in self._shunned.items() if until > now)

    def snapshot(self) -> RouterStats:
        """What was counted."""
        return self.stats.snapshot(self.budget.held_bytes)

    def close(self) -> None:
        """Fails what is pending and ends every thread; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            runs, transport = list(self._runs), self._transport
        self._forget()
        for run in runs:
            run.post(_LOOK)
        if transport is not None:
            transport.close()
        self._mesh.close()


class Run:
    """One forward under way, for one thread or task; only `post` is called by others.

    A task may be cancelled while a thread advances its run: `end` waits for that.
    """

    def __init__(
        self, core: RouterCore, tokens: Tokens, like: Any, timeout_s: float, post: Callable[[Event], None]
    ) -> None:
        self.post = post
        self._core, self._like = core, like
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._forward = Forward(tokens)
        self._turn = core.next_turn()
        self._claim: Claim | None = None
        self._unsent: list[NodeCall] = []
        self._sent: dict[int, tuple[Future[Any], float]] = {}
        self._routes: Routes | None = None
        self._failed, self._over = True, False
        self._lock = threading.Lock()  # held by whoever works on it

    @property
    def num_bytes(self) -> int:
        """Of the rows, as a measure of how long a step may take."""
        return self._forward.tokens.hidden.data.nbytes

    def advance(self) -> bool:
        """Does all that can be done now; whether the forward is done.

        Raises:
            EpmeshError: the deadline is over, or the router was closed.
        """
        with self._lock:
            now = time.monotonic()
            if self._core.closed or self._over:
                raise closed_error()
            if now >= self._deadline and not self._forward.done:
                raise self._too_late()
            routes = self._follow()
            shunned, follows = self._core.shunned(now), self._core.follows
            self._unsent += self._forward.plan(routes, self._turn, self._pick, now, shunned, follows=follows)
            self._refuse_here(now)
            if self._unsent and self._has_room():
                self._send()
            return self._forward.done

    def wait_s(self) -> float:
        """Seconds until `advance` can do more, even if nothing happens."""
        return max(0.0, min(self._deadline, self._forward.wake_at) - time.monotonic())

    def take(self, event: Event) -> None:
        """Takes in what was posted."""
        if isinstance(event, _Answer):
            with self._lock:
                self._take(event)

    def _take(self, event: _Answer) -> None:
        call, now = event.call, time.monotonic()
        _, sent_at = self._sent.pop(call.number, (None, now))
        try:
            # Asked for, not raised: a traceback would keep the run, and its rows, until the next garbage collection.
            error = event.future.exception()
            if error is None:
                sums = self._core.transport().sums(call, event.future)
        except CancelledError:
            return
        except EpmeshError as exc:
            error = exc
        if isinstance(error, EpmeshError):
            self._forward.fail(call.number, error, now)
            if isinstance(error, PeerLost):
                self._core.shun(lost_ranks(call, error), now)
            if isinstance(error, Overloaded):
                left_s, rows = self._deadline - sent_at, len(call.part.rows)
                self._core.held_off.note(
                    _asked(call), rows=rows, left_s=left_s, retry_after_s=error.retry_after_s, now=now
                )
            return
        if error is not None:
            raise error
        self._forward.succeed(call.number, sums)
        self._core.stats.answered(call.part.node.slot, now - sent_at)
        sent = len(call.part.rows) * self._forward.tokens.row_bytes
        self._core.stats.add(bytes_received=sums.data.nbytes, floor_bytes=sent + sums.data.nbytes)

    def result(self) -> Any:
        """The sums, in the caller's kind; after `advance` returned true.

        Raises:
            EpmeshError: the forward failed.
        """
        with self._lock:
            sums = in_kind(self._forward.result(), self._like)
            self._failed = False
            return sums

    def end(self) -> None:
        """Gives up what is under way and makes room; idempotent."""
        self._core.forget(self)
        with self._lock:
            if self._over:
                return
            self._over = True
            sent, self._sent = self._sent, {}  # nothing may refer back to the run: its rows would stay for a while
            claim, self._claim = self._claim, None
        for future, _ in sent.values():
            future.cancel()
        if claim is not None:
            self._core.budget.release(claim)
        self._forward.failure = None
        rows = 0 if self._failed else len(self._forward.tokens.hidden)
        self._core.stats.add(calls=1, failed=int(self._failed), rows=rows, retries=self._forward.retries)

    def _follow(self) -> Routes:
        """The newest view's routes; what it makes pointless is given up."""
        routes = self._core.routes
        if routes is self._routes:
            return routes
        self._routes = routes
        for number in self._forward.follow(routes.view):
            future, _ = self._sent.pop(number, (None, 0.0))
            if future is not None:
                future.cancel()
        under_way = {call.number for call in self._forward.under_way}
        self._unsent = [call for call in self._unsent if call.number in under_way]
        return routes

    def _pick(self, ranks: tuple[RankInfo, ...]) -> RankInfo:
        return self._core.pick(ranks, self._turn)

    def _has_room(self) -> bool:
        """Asks for room once a forward, by its first calls; later ones replace those that failed."""
        if self._claim is None:
            rows = sum(len(call.part.rows) for call in self._unsent)
            tokens = self._forward.tokens
            self._claim = self._core.budget.ask(
                rows * (tokens.row_bytes + tokens.hidden.row_bytes), lambda: self.post(_LOOK)
            )
        return self._claim.held

    def _refuse_here(self, now: float) -> None:
        """Sends nothing of a forward of which a part was refused a moment ago, and would be again."""
        left_s = self._deadline - now
        for call in self._unsent:
            rows = len(call.part.rows)
            wait_s = self._core.held_off.wait_s(_asked(call), rows=rows, left_s=left_s, now=now)
            if wait_s:
                slot = call.part.node.slot
                why = f"a rank of node {slot} refused as much a moment ago; retry after {wait_s:.3f} s"
                self._forward.fail(call.number, Overloaded(wait_s, why), now)
                self._unsent = []
                return

    def _send(self) -> None:
        transport = self._core.transport()
        calls, self._unsent = self._unsent, []
        for call in calls:
            parts = call_parts(call, self._forward.tokens)
            now = time.monotonic()
            future = transport.send(call, parts, max(0.001, self._deadline - now))
            self._sent[call.number] = future, now
            self._core.count(call.entry, 1)
            self._core.stats.add(bytes_sent=sum(map(len, parts[1])))
            future.add_done_callback(partial(self._ended, call))

    def _ended(self, call: NodeCall, done: Future[Any]) -> None:
        self._core.count(call.entry, -1)
        self.post(_Answer(call, done))

    def _too_late(self) -> EpmeshError:
        within = f"within {self._timeout_s:g} s"
        if self._claim is not None and not self._claim.held:
            limit = self._core.budget.limit
            return Overloaded(_RETRY_AFTER_S, f"no room {within}: {limit} bytes are under way, max_inflight_bytes")
        late = sorted(call.entry.rank for call in self._forward.under_way)
        if late:
            return DeadlineExceeded(late[0], 0, f"ranks {', '.join(map(str, late[:16]))} did not answer {within}")
        why = f"; the last refusal: {self._forward.refusal}" if self._forward.refusal else ""
        return DeadlineExceeded(-1, 0, f"no rank or view to go on with {within}{why}")


def _asked(call: NodeCall) -> tuple[Identity, ...]:
    """Who refuses where a call is refused: one of these, for all that is told."""
    return tuple(identity(info) for info in call.part.ranks)


def make_tokens(hidden_states: Any, topk_weights: Any, topk_ids: Any, layer: int | None) -> Tokens:
    """The input of a forward, checked.

    Raises:
        InvalidRequest: it is wrong; the text names the value and the mend.
    """
    hidden = as_rows(hidden_states, "hidden_states")
    weights = as_rows(topk_weights, "topk_weights")
    ids = as_ids(topk_ids, "topk_ids")
    if not is_floating(weights.dtype):
        raise InvalidRequest(f"topk_weights is {weights.dtype}; it must be floating point, float64 at most")
    if (len(weights), weights.width) != ids.shape:
        shapes = f"topk_weights has shape {[len(weights), weights.width]} and topk_ids {list(ids.shape)}"
        raise InvalidRequest(f"{shapes}; both must be [num_tokens, num_topk]")
    if len(hidden) != len(ids):
        raise InvalidRequest(f"hidden_states has {len(hidden)} rows and topk_ids {len(ids)}; give one each per token")
    if not hidden.width:
        raise InvalidRequest("hidden_states has rows of no elements; a row needs one at least")
    if ids.size and ids.min() < -1:
        raise InvalidRequest(f"topk_ids has {int(ids.min())}; ids are -1 (none) and up")
    _check_layer(layer)
    return Tokens(hidden, weights, ids, layer)


def _check_layer(layer: Any) -> None:
    good = isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer <= _MAX_LAYER
    if layer is not None and not good:
        raise InvalidRequest(f"layer is {layer!r}; it must be a whole number from 0 on, or None")


def _tell(core: weakref.ref[RouterCore], view: View) -> None:
    """Tells a router of a view; the mesh must not keep one that nobody has any more."""
    found = core()
    if found is not None:
        found._follow(view)


def closed_error() -> MeshUnavailable:
    """What a forward of a closed router raises."""
    return MeshUnavailable("this router was closed; make another one")
