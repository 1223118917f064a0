"""The commands and their options. What they do stands in the modules beside this one, imported when needed."""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from epmesh.errors import EpmeshError
from epmesh.tls import tls_files
from epmesh_server.cli import certs
from epmesh_server.cli.logs import LogLevel, configure_logging
from epmesh_server.cli.options import (
    AddressArgument,
    ClientTlsOption,
    LevelOption,
    TokenOption,
    parse_size,
    refuse_beside,
    refuse_without_ranks,
    take_service_links,
    tls_dir_beside,
)
from epmesh_server.hosted.options import DEFAULT_DRAIN_S, HostedRanks, parse_hold

_DATA_DIR = "$XDG_STATE_HOME/epmesh/coordinator-PORT"
_SERVICE, _COORDINATOR = "This node", "The coordinator beside it (without --coordinator)"
_RANKS = "Hosted ranks (with --ranks)"
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Expert-parallel all-to-all as a service: node services, a coordinator, and what they know.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(certs.app, name="certs")


class BenchOf(enum.Enum):
    """What `epmesh bench` times."""

    EXCHANGE = "exchange"
    ROUTER = "router"
    ATTACH = "attach"


def main() -> None:
    """Runs the command of `sys.argv`. An `EpmeshError` becomes one line on stderr and exit code 1."""
    for name, value in take_service_links(os.environ).items():
        print(
            f"epmesh: {name}={value} is not used: Kubernetes sets it for a service of that name; "
            "`enableServiceLinks: false` in the pod's spec stops that",
            file=sys.stderr,
        )
    try:
        app()
    except EpmeshError as exc:
        print(f"epmesh: {type(exc).__name__}: {exc}", file=sys.stderr)
        raise SystemExit(1) from None


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(envvar="EPMESH_HOST", help="Address to listen on.", rich_help_panel=_SERVICE)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="EPMESH_PORT", help="Port; 0 takes a free one.", rich_help_panel=_SERVICE)
    ] = 7400,
    node_id: Annotated[
        str | None,
        typer.Option(
            envvar="EPMESH_NODE_ID",
            help="Name of the node, unique among live ones.",
            show_default="as in its certificate, else hostname:port",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    slot: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_SLOT", help="Take the place of a dead node with another name.", rich_help_panel=_SERVICE
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            envvar="EPMESH_COORDINATOR",
            metavar="HOST:PORT[,HOST:PORT]",
            help="Where a coordinator runs, or several of which one leads; without it one is started beside this node.",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            envvar="EPMESH_ADVERTISE",
            metavar="HOST[:PORT]",
            help="Where others reach this node.",
            show_default="what it listens on; if that is everything, its address towards the coordinator",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    link_host: Annotated[
        str | None,
        typer.Option(
            envvar="EPMESH_LINK_HOST",
            help="Address of this host for links between ranks.",
            show_default="--advertise",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    buffer_bytes: Annotated[
        str,
        typer.Option(
            envvar="EPMESH_BUFFER_BYTES",
            metavar="SIZE",
            help="Most one rank may send another in one exchange: 64MiB, 1GiB, ... Only what is touched costs memory.",
            rich_help_panel=_SERVICE,
        ),
    ] = "1GiB",
    runtime_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="EPMESH_RUNTIME_DIR",
            help="Directory for unix sockets, this user's alone.",
            show_default="a fresh one, removed at the end",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    tls_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="EPMESH_TLS_DIR",
            help="Directory with ca.crt, tls.crt and tls.key (see `epmesh certs`): callers must show who they are.",
            show_default="no TLS",
            rich_help_panel=_SERVICE,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="EPMESH_INSECURE",
            help="Allow a --host that others can reach, though nothing authenticates them.",
            rich_help_panel=_SERVICE,
        ),
    ] = False,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="EPMESH_METRICS_PORT",
            help="Where Prometheus finds /metrics, in plain HTTP; 0: nowhere.",
            rich_help_panel=_SERVICE,
        ),
    ] = 0,
    coordinator_tls_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="EPMESH_COORDINATOR_TLS_DIR",
            help="Its certificates; needed with --tls-dir.",
            show_default="no TLS",
            rich_help_panel=_COORDINATOR,
        ),
    ] = None,
    coordinator_port: Annotated[
        int, typer.Option(envvar="EPMESH_COORDINATOR_PORT", help="Its port.", rich_help_panel=_COORDINATOR)
    ] = 7401,
    coordinator_metrics_port: Annotated[
        int,
        typer.Option(
            envvar="EPMESH_COORDINATOR_METRICS_PORT", help="Its --metrics-port.", rich_help_panel=_COORDINATOR
        ),
    ] = 0,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="EPMESH_DATA_DIR",
            help="Where its log is kept.",
            show_default=_DATA_DIR,
            rich_help_panel=_COORDINATOR,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_STRIDE",
            help="Most ranks a node may have; fixed when the log is new.",
            show_default="8",
            rich_help_panel=_COORDINATOR,
        ),
    ] = None,
    min_nodes: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_MIN_NODES",
            help="Fewest nodes a view may have.",
            show_default="half of the last view's",
            rich_help_panel=_COORDINATOR,
        ),
    ] = None,
    ranks: Annotated[
        int,
        typer.Option(
            envvar="EPMESH_RANKS",
            help="Ranks to run here, each a process of its own, restarted when it ends.",
            rich_help_panel=_RANKS,
        ),
    ] = 0,
    experts: Annotated[
        str,
        typer.Option(
            envvar="EPMESH_EXPERTS",
            metavar="MODULE:FACTORY",
            help="They serve routers: factory(comm) returns experts(layer, hidden_states, topk_weights, topk_ids).",
            show_default="they wait for epmesh.attach",
            rich_help_panel=_RANKS,
        ),
    ] = "",
    num_experts: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_NUM_EXPERTS",
            help="Logical experts of the model.",
            show_default="every row goes to every rank",
            rich_help_panel=_RANKS,
        ),
    ] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            envvar="EPMESH_HOLD",
            metavar="EXPERTS;...",
            help="Experts of each local rank: 0-7;8-15, or 0,3,5-7;1,2. One may be held by several.",
            show_default="contiguous blocks over --world-size ranks",
            rich_help_panel=_RANKS,
        ),
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_WORLD_SIZE",
            help="Ranks of the whole mesh to wait for.",
            show_default="--ranks",
            rich_help_panel=_RANKS,
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            envvar="EPMESH_TENSOR_PARALLEL_SIZE",
            help="Consecutive ranks that hold the same tokens.",
            rich_help_panel=_RANKS,
        ),
    ] = 1,
    max_tokens_per_rank: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_MAX_TOKENS_PER_RANK",
            help="Most tokens of a dispatch in static mode.",
            show_default="no static mode",
            rich_help_panel=_RANKS,
        ),
    ] = None,
    exchange_timeout: Annotated[
        float,
        typer.Option(
            envvar="EPMESH_EXCHANGE_TIMEOUT",
            metavar="SECONDS",
            help="How long a call waits for other ranks.",
            rich_help_panel=_RANKS,
        ),
    ] = 30.0,
    device: Annotated[
        str,
        typer.Option(
            envvar="EPMESH_DEVICE",
            help="Of every rank; cuda gives local rank k the device cuda:k.",
            rich_help_panel=_RANKS,
        ),
    ] = "cpu",
    threads: Annotated[
        int, typer.Option(envvar="EPMESH_THREADS", help="Threads of torch in each rank.", rich_help_panel=_RANKS)
    ] = 1,
    join_token_file: TokenOption = None,
    drain: Annotated[
        float,
        typer.Option(
            envvar="EPMESH_DRAIN",
            metavar="SECONDS",
            help="At the end, how long requests that were taken in may take. A second Ctrl-C cuts them off.",
            rich_help_panel=_RANKS,
        ),
    ] = DEFAULT_DRAIN_S,
    log_level: LevelOption = LogLevel.INFO,
) -> None:
    """Run the node service of this host, and ranks beside it where --ranks says so.

    Ranks on this host join it with epmesh.join("HOST:PORT"). Without --coordinator a coordinator is started beside it
    and kept alive; further nodes are then started with --coordinator. The order does not matter. Ctrl-C ends all of it.
    """
    from epmesh_server.cli import serving
    from epmesh_server.node import NodeSettings

    configure_logging(log_level)
    if coordinator is not None:
        refuse_beside(context, coordinator)
    hosted = None
    if ranks:
        hosted = HostedRanks(
            count=ranks,
            experts=experts,
            num_experts=num_experts,
            hold=None if hold is None else parse_hold(hold),
            world_size=world_size,
            tensor_parallel_size=tensor_parallel_size,
            max_tokens_per_rank=max_tokens_per_rank,
            exchange_timeout_s=exchange_timeout,
            device=device,
            threads=threads,
            drain_s=drain,
            path=(str(Path.cwd()),),
            log_level=log_level.value,
        )
    else:
        refuse_without_ranks(context)
    serving.serve(
        NodeSettings(
            host=host,
            port=port,
            node_id=node_id,
            coordinator=coordinator or serving.address_beside(host, coordinator_port),
            runtime_dir=runtime_dir,
            buffer_bytes=parse_size(buffer_bytes),
            advertise=advertise,
            link_host=link_host,
            slot=slot,
            tls=tls_files(tls_dir),
            insecure=insecure,
            metrics_port=metrics_port or None,
            join_token_file=join_token_file,
        ),
        None
        if coordinator is not None
        else serving.CoordinatorOptions(
            host=host,
            port=coordinator_port,
            data_dir=data_dir,
            stride=stride,
            min_nodes=min_nodes,
            tls_dir=tls_dir_beside(tls_dir, coordinator_tls_dir),
            insecure=insecure,
            metrics_port=coordinator_metrics_port,
            join_token_file=join_token_file,
            log_level=log_level,
        ),
        hosted,
    )


