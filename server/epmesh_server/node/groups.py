"""GroupService of a node: changes go to the coordinator, what is known is answered here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from epmesh.errors import MeshUnavailable, from_rpc_error
from epmesh.grpc_errors import abort
from epmesh.v1 import group_service_pb2 as wire
from epmesh.v1 import group_service_pb2_grpc
from epmesh_server.node.coordinator_channel import CoordinatorChannel
from epmesh_server.node.rpc import seconds_left
from epmesh_server.node.views import ViewBoard

_MAX_TIMEOUT_S = 600.0
_Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Groups(group_service_pb2_grpc.GroupServiceServicer):
    """Forwards to the coordinator with the caller's deadline; typed errors pass through as they are."""

    def __init__(self, channel: CoordinatorChannel, board: ViewBoard) -> None:
        self._channel = channel
        self._board = board

    async def CreateGroup(self, request: wire.CreateGroupRequest, context: _Context) -> wire.CreateGroupResponse:
        """Makes a group."""
        return await self._forward(self._stub.CreateGroup, request, context)

    async def DestroyGroup(self, request: wire.DestroyGroupRequest, context: _Context) -> wire.DestroyGroupResponse:
        """Removes a group."""
        return await self._forward(self._stub.DestroyGroup, request, context)

    async def SetExpertPlacement(
        self, request: wire.SetExpertPlacementRequest, context: _Context
    ) -> wire.SetExpertPlacementResponse:
        """Replaces a placement."""
        return await self._forward(self._stub.SetExpertPlacement, request, context)

    async def ListGroups(self, request: wire.ListGroupsRequest, context: _Context) -> wire.ListGroupsResponse:
        """The groups of the newest view known here, none before the first; works while the coordinator is away."""
        return wire.ListGroupsResponse(groups=self._board.message.groups if self._board.message else ())

    @property
    def _stub(self) -> group_service_pb2_grpc.GroupServiceAsyncStub:
        return group_service_pb2_grpc.GroupServiceStub(self._channel.current)

    async def _forward(
        self, call: Callable[..., Awaitable[_Response]], request: _Request, context: _Context
    ) -> _Response:
        try:
            return await call(request, timeout=seconds_left(context, _MAX_TIMEOUT_S))
        except grpc.aio.AioRpcError as exc:
            await abort(context, from_rpc_error(exc, f"coordinator at {self._channel.address}"))
        except asyncio.CancelledError:
            # The channel was closed under the call, or the caller is gone; grpc.aio does not tell which.
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
            await abort(context, MeshUnavailable("the node turned to another coordinator during the call; try again"))
