"""``python -m benchmarks.gpu_exchange``: dispatch and combine on this machine's GPUs, beside a copy of as many bytes.

Two parts. *Communicators*: one rank a GPU, in processes of their own that joined a mesh, in exact mode, in static
mode, and in static mode in a CUDA graph. *Kernels*: several ranks in one process on the first GPU, each with a stream,
in one graph: these move rows within one GPU's memory, and measure no NVLink.

Every shape is checked before it is timed. Between runs a buffer larger than the L2 cache is overwritten.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from epmesh.communicator import Communicator
from epmesh.errors import InvalidRequest
from epmesh.layout import Topology, make_reach, make_routing
from epmesh.placement import linear_placement
from epmesh.testing import LocalMesh

_FLUSH_BYTES = 128 << 20
_MOST_PROGRAMS = 128
_STAMP = 1 << 40


@dataclass(frozen=True, kw_only=True)
class GpuBenchPlan:
    """What is timed.

    Attributes:
        tokens: tokens a rank, one row of each table.
        shared: numbers of ranks that share the first GPU in the table of kernels.
        warmups, runs: calls before, and calls that count.
    """

    tokens: tuple[int, ...] = (1, 8, 32, 128, 512, 4096)
    shared: tuple[int, ...] = (1, 2, 4)
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    warmups: int = 10
    runs: int = 50

    @property
    def row_bytes(self) -> int:
        """bf16 hidden states, fp32 weights, int64 ids."""
        return 2 * self.hidden + 12 * self.topk

    def inputs(self, tokens: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random rows, weights and ids of one rank."""
        source = torch.Generator(device=device).manual_seed(1000 * tokens + rank)
        rows = torch.randn(tokens, self.hidden, generator=source, device=device).bfloat16()
        weights = torch.rand(tokens, self.topk, generator=source, device=device)
        scores = torch.rand(tokens, self.experts, generator=source, device=device)
        return rows, weights, scores.argsort(dim=1)[:, : self.topk].contiguous()


@dataclass(frozen=True)
class Times:
    """Microseconds of one shape, medians of the slowest rank's.

    Attributes:
        what: the mode.
        bytes_moved: rows, weights and ids that left a rank for another, all ranks together.
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
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise InvalidRequest("no CUDA device here")
    plan = GpuBenchPlan(tokens=tuple(given.tokens), shared=tuple(given.shared), runs=given.runs)
    conditions = _conditions(plan, given.ranks)
    print(conditions)
    print(
        f"{'mode':<32}{'ranks':>6}{'tokens':>8}{'dispatch':>10}{'combine':>10}{'moved MB':>10}{'copy':>8}", flush=True
    )
    found = []
    for each in itertools.chain(_communicators(plan, given.ranks), _kernels(plan)):
        found.append(each)
        print(_line(each), flush=True)
    print("'one GPU' rows move bytes within one GPU's memory: they say what the kernels cost, and nothing of NVLink")
    if given.json:
        given.json.write_text(json.dumps({"conditions": conditions, "times": [asdict(each) for each in found]}))


def _conditions(plan: GpuBenchPlan, ranks: int) -> str:
    import triton

    return (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        f"{triton.__version__}; hidden {plan.hidden} bf16, top-{plan.topk} of {plan.experts} experts; {plan.runs} runs "
        f"after {plan.warmups}, medians of the slowest rank's microseconds; {ranks} rank(s) joined, one a GPU\n"
        f"eager: from the call until the device is done, on the host's clock; graph: device events around a replay, an "
        f"empty one of which takes {_empty_graph():.1f}; copy: as many bytes within one GPU, by one copy"
    )


def _line(times: Times) -> str:
    moved = f"{times.bytes_moved / 1e6:.2f}" if times.bytes_moved else "-"
    copy = f"{times.copy_us:.1f}" if times.bytes_moved else "-"
    return (
        f"{times.what:<32}{times.ranks:>6}{times.tokens:>8}{times.dispatch_us:>10.1f}{times.combine_us:>10.1f}"
        f"{moved:>10}{copy:>8}"
    )


# Communicators ------------------------------------------------------------------------------------------------------


def _communicators(plan: GpuBenchPlan, ranks: int) -> Iterator[Times]:
    for tokens in plan.tokens if ranks else ():
        with LocalMesh(1, ranks, num_experts=plan.experts, device="cuda", max_tokens_per_rank=tokens) as mesh:
            results = mesh.run(time_rank, plan, tokens)
        for what in results[0]:
            runs = [max(pair[0] for pair in run) for run in zip(*(each[what] for each in results), strict=True)]
            back = [max(pair[1] for pair in run) for run in zip(*(each[what] for each in results), strict=True)]
            yield Times(what, ranks, tokens, statistics.median(runs), statistics.median(back))


def time_rank(comm: Communicator, plan: GpuBenchPlan, tokens: int) -> dict[str, list[tuple[float, float]]]:
    """One rank's part: microseconds of every dispatch and combine, by mode."""
    rows, weights, ids = plan.inputs(tokens, comm.rank, comm.device)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=comm.device)

    def dispatch(static: bool) -> torch.Tensor:
        received: torch.Tensor = comm.dispatch(rows, weights, ids, static=static)[0]
        return received

    def eager(static: bool) -> tuple[float, float]:
        flush.zero_()
        torch.cuda.synchronize()
        if comm.world_size > 1:
            comm.all_reduce(torch.ones(1))
        return _on_host(lambda: dispatch(static), comm.combine)

    for static in (False, True):
        _check_sums(comm.combine(dispatch(static)), rows, ids, plan, comm.world_size)
    graphs, parts = _captured(lambda: dispatch(True), comm.combine)
    results = {
        "exact, eager": [eager(False) for _ in range(plan.warmups + plan.runs)],
        "static, eager": [eager(True) for _ in range(plan.warmups + plan.runs)],
        "static, graph": [_replayed(graphs, flush) for _ in range(plan.warmups + plan.runs)],
    }
    _check_sums(parts[1], rows, ids, plan, comm.world_size)
    comm.check()
    return {what: times[plan.warmups :] for what, times in results.items()}


