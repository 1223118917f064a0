"""``python -m benchmarks.gpu_exchange``: dispatch and combine on this machine's GPUs, beside what else moves rows.

Three parts. *Communicators*: one rank a GPU, in processes of their own that joined a mesh, in exact mode, in static
mode, and in static mode in a CUDA graph, in bf16 and with rows quantized to fp8. *Rivals*, from two GPUs on: NCCL's
all-gather/reduce-scatter and `all_to_all_single` with counts, in the same processes with the same rows, and a copy of
as many bytes to the next GPU as the ceiling. *Kernels*: several ranks in one process on the first GPU, each with a
stream, in one graph: these move rows within one GPU's memory, and measure no NVLink.

Every shape is checked before it is timed. Between runs a buffer larger than the L2 cache is overwritten. Bytes on the
wire are those that leave a rank for another, the mean over ranks; what a rank sends itself is not counted.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.gpu_chart import chart
from benchmarks.gpu_rivals import RIVALS, PeerCopy, nccl_group
from epmesh.communicator import Communicator
from epmesh.errors import InvalidRequest
from epmesh.layout import Topology, make_reach, make_routing
from epmesh.placement import linear_placement
from epmesh.testing import LocalMesh

_T = TypeVar("_T")
_FLUSH_BYTES = 128 << 20
_MOST_PROGRAMS = 128
_BLOCKS, _BLOCKS_A_ROW = 8, 4
_STAMP = 1 << 40


@dataclass(frozen=True, kw_only=True)
class GpuBenchPlan:
    """What is timed.

    Attributes:
        tokens: tokens a rank, one row of each table.
        shared: numbers of ranks that share the first GPU in the table of kernels.
        warmups, runs: calls before, and calls that count.
        routing: "uniform"; "zipf": expert e is wanted 1 / (e + 1) as often; "node-limited": a row's experts are in 4 of
            8 blocks.
        quantize: whether fp8 is timed besides.
        rivals: fewest ranks with which rivals are timed.
    """

    tokens: tuple[int, ...] = (1, 8, 32, 128, 512, 4096, 8192)
    shared: tuple[int, ...] = (1, 2, 4)
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    warmups: int = 10
    runs: int = 50
    routing: str = "uniform"
    quantize: bool = True
    rivals: int = 2

    def row_bytes(self, dtype: str = "bf16") -> int:
        """Hidden states (fp8: and their scales), fp32 weights, int64 ids."""
        wide = {"bf16": 2 * self.hidden, "fp8": self.hidden + self.hidden // 32}
        return wide[dtype] + 12 * self.topk

    def inputs(self, tokens: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random rows, weights and ids of one rank."""
        source = torch.Generator(device=device).manual_seed(1000 * tokens + rank)
        rows = torch.randn(tokens, self.hidden, generator=source, device=device).bfloat16()
        weights = torch.rand(tokens, self.topk, generator=source, device=device)
        return rows, weights, self._scores(tokens, source, device).argsort(dim=1)[:, : self.topk].contiguous()

    def _scores(self, tokens: int, source: torch.Generator, device: torch.device) -> torch.Tensor:
        """``[tokens, experts]``; the lowest ones are chosen."""
        scores = torch.rand(tokens, self.experts, generator=source, device=device)
        if self.routing == "zipf":  # the first of exponential clocks, which run as fast as experts are wanted
            return -scores.clamp_min(1e-12).log() * torch.arange(1, self.experts + 1, device=device)
        if self.routing == "node-limited":
            blocks = torch.rand(tokens, _BLOCKS, generator=source, device=device).argsort(dim=1)
            far = (blocks >= _BLOCKS_A_ROW).repeat_interleave(self.experts // _BLOCKS, dim=1)
            return scores + far
        return scores


@dataclass(frozen=True)
class Times:
    """Microseconds of one shape, medians of the slowest rank's.

    Attributes:
        what: the mode.
        bytes_moved: rows, weights and ids that left a rank for another: of communicators and rivals the mean over
            ranks, of kernels all ranks together.
        copy_us: as many bytes by one copy: to the next GPU, or within the one.
    """

    what: str
    ranks: int
    tokens: int
    dispatch_us: float
    combine_us: float
    bytes_moved: int = 0
    copy_us: float = 0.0


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_exchange", description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(GpuBenchPlan.tokens))
    parser.add_argument("--shared", type=int, nargs="*", default=list(GpuBenchPlan.shared))
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), help="ranks that join, one a GPU")
    parser.add_argument("--runs", type=int, default=GpuBenchPlan.runs)
    parser.add_argument("--routing", choices=["uniform", "zipf", "node-limited"], default=GpuBenchPlan.routing)
    parser.add_argument("--no-fp8", action="store_true", help="bf16 alone")
    parser.add_argument("--rivals", type=int, default=GpuBenchPlan.rivals, help="fewest ranks with which to time them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise InvalidRequest("no CUDA device here")
    plan = GpuBenchPlan(
        tokens=tuple(given.tokens),
        shared=tuple(given.shared),
        runs=given.runs,
        routing=given.routing,
        quantize=not given.no_fp8,
        rivals=given.rivals,
    )
    conditions = _conditions(plan, given.ranks)
    print(conditions)
    print(
        f"{'mode':<44}{'ranks':>6}{'tokens':>8}{'dispatch':>10}{'combine':>10}{'moved MB':>10}{'copy':>8}", flush=True
    )
    found = []
    for each in itertools.chain(_communicators(plan, given.ranks), _kernels(plan)):
        found.append(each)
        print(_line(each), flush=True)
    print("'one GPU' rows move bytes within one GPU's memory: they say what the kernels cost, and nothing of NVLink")
    if given.ranks < 2:
        print(f"{given.ranks} rank joined: nothing crossed a wire, and figures say nothing of NVLink")
    if given.svg:
        given.svg.write_text(_chart(plan, given.ranks, found))
    if given.json:
        given.json.write_text(json.dumps({"conditions": conditions, "times": [asdict(each) for each in found]}))


def _conditions(plan: GpuBenchPlan, ranks: int) -> str:
    import triton

    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        f"{triton.__version__}; hidden {plan.hidden} bf16, top-{plan.topk} of {plan.experts} experts, "
        f"{plan.routing} routing; {plan.runs} runs after {plan.warmups}, medians of the slowest rank's microseconds; "
        f"{ranks} rank(s) joined, one a GPU\n"
        f"eager: from the call until the device is done, on the host's clock; graph: device events around a replay, an "
        f"empty one of which takes {_empty_graph():.1f}; copy: as many bytes within one GPU, by one copy"
    )


