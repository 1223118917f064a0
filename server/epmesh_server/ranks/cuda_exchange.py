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
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from epmesh.communicator import Handle
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.layout import Layout, routed_layout
from epmesh_server.kernels.lane import Lane, Rows, Sent
from epmesh_server.kernels.launcher import stream_of
from epmesh_server.kernels.plan import ArenaPlan, region_bytes_for
from epmesh_server.kernels.status import Code, Report, error_of
from epmesh_server.ranks.arguments import refusals
from epmesh_server.ranks.buffers import stamp
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.cuda_arenas import Arenas
from epmesh_server.ranks.cuda_prepared import (
    PreparedDispatch,
    PreparedExchange,
    PreparedWayThere,
    StaticExchange,
    movable,
)
from epmesh_server.ranks.cuda_watch import Watch
from epmesh_server.ranks.cuda_ways import CudaWayBack, CudaWayThere, digest_of, launch_combine
from epmesh_server.ranks.exchange import Exchange
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.open_exchange import IDS_AT, ExchangeStats, OpenExchange, Request
from epmesh_server.ranks.store import NodeStore

_MOST_PROGRAMS = 128
_LEAST_ROWS = 64
_LEAST_OUT_BYTES = 4096  # of one result
_WIDEST = 4  # bytes of a result's element beside one of hidden_states
_MOST_PREPARED = 1024  # shapes


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
        num_sms: int | None = None,
    ) -> None:
        """Starts with nothing open and no memory; arguments as `OpenExchanges` takes them.

        Args:
            older: lanes of earlier views, which graphs that were captured then may still run.
            num_sms: most multiprocessors to use; `None`: as many as are good for it.
        """
        super().__init__(member, stats, turn)
        self.device = device
        self.exact: Lane | None = None
        self._static: Lane | None = None
        self._arenas: dict[Lane, Arenas] = {}
        self._least_rows = max_tokens_per_rank or 1
        self._older = older
        self._num_sms = num_sms
        self._sent: dict[OpenExchange, Sent] = {}
        self.lent: set[OpenExchange] = set()  # open, and given memory for their results
        self._prepared: dict[Hashable, PreparedDispatch] = {}
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
        num_tokens = 0 if rows is None else rows.num_tokens
        return [max(num_tokens, self._least_rows), self.most_programs]

    @property
    def most_programs(self) -> int:
        """Of a kernel that this rank would launch: each is on one multiprocessor."""
        there: int = torch.cuda.get_device_properties(self.device).multi_processor_count
        return min(there, _MOST_PROGRAMS, self._num_sms or there)

    def bound(self, num_sms: int) -> None:
        """Bounds the multiprocessors, from the next dispatch on: where a lane takes more, its memory is made anew."""
        self._num_sms = num_sms
        self._prepared.clear()

    def suits(self, lane: Lane) -> bool:
        """Whether a lane keeps within the bound on multiprocessors."""
        return self._num_sms is None or lane.plan.programs <= self._num_sms

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

    def again(
        self, key: Hashable, tensors: Sequence[torch.Tensor], make_request: Callable[[], Request]
    ) -> tuple[Any, ...] | None:
        """A dispatch that was prepared under `key`; `None` where it has to go the long way."""
        call = self._prepared.get(key)
        if call is None or call.view is not self.member.view:
            return None
        static = call.take is None
        if call.lane is not (self._static if static else self.exact):
            return None
        index = self.device.index
        for tensor in tensors:
            if not movable(tensor, index):
                return None
        stream = self._quick_stream(call.lane)
        if stream is None:
            return None
        self.release()
        if not static:
            return self._exact_again(call, tensors, make_request, stream)
        slot = self._free_slot()
        received = call.request.shape(call.launch_static(tensors, slot, stream))
        exchange = StaticExchange(self, call.request, call.layout, slot, call.lane, received, call)
        self._last = self._open[slot] = exchange
        self._sent[exchange] = call.sent[slot]
        return received

    def _exact_again(
        self,
        call: PreparedDispatch,
        tensors: Sequence[torch.Tensor],
        make_request: Callable[[], Request],
        stream: int,
    ) -> tuple[Any, ...]:
        """As `_start` and `settle`."""
        slot, member = self._free_slot(), self.member
        sequence = member.begin()
        if self._open:
            self._settle_all(sequence - self.turns + 1)
        exchange: OpenExchange
        with self.guard(sequence, call.request.method):
            if call.view is member.view and call.lane is self.exact:
                there = PreparedWayThere(self, sequence, call, tensors, slot, stream)
                exchange = PreparedExchange(self, there, call.request, call.layout, slot)
                exchange.prepared = call
            else:  # another placement was adopted just now
                request = make_request()
                layout, described = self._plan(request)
                stage = self._way_there(sequence, request.tensors, layout)
                stage.post(described)
                exchange = OpenExchange(self, stage, request, layout, slot)
        self._last = self._open[slot] = exchange
        exchange.settle()
        return exchange._received

    def prepare(self, key: Hashable, tensors: Sequence[torch.Tensor]) -> None:
        """Prepares to do the last dispatch, which was of `tensors`, again."""
        exchange = self._last
        if exchange is None or torch.cuda.is_current_stream_capturing():
            return
        layout = exchange.layout
        lane = exchange.lane if isinstance(exchange, StaticExchange) else self.exact
        if not isinstance(layout, DeviceLayout) or layout.rows is None or lane is None:
            return
        rows = layout.rows
        if rows.table is not None and rows.table.choices > 1:
            return  # turns among replicas depend on the ids
        if all(movable(tensor, self.device.index) for tensor in tensors) and lane.fits(rows):
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            digest = digest_of(exchange._request)
            self._prepared[key] = PreparedDispatch.of(exchange, lane, rows, digest, self.member.view)

    def combine_again(
        self,
        hidden_states: torch.Tensor,
        handle: Handle | None,
        is_sequence_parallel: bool,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """A combine that was prepared; `None` where it has to go the long way."""
        exchange = self._last if handle is None else handle
        if not isinstance(exchange, StaticExchange | PreparedExchange) or self._open.get(exchange.slot) is not exchange:
            return None
        call = exchange.prepared
        if call is None or hidden_states.dim() != 2 or hidden_states.shape[0] != exchange.num_returned:
            return None
        static = call.take is None
        found = call.combines.get((hidden_states.shape[1], hidden_states.dtype, is_sequence_parallel))
        index = self.device.index
        if found is None or call.lane is not (self._static if static else self.exact):
            return None
        if not movable(hidden_states, index) or (output is not None and not _takes(output, hidden_states, call, index)):
            return None
        stream = self._quick_stream(call.lane)
        if stream is None or self.lent - {exchange}:
            return None
        if not static:
            try:
                self.hear(exchange.sequence)
            except EpmeshError:
                return None  # on the long way it is raised again, and has its consequences
        flag = None if static else self.member.flag(exchange.sequence)
        result = call.launch_combine(found[exchange.slot], hidden_states, exchange.slot, output, stream, flag)
        self._close(exchange)
        return result

    def _quick_stream(self, lane: Lane) -> int | None:
        """The current stream, where launches may go to it at once: it is the latest one's, and all is well.

        Losses and ends are looked for by the watch, which has kernels give up, this call's too if it is late.
        """
        index = self.device.index
        if torch._C._cuda_getDevice() != index or torch._C._cuda_isCurrentStreamCapturing():
            return None
        stream: int = stream_of(index)
        if stream != self._stream_number or lane.ended:
            return None
        for each in self._arenas:
            if not each.silent:
                return None
        for each in self._older:
            if not each.silent:
                return None
        return stream

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
        """Memory of the arena in which peers read a plain combine's input in place; `None` where it would be copied.

        It is for rows whose bytes 16 divides, up to half as wide as the widest that the arenas were made for.
        """
        exchange = self._last
        if exchange is None or num_rows != exchange.num_returned:
            return None
        lane = exchange.lane if isinstance(exchange, StaticExchange) else self.exact
        if lane is None or lane not in (self._static, self.exact):
            return None
        width = hidden * dtype.itemsize
        at = lane.room_in_place(exchange.slot, num_rows, width)
        if at is None:
            return None
        self.lent.add(exchange)
        return self._arenas[lane].lend(at, num_rows * width).view(dtype).view(num_rows, hidden)

    def check_lent(self, exchange: OpenExchange, lane: Lane, width: int) -> None:
        """Refuses results that would be copied over those that another open exchange has in place.

        Raises:
            InvalidRequest: with the mend.
        """
        most = lane.plan.in_place_at // (lane.plan.world_size * lane.plan.rows)
        if width > most and self.lent - {exchange}:
            raise InvalidRequest(
                f"results of {width} bytes a row while another exchange has a buffer of allocate_combine_input; "
                f"combine that one first, or bring at most {most} bytes a row"
            )

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
                self.drop_static()
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
        self.lent.clear()
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
        self.lent.discard(exchange)
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
        if self._num_sms is not None:
            lane.copying_programs = plan.programs
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
        if lane is None or static_rows > lane.rows_for(rows.widths) or not self.suits(lane):
            lane = self._form_static(request, rows, static_rows)
        sent, outputs = lane.dispatch_static(rows, digest_of(request), static_rows)
        received = request.shape(outputs)
        exchange = self._open[slot] = StaticExchange(self, request, layout, slot, lane, received)
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
            self.drop_static()
        raise error

    def drop_static(self) -> None:
        """Has static mode begin anew."""
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
        return launch_combine(self, exchange, exchange.lane, hidden_states, is_sequence_parallel, output, sent, 0)


def _takes(output: torch.Tensor, hidden_states: torch.Tensor, call: PreparedDispatch, index: int) -> bool:
    """Whether sums can be written straight into `output`."""
    wanted = (call.layout.num_tokens, hidden_states.shape[1])
    return output.shape == wanted and output.dtype == hidden_states.dtype and movable(output, index)


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