def _on_host(there: Callable[[], torch.Tensor], back: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    start = time.perf_counter()
    received = there()
    torch.cuda.synchronize()
    middle = time.perf_counter()
    back(received)
    torch.cuda.synchronize()
    return 1e6 * (middle - start), 1e6 * (time.perf_counter() - middle)


def _captured(
    there: Callable[[], torch.Tensor], back: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[list[torch.cuda.CUDAGraph], list[torch.Tensor]]:
    """A graph of each half, and what each gives."""
    graphs, parts = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
    torch.cuda.synchronize()
    with torch.cuda.graph(graphs[0]):
        parts.append(there())
    with torch.cuda.graph(graphs[1]):
        parts.append(back(parts[0]))
    return graphs, parts


def _replayed(graphs: Sequence[torch.cuda.CUDAGraph], flush: torch.Tensor) -> tuple[float, float]:
    events: list[Any] = [_event() for _ in range(2 * len(graphs))]
    for number, graph in enumerate(graphs):
        flush.zero_()
        events[2 * number].record()
        graph.replay()
        events[2 * number + 1].record()
    torch.cuda.synchronize()
    first, second = (1e3 * events[2 * n].elapsed_time(events[2 * n + 1]) for n in range(2))
    return first, second


def _check_sums(sums: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, plan: GpuBenchPlan, world_size: int) -> None:
    """Experts that give back their rows: every rank that a row went to adds it once."""
    holders = torch.div(ids * world_size, plan.experts, rounding_mode="floor")
    times = sum((holders == rank).any(dim=1).float() for rank in range(world_size))
    assert isinstance(times, torch.Tensor)
    wanted = (rows.float() * times[:, None]).bfloat16()
    if not torch.equal(sums, wanted):
        raise InvalidRequest("sums are wrong; nothing is timed")


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
        moved = 0
        for rank, (_, _, ids) in enumerate(self._inputs):
            holders = torch.div(ids * self._world, self._plan.experts, rounding_mode="floor")
            others = [(holders == other).any(dim=1).sum() for other in range(self._world) if other != rank]
            moved += sum(int(count) for count in others) * self._plan.row_bytes
        return moved


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
