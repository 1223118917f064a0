"""Options that several commands have, and what is checked about options together."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from epmesh.errors import InvalidRequest
from epmesh_server.cli.logs import LogLevel

DEFAULT_DATA_DIR = "$XDG_STATE_HOME/epmesh/coordinator-PORT"
TokenOption = Annotated[
    Path | None,
    typer.Option(
        "--join-token-file",
        envvar="EPMESH_JOIN_TOKEN_FILE",
        help="File with a secret: nodes that are new to the mesh show it to the coordinator.",
        show_default="none is needed",
    ),
]
AddressArgument = Annotated[
    str,
    typer.Argument(
        envvar="EPMESH_ADDRESS", metavar="[HOST:PORT]", help="A node service, or a coordinator.", show_default=True
    ),
]
ClientTlsOption = Annotated[
    Path | None,
    typer.Option(
        envvar="EPMESH_TLS_DIR",
        help="Directory with ca.crt, tls.crt and tls.key, where the mesh is secured.",
        show_default="no TLS",
    ),
]
LevelOption = Annotated[LogLevel, typer.Option(envvar="EPMESH_LOG_LEVEL", help="Least severe lines on stderr.")]


def service_tls(panel: str | None = None) -> Any:
    """``--tls-dir`` of a service."""
    return typer.Option(
        envvar="EPMESH_TLS_DIR",
        help="Directory with ca.crt, tls.crt and tls.key (see `epmesh certs`): callers must show who they are.",
        show_default="no TLS",
        rich_help_panel=panel,
    )


def insecure_service(panel: str | None = None) -> Any:
    """``--insecure`` of a service."""
    return typer.Option(
        "--insecure",
        envvar="EPMESH_INSECURE",
        help="Allow a --host that others can reach, though nothing authenticates them.",
        rich_help_panel=panel,
    )


def take_service_links(environment: MutableMapping[str, str]) -> dict[str, str]:
    """Takes variables out of `environment` that Kubernetes made, and returns them.

    In a pod, a service named ``epmesh`` is also ``EPMESH_PORT=tcp://10.96.0.7:7400``, which is an option's variable.
    """
    options = ("EPMESH_PORT", "EPMESH_COORDINATOR_PORT", "EPMESH_METRICS_PORT", "EPMESH_COORDINATOR_METRICS_PORT")
    names = [name for name in options if "://" in environment.get(name, "")]
    return {name: environment.pop(name) for name in names}


def tls_dir_beside(tls_dir: Path | None, coordinator_tls_dir: Path | None) -> Path | None:
    """The certificates of the coordinator beside a node: both are secured, or neither is."""
    if (tls_dir is None) != (coordinator_tls_dir is None):
        given, missing = ("--tls-dir", "--coordinator-tls-dir") if tls_dir else ("--coordinator-tls-dir", "--tls-dir")
        raise InvalidRequest(f"{given} without {missing}: the coordinator beside this node and the node need one each")
    return coordinator_tls_dir


def parse_size(text: str) -> int:
    """Bytes of ``4096``, ``64MiB``, ``1GiB`` and the like.

    Raises:
        InvalidRequest: it is something else.
    """
    units = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    digits = text.strip().rstrip("BbIiKkMmGg ")
    unit = text.strip()[len(digits) :].strip().lower()
    if not (digits.isascii() and digits.isdigit()) or unit not in units:
        raise InvalidRequest(f"size is {text!r}; write bytes as 4096, 64MiB or 1GiB")
    return int(digits) * units[unit]


def refuse_without_ranks(context: typer.Context) -> None:
    """Options of hosted ranks mean nothing where there are none."""
    names = (
        "experts", "num_experts", "hold", "world_size", "tensor_parallel_size", "max_tokens_per_rank",
        "exchange_timeout", "device", "threads", "drain",
    )  # fmt: skip
    given = _given(context, names)
    if given:
        raise InvalidRequest(f"{', '.join(given)}: this node hosts no ranks; say how many with --ranks N")


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """The options of those of the parameters `names` that the command line has."""
    return [
        f"--{name.replace('_', '-')}"
        for name in names
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]


def refuse_beside(context: typer.Context, coordinator: str) -> None:
    """Options of the coordinator beside the node mean nothing where there is none."""
    names = (
        "coordinator_port", "data_dir", "stride", "coordinator_tls_dir", "coordinator_metrics_port", "min_nodes",
    )  # fmt: skip
    given = _given(context, names)
    if given:
        raise InvalidRequest(f"{', '.join(given)}: the coordinator at {coordinator} has its own; leave this out")
