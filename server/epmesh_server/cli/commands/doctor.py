"""`epmesh doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from epmesh_server.cli.options import DEFAULT_DATA_DIR, parse_size


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
        typer.Option(
            envvar="EPMESH_DATA_DIR", help="Where a coordinator keeps its log.", show_default=DEFAULT_DATA_DIR
        ),
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
