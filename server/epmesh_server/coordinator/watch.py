"""The newest view, for those who ask and those who watch. Encoded once, however many they are."""

from __future__ import annotations

import asyncio

from epmesh.errors import MeshUnavailable
from epmesh.v1 import discovery_service_pb2 as discovery
from epmesh.version import VERSION
from epmesh.view import View
from epmesh_server.coordinator.wire import view_to_proto


class ViewBoard:
    """Shows the newest committed view. Who is slow skips views and holds nobody up."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._published = asyncio.Event()
        self._encoded: bytes | None = None
        self._closed = False

    def publish(self, view: View) -> None:
        """A view was committed."""
        self.view = view
        self._encoded = None
        self._tell()

    def close(self) -> None:
        """There will be no other view from here."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        published, self._published = self._published, asyncio.Event()
        published.set()

    @property
    def encoded(self) -> bytes:
        """The view as response of `GetView` and of `WatchViews`, whose bytes are the same."""
        if self._encoded is None:
            self._encoded = discovery.WatchViewsResponse(
                view=view_to_proto(self.view), version=VERSION
            ).SerializeToString()
        return self._encoded

    async def after(self, epoch: int) -> None:
        """Waits until the view's epoch is larger than `epoch`.

        Raises:
            MeshUnavailable: there will be no such view from here.
        """
        while self.view.epoch <= epoch:
            if self._closed:
                raise MeshUnavailable("the coordinator is stopping; watch again, or another server")
            await self._published.wait()
