"""The exchange: dispatch and combine, inside a node by symmetric buffers and between nodes by links.

The way there (`dispatch.py`): a source puts rows straight into its neighbours' receive regions, and sends each other
node one copy of every row wanted there, to the rank on its rail, which passes rows on. The way back (`combine.py`):
every rank shows its results in its own `out` region, neighbours pull and sum; for a source on another node its rail
sums and sends one row per row.

What members called travels with the rows, so every rank sees every member's call and all raise the same error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch

from epmesh.communicator import Handle
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, PeerLost, StaleEpoch
from epmesh.layout import Ints, Layout
from epmesh_server.ranks.buffers import MAX_WORLD_SIZE
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.combine import CombineStage
from epmesh_server.ranks.dispatch import DispatchStage
from epmesh_server.ranks.member import GroupMember

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


@dataclass
class Relayed:
    """Rows of a source on another node that this rank passed on, until their sums went back."""

    num_rows: int
    rows_of: dict[int, Ints]  # local position -> rows of the message, ascending


class OpenExchange(Handle):
    """An exchange between its dispatch and its combine.

    Attributes:
        slot: which of the two `out` regions it uses.
        layout: where this rank's rows went.
        counts: rows received, by source position.
        relayed: by source position, what this rank passed on.
    """

    def __init__(self, sequence: int, slot: int, layout: Layout, is_sequence_parallel: bool) -> None:
        self._sequence = sequence
        self.slot = slot
        self.layout = layout
        self.is_sequence_parallel = is_sequence_parallel
        self.counts: list[int] = []
        self.relayed: dict[int, Relayed] = {}

    @property
    def sequence(self) -> int:
        """The exchange's number in its group."""
        return self._sequence

    @property
    def num_received(self) -> int:
        """Rows this rank received."""
        return sum(self.counts)


class Exchange:
    """Runs the exchanges of one group on one rank: the object behind ``all2all_manager``."""

    def __init__(self, member: GroupMember, stats: ExchangeStats | None = None) -> None:
        """Starts with nothing open.

        Args:
            stats: to go on counting in, when the set of ranks changed.

        Raises:
            InvalidRequest: the group is too large.
        """
        if member.topology.world_size > MAX_WORLD_SIZE:
            raise InvalidRequest(f"a group of {member.topology.world_size}; at most {MAX_WORLD_SIZE} can exchange")
        self.member = member
        self.stats = stats or ExchangeStats()
        self._last: OpenExchange | None = None  # what a plain combine is for
        self._open: dict[int, OpenExchange] = {}  # by slot

    def round(self, call: Call) -> tuple[int, dict[int, Call]]:
        """A dispatch without rows: every member learns every member's call; the number stays open.

        Returns:
            The sequence number, which the caller completes, and the calls by global rank.

        Raises:
            EpmeshError: the calls do not agree, the same error on all members.
        """
        sequence = self.member.begin()
        with Guard(self.member, sequence, call.method):
            stage = DispatchStage(self.member, sequence, [], None)
            stage.post(call)
            calls = stage.wait()
            self.member.dispatched(sequence)
        return sequence, calls

    def dispatch(
        self,
        method: str,
        tensors: Sequence[torch.Tensor],
        make_layout: Callable[[], Layout],
        arguments: str,
        is_sequence_parallel: bool,
    ) -> tuple[OpenExchange, list[torch.Tensor]]:
        """Sends rows out and takes rows in.

        Args:
            tensors: ``[num_tokens, ...]`` each, on CPU; for method ``dispatch`` the third one has the ids.
            make_layout: checks the tensors and decides where rows go; may refuse.
            arguments: what must be the same on all ranks.

        Returns:
            The open exchange, and the received rows of every tensor, by source rank, then source row.
        """
        started = time.perf_counter()
        self.release()
        slot = self._free_slot()
        sequence = self.member.begin()
        with Guard(self.member, sequence, method):
            layout, call = self._plan(method, tensors, make_layout, arguments)
            stage = DispatchStage(self.member, sequence, tensors, layout)
            stage.post(call)
            stage.wait()
            outputs = stage.assemble()
            self.member.dispatched(sequence)
        assert layout is not None  # a refusal was raised by wait()
        exchange = OpenExchange(sequence, slot, layout, is_sequence_parallel)
        exchange.counts = stage.counts
        exchange.relayed = {
            source: Relayed(passed.num_rows, passed.rows_of) for source, passed in stage.passed_on.items()
        }
        self._open[slot] = self._last = exchange
        self.stats.bytes_sent += stage.bytes_sent
        self.stats.floor_bytes += stage.floor_bytes
        self.stats.dispatch_s.append(time.perf_counter() - started)
        return exchange, outputs

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
        stage = CombineStage(self.member, exchange, hidden_states)
        try:
            with Guard(self.member, exchange.sequence, "combine"):
                stage.post(is_sequence_parallel, output)
                result = stage.collect()
        except BaseException as exc:
            if not isinstance(exc, _BROKEN):
                self._close(exchange)
            raise
        self._close(exchange)
        self.stats.bytes_sent += stage.bytes_sent
        self.stats.floor_bytes += stage.floor_bytes
        self.stats.combine_s.append(time.perf_counter() - started)
        return result if output is None else output.copy_(result)

    def release(self) -> None:
        """Ends the last plain exchange if it was never combined."""
        if self._last is not None:
            self._close(self._last)

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

    def _plan(
        self, method: str, tensors: Sequence[torch.Tensor], make_layout: Callable[[], Layout], arguments: str
    ) -> tuple[Layout | None, Call]:
        """This rank's layout and call; without a layout where its input is refused."""
        try:
            layout = make_layout()
            DispatchStage.check_room(layout, tensors, self.member)
            return layout, describe(method, arguments)
        except EpmeshError as exc:
            return None, describe(method, arguments, refusal=exc)

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
        if isinstance(error, PeerLost):  # others may not have noticed yet
            self._member.abandon(self._sequence, error)
        if error is None or isinstance(error, _BROKEN):
            return
        if not isinstance(error, EpmeshError):
            text = f"{self._method} failed on rank {self._member.session.rank}: {type(error).__name__}: {error}"
            self._member.abandon(self._sequence, DeadlineExceeded(self._member.session.rank, self._sequence, text))
        self._member.complete(self._sequence)
