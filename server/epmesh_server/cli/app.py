"""The commands together, and how their errors are told. Each stands in a module of `commands`."""

from __future__ import annotations

import os
import sys

import typer

from epmesh.errors import EpmeshError
from epmesh_server.cli import certs
from epmesh_server.cli.commands import clients, coordinator, doctor, serve, trials
from epmesh_server.cli.options import take_service_links

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Expert-parallel all-to-all as a service: node services, a coordinator, and what they know.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(certs.app, name="certs")
for command in (
    serve.serve,
    coordinator.coordinator,
    clients.status,
    doctor.doctor,
    clients.health,
    trials.demo,
    trials.bench,
):
    app.command()(command)


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
