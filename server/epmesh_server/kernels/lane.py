"""Launches the exchange's kernels over one set of arenas: a lane. Exchanges in a lane follow each other on one stream.

A lane whose stamps the host gives serves exact mode; one that counts on the device serves static mode, and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

from epmesh.errors import InvalidRequest
from epmesh.layout import Routing
from epmesh_server.kernels import exchange_kernels as kernels
from epmesh_server.kernels.launcher import Launch, Launcher
from epmesh_server.kernels.plan import MAX_TENSORS, MAX_TOPK, TURNS, ArenaPlan, RowPlan, block_of, plan_rows, unit_of
from epmesh_server.kernels.status import Code, Report, count_in, decode, done_report
from epmesh_server.ranks.tensors import accumulator, dtype_name, row_bytes

ABORT_ALL = (1 << 63) - 1

_ABORT, _REPORT, _TURN = 0, 1, 2  # words that host and device share; of each turn: how it ended, counts by source
_WORST_SHOWN, _BROKEN, _COUNTERS = 1, 2, 8  # words of the device
_IDS_AT = 2
_MOST_AT_ONCE = 2048
_MOST_ALIGNED = 16  # bytes

_ALL_PHASES = (True, True)

_Launched = tuple[Any, tuple[Any, ...], int, tuple[Any, ...], Callable[[], dict[str, Any]]]  # what a `Launcher` takes


@dataclass(frozen=True)
class Table:
    """A routing as the kernels read it.

    Attributes:
        entries: ``[num_experts, 2 + choices]`` int32 on the device: how many ranks hold the expert for this source,
            whether there are replicas, and the ranks (-1: another rank with the same tokens sends there). Captured
            graphs hold the address.
        first_turn: where the turns among replicas start.
        routing: what it was made from.
    """

    entries: torch.Tensor
    first_turn: int
    routing: Routing

    @property
    def choices(self) -> int:
        """Most ranks that an expert's rows may go to."""
        return self.entries.shape[1] - 2

    @classmethod
    def of(cls, routing: Routing, device: torch.device) -> Table:
        """Copies a routing to the device."""
        return cls(_entries_of(routing).to(device), routing.turn, routing)

    def follow(self, routing: Routing) -> Table | None:
        """This table with another routing in the same place, for graphs too; `None` where the form is another.

        Nothing that runs on the device may read the table meanwhile.
        """
        entries = _entries_of(routing)
        if entries.shape != self.entries.shape or routing.turn != self.first_turn:
            return None
        self.entries.copy_(entries)
        return replace(self, routing=routing)

    def retire(self) -> None:
        """Has whatever still goes by this table report that it is an old one, and send nothing."""
        self.entries[:, 0] = -1


