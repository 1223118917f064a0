"""The exchange: dispatch and combine, inside a node by symmetric buffers and between nodes by links.

The way there (`dispatch.py`): a source puts rows straight into its neighbours' receive regions, and sends each other
node one copy of every row wanted there, to the rank on its rail, which passes rows on. The way back (`combine.py`):
every rank shows its results in its own `out` region, neighbours pull and sum; for a source on another node its rail
sums and sends one row per row.

What members called travels with the rows, so every rank sees every member's call and all raise the same error.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from epmesh.communicator import Handle
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, PeerLost, StaleEpoch
from epmesh.layout import Ints, Layout
from epmesh_server.ranks.arguments import refusals
from epmesh_server.ranks.buffers import MAX_WORLD_SIZE
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.combine import CombineStage, shown_dtype, shown_rows
from epmesh_server.ranks.dispatch import IDS_AT, DispatchStage
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.tensors import as_rows, row_bytes
from epmesh_server.shared_memory import BufferLayout

_log = logging.getLogger(__name__)

MAX_OPEN = 2


@dataclass
class ExchangeStats:
    """What this rank's exchanges cost so far; bytes are those handed to the sockets.

    Attributes:
        floor_bytes: least possible bytes between nodes for what was sent: rows, ids and weights, once per (row, node).
        dispatch_s, combine_s: durations of the latest calls, seconds.
    """

    bytes_sent: int = 0
    floor_bytes: int = 0
    dispatch_s: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    combine_s: deque[float] = field(default_factory=lambda: deque(maxlen=1024))


@dataclass(frozen=True)
class Request:
    """One dispatch as its caller means it.

    Attributes:
        tensors: ``[num_tokens, ...]`` each, on CPU; the third one of ``dispatch`` has the ids; in static mode the last
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
    """

    def __init__(
        self, owner: Exchange, stage: DispatchStage, request: Request, layout: Layout | None, slot: int
    ) -> None:
        self._owner = owner
        self._stage: DispatchStage | None = stage
        self._request = request
        self._sequence = stage.sequence
        self._received: tuple[Any, ...] = ()
        self._error: BaseException | None = None
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
        started = time.perf_counter()
        try:
            with Guard(stage.member, self._sequence, self._request.method):
                stage.wait()
                rows = stage.assemble()
                stage.member.dispatched(self._sequence)
        except BaseException as exc:
            self._error = exc
            self._owner.drop(self)
            raise
        self.counts = stage.counts
        self.relayed = {source: Relayed(passed.num_rows, passed.rows_of) for source, passed in stage.passed_on.items()}
        if self._request.static_rows is not None:
            rows = self._spread(rows, self._request.static_rows)
        self._received = self._request.shape(rows)
        self._owner.count(stage, time.perf_counter() - started)

    def keep_own_rows(self) -> None:
        """Copies what this rank has for itself, if the rows were not taken in yet."""
        if self._stage is not None:
            self._stage.keep_own_rows()

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


class Exchange:
    """Runs the exchanges of one group on one rank: the object behind ``all2all_manager``."""

    def __init__(
        self, member: GroupMember, stats: ExchangeStats, turn: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Starts with nothing open.

        Args:
            stats: to count in; it outlives changes of the set of ranks.
            turn: keeps other threads out of the group while a handle is waited for.

        Raises:
            InvalidRequest: the group is too large.
        """
        if member.topology.world_size > MAX_WORLD_SIZE:
            raise InvalidRequest(f"a group of {member.topology.world_size}; at most {MAX_WORLD_SIZE} can exchange")
        self.member = member
        self.stats = stats
        self.turn = turn
        self._last: OpenExchange | None = None  # what a plain combine is for
        self._open: dict[int, OpenExchange] = {}  # by slot

    def round(self, call: Call, timeout_s: float | None = None) -> tuple[int, dict[int, Call]]:
        """A dispatch without rows: every member learns every member's call; the number stays open.

        Args:
            timeout_s: how long to wait for the others, if not as long as ever.

        Returns:
            The sequence number, which the caller completes, and the calls by global rank.

        Raises:
            EpmeshError: the calls do not agree, the same error on all members.
        """
        self._settle_all()
        sequence = self.member.begin()
        with Guard(self.member, sequence, call.method):
            stage = DispatchStage(self.member, sequence, [], None)
            stage.post(call)
            calls = stage.wait(timeout_s)
            self.member.dispatched(sequence)
        return sequence, calls

    def dispatch(self, request: Request) -> tuple[Any, ...]:
        """Sends rows out and takes rows in; the exchange becomes the one that a plain combine is for."""
        self.release()
        started = time.perf_counter()
        exchange = self._start(request)
        self._last = exchange
        exchange.settle()
        self.stats.dispatch_s[-1] = time.perf_counter() - started
        return exchange._received

    def start(self, request: Request) -> OpenExchange:
        """Sends rows out; the caller may change its tensors as soon as this returns."""
        exchange = self._start(request)
        exchange.keep_own_rows()
        return exchange

    def _start(self, request: Request) -> OpenExchange:
        slot = self._free_slot()
        sequence = self.member.begin()
        self._settle_all(sequence - BufferLayout.TURNS + 1)
        with Guard(self.member, sequence, request.method):
            layout, call = self._plan(request)
            stage = DispatchStage(self.member, sequence, request.tensors, layout)
            stage.post(call)
        exchange = self._open[slot] = OpenExchange(self, stage, request, layout, slot)
        return exchange

    def drop(self, exchange: OpenExchange) -> None:
        """Forgets an exchange whose dispatch failed."""
        self._open.pop(exchange.slot, None)
        if self._last is exchange:
            self._last = None

    def count(self, stage: DispatchStage, seconds: float) -> None:
        """Adds a dispatch to the statistics."""
        self.stats.bytes_sent += stage.bytes_sent
        self.stats.floor_bytes += stage.floor_bytes
        self.stats.dispatch_s.append(seconds)

    def combine(
        self,
        hidden_states: torch.Tensor,
        handle: Handle | None,
        is_sequence_parallel: bool,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shows this rank's results, sums those for its own rows, and those it owes to other nodes.

        Args:
            hidden_states: ``[num_received, hidden]`` on CPU.
            output: ``[num_tokens, hidden]`` to write into, or `None` for a new tensor.
        """
        started = time.perf_counter()
        exchange = self._exchange_of(handle)
        exchange.settle()
        stage = CombineStage(self.member, exchange, hidden_states)
        try:
            with Guard(self.member, exchange.sequence, "combine"):
                stage.post(is_sequence_parallel, output)
                result = stage.collect()
        except BaseException as exc:
            if not isinstance(exc, _BROKEN):
                self._close(exchange)
            if isinstance(exc, InvalidRequest):
                self.member.pass_over(exchange.sequence + 1, exc)
            raise
        self._close(exchange)
        self.stats.bytes_sent += stage.bytes_sent
        self.stats.floor_bytes += stage.floor_bytes
        self.stats.combine_s.append(time.perf_counter() - started)
        return result if output is None else output.copy_(result)

    def combine_buffer(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Memory in which a plain combine reads its input in place; `None` where it would be copied anyway."""
        local = self.member.topology.local
        if self._last is None or len(local) == 1 or shown_dtype(dtype) != dtype or not num_rows * hidden:
            return None
        region = self.member.buffers.out(self.member.topology.me, self._last.slot)
        if (num_rows + 1) * hidden * dtype.itemsize > len(region.payload):
            return None
        return shown_rows(region, num_rows, hidden, dtype)

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
            except _BROKEN:
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
            DispatchStage.check_room(layout, request.tensors, self.member)
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


_BROKEN = (PeerLost, StaleEpoch, MeshUnavailable)  # the group waits for wait_ready; the number stays open


class Guard:
    """What a failure inside a numbered call means: agreed refusals and deadlines end the number, losses do not, and
    whatever nobody else could know of is told to all members, so that none of them waits for it."""

    def __init__(self, member: GroupMember, sequence: int, method: str) -> None:
        self._member, self._sequence, self._method = member, sequence, method

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        member, sequence = self._member, self._sequence
        known = error is member.agreed or sequence in member.inbox.abandoned or sequence == member.abandoned
        if isinstance(error, _BROKEN):
            if isinstance(error, PeerLost) and not known:  # others may not have noticed yet
                member.abandon(sequence, error)
            return
        if not known:
            rank = member.session.rank
            text = f"{self._method} failed on rank {rank}: {type(error).__name__}: {error}"
            told = error if isinstance(error, EpmeshError) else DeadlineExceeded(rank, sequence, text)
            member.abandon(sequence, told)
        member.complete(sequence)
