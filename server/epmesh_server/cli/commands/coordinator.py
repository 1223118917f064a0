"""`epmesh coordinator`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epmesh_server.cli.logs import LogLevel, configure_logging
from epmesh_server.cli.options import DEFAULT_DATA_DIR, LevelOption, TokenOption, insecure_service, service_tls


def coordinator(
    host: Annotated[str, typer.Option(envvar="EPMESH_COORDINATOR_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="EPMESH_COORDINATOR_PORT", help="Port; 0 takes a free one.")] = 7401,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="EPMESH_DATA_DIR", help="Where its log is kept.", show_default=DEFAULT_DATA_DIR),
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
    tls_dir: Annotated[Path | None, service_tls()] = None,
    insecure: Annotated[bool, insecure_service()] = False,
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar=["EPMESH_COORDINATOR_METRICS_PORT", "EPMESH_METRICS_PORT"],
            help="Where Prometheus finds /metrics, in plain HTTP; 0: nowhere.",
        ),
    ] = 0,
    metrics_tls: Annotated[
        bool,
        typer.Option(
            "--metrics-tls",
            envvar="EPMESH_METRICS_TLS",
            help="/metrics over TLS, for those with a certificate of the mesh.",
        ),
    ] = False,
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
        metrics_tls=metrics_tls,
        join_token_file=join_token_file,
        log_level=log_level,
        store=store,
    )
    serving.coordinate(options, supervisor)