@app.command()
def coordinator(
    host: Annotated[str, typer.Option(envvar="EPMESH_COORDINATOR_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="EPMESH_COORDINATOR_PORT", help="Port; 0 takes a free one.")] = 7401,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="EPMESH_DATA_DIR", help="Where its log is kept.", show_default=_DATA_DIR),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="EPMESH_STORE",
            metavar="etcd://HOST:PORT[,HOST:PORT][/PREFIX]",
            help="Keep the log in etcd instead of --data-dir: of several coordinators one leads, the others stand by.",
            show_default="--data-dir",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_STRIDE", help="Most ranks a node may have; fixed when the log is new.", show_default="8"
        ),
    ] = None,
    min_nodes: Annotated[
        int | None,
        typer.Option(
            envvar="EPMESH_MIN_NODES", help="Fewest nodes a view may have.", show_default="half of the last view's"
        ),
    ] = None,
    tls_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="EPMESH_TLS_DIR",
            help="Directory with ca.crt, tls.crt and tls.key (see `epmesh certs`): callers must show who they are.",
            show_default="no TLS",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="EPMESH_INSECURE",
            help="Allow a --host that others can reach, though nothing authenticates them.",
        ),
    ] = False,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar=["EPMESH_COORDINATOR_METRICS_PORT", "EPMESH_METRICS_PORT"],
            help="Where Prometheus finds /metrics, in plain HTTP; 0: nowhere.",
        ),
    ] = 0,
    join_token_file: TokenOption = None,
    log_level: LevelOption = LogLevel.INFO,
    supervisor: Annotated[int | None, typer.Option("--supervisor", hidden=True)] = None,
) -> None:
    """Run a coordinator alone.

    It decides who is in the mesh, and keeps that in a log: after a restart with the same --data-dir every node has its
    place again. Exchanges go on while it is away. With --store several may be started, on hosts of their own: when
    the one that leads is gone another takes over. Nodes are told of all of them by --coordinator HOST:PORT,HOST:PORT.
    """
    from epmesh_server.cli import serving

    configure_logging(log_level, prefix="coordinator | " if supervisor else "")
    options = serving.CoordinatorOptions(
        host=host,
        port=port,
        data_dir=data_dir,
        stride=stride,
        min_nodes=min_nodes,
        tls_dir=tls_dir,
        insecure=insecure,
        metrics_port=metrics_port,
        join_token_file=join_token_file,
        log_level=log_level,
        store=store,
    )
    serving.coordinate(options, supervisor)


