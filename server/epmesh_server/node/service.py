"""The node service: puts the parts together, starts them, and takes them down again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from epmesh.addresses import join_address, split_address
from epmesh.channels import UNIX_PREFIX
from epmesh.curve import KeyPair
from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.tls import TlsFiles
from epmesh.v1 import (
    discovery_service_pb2_grpc,
    group_service_pb2_grpc,
    key_service_pb2_grpc,
    rank_service_pb2,
    rank_service_pb2_grpc,
    router_service_pb2_grpc,
    store_service_pb2_grpc,
)
from epmesh.version import VERSION
from epmesh_server.access import NODE_ACCESS, Role
from epmesh_server.exposure import warn_if_exposed
from epmesh_server.join_token import read_token
from epmesh_server.metrics_guard import MetricsGuard
from epmesh_server.metrics_server import maybe_metrics
from epmesh_server.node.admission import member_keys
from epmesh_server.node.advertising import advertised_address, choose_address, wants_route
from epmesh_server.node.buffers import BufferPool
from epmesh_server.node.client_keys import ClientKeyTable
from epmesh_server.node.commands import Commands
from epmesh_server.node.communicator_service import CommunicatorService
from epmesh_server.node.coordinator_channel import CoordinatorChannel
from epmesh_server.node.coordinator_link import CoordinatorLink
from epmesh_server.node.descriptors import DescriptorBroker
from epmesh_server.node.drivers import Drivers
from epmesh_server.node.follower import EpochFollower
from epmesh_server.node.front_caller import FrontCaller
from epmesh_server.node.groups import Groups
from epmesh_server.node.hosting import RankHosting
from epmesh_server.node.key_authority import KeyAuthority
from epmesh_server.node.key_service import KeyService
from epmesh_server.node.metrics import NodeCollector
from epmesh_server.node.rank_service import RankService
from epmesh_server.node.rank_stats import StatsBook
from epmesh_server.node.ranks import RankTable
from epmesh_server.node.registration import Enrolment, Identity, Registration
from epmesh_server.node.router_service import RouterService
from epmesh_server.node.rpc import TCP_SERVER_OPTIONS, UNIX_SERVER_OPTIONS
from epmesh_server.node.runtime_dir import DESCRIPTOR_SOCKET, GRPC_SOCKET, ZAP_SOCKET, runtime_directory
from epmesh_server.node.settings import NodeSettings
from epmesh_server.node.store import KeyValueStore, Store
from epmesh_server.node.views import Discovery, ViewBoard
from epmesh_server.revocation import Revocations
from epmesh_server.secure_server import add_port, check_own_certificate, make_server

_log = logging.getLogger(__name__)
HEALTH_SERVICES = ("", "epmesh.node")
OnRegistered = Callable[[Registration, str], None]
_STOP_GRACE_S = 0.4
_LEAVE_S = 0.3
_DRIVER_REGIONS = 4  # the memory of a rank and its driver, in regions of its exchange; only touched pages count


async def run_node(
    settings: NodeSettings,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
    on_registered: OnRegistered = lambda *_: None,
) -> None:
    """Runs a node service until `stop` is set.

    Args:
        on_ready: called with the bound ``host:port`` once everything listens; the coordinator may still be away.
        on_registered: called once the coordinator accepted the node for the first time, with the registration and the
            address of the unix socket that ranks of this host may join at; it may refuse with `InvalidRequest`, which
            ends the service.

    Raises:
        InvalidRequest: the port is in use, a directory cannot be used, or the coordinator refuses the node for good.
        Unauthenticated: the coordinator does not take this node's word.
    """
    with runtime_directory(settings.runtime_dir) as directory:
        node = Node(settings, directory, on_registered)
        try:
            on_ready(await node.start())
            await node.run_until(stop)
        finally:
            await asyncio.shield(node.close())


class Node:
    """One node service on one event loop: `start`, `run_until`, `close`."""

    def __init__(
        self,
        settings: NodeSettings,
        directory: Path,
        on_registered: OnRegistered = lambda *_: None,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._board = ViewBoard()
        self._enrolment = Enrolment()
        self._enrolment.on_first = lambda first: on_registered(first, f"{UNIX_PREFIX}{directory / GRPC_SOCKET}")
        self._pair = KeyPair.generate() if settings.curve else None
        self._client_keys = ClientKeyTable()
        self._revocations = None if settings.tls is None else Revocations(settings.tls)
        if self._revocations is not None:
            self._revocations.on_change(partial(self._client_keys.end_revoked, self._revocations))
        self._table = RankTable(curve=settings.curve)
        self._store = KeyValueStore()
        self._pool = BufferPool(settings.region_bytes)
        self._follower = EpochFollower(self._table, self._board, self._store, self._pool)
        self._stats = StatsBook()
        self._hosting = RankHosting(
            self._table, self._follower, self._board, self._enrolment, pair=self._pair, stats=self._stats
        )
        self._caller = FrontCaller(self._pair)
        self._drivers = Drivers(
            self._table, self._board, self._enrolment, self._hosting.died, _DRIVER_REGIONS * settings.region_bytes
        )
        self._communicators = CommunicatorService(
            self._drivers,
            self._enrolment,
            self._caller,
            descriptor_socket=str(directory / DESCRIPTOR_SOCKET),
            budget_bytes=_DRIVER_REGIONS * settings.region_bytes,
        )
        self._health = health.aio.HealthServicer()
        self._channel = CoordinatorChannel(settings.coordinators, settings.tls)
        self._commands = Commands(self._table, self._board, self._follower, self._hosting, self._enrolment)
        self._link = CoordinatorLink(self._channel, self._commands)
        self._table.on_change = self._link.ranks_changed
        self._hosting.on_links = self._link.links_changed
        self._groups = Groups(self._channel, self._board)
        self._router = RouterService(self._board, self._own_slot, self._caller)
        self._identity = Identity(settings.node_id or "", secrets.randbits(63) | 1, "", VERSION)
        self._servers: list[grpc.aio.Server] = []
        self.metrics_address = ""
        self._exit = contextlib.AsyncExitStack()

    async def start(self) -> str:
        """Binds everything; returns the bound ``host:port``.

        Raises:
            InvalidRequest: a port or path cannot be bound.
        """
        self._exit.push_async_callback(self._channel.close)
        self._exit.callback(self._follower.close)
        self._exit.callback(self._caller.close)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._pair is not None:
            path = self._directory / ZAP_SOCKET
            authority = KeyAuthority(path, self._pair, self._board, self._client_keys)
            self._exit.push_async_callback(authority.close)
        bound = await self._listen_tcp()
        await self._listen_unix()
        broker = DescriptorBroker(
            self._directory / DESCRIPTOR_SOCKET, self._table, self._board, self._pool, self._drivers
        )
        self._exit.callback(broker.close)
        collector = NodeCollector(
            self._table,
            self._board,
            self._stats,
            self._drivers,
            {"router": self._router.budget, "driver": self._communicators.budget},
            coordinator_reachable=lambda: self._link.connected,
        )
        tls, guard = self._settings.tls, None
        if self._settings.metrics_tls and tls is not None and self._revocations is not None:
            guard = MetricsGuard(tls, self._revocations)
        metrics = maybe_metrics(self._settings.host, self._settings.metrics_port, collector.registry(), guard)
        self.metrics_address = await self._exit.enter_async_context(metrics)
        return bound

    async def run_until(self, stop: asyncio.Event) -> None:
        """Follows the coordinator until `stop` is set.

        Raises:
            EpmeshError: the coordinator refused the node for good.
        """
        expiring = asyncio.create_task(self._client_keys.expire())
        following = asyncio.create_task(self._link.run(self._present))
        stopped = asyncio.create_task(stop.wait())
        serving = asyncio.create_task(self._report_health())
        tasks = [following, stopped, serving, expiring]
        if self._revocations is not None:
            tasks.append(asyncio.create_task(self._revocations.watch()))
        try:
            await asyncio.wait((following, stopped), return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
        finally:
            _log.info("node %s: stop.started", self._identity.node_id)
            # Ranks hear of it before the coordinator can commit anything without them.
            self._hosting.end_all(self._farewell())
            await self._link.leave(_LEAVE_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Ends every rank's membership and closes everything; idempotent and bounded in time."""
        await self._hosting.close(self._farewell())
        await asyncio.gather(*(server.stop(_STOP_GRACE_S) for server in self._servers))
        await self._exit.aclose()
        _log.info("node %s: stop.complete", self._identity.node_id)

    async def _present(self) -> Identity:
        """Who the node is, with the address that is right now."""
        _, port = split_address(self._identity.address, "advertise")
        if wants_route(self._settings):
            address = await advertised_address(self._settings, port)
            if address != self._identity.address:
                _log.info("node %s: others reach it at %s", self._identity.node_id, address)
                self._identity = replace(self._identity, address=address)
        return self._identity

    def describe(self) -> rank_service_pb2.DescribeNodeResponse:
        """Who the node is and where its unix sockets are."""
        registration = self._enrolment.current
        return rank_service_pb2.DescribeNodeResponse(
            node_id=self._identity.node_id,
            incarnation=self._identity.incarnation,
            slot=registration.slot if registration else 0,
            registered=registration is not None,
            mesh_id=registration.mesh_id if registration else "",
            grpc_socket=str(self._directory / GRPC_SOCKET),
            descriptor_socket=str(self._directory / DESCRIPTOR_SOCKET),
            coordinator_address=self._channel.address,
            link_host=self._settings.link_host or split_address(self._identity.address, "advertise")[0],
            version=self._identity.version,
            coordinator_reachable=self._link.connected,
            curve=self._settings.curve,
            zap_socket=str(self._directory / ZAP_SOCKET) if self._settings.curve else "",
            recent_waits=self._stats.recent_waits(),
        )

    async def _listen_tcp(self) -> str:
        settings = self._settings
        warn_if_exposed("node service", settings.host, settings.tls)
        server = make_server(TCP_SERVER_OPTIONS, NODE_ACCESS, self._revocations)
        self._add_services(server, RankService(self.describe, None, self._board))
        port = _bind(server, join_address(settings.host, settings.port), settings.tls)
        bound = join_address(settings.host, port)
        self._identity = _identity(settings, port, self._identity.incarnation)
        await self._begin(server)
        return bound

    async def _listen_unix(self) -> None:
        path = self._directory / GRPC_SOCKET
        path.unlink(missing_ok=True)
        server = grpc.aio.server(options=UNIX_SERVER_OPTIONS)
        self._add_services(server, RankService(self.describe, self._hosting, self._board, self._client_keys))
        store_service_pb2_grpc.add_StoreServiceServicer_to_server(Store(self._store), server)
        _bind(server, f"{UNIX_PREFIX}{path}", None)
        path.chmod(0o600)
        await self._begin(server)

    def _add_services(self, server: grpc.aio.Server, ranks: RankService) -> None:
        rank_service_pb2_grpc.add_RankServiceServicer_to_server(ranks, server)
        discovery_service_pb2_grpc.add_DiscoveryServiceServicer_to_server(Discovery(self._board), server)
        group_service_pb2_grpc.add_GroupServiceServicer_to_server(self._groups, server)
        keys = KeyService(self._client_keys, self._is_member_key, curve=self._settings.curve)
        key_service_pb2_grpc.add_KeyServiceServicer_to_server(keys, server)
        router_service_pb2_grpc.add_RouterServiceServicer_to_server(self._router, server)
        self._communicators.add_to(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    def _is_member_key(self, key: bytes) -> bool:
        return self._pair is not None and key in member_keys(self._board.view, self._pair.public)

    def _own_slot(self) -> int | None:
        registration = self._enrolment.current
        return registration.slot if registration else None

    async def _begin(self, server: grpc.aio.Server) -> None:
        await server.start()
        self._servers.append(server)

    async def _report_health(self) -> None:
        """SERVING once the node is registered and knows a view; not again before both are so after a change."""
        while True:
            change = self._board.next_change  # one that comes while health is set must not be missed
            serving = self._enrolment.current is not None and self._board.view is not None
            status = health_pb2.HealthCheckResponse
            await self._set_health(status.SERVING if serving else status.NOT_SERVING)
            await change.wait()

    async def _set_health(self, status: int) -> None:
        for service in HEALTH_SERVICES:
            await self._health.set(service, status)

    def _farewell(self) -> EpmeshError:
        return MeshUnavailable(f"node service {self._identity.node_id} is shutting down")


def _bind(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    try:
        return add_port(server, address, tls)
    except RuntimeError as exc:
        raise InvalidRequest(
            f"cannot listen at {address}: it is in use, or not an address of this host; choose another --port or --host"
        ) from exc


def _identity(settings: NodeSettings, port: int, incarnation: int) -> Identity:
    node_id = settings.node_id
    if settings.tls is not None:
        node_id = check_own_certificate(settings.tls, Role.NODE, node_id)
    return Identity(
        node_id=node_id or f"{socket.gethostname()}:{port}",
        incarnation=incarnation,
        address=choose_address(settings, port, ()),
        version=VERSION,
        slot=settings.slot,
        curve=settings.curve,
        join_token=b"" if settings.join_token_file is None else read_token(settings.join_token_file),
    )
