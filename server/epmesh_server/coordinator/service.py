"""The coordinator's gRPC services: protos in and out, everything else is the engine's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, Unauthenticated
from epmesh.grpc_errors import abort
from epmesh.placement import Placement
from epmesh.v1 import discovery_service_pb2 as discovery
from epmesh.v1 import group_service_pb2 as groups
from epmesh.v1 import membership_service_pb2 as membership
from epmesh_server.access import check_node
from epmesh_server.coordinator.engine import Engine
from epmesh_server.coordinator.outbox import Outbox
from epmesh_server.coordinator.peers import check_advertised
from epmesh_server.coordinator.settings import CoordinatorSettings
from epmesh_server.coordinator.wire import (
    command_to_proto,
    groups_to_proto,
    registration_from_proto,
    report_from_proto,
)
from epmesh_server.join_token import check_token, read_token
from epmesh_server.membership.actions import Command, Done, NodeGranted
from epmesh_server.membership.events import CreateGroup, DestroyGroup, Event, RegisterNode, SetPlacement
from epmesh_server.secure_server import caller_of

_HELLO_TIMEOUT_S = 5.0
_FLUSH_TIMEOUT_S = 1.0
_MAX_ODD = 256
# A stream that breaks looks for a moment like one whose client said that it is done.
_BROKEN_TOO_S = 0.1

_log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class Encoder:
    """Encodes commands. What goes to many nodes is one object, encoded once."""

    def __init__(self) -> None:
        self._last: tuple[Command | None, bytes] = (None, b"")

    def __call__(self, command: Command) -> bytes:
        """The command as a message of the control stream."""
        last, encoded = self._last
        if command is not last:
            encoded = command_to_proto(command).SerializeToString()
            self._last = command, encoded
        return encoded


class Services:
    """Membership, discovery and groups of one mesh."""

    def __init__(self, engine: Engine, settings: CoordinatorSettings, mesh_id: str) -> None:
        self._engine = engine
        self._settings = settings
        self._mesh_id = mesh_id
        self._encode = Encoder()
        self._odd: deque[str] = deque(maxlen=_MAX_ODD)  # addresses that were complained about

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What to add to a server. Not by the generated functions: views are sent as bytes that are encoded already."""
        unary, encoded = _unary, _as_it_is
        return [
            _handler(
                membership.DESCRIPTOR.services_by_name["MembershipService"].full_name,
                RegisterNode=unary(self.register_node, membership.RegisterNodeRequest),
                NodeSession=grpc.stream_stream_rpc_method_handler(
                    self.node_session, membership.NodeSessionRequest.FromString, encoded
                ),
            ),
            _handler(
                discovery.DESCRIPTOR.services_by_name["DiscoveryService"].full_name,
                GetView=grpc.unary_unary_rpc_method_handler(
                    self.get_view, discovery.GetViewRequest.FromString, encoded
                ),
                WatchViews=grpc.unary_stream_rpc_method_handler(
                    self.watch_views, discovery.WatchViewsRequest.FromString, encoded
                ),
            ),
            _handler(
                groups.DESCRIPTOR.services_by_name["GroupService"].full_name,
                CreateGroup=unary(self.create_group, groups.CreateGroupRequest),
                DestroyGroup=unary(self.destroy_group, groups.DestroyGroupRequest),
                ListGroups=unary(self.list_groups, groups.ListGroupsRequest),
                SetExpertPlacement=unary(self.set_expert_placement, groups.SetExpertPlacementRequest),
            ),
        ]

    # Membership --------------------------------------------------------------------------------------------------

    async def register_node(
        self, request: membership.RegisterNodeRequest, context: Context
    ) -> membership.RegisterNodeResponse:
        """Gives a node its slot and lease."""
        slot = request.slot if request.HasField("slot") else None
        await _refuse_impostor(context, request.node_id)
        await self._refuse_uninvited(context, request)
        await self._look_at_address(context, request)

        def event(call: int) -> Event:
            return RegisterNode(call, registration_from_proto(request), slot)

        granted = await self._call(context, event)
        assert isinstance(granted, NodeGranted)
        return membership.RegisterNodeResponse(
            slot=granted.slot,
            mesh_id=self._mesh_id,
            stride=self._settings.stride,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            lease_s=self._settings.lease_s,
        )

    async def _refuse_uninvited(self, context: Context, request: membership.RegisterNodeRequest) -> None:
        """Ends the registration of a node that is new to the mesh and does not show its join token."""
        path = self._settings.join_token_file
        if path is None or self._engine.knows(request.node_id):
            return
        try:
            check_token(request.node_id, request.join_token, read_token(path))
        except Unauthenticated as error:
            _log.warning("register.refused: %s", error)
            await abort(context, error)
        except InvalidRequest as error:  # nothing is wrong with the node: it may try again
            _log.error("register.failed: %s", error)
            await abort(context, MeshUnavailable("the coordinator cannot read its own join token; see its log"))

    async def _look_at_address(self, context: Context, request: membership.RegisterNodeRequest) -> None:
        try:
            odd = check_advertised(request.node_id, request.address, context.peer())
        except InvalidRequest as error:
            await abort(context, error)
        if odd is not None and odd not in self._odd:
            self._odd.append(odd)
            _log.warning("register.odd: %s", odd)

    async def node_session(self, requests: AsyncIterator[membership.NodeSessionRequest], context: Context) -> None:
        """A node's control stream."""
        hello = await self._hello(context)
        await _refuse_impostor(context, self._engine.node_id(hello.slot))
        session, outbox = self._engine.open_session(hello.slot, hello.incarnation, hello.epoch)
        orderly = False
        reading = asyncio.create_task(self._read(session, context))
        writing = asyncio.create_task(self._write(outbox, context))
        ending = asyncio.create_task(_ended(outbox))
        tasks = (reading, writing, ending)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
                await asyncio.sleep(_BROKEN_TOO_S)  # cancelled here where the stream broke
                orderly = True
                return
            error = writing.result() if writing.done() else ending.result()
        except InvalidRequest as exc:
            error = exc
        finally:
            for task in tasks:
                task.cancel()
            self._engine.close_session(session, orderly=orderly)
            await asyncio.gather(*tasks, return_exceptions=True)
        await abort(context, error)

    async def _hello(self, context: Context) -> membership.Hello:
        first = None
        with contextlib.suppress(TimeoutError):
            first = await asyncio.wait_for(context.read(), _HELLO_TIMEOUT_S)
        if not isinstance(first, membership.NodeSessionRequest) or first.WhichOneof("report") != "hello":
            await abort(context, InvalidRequest("the first message of a control stream must be hello, sent at once"))
        return first.hello

    async def _read(self, session: int, context: Context) -> None:
        """Takes reports in until the node ends its side.

        Raises:
            InvalidRequest: a report is garbage.
        """
        while isinstance(request := await context.read(), membership.NodeSessionRequest):
            report = report_from_proto(session, request)
            if report is not None:
                self._engine.submit(report)

    async def _write(self, outbox: Outbox, context: Context) -> EpmeshError:
        """Sends commands until the coordinator ends the stream; returns why it does."""
        while not isinstance(command := await outbox.get(), EpmeshError):
            await context.write(self._encode(command))
        return command

    # Discovery ---------------------------------------------------------------------------------------------------

    async def get_view(self, request: discovery.GetViewRequest, context: Context) -> bytes:
        """The last committed view; epoch 0 before the first."""
        clock = discovery.GetViewResponse(time_unix_s=time.time())
        return self._engine.board.encoded + clock.SerializeToString()  # messages that follow each other are merged

    async def watch_views(self, request: discovery.WatchViewsRequest, context: Context) -> AsyncIterator[bytes]:
        """The current view and every later one, or only the newest for those who read slowly."""
        epoch = request.after_epoch if request.mesh_id in {"", self._mesh_id} else 0
        while True:
            try:
                await self._engine.board.after(epoch)
            except MeshUnavailable as error:
                await abort(context, error)
            epoch = self._engine.view.epoch
            yield self._engine.board.encoded

    # Groups ------------------------------------------------------------------------------------------------------

    async def create_group(self, request: groups.CreateGroupRequest, context: Context) -> groups.CreateGroupResponse:
        """Makes a group; answers when it is committed."""
        ranks = tuple(request.ranks)
        epoch = await self._operate(context, lambda call: CreateGroup(call, request.request_id, request.name, ranks))
        return groups.CreateGroupResponse(epoch=epoch)

    async def destroy_group(self, request: groups.DestroyGroupRequest, context: Context) -> groups.DestroyGroupResponse:
        """Removes a group; answers when that is committed."""
        epoch = await self._operate(context, lambda call: DestroyGroup(call, request.request_id, request.name))
        return groups.DestroyGroupResponse(epoch=epoch)

    async def list_groups(self, request: groups.ListGroupsRequest, context: Context) -> groups.ListGroupsResponse:
        """The groups of the committed view."""
        return groups.ListGroupsResponse(groups=groups_to_proto(self._engine.view))

    async def set_expert_placement(
        self, request: groups.SetExpertPlacementRequest, context: Context
    ) -> groups.SetExpertPlacementResponse:
        """Replaces the placement of one layer; answers when it is committed."""

        def event(call: int) -> Event:
            return SetPlacement(call, request.request_id, *Placement.from_proto(request.placement))

        return groups.SetExpertPlacementResponse(epoch=await self._operate(context, event))

    async def _operate(self, context: Context, event: Callable[[int], Event]) -> int:
        done = await self._call(context, event)
        assert isinstance(done, Done)
        return done.epoch

    async def _call(self, context: Context, event: Callable[[int], Event]) -> NodeGranted | Done:
        try:
            return await self._engine.call(event)
        except EpmeshError as error:
            await abort(context, error)


async def _refuse_impostor(context: Context, node_id: str | None) -> None:
    """Ends a call that acts for another node than the caller's certificate is for."""
    if node_id is None:
        return  # the machine refuses it
    try:
        check_node(node_id, caller_of(context))
    except Unauthenticated as error:
        await abort(context, error)


async def _ended(outbox: Outbox) -> EpmeshError:
    """Returns why the coordinator ends a stream, once its node had time to read what was sent before."""
    error = await outbox.ended()
    await asyncio.sleep(_FLUSH_TIMEOUT_S)
    return error


def _handler(name: str, **methods: grpc.RpcMethodHandler[Any, Any]) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler(name, methods)


def _unary(behaviour: Callable[..., Any], request: Any) -> grpc.RpcMethodHandler[Any, Any]:
    return grpc.unary_unary_rpc_method_handler(behaviour, request.FromString, _serialize)


def _serialize(message: Any) -> bytes:
    encoded: bytes = message.SerializeToString()
    return encoded


def _as_it_is(encoded: bytes) -> bytes:
    return encoded
