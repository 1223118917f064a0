"""Exchanges between their dispatch and their combine, however rows travel. At most two are open in a group.

`OpenExchanges` keeps the order and the refusals; how rows go there and back is a subclass's (`WayThere`, `WayBack`).
"""

from __future__ import annotations

import abc
import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from epmesh.communicator import Handle
from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, PeerLost, StaleEpoch
from epmesh.layout import Ints, Layout
from epmesh_server.ranks.arguments import check_tensor, refusals, shape_text
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.tensors import accumulator, as_rows, dtype_name, row_bytes

_log = logging.getLogger(__name__)

MAX_OPEN = 2
IDS_AT = 2  # where `dispatch` has its ids among the row tensors
BROKEN = (PeerLost, StaleEpoch, MeshUnavailable)  # the group waits for wait_ready; the number stays open


class Member(Protocol):
    """Who gives out a group's sequence numbers."""

    def begin(self) -> int:
        """Takes the next number."""

    def dispatched(self, sequence: int) -> None:
        """The first half of an exchange is done."""

    def complete(self, sequence: int) -> None:
        """An exchange is over, well or refused on all ranks."""

    def pass_over(self, sequence: int, error: EpmeshError | None = None) -> None:
        """Ends a call that this rank never made; with `error`, only if others ended it for that."""


class WayThere(Protocol):
    """One dispatch on one rank.

    Attributes:
        sequence: its number.
        counts: after `assemble`, rows received by source position.
        bytes_sent, floor_bytes: between nodes, handed to the sockets; least possible.
    """

    sequence: int
    counts: list[int]
    bytes_sent: int
    floor_bytes: int

    def post(self, call: Call) -> None:
        """Sends this rank's part."""

    def let_caller_go(self) -> None:
        """Lets the dispatch go on while its caller does something else, such as changing its tensors."""

    def wait(self) -> object:
        """Waits for everybody's part; raises where the calls do not agree or a member refused."""

    def assemble(self) -> list[torch.Tensor]:
        """All received rows, by source rank, then source row, in new tensors."""

    def relayed(self) -> dict[int, Relayed]:
        """By source position, what this rank passed on."""


