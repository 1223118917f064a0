"""``epmesh bench``: dispatch and combine beside all-gather/reduce-scatter over Gloo, in one run on this machine.

The peer is what vLLM does by default (AgRs): every rank gets every row of every rank, and what the experts made of them
is summed by a reduce-scatter. Both move the same inputs and are checked against each other before they are timed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from epmesh.errors import InvalidRequest

if TYPE_CHECKING:
    import torch

    from epmesh_server.ranks.communicator import JoinedCommunicator

_TOLERANCE = {
    "float32": 1e-4,
    "bfloat16": 6e-2,
}  # of sums of topk terms of size one, rounded once per node and once more


@dataclass(frozen=True)
class BenchPlan:
    """What is timed.

    Attributes:
        tokens: tokens a rank, one row of the table each.
        warmups, runs: calls before, and calls that count.
        tls: whether the mesh is secured: everything between its nodes is encrypted.
    """

    nodes: int = 2
    ranks: int = 4
    tokens: tuple[int, ...] = (1, 32, 128, 512)
    hidden: int = 1024
    topk: int = 8
    experts: int = 64
    dtype: str = "bfloat16"
    warmups: int = 5
    runs: int = 30
    tls: bool = False

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks", "hidden", "topk", "experts", "runs"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.tokens or min(self.tokens) < 0:
            raise InvalidRequest(f"tokens are {self.tokens}; give one or more numbers of 0 or more")
        if self.topk > self.experts:
            raise InvalidRequest(f"topk is {self.topk} of {self.experts} experts; it cannot be more")
        if self.dtype not in _TOLERANCE:
            raise InvalidRequest(f"dtype is {self.dtype!r}; use one of {', '.join(_TOLERANCE)}")


@dataclass(frozen=True)
class BenchRow:
    """One line of the result. Milliseconds are medians over runs of the slowest rank's time; bytes are of one pair."""

    tokens: int
    dispatch_ms: float
    combine_ms: float
    agrs_ms: float
    sent_bytes: int
    floor_bytes: int

    @property
    def ratio(self) -> float:
        """How many times faster than AgRs."""
        return self.agrs_ms / (self.dispatch_ms + self.combine_ms)


