"""`epmesh serve` and `epmesh coordinator`: services that run until a signal."""

from __future__ import annotations

import asyncio
import contextlib
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
from epmesh.tls import tls_files
from epmesh_server.cli.logs import LogLevel
from epmesh_server.cli.supervisor import Supervisor, die_with_parent
from epmesh_server.doctor import Asked, local_errors
from epmesh_server.hosted.options import HostedRanks
from epmesh_server.hosted.supervisor import HostedSupervisor, prepare_hosting
from epmesh_server.node import NodeSettings, run_node
from epmesh_server.node.registration import Registration
from epmesh_server.open_files import allow_open_files

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
    tls_dir: Path | None
    insecure: bool
    join_token_file: Path | None
    log_level: LogLevel
    metrics_port: int = 0
    metrics_tls: bool = False
    store: str | None = None

    @property
    def directory(self) -> Path:
        """Where the log is kept."""
        return self.data_dir if self.data_dir is not None else default_data_dir(self.port)

    def command(self) -> list[str]:
        """The command that runs it as a child of this process."""
        command = [sys.executable, "-m", "epmesh_server.cli", "coordinator", "--supervisor", str(os.getpid())]
        command += ["--host", self.host, "--port", str(self.port), "--data-dir", str(self.directory)]
        command += ["--log-level", self.log_level.value, "--metrics-port", str(self.metrics_port)]
        if self.metrics_tls:
            command.append("--metrics-tls")
        if self.stride is not None:
            command += ["--stride", str(self.stride)]
        if self.min_nodes is not None:
            command += ["--min-nodes", str(self.min_nodes)]
        if self.tls_dir is not None:
            command += ["--tls-dir", str(self.tls_dir)]
        if self.join_token_file is not None:
            command += ["--join-token-file", str(self.join_token_file)]
        return [*command, "--insecure"] if self.insecure else command


@dataclass(frozen=True)
class Signals:
    """What signals ask for: to stop, and, from the second on, to do so at once."""

    stop: asyncio.Event
    hurry: asyncio.Event

    def received(self) -> None:
        """A signal came."""
        (self.hurry if self.stop.is_set() else self.stop).set()


def serve(settings: NodeSettings, beside: CoordinatorOptions | None, hosted: HostedRanks | None = None) -> None:
    """Runs a node service, with a coordinator beside it and ranks of its own where they are asked for, until a signal.

    Raises:
        EpmeshError: it could not start, the coordinator refused it for good, or a hosted rank cannot start.
    """
    if beside is not None and beside.port == 0:
        raise InvalidRequest("--coordinator-port is 0, and other nodes could not know it; choose a port")
    _log_local_errors(settings, beside, hosted)
    allow_open_files()
    if hosted is not None:
        prepare_hosting()
    asyncio.run(_until_signal(lambda signals: _serve(settings, beside, hosted, signals)))


def coordinate(options: CoordinatorOptions, supervisor: int | None) -> None:
    """Runs a coordinator until a signal, or until the process `supervisor` is gone.

    Raises:
        EpmeshError: it could not start.
    """
    from epmesh_server.coordinator import CoordinatorSettings, run_coordinator

    if supervisor is not None:
        die_with_parent(supervisor)
    allow_open_files()
    stride: dict[str, Any] = {} if options.stride is None else {"stride": options.stride}
    settings = CoordinatorSettings(
        host=options.host,
        port=options.port,
        data_dir=options.directory,
        min_nodes=options.min_nodes,
        tls=tls_files(options.tls_dir),
        insecure=options.insecure,
        metrics_port=options.metrics_port or None,
        metrics_tls=options.metrics_tls,
        join_token_file=options.join_token_file,
        store=options.store,
        **stride,
    )
    asyncio.run(_until_signal(lambda signals: run_coordinator(settings, signals.stop, lambda _: None)))


def address_beside(host: str, port: int) -> str:
    """Where a node reaches the coordinator beside it."""
    return join_address("127.0.0.1" if host in ANY_HOST else host, port or 7401)


def default_data_dir(port: int) -> Path:
    """Where a coordinator keeps its log unless told: under $XDG_STATE_HOME, one directory a port."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state else Path.home() / ".local" / "state"
    return base / "epmesh" / f"coordinator-{port}"


def _log_local_errors(settings: NodeSettings, beside: CoordinatorOptions | None, hosted: HostedRanks | None) -> None:
    """What is wrong here already, so that nobody has to ask the doctor first. It ends no service."""
    asked = Asked(
        host=settings.host,
        port=settings.port,
        node_id=settings.node_id,
        advertise=settings.advertise,
        coordinator=settings.coordinator if beside is None else None,
        runtime_dir=settings.runtime_dir,
        data_dir=beside.directory if beside is not None else None,
        buffer_bytes=settings.buffer_bytes,
        ranks=hosted.count if hosted is not None else 0,
        device=hosted.device if hosted is not None else "cpu",
        insecure=settings.insecure,
        tls_dir=None if settings.tls is None else settings.tls.certificate.parent,
    )
    for finding in local_errors(asked):
        _log.error("%s: %s. %s Mend: %s", finding.cause, finding.seen, finding.why, finding.mend)


async def _serve(
    settings: NodeSettings, beside: CoordinatorOptions | None, hosted: HostedRanks | None, signals: Signals
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        failed = []
        if beside is not None:
            coordinator = await stack.enter_async_context(Supervisor(beside.command(), "coordinator"))
            failed.append(asyncio.create_task(coordinator.failed()))
        ranks = HostedSupervisor(hosted) if hosted is not None else None
        if ranks is not None:
            failed.append(asyncio.create_task(ranks.failed()))
        await _serve_node(settings, ranks, failed, signals)


async def _serve_node(
    settings: NodeSettings, ranks: HostedSupervisor | None, failed: list[asyncio.Task[None]], signals: Signals
) -> None:
    """Until a signal, or until one of `failed` is done or the node service ends; then ranks first, the node last."""

    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def ready(address: str) -> None:
        _log.info("node service listens at %s", address)
        listening.set_result(address)

    def registered(registration: Registration, local_address: str) -> None:
        if ranks is not None:
            ranks.start(local_address, registration.stride)

    end = asyncio.Event()
    node = asyncio.create_task(run_node(settings, end, ready, registered))
    stopped = asyncio.create_task(signals.stop.wait())
    try:
        await asyncio.wait((node, stopped, *failed), return_when=asyncio.FIRST_COMPLETED)
        if ranks is not None and not node.done() and not any(task.done() for task in failed):
            await ranks.stop(signals.hurry)
    finally:
        if ranks is not None:
            await ranks.kill()
        end.set()
        for task in (stopped, *failed):
            task.cancel()
        await asyncio.gather(node, stopped, *failed, return_exceptions=True)
    for task in (node, *failed):
        if not task.cancelled():
            task.result()


async def _until_signal(run: Callable[[Signals], Awaitable[None]]) -> None:
    signals = Signals(asyncio.Event(), asyncio.Event())
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, signals.received)
    await run(signals)