def _line(times: Times) -> str:
    moved = f"{times.bytes_moved / 1e6:.2f}" if times.bytes_moved else "-"
    copy = f"{times.copy_us:.1f}" if times.bytes_moved else "-"
    return (
        f"{times.what:<44}{times.ranks:>6}{times.tokens:>8}{times.dispatch_us:>10.1f}{times.combine_us:>10.1f}"
        f"{moved:>10}{copy:>8}"
    )


# Communicators ------------------------------------------------------------------------------------------------------


def _communicators(plan: GpuBenchPlan, ranks: int) -> Iterator[Times]:
    for tokens in plan.tokens if ranks else ():
        with (
            tempfile.TemporaryDirectory() as folder,
            LocalMesh(1, ranks, num_experts=plan.experts, device="cuda", max_tokens_per_rank=tokens) as mesh,
        ):
            results: list[Found] = mesh.run(time_rank, plan, tokens, Path(folder) / "nccl")
        for what in results[0].runs:
            runs = zip(*(each.runs[what] for each in results), strict=True)
            there, back = zip(*((max(a for a, _ in run), max(b for _, b in run)) for run in runs), strict=True)
            moved = sum(each.bytes_moved[what] for each in results) // ranks
            copy = max(each.copy_us.get(what, 0.0) for each in results)
            yield Times(what, ranks, tokens, statistics.median(there), statistics.median(back), moved, copy)