def run_bench(plan: BenchPlan, *, as_json: bool = False) -> list[BenchRow]:
    """Runs and prints."""
    from epmesh_server.testing.local_mesh import LocalMesh

    console = Console(file=sys.stderr if as_json else sys.stdout)
    console.print(
        f"bench: {plan.nodes} nodes x {plan.ranks} ranks on this machine, hidden {plan.hidden} {plan.dtype}, "
        f"top-{plan.topk} of {plan.experts} experts, {plan.runs} runs after {plan.warmups}"
        f"{', secured' if plan.tls else ''}"
    )
    rows = []
    with LocalMesh(plan.nodes, plan.ranks, num_experts=plan.experts, tls=plan.tls) as mesh:
        for tokens in plan.tokens:
            rows.append(_summary(tokens, mesh.run(time_rank, plan, tokens)))
            console.print(f"bench: {tokens} tokens a rank: {rows[-1].ratio:.1f}x faster than all-gather/reduce-scatter")
    if as_json:
        print(json.dumps({"plan": asdict(plan), "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}))
    else:
        console.print(_table(rows))
        console.print("times: medians of the slowest rank")
        console.print(
            "bytes: one dispatch + combine of all ranks, handed to the sockets between nodes; floor: rows, ids, weights"
        )
    return rows


def time_rank(comm: JoinedCommunicator, plan: BenchPlan, tokens: int) -> dict[str, Any]:
    """One rank's part: seconds of every run, and bytes of one pair."""
    import torch

    torch.manual_seed(1000 * tokens + comm.rank)
    hidden = torch.randn(tokens, plan.hidden).to(getattr(torch, plan.dtype))
    weights = torch.rand(tokens, plan.topk)
    ids = torch.rand(tokens, plan.experts).argsort(dim=1)[:, : plan.topk]
    agrs = AgRs(comm)
    _check(comm, agrs, hidden, weights, ids, _TOLERANCE[plan.dtype])
    before = (comm.stats.bytes_sent, comm.stats.floor_bytes)
    received, _, _ = comm.dispatch(hidden, weights, ids)
    comm.combine(received)
    sent, floor = comm.stats.bytes_sent - before[0], comm.stats.floor_bytes - before[1]
    everything = agrs.gather(hidden, weights, ids)[0]

    def pair() -> tuple[float, float]:
        start = time.perf_counter()
        rows, _, _ = comm.dispatch(hidden, weights, ids)
        middle = time.perf_counter()
        comm.combine(rows)
        return middle - start, time.perf_counter() - middle

    def peer() -> tuple[float, float]:
        start = time.perf_counter()
        agrs.gather(hidden, weights, ids)
        agrs.scatter(everything)
        return time.perf_counter() - start, 0.0

    # In turn, so that what else the machine does falls on both alike.
    ours, theirs = [], []
    for _ in range(plan.warmups + plan.runs):
        ours.append(_timed(agrs, pair))
        theirs.append(_timed(agrs, peer))
    agrs.close()
    return {"ours": ours[plan.warmups :], "theirs": theirs[plan.warmups :], "sent": sent, "floor": floor}


class AgRs:
    """All-gather and reduce-scatter over Gloo among all ranks: vLLM's default exchange."""

    def __init__(self, comm: JoinedCommunicator) -> None:
        import torch
        import torch.distributed as dist

        timeout = timedelta(seconds=60)
        make_store: Any = getattr(dist, "TCPStore")  # noqa: B009  (not in torch's typed exports)
        store = make_store("127.0.0.1", 0, None, True, timeout, False) if comm.rank == 0 else None
        port = comm.broadcast(torch.tensor([store.port if store else 0]))
        self._store = store or make_store("127.0.0.1", int(port), None, False, timeout)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timeout
        self._group = gloo(self._store, comm.rank, comm.world_size, options)
        self._world_size = comm.world_size

    def gather(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's rows of each tensor, in rank order."""
        import torch

        outputs = []
        for tensor in tensors:
            output = torch.empty((self._world_size * len(tensor), *tensor.shape[1:]), dtype=tensor.dtype)
            self._group._allgather_base(output, tensor).wait()
            outputs.append(output)
        return outputs

    def scatter(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum over ranks."""
        import torch

        output = torch.empty((len(rows) // self._world_size, *rows.shape[1:]), dtype=rows.dtype)
        self._group._reduce_scatter_base(output, rows).wait()
        return output

    def barrier(self) -> None:
        """Lines all ranks up."""
        self._group.barrier().wait()

    def close(self) -> None:
        """Ends the group; rank 0's store last."""
        self.barrier()
        self._group.abort()


def _check(
    comm: JoinedCommunicator,
    agrs: AgRs,
    hidden: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    tolerance: float,
) -> None:
    """Both ways must give the same sums, with experts that scale their rows by their number."""
    import torch

    placement = comm.view.placement(None)
    assert placement is not None
    held = torch.zeros(placement.num_experts, dtype=torch.bool)
    held[list(placement.experts_of[comm.global_rank])] = True

    def experts(rows: torch.Tensor, row_weights: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
        mine = held[row_ids]
        scale = (row_weights * (row_ids + 1) / placement.num_experts * mine).sum(dim=1, keepdim=True)
        return (rows.float() * scale).to(rows.dtype)

    ours = comm.combine(experts(*comm.dispatch(hidden, weights, ids)))
    theirs = agrs.scatter(experts(*agrs.gather(hidden, weights, ids)))
    difference = float((ours.float() - theirs.float()).abs().max()) if ours.numel() else 0.0
    scale = float(theirs.float().abs().max()) if ours.numel() else 1.0
    if difference > tolerance * scale:
        raise InvalidRequest(f"the two ways differ by {difference:.3g} of {scale:.3g}; nothing is timed")


def _timed(agrs: AgRs, call: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    agrs.barrier()
    return call()


def _summary(tokens: int, results: list[dict[str, Any]]) -> BenchRow:
    def slowest(key: str, index: int) -> list[float]:
        return [max(times) for times in zip(*([run[index] for run in r[key]] for r in results), strict=True)]

    pairs = zip(*(r["ours"] for r in results), strict=True)
    slow_pairs = [max(run, key=sum) for run in pairs]
    return BenchRow(
        tokens=tokens,
        dispatch_ms=1e3 * statistics.median(d for d, _ in slow_pairs),
        combine_ms=1e3 * statistics.median(c for _, c in slow_pairs),
        agrs_ms=1e3 * statistics.median(slowest("theirs", 0)),
        sent_bytes=sum(r["sent"] for r in results),
        floor_bytes=sum(r["floor"] for r in results),
    )


def _table(rows: list[BenchRow]) -> Table:
    table = Table()
    for name in (
        "tokens a rank",
        "dispatch ms",
        "combine ms",
        "AgRs over Gloo ms",
        "faster",
        "bytes between nodes",
        "/ floor",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        over = f"{row.sent_bytes / row.floor_bytes:.3f}" if row.floor_bytes else "-"
        times = (f"{row.dispatch_ms:.2f}", f"{row.combine_ms:.2f}", f"{row.agrs_ms:.2f}", f"{row.ratio:.1f}x")
        table.add_row(str(row.tokens), *times, f"{row.sent_bytes:,}", over)
    return table
