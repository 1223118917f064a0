"""`epmesh status` and `epmesh health`, which ask a service."""

from __future__ import annotations

from typing import Annotated

import typer

from epmesh.tls import tls_files
from epmesh_server.cli.options import AddressArgument, ClientTlsOption


def status(
    address: AddressArgument = "127.0.0.1:7400",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing every new view, until Ctrl-C.")] = False,
    tls_dir: ClientTlsOption = None,
) -> None:
    """Show who is in the mesh: nodes, ranks, devices, modes, groups and experts."""
    from epmesh_server.cli import status as status_command

    status_command.show(address, as_json=as_json, watch=watch, tls=tls_files(tls_dir))


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