@dataclass(frozen=True)
class Rows:
    """What one dispatch sends.

    Attributes:
        tensors: ``[num_tokens, ...]`` each, contiguous, on the device; with a table the third one has the ids.
        table: who holds what; `None`: every row goes to every rank in `eligible`.
        eligible: bit r: rank r.
        has_ids: the third tensor has ids, which are -1 in unused rows.
    """

    tensors: tuple[torch.Tensor, ...]
    table: Table | None
    eligible: int
    has_ids: bool = True

    @property
    def num_tokens(self) -> int:
        """Rows."""
        return len(self.tensors[0])

    @property
    def routing(self) -> Routing | None:
        """Who holds what, on the host."""
        return None if self.table is None else self.table.routing

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Bytes of one row of each tensor."""
        return tuple(row_bytes(tensor) for tensor in self.tensors)

    def check(self) -> None:
        """Refuses what the kernels cannot carry.

        Raises:
            InvalidRequest: with the value and the mend.
        """
        if len(self.tensors) > MAX_TENSORS:
            raise InvalidRequest(f"{len(self.tensors)} tensors; at most {MAX_TENSORS} travel together on a GPU")
        if self.table is not None and self.tensors[2].shape[1] > MAX_TOPK:
            raise InvalidRequest(f"topk_ids has {self.tensors[2].shape[1]} ids a row; at most {MAX_TOPK} on a GPU")
        if min(self.widths) < 1:
            raise InvalidRequest(f"rows of {list(self.widths)} bytes; none may be empty on a GPU")


@dataclass(frozen=True)
class Sent:
    """What a dispatch leaves for its copy-out and its combine.

    Attributes:
        hits: ``[num_tokens]`` int32, or longer: bit r: the row went to rank r.
        positions: ``[world_size, rows]`` int32: where a source's row stands among the returned ones, -1: nowhere.
        tokens: ``[world_size]`` int32: rows of each source; static mode: `None`.
        origins: exact mode: source x rows + row of each received row.
        rows: row numbers that `positions` has for each source.
        num_tokens: rows that were sent.
    """

    hits: torch.Tensor
    positions: torch.Tensor
    rows: int
    num_tokens: int
    tokens: torch.Tensor | None = None
    origins: torch.Tensor | None = None


class Lane:
    """One rank's launches over the arenas of all ranks of its node.

    Attributes:
        plan: of every arena.
        copying_programs: most of the kernel that copies received rows, which waits for nobody.
    """

    def __init__(
        self, plan: ArenaPlan, me: int, bases: Sequence[int], device: torch.device, limit_s: float, base_stamp: int = -1
    ) -> None:
        """Prepares what every call needs.

        Args:
            bases: address of every rank's arena, as this process maps it; zeroed before the first use.
            limit_s: longest wait of a kernel.
            base_stamp: the stamp before the first exchange where the device counts; -1: the host gives stamps.
        """
        self.plan = plan
        self.copying_programs = 4 * plan.programs
        self._me = me
        self._bases = tuple(bases)
        self._device = device
        self._clock = device.type == "cuda"
        self._limit = int(limit_s * 1e9) if self._clock else 1000
        self._base_stamp = base_stamp
        shared = torch.zeros(_TURN + TURNS * (1 + plan.world_size), dtype=torch.int64)
        self._shared = shared.pin_memory() if self._clock else shared
        self._words: npt.NDArray[np.int64] = self._shared.numpy()
        self._local = torch.zeros(_COUNTERS + 2 * plan.programs, dtype=torch.int64, device=device)
        self._quick = self._words.data  # an array's elements take longer to look at
        self._launch = Launcher(device)
        self._kept: dict[int, tuple[torch.Tensor, int, tuple[torch.Tensor, ...]]] = {}
        self._turns: torch.Tensor | None = None
        self._row_plans: dict[tuple[int, ...], RowPlan] = {}

    @property
    def counted(self) -> bool:
        """Whether the device counts."""
        return self._base_stamp >= 0

    # Host --------------------------------------------------------------------------------------------------------

    def fits(self, rows: Rows) -> bool:
        """Whether the receive regions hold the rows."""
        return rows.num_tokens <= self.rows_for(rows.widths)

    def rows_for(self, widths: tuple[int, ...]) -> int:
        """Most rows of these widths, in bytes."""
        return min(self._row_plan(widths).rows, self.plan.rows)

    def abort(self, stamp: int = ABORT_ALL) -> None:
        """Ends every wait for an exchange up to `stamp`, soon; any thread may call it."""
        self._words[_ABORT] = max(int(self._words[_ABORT]), stamp)

    @property
    def ended(self) -> bool:
        """Whether all waits were ended."""
        return bool(self._quick[_ABORT] == ABORT_ALL)

    @property
    def silent(self) -> bool:
        """Whether there is no report."""
        return not self._quick[_REPORT]

    def report(self) -> Report | None:
        """What went wrong in some call whose outcome nobody waits for: combines, and what the device counts."""
        return decode(int(self._words[_REPORT]))

    def forget_report(self) -> None:
        """Takes the report back, so that the next one is seen."""
        self._local[_WORST_SHOWN] = 0
        self._words[_REPORT] = 0

    def retire(self) -> None:
        """Ends all waits, in graphs that are replayed later too: they report that they were. Waits for the device."""
        self.abort()
        self._local[_BROKEN] = 1
        if self._clock:
            torch.cuda.synchronize(self._device)
        self.forget_report()

    def outcome(self, stamp: int) -> tuple[bool, Report | None]:
        """Whether the dispatch of `stamp` is over, and what went wrong in it."""
        return done_report(int(self._words[self._turn_at(stamp)]), stamp)

    def counts(self, stamp: int) -> list[int]:
        """Rows received by source, once the dispatch of `stamp` is over."""
        first = self._turn_at(stamp) + 1
        words = self._words[first : first + self.plan.world_size]
        found = [count_in(int(word) & (1 << 64) - 1, stamp) for word in words]
        return [count for count in found if count is not None]

    def _turn_at(self, stamp: int) -> int:
        return _TURN + stamp % TURNS * (1 + self.plan.world_size)

    # Launches ----------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        rows: Rows,
        signature: int,
        *,
        stamp: int = 0,
        refused: bool = False,
        phases: tuple[bool, bool] = _ALL_PHASES,
        sent: Sent | None = None,
    ) -> Sent:
        """Exact mode: puts rows and awaits everybody's; then `outcome` and `counts` become known.

        Args:
            signature: must be the same on all ranks.
            refused: puts nothing but a refusal.
            phases: whether to put, and whether to await; one alone in tests that have no ranks side by side, the
                second with what the first returned as `sent`.
        """
        row_plan = self._row_plan(rows.widths)
        if sent is None:
            tokens, positions, origins = self._numbered(row_plan.rows)
            hits = self._new(rows.num_tokens)
            sent = Sent(hits, positions, row_plan.rows, rows.num_tokens, tokens, origins)
        self._launch(*self._dispatching(rows, row_plan, sent, (), signature, stamp, refused, phases))
        return sent

    def dispatch_static(
        self,
        rows: Rows,
        signature: int,
        static_rows: int,
        *,
        refused: bool = False,
        phases: tuple[bool, bool] = _ALL_PHASES,
        sent: Sent | None = None,
    ) -> tuple[Sent, list[torch.Tensor]]:
        """Static mode: as `dispatch`, and returns the rows, ``[world_size x static_rows, ...]``."""
        total = self.plan.world_size * static_rows
        outputs = [tensor.new_empty((total, *tensor.shape[1:])) for tensor in rows.tensors]
        sent = sent or Sent(self._new(rows.num_tokens), self._new(total), static_rows, rows.num_tokens)
        row_plan = self._row_plan(rows.widths)
        self._launch(*self._dispatching(rows, row_plan, sent, outputs, signature, 0, refused, phases))
        return sent, outputs

    def take(self, rows: Rows, sent: Sent, num_rows: int, stamp: int) -> list[torch.Tensor]:
        """Exact mode: the received rows, by source, then source row."""
        assert sent.origins is not None
        outputs = [tensor.new_empty((num_rows, *tensor.shape[1:])) for tensor in rows.tensors]
        if num_rows:
            addresses = tuple(tensor.data_ptr() for tensor in outputs)
            self._launch(*self._taking(rows, sent, addresses, num_rows, stamp))
        return outputs

    def _taking(self, rows: Rows, sent: Sent, addresses: tuple[int, ...], num_rows: int, stamp: int) -> _Launched:
        plan, row_plan = self.plan, self._row_plan(rows.widths)
        units = tuple(unit_of(width, at) for width, at in zip(rows.widths, addresses, strict=True))
        return (
            kernels.take_rows,
            ("take", rows.widths, units),
            self.programs_for(num_rows),
            (
                *(addresses, row_plan.offset_units, self._bases[self._me], self._address(sent.origins), num_rows),
                *(stamp, sent.rows, plan.recv_at, plan.region_stride),
            ),
            lambda: {
                "WIDTHS": rows.widths,
                "UNITS": units,
                "BLOCKS": _blocks(rows.widths, units),
                "NUM": len(addresses),
                "WORLD": plan.world_size,
            },
        )

    def combine(
        self,
        results: torch.Tensor,
        sent: Sent,
        signature: int,
        *,
        stamp: int = 0,
        slot: int = 0,
        output: torch.Tensor | None = None,
        refused: bool = False,
        phases: tuple[bool, bool] = _ALL_PHASES,
    ) -> torch.Tensor:
        """Shows results, and sums everybody's for this rank's own rows.

        Args:
            results: ``[rows, hidden]``, contiguous, one for each returned row; not copied where they stand in the
                slot's memory for it.
            output: ``[num_tokens, hidden]``, contiguous; `None`: a new one.

        Returns:
            The sums.
        """
        if output is None:
            output = results.new_empty((sent.num_tokens, results.shape[1]))
        self._launch(*self._combining(results, output, sent, signature, stamp, slot, refused, phases))
        return output

    def prepare_combine(
        self, results: torch.Tensor, output: torch.Tensor, sent: Sent, signature: int, slot: int
    ) -> Launch:
        """A combine whose first two values are the addresses of `results` and `output`."""
        kernel, _, programs, arguments, constants = self._combining(
            results, output, sent, signature, 0, slot, False, _ALL_PHASES
        )
        return self._launch.prepare(kernel, programs, arguments, constants)

    def _combining(
        self,
        results: torch.Tensor,
        output: torch.Tensor,
        sent: Sent,
        signature: int,
        stamp: int,
        slot: int,
        refused: bool,
        phases: tuple[bool, bool],
    ) -> _Launched:
        plan, width = self.plan, row_bytes(results)
        unit = unit_of(width, results.data_ptr())
        static = sent.tokens is None
        return (
            kernels.combine,
            ("combine", results.dtype, width, unit, static, phases),
            plan.programs,
            (
                *(self._address(results), self._address(output), self._address(sent.hits), self._bases),
                *(self._bases[self._me], self._shared.data_ptr(), self._local.data_ptr()),
                *(self._address(sent.tokens), self._address(sent.positions), sent.num_tokens),
                *(self._base_stamp if self.counted else stamp, signature, int(Code.REFUSED) if refused else 0),
                *(self._limit, slot, self._me, sent.rows),
                *(plan.out_flags_at, plan.out_heads_at, plan.out_at, plan.rows * width, plan.slot_stride),
                *(self.in_place(results, slot), plan.in_place_at),
            ),
            lambda: {
                "HIDDEN": results.shape[1],
                "WIDTH": width,
                "NARROW": _type(results.dtype),
                "UNIT": unit,
                "BLOCK": _sum_block(results.shape[1]),
                "COPY_BLOCK": block_of(width, unit, _MOST_AT_ONCE),
                "WIDE": _type(accumulator(results.dtype, "combine")),
                "WORLD": plan.world_size,
                "STATIC": static,
                "COUNTED": self.counted,
                "PUT": phases[0],
                "TAKE": phases[1],
                "CLOCK": self._clock,
            },
        )

    def room_in_place(self, slot: int, num_rows: int, width: int) -> int | None:
        """Where in the arena results can be written so that peers read them there; `None`: nowhere.

        Free from when the slot's dispatch is done on the device until its combine is.
        """
        if width % _MOST_ALIGNED or not 0 < num_rows * width <= self.plan.in_place_bytes:
            return None
        return self.plan.out_at + slot * self.plan.slot_stride + self.plan.in_place_at

    def in_place(self, results: torch.Tensor, slot: int) -> int:
        """What the kernel is told: 0 where results have to be copied, else 1 + the slot whose memory they are in."""
        width, rows = row_bytes(results), len(results)
        at = self.room_in_place(slot, rows, width)
        return 1 + slot if at is not None and results.data_ptr() == self._bases[self._me] + at else 0

    def check_results(self, width: int) -> None:
        """Refuses results of `width` bytes a row that the arenas do not hold.

        Raises:
            InvalidRequest: with the sizes and the mend.
        """
        room = self.plan.out_bytes // self.plan.rows
        if width > room:
            raise InvalidRequest(
                f"results of {width} bytes a row; the memory that GPUs share was made for {room}, by the first "
                f"dispatch: return rows no wider than hidden_states in float32"
            )

    def row_numbers(self, rows: Rows) -> int:
        """Exact mode: row numbers of each source, for rows as wide as `rows`."""
        return self._row_plan(rows.widths).rows

    def programs_for(self, num_rows: int) -> int:
        """Of a kernel that copies received rows."""
        return min(num_rows, self.copying_programs)

    def keep(self, slot: int, row_numbers: int, num_tokens: int, static: bool) -> Sent:
        """Where prepared exchanges in a slot keep what their combine needs, one after the other."""
        found = self._kept.get(slot)
        if found is None or len(found[0]) < num_tokens or found[1] < row_numbers:
            hits = self._new(max(num_tokens, self.plan.rows))
            found = self._kept[slot] = hits, row_numbers, self._numbered(row_numbers)
        hits, _, (tokens, positions, origins) = found
        return Sent(hits, positions, row_numbers, num_tokens, *(() if static else (tokens, origins)))

    def prepare_dispatch(self, rows: Rows, outputs: Sequence[torch.Tensor], sent: Sent, signature: int) -> Launch:
        """A dispatch whose first values are the addresses of the rows, then those of `outputs`, in static mode."""
        row_plan = self._row_plan(rows.widths)
        kernel, _, programs, arguments, constants = self._dispatching(
            rows, row_plan, sent, outputs, signature, 0, False, _ALL_PHASES
        )
        return self._launch.prepare(kernel, programs, arguments, constants)

    def prepare_take(self, rows: Rows, sent: Sent) -> Launch:
        """A copy of received rows whose first values are the addresses of the outputs, new tensors."""
        kernel, _, programs, arguments, constants = self._taking(rows, sent, (0,) * len(rows.widths), 1, 0)
        return self._launch.prepare(kernel, programs, arguments, constants)

    def _numbered(self, row_numbers: int) -> tuple[torch.Tensor, ...]:
        """Memory for tokens, positions and origins."""
        world = self.plan.world_size
        sizes = [world, world * row_numbers, world * row_numbers]
        return torch.split(self._new(sum(sizes)), sizes)

    def _dispatching(
        self,
        rows: Rows,
        row_plan: RowPlan,
        sent: Sent,
        outputs: Sequence[torch.Tensor],
        signature: int,
        stamp: int,
        refused: bool,
        phases: tuple[bool, bool],
    ) -> _Launched:
        plan, table = self.plan, rows.table
        sources = tuple(self._address(tensor) for tensor in rows.tensors)
        targets = tuple(self._address(tensor) for tensor in outputs) or sources
        units = tuple(unit_of(*each) for each in zip(rows.widths, sources, targets, strict=True))
        num_topk = rows.tensors[2].shape[1] if table is not None else 1
        turns = _occurrence(rows.tensors[2]) if table is not None and table.choices > 1 else None
        self._turns = turns  # a kernel that was launched may not have read it yet
        addresses = tuple(
            self._address(each)
            for each in (
                *(table.entries if table is not None else None, turns, sent.hits),
                *(sent.positions, sent.tokens, sent.origins),
            )
        )
        static = len(outputs) > 0
        routed = None if table is None else (table.choices, num_topk, rows.tensors[2].dtype)
        return (
            kernels.dispatch,
            ("dispatch", rows.widths, units, routed, rows.has_ids, static, phases),
            plan.programs,
            (
                *(sources, targets, self._bases, row_plan.offset_units, self._bases[self._me]),
                *(self._shared.data_ptr(), self._local.data_ptr(), *addresses, 0 if refused else rows.num_tokens),
                *(self._base_stamp if self.counted else stamp, signature, int(Code.REFUSED) if refused else 0),
                *(self._limit, table.first_turn if table is not None else 0),
                *(len(table.entries) if table is not None else 0, self._me, rows.eligible, sent.rows),
                *(plan.recv_flags_at, plan.recv_heads_at, plan.recv_at, plan.region_stride),
            ),
            lambda: {
                "WIDTHS": rows.widths,
                "UNITS": units,
                "BLOCKS": _blocks(rows.widths, units),
                "NUM": len(sources),
                "ROUTED": table is not None,
                "CHOICES": table.choices if table is not None else 1,
                "TOPK": num_topk,
                "PAD": max(2, 1 << (num_topk - 1).bit_length()),
                "IDS": _type(torch.int64 if table is None else rows.tensors[2].dtype),
                "FILLS": _fills(units, rows.has_ids),
                "WORLD": plan.world_size,
                "STATIC": static,
                "COUNTED": self.counted,
                "PUT": phases[0],
                "TAKE": phases[1],
                "CLOCK": self._clock,
            },
        )

    def _row_plan(self, widths: tuple[int, ...]) -> RowPlan:
        found = self._row_plans.get(widths)
        if found is None:
            found = self._row_plans[widths] = plan_rows(self.plan.region_bytes, widths)
        return found

    def _new(self, length: int) -> torch.Tensor:
        return torch.empty(length, dtype=torch.int32, device=self._device)

    def _address(self, tensor: torch.Tensor | None) -> int:
        """Of the data; some address that is never read where there is none."""
        return (tensor.data_ptr() if tensor is not None else 0) or self._bases[self._me]


def _entries_of(routing: Routing) -> torch.Tensor:
    head = np.stack([np.where(routing.available, np.maximum(routing.counts, 1), 0), routing.replicated], axis=1)
    return torch.from_numpy(np.concatenate([head, routing.candidates], axis=1).astype(np.int32))


def _blocks(widths: Sequence[int], units: Sequence[int]) -> tuple[int, ...]:
    return tuple(block_of(width, unit, _MOST_AT_ONCE) for width, unit in zip(widths, units, strict=True))


def _occurrence(ids: torch.Tensor) -> torch.Tensor:
    """For each id how many equal ones stand before it, in row order: replicas take turns by it. On the ids' device."""
    ordered, order = ids.reshape(-1).sort(stable=True)
    places = torch.arange(len(ordered), dtype=torch.int32, device=ids.device)
    begins = torch.ones(len(ordered), dtype=torch.bool, device=ids.device)
    begins[1:] = ordered[1:] != ordered[:-1]
    starts = torch.where(begins, places, 0).cummax(0).values
    return torch.empty_like(places).index_copy_(0, order, places - starts)


def _type(dtype: torch.dtype) -> Any:
    """The dtype as Triton names it."""
    return getattr(tl, dtype_name(dtype))


def _sum_block(hidden: int) -> int:
    return min(_MOST_AT_ONCE, 1 << max(0, hidden - 1).bit_length())


def _fills(units: Sequence[int], has_ids: bool) -> tuple[int, ...]:
    """What an unused row has in every element, by tensor: all bits set for ids, which is -1."""
    return tuple((255 if unit == 1 else -1) if has_ids and index == _IDS_AT else 0 for index, unit in enumerate(units))
