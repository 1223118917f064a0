"""`epmesh serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epmesh.tls import tls_files
from epmesh_server.cli.logs import LogLevel, configure_logging
from epmesh_server.cli.options import (
    DEFAULT_DATA_DIR,
    LevelOption,
    TokenOption,
    insecure_service,
    parse_size,
    refuse_beside,
    refuse_without_ranks,
    service_tls,
    tls_dir_beside,
)
from epmesh_server.hosted.options import DEFAULT_DRAIN_S, HostedRanks, parse_hold

_SERVICE, _COORDINATOR = "This node", "The coordinator beside it (without --coordinator)"
_RANKS = "Hosted ranks (with --ranks)"


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
    tls_dir: Annotated[Path | None, service_tls(_SERVICE)] = None,
    insecure: Annotated[bool, insecure_service(_SERVICE)] = False,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="EPMESH_METRICS_PORT",
            help="Where Prometheus finds /metrics, in plain HTTP; 0: nowhere.",
            rich_help_panel=_SERVICE,
        ),
    ] = 0,
    metrics_tls: Annotated[
        bool,
        typer.Option(
            "--metrics-tls",
            envvar="EPMESH_METRICS_TLS",
            help="/metrics over TLS, for those with a certificate of the mesh; of the coordinator beside it, too.",
            rich_help_panel=_SERVICE,
        ),
    ] = False,
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
            show_default=DEFAULT_DATA_DIR,
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
            metrics_tls=metrics_tls,
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
            metrics_tls=metrics_tls,
            join_token_file=join_token_file,
            log_level=log_level,
        ),
        hosted,
    )