@app.command()
def status(
    address: AddressArgument = "127.0.0.1:7400",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing every new view, until Ctrl-C.")] = False,
    tls_dir: ClientTlsOption = None,
) -> None:
    """Show who is in the mesh: nodes, ranks, devices, modes, groups and experts."""
    from epmesh_server.cli import status as status_command

    status_command.show(address, as_json=as_json, watch=watch, tls=tls_files(tls_dir))


@app.command()
def doctor(
    host: Annotated[str, typer.Option(envvar="EPMESH_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="EPMESH_PORT", help="Port of the node service.")] = 7400,
    node_id: Annotated[
        str | None, typer.Option(envvar="EPMESH_NODE_ID", help="Name of the node.", show_default="hostname:port")
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(envvar="EPMESH_COORDINATOR", metavar="HOST:PORT", help="Where the coordinator should be."),
    ] = None,
    coordinator_port: Annotated[
        int, typer.Option(envvar="EPMESH_COORDINATOR_PORT", help="Port of one beside this node.")
    ] = 7401,
    node: Annotated[
        str | None,
        typer.Option(
            envvar="EPMESH_NODE", metavar="HOST:PORT", help="A node service that should be reached from here."
        ),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(envvar="EPMESH_ADVERTISE", metavar="HOST[:PORT]", help="Where others reach this node.")
    ] = None,
    link_host: Annotated[
        str | None, typer.Option(envvar="EPMESH_LINK_HOST", help="Address of this host for links between ranks.")
    ] = None,
    buffer_bytes: Annotated[
        str,
        typer.Option(envvar="EPMESH_BUFFER_BYTES", metavar="SIZE", help="Most that one rank sends another at once."),
    ] = "1GiB",
    runtime_dir: Annotated[
        Path | None, typer.Option(envvar="EPMESH_RUNTIME_DIR", help="Directory for unix sockets.")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="EPMESH_DATA_DIR", help="Where a coordinator keeps its log.", show_default=_DATA_DIR),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="EPMESH_INSECURE", help="Allow a --host that others can reach.")
    ] = False,
    tls_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="EPMESH_TLS_DIR", help="Directory with ca.crt, tls.crt and tls.key.", show_default="no TLS"
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(envvar="EPMESH_RANKS", help="Ranks to run here.")] = 0,
    threads: Annotated[int, typer.Option(envvar="EPMESH_THREADS", help="Threads of torch in each rank.")] = 1,
    device: Annotated[
        str, typer.Option(envvar="EPMESH_DEVICE", help="Of every rank; cuda or cuda:k looks at GPUs too.")
    ] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document with all facts instead of tables.")
    ] = False,
) -> None:
    """Look for what keeps a node here from working with the others, and say what mends it.

    Takes the options and the environment of epmesh serve: run it where a node runs, or should run, also inside its
    container or pod. It changes nothing, takes some seconds, and ends with exit code 1 where it found errors.
    """
    from epmesh_server.cli import doctor as doctor_command
    from epmesh_server.cli.serving import default_data_dir
    from epmesh_server.doctor import Asked

    # Images set a data directory for every service; a node with its coordinator elsewhere keeps no log.
    log_dir = (data_dir or default_data_dir(coordinator_port)) if coordinator is None else None
    asked = Asked(
        host=host,
        port=port,
        node_id=node_id,
        coordinator=coordinator,
        coordinator_port=coordinator_port,
        node=node,
        advertise=advertise,
        link_host=link_host,
        buffer_bytes=parse_size(buffer_bytes),
        runtime_dir=runtime_dir,
        data_dir=log_dir,
        insecure=insecure,
        tls_dir=tls_dir,
        ranks=ranks,
        threads=threads,
        device=device,
    )
    raise SystemExit(doctor_command.examine(asked, as_json=as_json))


@app.command()
def health(
    address: AddressArgument = "127.0.0.1:7400",
    tls_dir: ClientTlsOption = None,
    ranks: Annotated[
        int, typer.Option(envvar="EPMESH_RANKS", help="Of the node, that must be in the view and answer.")
    ] = 0,
    alive: Annotated[
        bool, typer.Option("--alive", help="Only whether it answers: what is not ready need not be started anew.")
    ] = False,
) -> None:
    """Say whether a service is ready, by its exit code: for health checks of containers and pods."""
    from epmesh_server.cli import health as health_command

    if alive:
        health_command.check_alive(address, tls_files(tls_dir))
    else:
        health_command.check(address, tls_files(tls_dir), ranks)
    print("alive" if alive else "ready")


@app.command()
def demo() -> None:
    """Run a real mixture-of-experts model over two nodes, by ranks and by routers; ends with demo: PASS or FAIL."""
    from epmesh_server.cli.demo import run_demo

    raise SystemExit(run_demo())


@app.command()
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
