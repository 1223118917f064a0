"""The routing tables of one group on one GPU. Captured graphs hold their addresses, so none goes while they may run.

Another placement is written where the old one was, and graphs that are replayed go by it. Where its table has another
form, the old one stays, marked, and a graph that goes by it reports so instead of sending rows astray.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from epmesh.errors import InvalidRequest
from epmesh.layout import Routing
from epmesh_server.kernels.lane import Table

Key = tuple[int | None, bool]  # layer, whether sequence parallel


class RoutingTables:
    """Tables by layer, of the placements of one view at a time."""

    def __init__(self, device: torch.device) -> None:
        """Starts without any."""
        self._device = device
        self._tables: dict[Key, Table] = {}
        self._retired: list[Table] = []
        self._epoch: int | None = None

    def table(self, key: Key, routing: Routing) -> Table:
        """The table for a routing of the view that was followed last, copied when first used."""
        found = self._tables.get(key)
        if found is None:
            found = self._tables[key] = Table.of(routing, self._device)
        return found

    def follow(self, epoch: int, routing_of: Callable[[int | None, bool], Routing | None]) -> None:
        """Has all tables go by the view of `epoch`. Where something changes, waits for the device.

        Raises:
            InvalidRequest: during a capture, into which nothing of this may go.
        """
        if epoch == self._epoch:
            return
        if self._tables and self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise InvalidRequest("the placement changed since the last call; dispatch once before the capture")
            torch.cuda.synchronize(self._device)
        for key, table in list(self._tables.items()):
            routing = routing_of(*key)
            followed = None if routing is None else table.follow(routing)
            if followed is not None:
                self._tables[key] = followed
            else:
                table.retire()
                self._retired.append(self._tables.pop(key))
        if self._tables and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a replay on any stream finds the new ones
        self._epoch = epoch
