"""`epmesh serve` and `epmesh coordinator`: services that run until a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epmesh.addresses import ANY_HOST, join_address
from epmesh.errors import InvalidRequest
from epmesh_server.cli.logs import LogLevel
from epmesh_server.cli.supervisor import Supervisor, die_with_parent
from epmesh_server.node import NodeSettings, run_node

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class CoordinatorOptions:
    """What the command line says of a coordinator; `None` leaves a setting to its default."""

    host: str
    port: int
    data_dir: Path | None
    stride: int | None
    min_nodes: int | None
    insecure: bool
    log_level: LogLevel

    @property
    def directory(self) -> Path:
        """Where the log is kept."""
        return self.data_dir if self.data_dir is not None else default_data_dir(self.port)

    def command(self) -> list[str]:
        """The command that runs it as a child of this process."""
        command = [sys.executable, "-m", "epmesh_server.cli", "coordinator", "--supervisor", str(os.getpid())]
        command += ["--host", self.host, "--port", str(self.port), "--data-dir", str(self.directory)]
        command += ["--log-level", self.log_level.value]
        if self.stride is not None:
            command += ["--stride", str(self.stride)]
        if self.min_nodes is not None:
            command += ["--min-nodes", str(self.min_nodes)]
        return [*command, "--insecure"] if self.insecure else command


def serve(settings: NodeSettings, beside: CoordinatorOptions | None) -> None:
    """Runs a node service, and a coordinator beside it where `beside` says so, until a signal.

    Raises:
        EpmeshError: it could not start, or the coordinator refused it for good.
    """
    if beside is not None and beside.port == 0:
        raise InvalidRequest("--coordinator-port is 0, and other nodes could not know it; choose a port")
    asyncio.run(_until_signal(lambda stop: _serve(settings, beside, stop)))


def coordinate(options: CoordinatorOptions, supervisor: int | None) -> None:
    """Runs a coordinator until a signal, or until the process `supervisor` is gone.

    Raises:
        EpmeshError: it could not start.
    """
    from epmesh_server.coordinator import CoordinatorSettings, run_coordinator

    if supervisor is not None:
        die_with_parent(supervisor)
    stride: dict[str, Any] = {} if options.stride is None else {"stride": options.stride}
    settings = CoordinatorSettings(
        host=options.host,
        port=options.port,
        data_dir=options.directory,
        min_nodes=options.min_nodes,
        insecure=options.insecure,
        **stride,
    )
    asyncio.run(_until_signal(lambda stop: run_coordinator(settings, stop, lambda _: None)))


def address_beside(host: str, port: int) -> str:
    """Where a node reaches the coordinator beside it."""
    return join_address("127.0.0.1" if host in ANY_HOST else host, port or 7401)


def default_data_dir(port: int) -> Path:
    """Where a coordinator keeps its log unless told: under $XDG_STATE_HOME, one directory a port."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state else Path.home() / ".local" / "state"
    return base / "epmesh" / f"coordinator-{port}"


async def _serve(settings: NodeSettings, beside: CoordinatorOptions | None, stop: asyncio.Event) -> None:
    if beside is None:
        await run_node(settings, stop, _ready)
        return
    async with Supervisor(beside.command(), "coordinator") as supervisor:
        node = asyncio.create_task(run_node(settings, stop, _ready))
        failed = asyncio.create_task(supervisor.failed())
        try:
            await asyncio.wait((node, failed), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.set()
            failed.cancel()
            await asyncio.gather(node, failed, return_exceptions=True)
        node.result()
        if not failed.cancelled():
            failed.result()


async def _until_signal(run: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run(stop)


def _ready(address: str) -> None:
    _log.info("node service listens at %s", address)