@dataclass
class Found:
    """What one rank measured, by mode.

    Attributes:
        runs: microseconds of every dispatch and combine.
        bytes_moved: that left this rank for others in a dispatch.
        copy_us: as many bytes to the next GPU.
    """

    runs: dict[str, list[tuple[float, float]]]
    bytes_moved: dict[str, int]
    copy_us: dict[str, float]


def time_rank(comm: Communicator, plan: GpuBenchPlan, tokens: int, meeting: Path) -> Found:
    """One rank's part."""
    bench = RankBench(comm, plan, tokens)
    for dtype in ("bf16", "fp8") if plan.quantize else ("bf16",):
        bench.time_epmesh(dtype)
    if comm.world_size >= plan.rivals:
        with nccl_group(meeting, comm.rank, comm.world_size, comm.device):
            bench.time_rivals()
    if comm.world_size > 1:
        bench.time_copies()
    comm.check()
    return bench.found


class RankBench:
    """Times one shape on one rank; every method is called by all ranks."""

    def __init__(self, comm: Communicator, plan: GpuBenchPlan, tokens: int) -> None:
        self._comm, self._plan = comm, plan
        self._inputs = plan.inputs(tokens, comm.rank, comm.device)
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=comm.device)
        self._barrier = self._make_barrier()
        self.found = Found({}, {}, {})

    def time_epmesh(self, dtype: str) -> None:
        """Exact, static, and static in a graph."""
        quantize = "fp8" if dtype == "fp8" else None
        moved = self._rows_moved() * self._plan.row_bytes(dtype)

        def there(static: bool) -> torch.Tensor:
            received = self._comm.dispatch(*self._inputs, static=static, quantize=quantize)
            return _widened(received) if quantize else received[0]

        def sent(static: bool) -> object:
            return self._comm.dispatch(*self._inputs, static=static, quantize=quantize)

        for static in (False, True):
            self._check(self._comm.combine(there(static)), exact=quantize is None)
        result = there(True)
        self._comm.combine(result)
        for static in (False, True):
            what = f"epmesh {'static' if static else 'exact'}, eager, {dtype}"
            results = [there(static)]
            self._comm.combine(results[0])
            self._record(what, moved, functools.partial(self._eager, sent, static, results[0]))
        graphs = self._graphs(lambda: there_only(sent), lambda: self._comm.combine(result))
        self._record(f"epmesh static, graph, {dtype}", moved, lambda: self._replayed(graphs))
        if dtype == "bf16":
            self._time_in_place(sent, moved)

    def _time_in_place(self, sent: Callable[[bool], object], moved: int) -> None:
        """Combines of results that stand where peers read them; the dispatch is as without."""
        result = self._comm.dispatch(*self._inputs, static=True)[0]
        buffer = self._comm.allocate_combine_input(result.shape, result.dtype, result.device)
        if buffer is None:
            raise InvalidRequest(f"no memory for results in place, of shape {list(result.shape)}")
        self._check(self._comm.combine(buffer.copy_(result)), exact=True)
        graphs = self._graphs(lambda: there_only(sent), lambda: self._comm.combine(buffer))
        self._record("epmesh static, graph, in place, bf16", moved, lambda: self._replayed(graphs))

    def time_rivals(self) -> None:
        """Over torch's default group."""
        for rival_class in RIVALS:
            rival = rival_class(self._inputs, self._comm.world_size, self._plan.experts)
            results = rival.results(rival.there())
            self._check(rival.back(results), exact=False)
            everything = rival_class is RIVALS[0]
            rows = len(self._inputs[0]) * (self._comm.world_size - 1) if everything else self._rows_moved()
            moved = rows * self._plan.row_bytes()
            back = functools.partial(rival.back, results)
            timed = functools.partial(_on_host, rival.there, functools.partial(_ignoring, back))
            self._record(f"{rival.name}, eager, bf16", moved, functools.partial(self._together, timed))
            if rival.graph:
                graphs = self._graphs(rival.there, back)
                self._record(f"{rival.name}, graph, bf16", moved, functools.partial(self._replayed, graphs))

    def time_copies(self) -> None:
        """The ceiling of each mode."""
        for what, size in self.found.bytes_moved.items():
            copies = PeerCopy(size, self._comm.rank, self._comm.world_size, self._comm.device)
            times = [self._together(functools.partial(_timed, copies.copy)) for _ in range(self._plan.warmups * 2)]
            self.found.copy_us[what] = statistics.median(times[self._plan.warmups :])

    def _record(self, what: str, moved: int, run: Callable[[], tuple[float, float]]) -> None:
        times = [run() for _ in range(self._plan.warmups + self._plan.runs)]
        self.found.runs[what] = times[self._plan.warmups :]
        self.found.bytes_moved[what] = moved

    def _make_barrier(self) -> torch.cuda.CUDAGraph:
        """An exchange of next to nothing, after which all devices go on at once."""
        rows, weights = torch.ones(1, 16, device=self._comm.device), torch.ones(1, 1, device=self._comm.device)
        self._little = rows, weights, torch.zeros(1, 1, dtype=torch.int64, device=rows.device)  # as long as the graph

        def meet() -> None:
            self._comm.combine(self._comm.dispatch(*self._little, static=True)[0])

        self._comm.combine(self._comm.dispatch(*self._inputs, static=True)[0])  # makes memory for the largest
        meet()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            meet()
        return graph

    def _replayed(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> tuple[float, float]:
        return _replayed(graphs, self._flush, self._barrier)

    def _eager(self, sent: Callable[[bool], object], static: bool, results: torch.Tensor) -> tuple[float, float]:
        return self._together(lambda: _on_host(lambda: sent(static), lambda _: self._comm.combine(results)))

    def _together(self, timed: Callable[[], _T]) -> _T:
        """Begins when all ranks are here, and with a cold L2 cache."""
        self._flush.zero_()
        torch.cuda.synchronize()
        if self._comm.world_size > 1:
            self._comm.all_reduce(torch.ones(1))
        return timed()

    def _graphs(self, there: Callable[[], object], back: Callable[[], object]) -> list[torch.cuda.CUDAGraph]:
        graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
        torch.cuda.synchronize()
        for graph, call in zip(graphs, (there, back), strict=True):
            with torch.cuda.graph(graph):
                call()
        return graphs

    def _check(self, sums: torch.Tensor, *, exact: bool) -> None:
        rows, _, ids = self._inputs
        _check_sums(sums, rows, ids, self._plan, self._comm.world_size, exact=exact)

    def _rows_moved(self) -> int:
        """Copies of this rank's rows that other ranks hold experts for."""
        return _rows_away(self._inputs[2], self._plan, self._comm.world_size, self._comm.rank)


def there_only(sent: Callable[[bool], object]) -> object:
    """A static dispatch."""
    return sent(True)


def _widened(received: tuple[Any, ...]) -> torch.Tensor:
    """Quantized rows in bf16."""
    values, scales = received[0], received[-1][-1]
    widened: torch.Tensor = (values.float() * scales.repeat_interleave(128, dim=1)).bfloat16()
    return widened


def _ignoring(call: Callable[[], object], _: object) -> object:
    return call()


def _on_host(there: Callable[[], Any], back: Callable[[Any], object]) -> tuple[float, float]:
    start = time.perf_counter()
    received = there()
    torch.cuda.synchronize()
    middle = time.perf_counter()
    back(received)
    torch.cuda.synchronize()
    return 1e6 * (middle - start), 1e6 * (time.perf_counter() - middle)


def _replayed(
    graphs: Sequence[torch.cuda.CUDAGraph], flush: torch.Tensor, barrier: torch.cuda.CUDAGraph | None = None
) -> tuple[float, float]:
    events: list[Any] = [_event() for _ in range(2 * len(graphs))]
    for number, graph in enumerate(graphs):
        flush.zero_()
        if barrier is not None:
            barrier.replay()
        events[2 * number].record()
        graph.replay()
        events[2 * number + 1].record()
    torch.cuda.synchronize()
    first, second = (1e3 * events[2 * n].elapsed_time(events[2 * n + 1]) for n in range(2))
    return first, second


def _check_sums(
    sums: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    plan: GpuBenchPlan,
    world_size: int,
    *,
    exact: bool = True,
) -> None:
    """Experts that give back their rows: every rank that a row went to adds it once."""
    holders = torch.div(ids * world_size, plan.experts, rounding_mode="floor")
    times = sum((holders == rank).any(dim=1).float() for rank in range(world_size))
    assert isinstance(times, torch.Tensor)
    wanted = (rows.double() * times[:, None]).to(torch.float64)
    if exact:
        right = torch.equal(sums, wanted.bfloat16())
    else:  # quantized to three bits behind the first, or rounded on the way
        right = float((sums.double() - wanted).norm()) <= 0.04 * float(wanted.norm())
    if not right:
        raise InvalidRequest("sums are wrong; nothing is timed")


def _rows_away(ids: torch.Tensor, plan: GpuBenchPlan, world_size: int, rank: int) -> int:
    holders = torch.div(ids * world_size, plan.experts, rounding_mode="floor")
    return sum(int((holders == other).any(dim=1).sum()) for other in range(world_size) if other != rank)


def _chart(plan: GpuBenchPlan, ranks: int, found: Sequence[Times]) -> str:
    shown = [each for each in found if each.ranks == ranks and "one GPU" not in each.what]
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {"dispatch": {}, "combine": {}}
    for each in shown:
        panels["dispatch"].setdefault(each.what, []).append((each.tokens, each.dispatch_us))
        panels["combine"].setdefault(each.what, []).append((each.tokens, each.combine_us))
    name = torch.cuda.get_device_name()
    title = f"{ranks} x {name}, hidden {plan.hidden}, top-{plan.topk} of {plan.experts}, {plan.routing} routing"
    return chart(title, panels)


# Kernels ------------------------------------------------------------------------------------------------------------


def _kernels(plan: GpuBenchPlan) -> Iterator[Times]:
    for world, tokens in itertools.product(plan.shared, plan.tokens):
        yield SharedGpu(plan, world, tokens).times()
        torch.cuda.empty_cache()


class SharedGpu:
    """Ranks of one process on the first GPU; all their programs fit on it at once, for they wait for each other."""

    def __init__(self, plan: GpuBenchPlan, world: int, tokens: int) -> None:
        from epmesh_server.kernels.lane import Lane, Rows, Table
        from epmesh_server.kernels.plan import ArenaPlan, region_bytes_for

        self._plan, self._world, self._tokens = plan, world, tokens
        device = torch.device("cuda:0")
        self._inputs = [plan.inputs(tokens, rank, device) for rank in range(world)]
        widths = (2 * plan.hidden, 4 * plan.topk, 8 * plan.topk)
        arena = ArenaPlan(
            world_size=world,
            rows=tokens,
            programs=min(_MOST_PROGRAMS // world, tokens),
            region_bytes=region_bytes_for(tokens, widths),
            out_bytes=2 * tokens * plan.hidden,
        )
        self._arenas = [torch.zeros(arena.total_bytes, dtype=torch.uint8, device=device) for _ in range(world)]
        bases = [each.data_ptr() for each in self._arenas]
        self._lanes = [Lane(arena, rank, bases, device, 10.0, _STAMP) for rank in range(world)]
        placement = linear_placement(plan.experts, range(world))
        self._rows = []
        for rank, inputs in enumerate(self._inputs):
            topology = Topology(tuple(range(world)), (0,) * world, rank)
            routing = make_routing(placement, topology, make_reach(topology, world))
            self._rows.append(Rows(inputs, Table.of(routing, device), (1 << world) - 1))
        self._streams = _streams(max(plan.shared))[:world]
        self._sent: list[Any] = []

    def times(self) -> Times:
        """Checks, captures, and times."""
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda:0")
        self._make_room()
        self._back(self._there())
        graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
        torch.cuda.synchronize()
        with torch.cuda.graph(graphs[0]):
            received = self._there()
        with torch.cuda.graph(graphs[1]):
            sums = self._back(received)
        runs = [_replayed(graphs, flush) for _ in range(self._plan.warmups + self._plan.runs)][self._plan.warmups :]
        for lane, total, (rows, _, ids) in zip(self._lanes, sums, self._inputs, strict=True):
            if lane.report() is not None:
                raise InvalidRequest(f"a kernel reports {lane.report()}")
            _check_sums(total, rows, ids, self._plan, self._world)
        moved = self._bytes_moved()
        return Times(
            "static, graph, one GPU",
            self._world,
            self._tokens,
            statistics.median(run[0] for run in runs),
            statistics.median(run[1] for run in runs),
            moved,
            _copy_us(moved, flush, self._plan) if moved else 0.0,
        )

    def _make_room(self) -> None:
        """Has each stream's pool hold what a call allocates: getting memory would wait for kernels that wait."""
        for rank, stream in enumerate(self._streams):
            with torch.cuda.stream(stream):
                room = [each.new_empty(2 * self._world, *each.shape) for each in self._inputs[rank]]
            del room
        torch.cuda.synchronize()

    def _there(self) -> list[torch.Tensor]:
        self._sent, received = [], []

        def dispatch(rank: int) -> None:
            sent, outputs = self._lanes[rank].dispatch_static(self._rows[rank], 1, self._tokens)
            self._sent.append(sent)
            received.append(outputs[0])

        self._side_by_side(dispatch)
        return received

    def _back(self, received: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        sums: list[torch.Tensor] = []
        self._side_by_side(lambda rank: sums.append(self._lanes[rank].combine(received[rank], self._sent[rank], 1)))
        return sums

    def _side_by_side(self, launch: Callable[[int], None]) -> None:
        current = torch.cuda.current_stream()
        for rank, stream in enumerate(self._streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                launch(rank)
        for stream in self._streams:
            current.wait_stream(stream)

    def _bytes_moved(self) -> int:
        rows = sum(_rows_away(ids, self._plan, self._world, rank) for rank, (_, _, ids) in enumerate(self._inputs))
        return rows * self._plan.row_bytes()


@functools.cache
def _streams(count: int) -> list[Any]:
    """Made once: torch hands out the same few again and again, and among them the one that graphs are captured on."""
    make: Any = torch.cuda.Stream
    return [make() for _ in range(count)]


def _copy_us(size: int, flush: torch.Tensor, plan: GpuBenchPlan) -> float:
    source = torch.empty(size, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source)
    times = []
    for _ in range(plan.warmups + plan.runs):
        flush.zero_()
        times.append(_timed(lambda: target.copy_(source)))
    return statistics.median(times[plan.warmups :])


def _empty_graph() -> float:
    graph, nothing = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda:0")
    nothing.add_(0)
    with torch.cuda.graph(graph):
        nothing.add_(0)
    busy = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda:0")
    times = []
    for _ in range(50):
        busy.zero_()  # so that the graph is queued before the device comes to it, as where exchanges are timed
        times.append(_timed(graph.replay))
    return statistics.median(times)


def _timed(call: Callable[[], Any]) -> float:
    before, after = _event(), _event()
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return float(1e3 * before.elapsed_time(after))


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


if __name__ == "__main__":
    main()