class WayBack(Protocol):
    """One combine on one rank."""

    bytes_sent: int
    floor_bytes: int

    def post(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        """Shows this rank's results, or its refusal."""

    def collect(self) -> torch.Tensor:
        """Waits for all results of this rank's rows and sums them: ``[num_tokens, hidden]``."""


AnyMember = TypeVar("AnyMember", bound=Member)

BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Durations:
    """How long calls took: how many by bucket, bounded above by `BUCKETS_S` and the last by nothing, and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds


@dataclass
class RowCount:
    """Rows that went out and came in."""

    sent: int = 0
    received: int = 0


@dataclass
class ExchangeStats:
    """What this rank's exchanges cost so far; bytes are those handed to the sockets.

    Attributes:
        floor_bytes: least possible bytes between nodes for what was sent: rows, ids and weights, once per (row, node).
        inside, between: rows that went to, and came from, other ranks of the node and other nodes.
        inside_bytes: of rows that this rank wrote into its neighbours' memory.
        dispatch_s, combine_s: durations of the latest calls, seconds.
        dispatches, combines: durations of all.
        errors: calls that raised, by the error's class.
    """

    bytes_sent: int = 0
    floor_bytes: int = 0
    inside: RowCount = field(default_factory=RowCount)
    between: RowCount = field(default_factory=RowCount)
    inside_bytes: int = 0
    dispatch_s: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    combine_s: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    dispatches: Durations = field(default_factory=Durations)
    combines: Durations = field(default_factory=Durations)
    errors: dict[str, int] = field(default_factory=dict)

    def raised(self, error: EpmeshError) -> None:
        """A call ended with an error."""
        name = type(error).__name__
        self.errors[name] = self.errors.get(name, 0) + 1


@dataclass(frozen=True)
class Request:
    """One dispatch as its caller means it.

    Attributes:
        tensors: ``[num_tokens, ...]`` each; the third one of ``dispatch`` has the ids; in static mode the last
            one has the row numbers.
        make_layout: checks the tensors and decides where rows go; may refuse.
        shape: makes what the caller gets of the received rows.
        arguments: what must be the same on all ranks.
        static_rows: T of static mode, or `None`.
    """

    method: str
    tensors: Sequence[torch.Tensor]
    make_layout: Callable[[], Layout]
    shape: Callable[[list[torch.Tensor]], tuple[Any, ...]]
    arguments: str
    is_sequence_parallel: bool
    static_rows: int | None = None


@dataclass
class Relayed:
    """Rows of a source on another node that this rank passed on, until their sums went back."""

    num_rows: int
    rows_of: dict[int, Ints]  # local position -> rows of the message, ascending


class OpenExchange(Handle):
    """An exchange between its dispatch and its combine.

    Attributes:
        slot: which of the two `out` regions it uses.
        layout: where this rank's rows went; `None` where its input was refused.
        counts: rows received, by source position.
        relayed: by source position, what this rank passed on.
        began: ``time.perf_counter()`` at the call that waits for the dispatch from its start on; 0 for a handle's.
    """

    def __init__(
        self, owner: OpenExchanges[Any], stage: WayThere, request: Request, layout: Layout | None, slot: int
    ) -> None:
        self._owner = owner
        self._stage: WayThere | None = stage
        self._request = request
        self._sequence = stage.sequence
        self._received: tuple[Any, ...] = ()
        self._error: BaseException | None = None
        self.began = 0.0
        self._slots: torch.Tensor | None = None  # static mode: where each received row is among the returned ones
        self._layout = layout
        self.slot = slot
        self.is_sequence_parallel = request.is_sequence_parallel
        self.counts: list[int] = []
        self.relayed: dict[int, Relayed] = {}

    @property
    def sequence(self) -> int:
        """The exchange's number in its group."""
        return self._sequence

    @property
    def layout(self) -> Layout:
        """Where this rank's rows went."""
        assert self._layout is not None  # a refusal was raised on all ranks
        return self._layout

    @property
    def num_returned(self) -> int:
        """Rows that the dispatch returned, and that a combine must bring."""
        return sum(self.counts) if self._request.static_rows is None else len(self.counts) * self._request.static_rows

    def wait(self) -> tuple[Any, ...]:
        """The received rows, as ``dispatch`` returns them; the same again when called twice."""
        with self._owner.turn():
            self.settle()
        return self._received

    def settle(self) -> None:
        """Waits for the dispatch and takes its rows in, once."""
        if self._error is not None:
            raise self._error
        stage, self._stage = self._stage, None
        if stage is None:
            return
        started = self.began or time.perf_counter()
        try:
            with self._owner.guard(self._sequence, self._request.method):
                stage.wait()
                rows = stage.assemble()
                self._owner.member.dispatched(self._sequence)
        except BaseException as exc:
            self._error = exc
            self._owner.drop(self)
            raise
        self.counts = stage.counts
        self.relayed = stage.relayed()
        if self._request.static_rows is not None:
            rows = self._spread(rows, self._request.static_rows)
        self._received = self._request.shape(rows)
        self._owner.count(stage, self._layout, time.perf_counter() - started)

    def let_caller_go(self) -> None:
        """Lets the dispatch go on while its caller does something else, if the rows were not taken in yet."""
        if self._stage is not None:
            self._stage.let_caller_go()

    def check_results(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor | None,
        is_sequence_parallel: bool,
        tensor_parallel_size: int,
    ) -> str:
        """Checks what a combine brings; returns what must be the same on all ranks.

        Raises:
            InvalidRequest: with the value and the mend.
        """
        for tensor in (hidden_states,) if output is None else (hidden_states, output):
            check_tensor(tensor, self._owner.device)
        received = self.num_returned
        if hidden_states.dim() != 2 or hidden_states.shape[0] != received:
            raise InvalidRequest(
                f"hidden_states is {list(hidden_states.shape)}; the dispatch returned {received} rows, so it must be "
                f"[{received}, hidden]"
            )
        accumulator(hidden_states.dtype, "combine")
        if is_sequence_parallel != self.is_sequence_parallel and tensor_parallel_size > 1:
            raise InvalidRequest(f"is_sequence_parallel={is_sequence_parallel}; the dispatch had the other value")
        wanted = [self.layout.num_tokens, hidden_states.shape[1]]
        if output is not None and (list(output.shape) != wanted or output.dtype != hidden_states.dtype):
            raise InvalidRequest(
                f"output is {shape_text(output)}; it must be {dtype_name(hidden_states.dtype)}{wanted}"
            )
        return f"hidden={list(hidden_states.shape[1:])} dtype={dtype_name(hidden_states.dtype)}"

    def compact(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The rows of `hidden_states` that were received, by source rank, then source row."""
        return hidden_states if self._slots is None else hidden_states.index_select(0, self._slots)

    def _spread(self, rows: list[torch.Tensor], static_rows: int) -> list[torch.Tensor]:
        """Static mode: puts rows at source rank x T + source row; unused ones are 0, unused ids -1."""
        *payload, source_rows = rows
        sources = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
        self._slots = sources * static_rows + source_rows[:, 0].to(torch.int64)
        spread = []
        for index, tensor in enumerate(payload):
            unused = -1 if self._request.method == "dispatch" and index == IDS_AT else 0
            raw = torch.zeros((len(self.counts) * static_rows, row_bytes(tensor)), dtype=torch.uint8)
            raw.fill_(0xFF if unused else 0)
            raw.index_copy_(0, self._slots, torch.from_numpy(as_rows(tensor)))
            spread.append(raw.view(-1).view(tensor.dtype).reshape(len(raw), *tensor.shape[1:]))
        return spread


class OpenExchanges(abc.ABC, Generic[AnyMember]):
    """Runs the exchanges of one group on one rank.

    Attributes:
        turns: how many calls may be under way before the oldest one's rows must have been taken in.
        device: where rows and results are.
    """

    turns: int
    device = torch.device("cpu")

    def __init__(
        self, member: AnyMember, stats: ExchangeStats, turn: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Starts with nothing open.

        Args:
            stats: to count in; it outlives changes of the set of ranks.
            turn: keeps other threads out of the group while a handle is waited for.
        """
        self.member = member
        self.stats = stats
        self.turn = turn
        self._last: OpenExchange | None = None  # what a plain combine is for
        self._open: dict[int, OpenExchange] = {}  # by slot

    @abc.abstractmethod
    def guard(self, sequence: int, method: str) -> AbstractContextManager[None]:
        """Decides what a failure inside a numbered call means."""

    @abc.abstractmethod
    def _way_there(self, sequence: int, tensors: Sequence[torch.Tensor], layout: Layout | None) -> WayThere:
        """Prepares a dispatch; `layout` is `None` where this rank's input is refused."""

    @abc.abstractmethod
    def _way_back(self, exchange: OpenExchange, hidden_states: torch.Tensor) -> WayBack:
        """Prepares a combine."""

    @abc.abstractmethod
    def _check_room(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
        """Refuses more rows than can travel."""

    @property
    def last(self) -> OpenExchange | None:
        """The exchange that a plain combine is for, if one is open."""
        return self._last

    def dispatch(self, request: Request) -> tuple[Any, ...]:
        """Sends rows out and takes rows in; the exchange becomes the one that a plain combine is for."""
        self.release()
        started = time.perf_counter()
        exchange = self._start(request)
        exchange.began = started
        self._last = exchange
        exchange.settle()
        return exchange._received

    def start(self, request: Request) -> OpenExchange:
        """Sends rows out; the caller may change its tensors as soon as this returns."""
        exchange = self._start(request)
        exchange.let_caller_go()
        return exchange

    def _start(self, request: Request) -> OpenExchange:
        slot = self._free_slot()
        sequence = self.member.begin()
        self._settle_all(sequence - self.turns + 1)
        with self.guard(sequence, request.method):
            layout, call = self._plan(request)
            stage = self._way_there(sequence, request.tensors, layout)
            stage.post(call)
        exchange = self._open[slot] = OpenExchange(self, stage, request, layout, slot)
        return exchange

    def drop(self, exchange: OpenExchange) -> None:
        """Forgets an exchange whose dispatch failed."""
        self._open.pop(exchange.slot, None)
        if self._last is exchange:
            self._last = None

    def count(self, stage: WayThere, layout: Layout | None, seconds: float) -> None:
        """Adds a dispatch to the statistics."""
        self.stats.bytes_sent += stage.bytes_sent
        self.stats.floor_bytes += stage.floor_bytes
        self.stats.dispatch_s.append(seconds)
        self.stats.dispatches.add(seconds)

    def combine(
        self,
        hidden_states: torch.Tensor,
        handle: Handle | None,
        is_sequence_parallel: bool,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shows this rank's results, sums those for its own rows, and those it owes to other nodes.

        Args:
            hidden_states: ``[num_received, hidden]``.
            output: ``[num_tokens, hidden]`` to write into, or `None` for a new tensor.
        """
        started = time.perf_counter()
        exchange = self._exchange_of(handle)
        exchange.settle()
        stage = self._way_back(exchange, hidden_states)
        try:
            with self.guard(exchange.sequence, "combine"):
                stage.post(is_sequence_parallel, output)
                result = stage.collect()
        except BaseException as exc:
            if not isinstance(exc, BROKEN):
                self._close(exchange)
            if isinstance(exc, InvalidRequest):
                self.member.pass_over(exchange.sequence + 1, exc)
            raise
        self._close(exchange)
        self.stats.bytes_sent += stage.bytes_sent
        self.stats.floor_bytes += stage.floor_bytes
        seconds = time.perf_counter() - started
        self.stats.combine_s.append(seconds)
        self.stats.combines.add(seconds)
        return result if output is None else output.copy_(result)

    def combine_buffer(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Memory ``[num_rows, hidden]`` in which a plain combine reads its input in place, or `None`."""
        return None

    def forget_open(self) -> None:
        """Forgets open exchanges; their numbers are the member's to end."""
        self._open.clear()
        self._last = None

    def release(self) -> None:
        """Ends the last plain exchange if it was never combined."""
        if self._last is not None:
            self._close(self._last)

    def _settle_all(self, newest: int | None = None) -> None:
        """Takes in what is under way, up to the number `newest`, before another call is posted (see BufferLayout)."""
        for exchange in list(self._open.values()):
            if newest is not None and exchange.sequence > newest:
                continue
            try:
                exchange.settle()
            except BROKEN:
                raise
            except EpmeshError:
                _log.debug("sequence %d: its handle's wait() raises the error", exchange.sequence)

    def _close(self, exchange: OpenExchange) -> None:
        if self._open.get(exchange.slot) is exchange:
            del self._open[exchange.slot]
            self.member.complete(exchange.sequence)
        if self._last is exchange:
            self._last = None

    def _free_slot(self) -> int:
        for slot in range(MAX_OPEN):
            if slot not in self._open:
                return slot
        raise InvalidRequest(f"{MAX_OPEN} exchanges are open; combine one before the next dispatch")

    def _plan(self, request: Request) -> tuple[Layout | None, Call]:
        """This rank's layout and call; without a layout where its input is refused."""
        try:
            with refusals():
                layout = request.make_layout()
            self._check_room(layout, request.tensors)
            return layout, describe(request.method, request.arguments)
        except EpmeshError as exc:
            return None, describe(request.method, request.arguments, refusal=exc)

    def _exchange_of(self, handle: Handle | None) -> OpenExchange:
        exchange = self._last if handle is None else handle
        if isinstance(exchange, OpenExchange) and self._open.get(exchange.slot) is exchange:
            return exchange
        if handle is not None:
            raise InvalidRequest(f"exchange {handle.sequence} is not open here; a handle is good for one combine")
        raise InvalidRequest("combine without an open dispatch; call dispatch first")
