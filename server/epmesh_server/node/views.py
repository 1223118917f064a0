"""The newest committed view this node knows, and those who wait for the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc

from epmesh.v1 import discovery_service_pb2, discovery_service_pb2_grpc, view_pb2
from epmesh.version import VERSION
from epmesh.view import View, is_newer


class ViewBoard:
    """Holds the newest view. Waiters get the newest one, never a backlog; used on the event loop only."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.message: view_pb2.View | None = None
        self._changed = asyncio.Event()

    @property
    def epoch(self) -> int:
        """Epoch of the newest view; 0 before the first."""
        return self.view.epoch if self.view else 0

    def publish(self, message: view_pb2.View) -> View:
        """Makes `message` the newest view.

        Raises:
            InvalidRequest: it contradicts itself; the old view stays.
        """
        self.view = View.from_proto(message)
        self.message = message
        self._notify()
        return self.view

    def reset(self) -> None:
        """Forgets the view: the node belongs to another mesh now."""
        self.view = self.message = None
        self._notify()

    async def newer_than(self, epoch: int, mesh_id: str = "") -> view_pb2.View:
        """The newest view, once its epoch is larger than `epoch`, or it is of another mesh than `mesh_id`, if any."""
        while self.message is None or not is_newer(self.message, epoch, mesh_id):
            await self._changed.wait()
        return self.message

    @property
    def next_change(self) -> asyncio.Event:
        """Set by the next change from now on; taken before something is decided, it tells whether that still holds."""
        return self._changed

    async def changed(self) -> None:
        """Returns after the next change."""
        await self._changed.wait()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Discovery(discovery_service_pb2_grpc.DiscoveryServiceServicer):
    """DiscoveryService over a `ViewBoard`."""

    def __init__(self, board: ViewBoard) -> None:
        self._board = board

    async def GetView(
        self,
        request: discovery_service_pb2.GetViewRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> discovery_service_pb2.GetViewResponse:
        """The newest view; epoch 0 before the first."""
        return discovery_service_pb2.GetViewResponse(
            view=self._board.message or view_pb2.View(), version=VERSION, time_unix_s=time.time()
        )

    async def WatchViews(
        self,
        request: discovery_service_pb2.WatchViewsRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[discovery_service_pb2.WatchViewsResponse]:
        """Every newer view, the newest first; a slow reader skips some."""
        epoch, mesh_id = request.after_epoch, request.mesh_id
        while True:
            message = await self._board.newer_than(epoch, mesh_id)
            epoch, mesh_id = message.epoch, message.mesh_id
            yield discovery_service_pb2.WatchViewsResponse(view=message, version=VERSION)
