"""`epmesh demo` and `epmesh bench`, which run a mesh of their own."""

from __future__ import annotations

import enum
from typing import Annotated

import typer


class BenchOf(enum.Enum):
    """What `epmesh bench` times."""

    EXCHANGE = "exchange"
    ROUTER = "router"
    ATTACH = "attach"


def demo() -> None:
    """Run a real mixture-of-experts model over two nodes, by ranks and by routers; ends with demo: PASS or FAIL."""
    from epmesh_server.cli.demo import run_demo

    raise SystemExit(run_demo())


def bench(
    nodes: Annotated[int, typer.Option(help="Node services.")] = 2,
    ranks: Annotated[int, typer.Option(help="Ranks of each.")] = 4,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens a rank; give it again for more rows.")] = None,
    hidden: Annotated[int, typer.Option(help="Elements of a row.")] = 1024,
    topk: Annotated[int, typer.Option(help="Experts a token.")] = 8,
    experts: Annotated[int, typer.Option(help="Logical experts.")] = 64,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32; of the exchange alone.")] = "bfloat16",
    runs: Annotated[int, typer.Option(help="Calls that count.")] = 30,
    tls: Annotated[bool, typer.Option("--tls", help="Of a secured mesh.")] = False,
    of: Annotated[BenchOf, typer.Option(help="What is timed.")] = BenchOf.EXCHANGE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time this machine, each way beside another one in the same run.

    exchange: dispatch and combine of joined ranks, beside all-gather/reduce-scatter over Gloo. router: a router's
    forward, beside a bare round trip of the same bytes. attach: dispatch + combine of attached ranks, beside joined.
    """
    from epmesh_server.cli.bench import BenchPlan, run_bench
    from epmesh_server.cli.bench_ways import bench_attach, bench_routers

    plan = BenchPlan(nodes, ranks, tuple(tokens or BenchPlan.tokens), hidden, topk, experts, dtype, runs=runs, tls=tls)
    {BenchOf.EXCHANGE: run_bench, BenchOf.ROUTER: bench_routers, BenchOf.ATTACH: bench_attach}[of](
        plan, as_json=as_json
    )
