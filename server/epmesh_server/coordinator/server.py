"""One coordinator process: log, engine and gRPC server, from start to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from epmesh.channels import COMMON, KEEPALIVE
from epmesh.errors import InvalidRequest
from epmesh_server.access import COORDINATOR_ACCESS, Role
from epmesh_server.coordinator.engine import Engine
from epmesh_server.coordinator.etcd_leader import lead
from epmesh_server.coordinator.etcd_store import EtcdStore
from epmesh_server.coordinator.log import FileStore, Store
from epmesh_server.coordinator.metrics import CoordinatorCollector
from epmesh_server.coordinator.service import Services
from epmesh_server.coordinator.settings import CoordinatorSettings
from epmesh_server.exposure import warn_if_exposed
from epmesh_server.membership import Membership, MeshCreated, Snapshot
from epmesh_server.metrics_guard import MetricsGuard
from epmesh_server.metrics_server import maybe_metrics
from epmesh_server.revocation import Revocations
from epmesh_server.secure_server import add_port, check_own_certificate, make_server

HEALTH_NAMES = ("", "epmesh.coordinator")
_STOP_GRACE_S = 0.2
_OPTIONS = (
    *COMMON,
    *KEEPALIVE,
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a share of its connections
    # Clients' pings would be punished otherwise.
    ("grpc.http2.min_ping_interval_without_data_ms", 100),
    ("grpc.http2.max_ping_strikes", 0),
)
_log = logging.getLogger(__name__)


class Coordinator:
    """A running coordinator; made by `open_coordinator`.

    Attributes:
        address: host:port where it answers.
        bound_port: the port that was bound.
        metrics_address: host:port of ``/metrics``; empty where there is none.
    """

    def __init__(self, engine: Engine, address: str, bound_port: int, metrics_address: str = "") -> None:
        self._engine = engine
        self.address = address
        self.bound_port = bound_port
        self.metrics_address = metrics_address

    async def run(self) -> None:
        """Decides until cancelled.

        Raises:
            MeshUnavailable: the log cannot be written any more.
        """
        await self._engine.run()


async def run_coordinator(settings: CoordinatorSettings, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
    """Runs a coordinator until `stop` is set, and ends within a second then.

    Args:
        settings: see there.
        stop: set it to stop; the nodes go on in their last epoch.
        on_ready: called once with host:port, when it answers there; with a store in etcd, when it leads.

    Raises:
        InvalidRequest: the port is taken, or the data directory or the log in etcd cannot be used.
        MeshUnavailable: the log cannot be written any more, or another coordinator may lead.
    """
    if settings.etcd is None:
        await _run(settings, None, stop, on_ready)
        return
    leadership = await lead(settings.etcd, f"{socket.gethostname()} process {os.getpid()}", stop)
    if leadership is None:
        return
    _log.info("coordinator leads at %s", settings.etcd)
    try:
        await _run(settings, EtcdStore(leadership), stop, on_ready, leadership.until_lost)
    finally:
        await asyncio.to_thread(leadership.close)


async def _run(
    settings: CoordinatorSettings,
    store: Store | None,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
    until_lost: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Until `stop`, or until one of the coordinator and `until_lost` raises."""
    async with open_coordinator(settings, store) as coordinator:
        running = [asyncio.ensure_future(coordinator.run())]
        if until_lost is not None:
            running.append(asyncio.ensure_future(until_lost()))
        stopping = asyncio.create_task(stop.wait())
        try:
            on_ready(coordinator.address)
            await asyncio.wait((*running, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (stopping, *running):
                task.cancel()
            results = await asyncio.gather(*running, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result


@contextlib.asynccontextmanager
async def open_coordinator(settings: CoordinatorSettings, store: Store | None = None) -> AsyncIterator[Coordinator]:
    """A coordinator that listens; it decides while its `run` runs.

    Args:
        settings: see there.
        store: instead of the log in `settings.data_dir`.

    Raises:
        InvalidRequest: the port is taken, or the data directory cannot be used.
    """
    if settings.tls is not None:
        check_own_certificate(settings.tls, Role.COORDINATOR)
    warn_if_exposed("coordinator", settings.host, settings.tls)
    held = store or FileStore(settings.data_dir)
    try:
        snapshot = load_mesh(held, settings.stride)
        machine = Membership(settings.membership, snapshot, time.monotonic())
        engine = Engine(machine, held)
        revocations = None if settings.tls is None else Revocations(settings.tls)
        server = make_server(_OPTIONS, COORDINATOR_ACCESS, revocations)
        server.add_generic_rpc_handlers(tuple(Services(engine, settings, snapshot.mesh_id).handlers()))
        service = await _add_health(server)
        port = bind(server, settings)
        await server.start()
        _log.info("coordinator.started at %s, mesh %s", settings.address(port), snapshot.mesh_id)
        collector = CoordinatorCollector(machine, engine.counters, lambda: held.num_bytes, time.monotonic)
        guard = None
        if settings.metrics_tls and settings.tls is not None and revocations is not None:
            guard = MetricsGuard(settings.tls, revocations)
        watching = None if revocations is None else asyncio.create_task(revocations.watch())
        try:
            async with maybe_metrics(settings.host, settings.metrics_port, collector.registry(), guard) as metrics:
                yield Coordinator(engine, settings.address(port), port, metrics)
        finally:
            if watching is not None:
                watching.cancel()
            await asyncio.shield(_stop(server, service))
    finally:
        held.close()


def load_mesh(store: Store, stride: int) -> Snapshot:
    """What the store holds; a new mesh where it is empty."""
    records = store.load()
    if not records:
        records = [MeshCreated(uuid.uuid4().hex, stride)]
        store.append(records)
    snapshot = Snapshot()
    for record in records:
        snapshot.apply(record)
    return snapshot


def bind(server: grpc.aio.Server, settings: CoordinatorSettings) -> int:
    """Binds the port and returns it.

    Raises:
        InvalidRequest: it is taken, or the host is not this machine's.
    """
    address = settings.address(settings.port)
    try:
        port = add_port(server, address, settings.tls)
    except RuntimeError:
        port = 0
    if port == 0:
        raise InvalidRequest(f"cannot listen at {address}: {_why(settings)}")
    return port


def _why(settings: CoordinatorSettings) -> str:
    """What the kernel says about the address; gRPC does not tell."""
    host = settings.host.strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return f"port {settings.port} is in use; stop what has it, or choose another with --port"
        return f"{exc.strerror}; choose an address of this machine with --host"
    return f"port {settings.port} was in use a moment ago; try again, or choose another with --port"


async def _add_health(server: grpc.aio.Server) -> health.aio.HealthServicer:
    service = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    for name in HEALTH_NAMES:
        await service.set(name, health_pb2.HealthCheckResponse.SERVING)
    return service


async def _stop(server: grpc.aio.Server, service: health.aio.HealthServicer) -> None:
    await service.enter_graceful_shutdown()
    await server.stop(_STOP_GRACE_S)
