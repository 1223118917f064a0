"""The exchange of a group inside one node whose ranks have their tensors on GPUs.

Rows and results move by kernels (`epmesh_server.kernels`); the host gives numbers and looks at outcomes. An exact
dispatch has two doors. By the device's, a rank launches its kernel, whose flags carry a digest of the call, and waits
for counts. By the host's, it posts its call as ranks on CPU do: where its input is refused, where the shared memory has
to be made or is too small, and where a digest differs. Who waits at the device's door sees a peer at the host's, gives
its kernel up and goes there too; so all agree, with all calls in full.

Static dispatches take no number and wait for nothing: the device counts, and what goes wrong is raised by a later call.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch

from epmesh.communicator import Handle
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.layout import Layout, routed_layout
from epmesh_server.kernels.lane import Lane, Rows, Sent
from epmesh_server.kernels.plan import ArenaPlan, region_bytes_for
from epmesh_server.kernels.status import Code, Report, error_of, signature
from epmesh_server.ranks.arguments import refusals
from epmesh_server.ranks.buffers import stamp
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.cuda_arenas import Arenas
from epmesh_server.ranks.cuda_watch import Watch
from epmesh_server.ranks.dispatch import DispatchStage
from epmesh_server.ranks.exchange import Exchange
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.open_exchange import IDS_AT, ExchangeStats, OpenExchange, Relayed, Request
from epmesh_server.ranks.store import NodeStore
from epmesh_server.ranks.tensors import row_bytes

_MOST_PROGRAMS = 128
_LEAST_ROWS = 64
_LEAST_OUT_BYTES = 4096  # of one result
_WIDEST = 4  # bytes of a result's element beside one of hidden_states
_SPIN_S = 0.001
_POLL_S = 0.0005
_HOST_GRACE_S = 0.5  # the kernel's limit comes first: it knows who is late
_NEWS_S = 1.0  # how long to wait to hear why a kernel was given up


@dataclass(frozen=True)
class DeviceLayout(Layout):
    """A layout that is made on the device.

    Attributes:
        rows: what to send.
    """

    rows: Rows | None = None


def layout_of(rows: Rows) -> DeviceLayout:
    """The layout for `rows`."""
    return DeviceLayout(rows.num_tokens, (), {}, {}, rows=rows)


class CudaExchange(Exchange):
    """Runs the exchanges of one group on one rank.

    Attributes:
        exact: the lane of exact mode, once its memory was made.
    """

    def __init__(
        self,
        member: GroupMember,
        stats: ExchangeStats,
        turn: Callable[[], AbstractContextManager[None]],
        device: torch.device,
        max_tokens_per_rank: int | None,
        older: Collection[Lane] = (),
    ) -> None:
        """Starts with nothing open and no memory; arguments as `OpenExchanges` takes them.

        Args:
            older: lanes of earlier views, which graphs that were captured then may still run.
        """
        super().__init__(member, stats, turn)
        self.device = device
        self.exact: Lane | None = None
        self._static: Lane | None = None
        self._arenas: dict[Lane, Arenas] = {}
        self._least_rows = max_tokens_per_rank or 1
        self._older = older
        self._sent: dict[OpenExchange, Sent] = {}
        self._stream: torch.cuda.Stream | None = None
        self._stream_number = -1
        self._watch = Watch(member, self._abort_all)

    # Exact mode --------------------------------------------------------------------------------------------------

    def _way_there(self, sequence: int, tensors: Sequence[torch.Tensor], layout: Layout | None) -> CudaWayThere:
        assert layout is None or isinstance(layout, DeviceLayout)
        return CudaWayThere(self, sequence, None if layout is None else layout.rows)

    def _way_back(self, exchange: OpenExchange, hidden_states: torch.Tensor) -> CudaWayBack:
        return CudaWayBack(self, exchange, hidden_states, self._sent[exchange])

    def _check_room(self, layout: Layout, tensors: Sequence[torch.Tensor]) -> None:
        assert isinstance(layout, DeviceLayout)
        assert layout.rows is not None
        layout.rows.check()

    def needs(self, rows: Rows | None) -> list[int]:
        """What a call at the host's door says of this rank, for `form`: rows, and programs."""
        programs = torch.cuda.get_device_properties(self.device).multi_processor_count
        num_tokens = 0 if rows is None else rows.num_tokens
        return [max(num_tokens, self._least_rows), min(programs, _MOST_PROGRAMS)]

    def form_exact(self, calls: Mapping[int, Call], rows: Rows, sequence: int) -> Lane:
        """Makes the memory of exact mode anew, large enough for all; every member is here."""
        most = max(call.numbers[0] for call in calls.values())
        if self.exact is not None:
            most = max(most, self.exact.plan.rows)
        wanted = max(_LEAST_ROWS, 1 << (most - 1).bit_length())
        self._retire(self.exact, keep=False)
        self.exact = self._form(f"exact/{sequence}", _plan(calls, rows, wanted), sequence, base_stamp=-1)
        return self.exact

    def settled(self, stage: CudaWayThere, sent: Sent) -> None:
        """Remembers what a dispatch leaves for its combine."""
        exchange = next((each for each in self._open.values() if each.sequence == stage.sequence), None)
        if exchange is not None:
            self._sent[exchange] = sent

    def check_ids(self, rows: Rows) -> None:
        """Refuses ids that cannot be routed, as ranks on CPU do."""
        if rows.routing is not None:
            routed_layout(rows.tensors[IDS_AT].cpu().numpy(), rows.routing, self.member.topology)

    # Both modes --------------------------------------------------------------------------------------------------

    def dispatch(self, request: Request) -> tuple[torch.Tensor, ...]:
        """Sends rows out and takes rows in."""
        self.surface()
        with self.on_stream():
            if request.static_rows is None:
                return super().dispatch(request)
            self.release()
            self._last = self._start_static(request)
            return self._last._received

    def start(self, request: Request) -> OpenExchange:
        """Sends rows out; the caller may change its tensors as soon as this returns."""
        self.surface()
        with self.on_stream():
            return super().start(request) if request.static_rows is None else self._start_static(request)

    def combine(
        self,
        hidden_states: torch.Tensor,
        handle: Handle | None,
        is_sequence_parallel: bool,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shows this rank's results, and sums those for its own rows, without waiting for the device."""
        self.surface()
        with self.on_stream():
            exchange = self._exchange_of(handle)
            if isinstance(exchange, StaticExchange):
                return self._combine_static(exchange, hidden_states, is_sequence_parallel, output)
            return super().combine(hidden_states, handle, is_sequence_parallel, output)

    def combine_buffer(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
        """There is none yet: results are copied once."""
        return None

    def surface(self) -> None:
        """Raises what went wrong on the device since a call returned without waiting.

        Raises:
            EpmeshError: `PeerLost` and `StaleEpoch` where those are why a kernel was given up.
        """
        for lane in [*self._arenas, *self._older]:
            report = lane.report()
            if report is None:
                continue
            if torch.cuda.is_current_stream_capturing():
                raise error_of(report, self.rank_of(report), "an exchange before the capture")
            lane.forget_report()
            if lane is self._static:
                self._drop_static()
            elif lane is not self.exact:
                raise InvalidRequest(
                    "a CUDA graph was replayed that is older than the memory of static mode; capture anew"
                )
            if report.code in (Code.ABORTED, Code.LATE):
                self.member.check(0)
            raise error_of(report, self.rank_of(report), "an exchange")

    def hear(self, sequence: int) -> None:
        """Raises what members say of an exchange that they gave up; this rank's kernels need not have met them."""
        self.member.poll_links()
        self.member.check(sequence)

    def rank_of(self, report: Report) -> int:
        """The global rank that a report is about."""
        topology = self.member.topology
        return topology.ranks[topology.local[report.source]]

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Launches go to the caller's stream of this device; after a change of streams, behind the earlier ones."""
        switch = torch.cuda.current_device() != self.device.index
        with torch.cuda.device(self.device) if switch else contextlib.nullcontext():
            number = torch._C._cuda_getCurrentRawStream(self.device.index)
            if number != self._stream_number and not torch.cuda.is_current_stream_capturing():
                stream = torch.cuda.current_stream()  # who captures has waited for what came before
                if self._stream is not None:
                    stream.wait_stream(self._stream)
                self._stream, self._stream_number = stream, number
            yield

    def forget_open(self) -> None:
        """Forgets open exchanges; lanes are made anew, because members may disagree on how far they came."""
        super().forget_open()
        self._sent.clear()
        self._retire(self.exact, keep=True)
        self._retire(self._static, keep=True)
        self.exact = self._static = None

    def close(self) -> dict[Lane, Arenas]:
        """Ends all waits and frees memory; returns what captured graphs may still refer to, for the caller to close."""
        self._watch.close()
        for lane in self._arenas:
            lane.retire()
        kept = {lane: arenas for lane, arenas in self._arenas.items() if lane.counted}
        for lane, arenas in self._arenas.items():
            if not lane.counted:
                arenas.close()
        self._arenas.clear()
        self.exact = self._static = None
        return kept

    def _close(self, exchange: OpenExchange) -> None:
        self._sent.pop(exchange, None)
        if isinstance(exchange, StaticExchange):  # it has no number
            if self._open.get(exchange.slot) is exchange:
                del self._open[exchange.slot]
            if self._last is exchange:
                self._last = None
        else:
            super()._close(exchange)

    def _abort_all(self) -> None:
        for lane in list(self._arenas):
            lane.abort()

    def _retire(self, lane: Lane | None, *, keep: bool) -> None:
        if lane is not None:
            lane.retire()
            if not keep:
                self._arenas.pop(lane).close()

    def _form(self, label: str, plan: ArenaPlan, sequence: int, base_stamp: int) -> Lane:
        member, topology = self.member, self.member.topology
        prefix = f"{member.membership_epoch}/group/{member.group_id}/arenas/{label}/{topology.slot}/"

        def check() -> None:
            member.poll_links()
            member.check(sequence)

        store = NodeStore(member.session.channel, prefix, member.timeout_s, check)
        arenas = Arenas(plan, topology, self.device, store)
        me = topology.local.index(topology.me)
        lane = Lane(plan, me, arenas.bases, self.device, member.timeout_s, base_stamp)
        self._arenas[lane] = arenas
        return lane

    # Static mode -------------------------------------------------------------------------------------------------

    def _start_static(self, request: Request) -> StaticExchange:
        slot = self._free_slot()
        if not torch.cuda.is_current_stream_capturing():
            self.member.check(0)
        try:
            with refusals():
                layout = request.make_layout()
                self._check_room(layout, request.tensors)
        except EpmeshError as exc:
            self._refuse_static(exc)
        assert isinstance(layout, DeviceLayout)
        assert layout.rows is not None
        rows, static_rows = layout.rows, request.static_rows
        assert static_rows is not None
        lane = self._static
        if lane is None or static_rows > lane.rows_for(rows.widths):
            lane = self._form_static(request, rows, static_rows)
        digest = signature(f"{request.method} {request.arguments}")
        sent, outputs = lane.dispatch_static(rows, digest, static_rows)
        exchange = self._open[slot] = StaticExchange(self, request, layout, slot, lane, outputs)
        self._sent[exchange] = sent
        return exchange

    def _form_static(self, request: Request, rows: Rows, static_rows: int) -> Lane:
        """Makes the memory of static mode; collective, and the host waits for it."""
        if torch.cuda.is_current_stream_capturing():
            raise InvalidRequest("static mode makes its memory at the first call of a shape; call once before capture")
        call = describe("prepare_static", request.arguments, self.needs(rows))
        sequence, calls = self.round(call)
        with self.guard(sequence, call.method):
            self._retire(self._static, keep=True)
            base = stamp(self.member.membership_epoch, 0)
            self._static = self._form(f"static/{sequence}", _plan(calls, rows, static_rows), sequence, base)
        self.member.complete(sequence)
        return self._static

    def _refuse_static(self, error: EpmeshError) -> NoReturn:
        """Tells the others by the device, and raises; they hear of it at a later call, and static mode begins anew."""
        if self._static is not None and not torch.cuda.is_current_stream_capturing():
            nothing = torch.zeros((0, 1), dtype=torch.uint8, device=self.device)
            self._static.dispatch(Rows((nothing,), None, 0, False), 0, refused=True, phases=(True, False))
            self._drop_static()
        raise error

    def _drop_static(self) -> None:
        self._retire(self._static, keep=True)
        self._static = None

    def _combine_static(
        self,
        exchange: StaticExchange,
        hidden_states: torch.Tensor,
        is_sequence_parallel: bool,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        sent = self._sent[exchange]
        self._close(exchange)
        if exchange.lane is not self._static:
            raise InvalidRequest("static mode began anew since this dispatch; dispatch again")
        return _combine(self, exchange, exchange.lane, hidden_states, is_sequence_parallel, output, sent, 0)


class StaticExchange(OpenExchange):
    """An exchange in static mode, between its dispatch and its combine; the host does not know its number (0).

    Attributes:
        lane: that it runs in.
    """

    def __init__(
        self,
        owner: CudaExchange,
        request: Request,
        layout: DeviceLayout,
        slot: int,
        lane: Lane,
        outputs: Sequence[torch.Tensor],
    ) -> None:
        self._owner = owner
        self._request = request
        self._layout = layout
        self._sequence = 0
        self._stage = self._error = self._slots = None
        self._received = request.shape(list(outputs))
        self.lane = lane
        self.slot = slot
        self.is_sequence_parallel = request.is_sequence_parallel
        self.counts = [0] * lane.plan.world_size
        self.relayed = {}


class CudaWayThere:
    """One exact dispatch on one rank.

    Attributes:
        sequence: its number.
        counts: after `wait`, rows received by source position.
        bytes_sent, floor_bytes: between nodes: none.
    """

    bytes_sent = floor_bytes = 0

    def __init__(self, owner: CudaExchange, sequence: int, rows: Rows | None) -> None:
        """Prepares; `rows` is `None` where this rank's input is refused."""
        self.sequence = sequence
        self._owner, self._member = owner, owner.member
        self._rows = rows
        self._stamp = owner.member.flag(sequence)
        self._lane: Lane | None = None
        self._sent: Sent | None = None
        self._door: DispatchStage | None = None
        self._passed = False  # the host's door, which can be passed once a number
        self.counts: list[int] = []

    def post(self, call: Call) -> None:
        """Launches, or posts the call at the host's door."""
        self._call = call
        lane = self._owner.exact
        if self._rows is None or lane is None or not lane.fits(self._rows):
            self._open_door()
        else:
            self._launch(lane, self._rows)

    def let_caller_go(self) -> None:
        """Copies the rows where no kernel reads them yet."""
        if self._rows is not None and self._sent is None:
            copies = tuple(tensor.clone() for tensor in self._rows.tensors)
            self._rows = Rows(copies, self._rows.table, self._rows.eligible, self._rows.has_ids)

    def wait(self) -> None:
        """Waits for everybody's part.

        Raises:
            EpmeshError: the calls do not agree, or a member refused: the same on all members.
        """
        try:
            if self._door is None:
                self._await_device()
            if self._door is not None:
                self._pass_door()
        except BaseException:
            if self._lane is not None:
                self._lane.abort(self._stamp)
            raise

    def assemble(self) -> list[torch.Tensor]:
        """All received rows, by source rank, then source row, in new tensors."""
        assert self._lane is not None
        assert self._sent is not None
        assert self._rows is not None
        self.counts = self._lane.counts(self._stamp)
        self._owner.settled(self, self._sent)
        with self._owner.on_stream():
            return self._lane.take(self._rows, self._sent, sum(self.counts), self._stamp)

    def relayed(self) -> dict[int, Relayed]:
        """Nothing: the group is inside one node."""
        return {}

    def _launch(self, lane: Lane, rows: Rows) -> None:
        digest = signature(f"{self._call.method} {self._call.arguments}")
        self._lane = lane
        self._sent = lane.dispatch(rows, digest, stamp=self._stamp)
        lane.index_rows(self._sent, self._stamp)

    def _open_door(self) -> None:
        """Posts the call, or why this rank's ids cannot be routed."""
        if self._lane is not None:
            self._lane.abort(self._stamp)  # first: looking at the ids waits for the device
        if self._rows is not None:
            try:
                with refusals():
                    self._owner.check_ids(self._rows)
            except EpmeshError as exc:
                self._call.refusal.CopyFrom(exc.to_proto())
        self._call.numbers.extend(self._owner.needs(self._rows))
        self._door = DispatchStage(self._member, self.sequence, [], None)
        self._door.post(self._call)

    def _pass_door(self) -> None:
        """Compares all calls, and launches once there is memory for them."""
        assert self._door is not None
        calls = self._door.wait()
        assert self._rows is not None  # its refusal was raised on all ranks
        self._door, self._passed = None, True
        with self._owner.on_stream():
            self._launch(self._owner.form_exact(calls, self._rows, self.sequence), self._rows)
        self._await_device()

    def _await_device(self) -> None:
        """Waits for the kernel, or for a member at the host's door."""
        lane, member = self._lane, self._member
        assert lane is not None
        flags, flag = member.buffers.recv_flags(self.sequence), np.uint64(self._stamp)

        def ready() -> bool:
            until = time.perf_counter() + _SPIN_S
            while time.perf_counter() < until:
                if lane.outcome(self._stamp)[0]:
                    return True
            return not self._passed and bool((flags == flag).any())

        deadline = time.monotonic() + member.timeout_s + _HOST_GRACE_S
        member.wait_until(ready, self.sequence, deadline, self._others, _POLL_S)
        done, report = lane.outcome(self._stamp)
        if report is not None:
            self._heed(report)
        elif not done:
            self._open_door()
        else:
            self._owner.hear(self.sequence)

    def _heed(self, report: Report) -> None:
        member = self._member
        position = member.topology.local[report.source]
        if report.code is Code.LATE:
            raise member.give_up(self.sequence, [position])
        if report.code in (Code.ABORTED, Code.AHEAD):
            deadline = time.monotonic() + _NEWS_S
            member.wait_until(lambda: False, self.sequence, deadline, lambda: [position])
        elif self._passed:
            raise error_of(report, self._owner.rank_of(report), self._call.method)
        else:
            self._open_door()  # calls differ, or ids cannot be routed; whose, all hear there

    def _others(self) -> list[int]:
        topology = self._member.topology
        return [position for position in topology.local if position != topology.me]


class CudaWayBack:
    """One exact combine on one rank; nobody waits for it on the host."""

    bytes_sent = floor_bytes = 0

    def __init__(self, owner: CudaExchange, exchange: OpenExchange, hidden_states: torch.Tensor, sent: Sent) -> None:
        self._owner, self._exchange, self._hidden, self._sent = owner, exchange, hidden_states, sent

    def post(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        """Launches; a refusal is raised here, and by a later call on the others."""
        lane = self._owner.exact
        if lane is None:
            raise InvalidRequest(f"exchange {self._exchange.sequence} is not open any more; dispatch again")
        self._owner.hear(self._exchange.sequence)
        flag = self._owner.member.flag(self._exchange.sequence)
        arguments = self._hidden, is_sequence_parallel, output
        self._result = _combine(self._owner, self._exchange, lane, *arguments, self._sent, flag)

    def collect(self) -> torch.Tensor:
        """``[num_tokens, hidden]``, once the device is done."""
        return self._result


def _combine(
    owner: CudaExchange,
    exchange: OpenExchange,
    lane: Lane,
    hidden_states: torch.Tensor,
    is_sequence_parallel: bool,
    output: torch.Tensor | None,
    sent: Sent,
    flag: int,
) -> torch.Tensor:
    """Launches a combine, or a refusal of it."""
    try:
        with refusals():
            sizes = owner.member.view.tensor_parallel_size
            text = exchange.check_results(hidden_states, output, is_sequence_parallel, sizes)
            if not hidden_states.shape[1]:
                raise InvalidRequest("results without columns; there must be at least one on a GPU")
            lane.check_results(row_bytes(hidden_states))
    except EpmeshError:
        nothing = torch.zeros((0, 1), device=owner.device)
        if not torch.cuda.is_current_stream_capturing():
            lane.combine(nothing, sent, 0, stamp=flag, slot=exchange.slot, refused=True, phases=(True, False))
            if lane.counted:
                owner._drop_static()
        raise
    into = output if output is not None and output.is_contiguous() else None
    result = lane.combine(
        hidden_states.contiguous(), sent, signature(text), stamp=flag, slot=exchange.slot, output=into
    )
    return result if output is None or into is not None else output.copy_(result)


def _plan(calls: Mapping[int, Call], rows: Rows, most_rows: int) -> ArenaPlan:
    """Of arenas for `most_rows` rows like `rows`, and results up to fp32."""
    hidden = rows.tensors[0].shape[1]
    return ArenaPlan(
        world_size=len(calls),
        rows=most_rows,
        programs=min(most_rows, *(call.numbers[1] for call in calls.values())),
        region_bytes=region_bytes_for(most_rows, rows.widths),
        out_bytes=most_rows * max(_LEAST_OUT_BYTES, hidden * _WIDEST),
    )
