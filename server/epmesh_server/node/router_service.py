"""RouterService: takes routers' rows over gRPC and hands them to a rank of this node that serves."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, Overloaded, StaleEpoch
from epmesh.frames import MAX_TENSORS, num_bytes
from epmesh.front import FrontReply
from epmesh.grpc_errors import abort
from epmesh.v1 import front_pb2, router_service_pb2_grpc
from epmesh.v1 import router_service_pb2 as wire
from epmesh.view import RankMode, View
from epmesh_server.node.front_caller import FrontCaller, front_peer
from epmesh_server.node.rpc import seconds_left
from epmesh_server.node.views import ViewBoard

CHUNK_BYTES = 2 << 20
DEFAULT_BUDGET_BYTES = 1 << 30
MAX_CALL_S = 60.0
_RETRY_AFTER_S = 0.05
_Context = grpc.aio.ServicerContext[Any, Any]


class ByteBudget:
    """Bytes that calls may hold at once. Used on one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Holds `size` bytes inside the block.

        Raises:
            InvalidRequest: so many never fit.
            Overloaded: they do not fit now.
        """
        if size > self.most:
            raise InvalidRequest(f"tensors of {size} bytes; at most {self.most} fit, send fewer rows at once")
        if self.held + size > self.most:
            raise Overloaded(_RETRY_AFTER_S, f"calls hold {self.held} bytes; {size} more do not fit into {self.most}")
        self.held += size
        try:
            yield
        finally:
            self.held -= size


class Turns:
    """Which of the ranks that serve is asked next: the one with the fewest bytes on their way, in turn among equals."""

    def __init__(self) -> None:
        self._outstanding: Counter[int] = Counter()
        self._last_turn: dict[int, int] = {}
        self._turn = itertools.count(1)

    @contextmanager
    def turn(self, ranks: Sequence[int], size: int) -> Iterator[int]:
        """One of `ranks`, which has `size` bytes more on their way inside the block."""
        rank = min(ranks, key=lambda each: (self._outstanding[each], self._last_turn.get(each, 0), each))
        self._last_turn[rank] = next(self._turn)
        self._outstanding[rank] += size
        try:
            yield rank
        finally:
            self._outstanding[rank] -= size
            if not self._outstanding[rank]:
                del self._outstanding[rank]


class RouterService(router_service_pb2_grpc.RouterServiceServicer):
    """RouterService of one node."""

    def __init__(
        self, board: ViewBoard, slot: Callable[[], int | None], caller: FrontCaller, budget: ByteBudget | None = None
    ) -> None:
        """See the class.

        Args:
            slot: of this node, once it has one.
        """
        self._board = board
        self._slot = slot
        self._caller = caller
        self._budget = budget or ByteBudget(DEFAULT_BUDGET_BYTES)
        self._turns = Turns()

    # Not a generator: one that is suspended in a `yield` would hear late that its caller is gone.
    async def ForwardRows(  # type: ignore[override]
        self, request_iterator: AsyncIterator[wire.ForwardRowsRequest], context: _Context
    ) -> None:
        """Sends a router's rows for this node to one of its ranks, and the sums back."""
        try:
            async with asyncio.timeout(seconds_left(context, MAX_CALL_S)):
                await self._forward(request_iterator, context)
        except TimeoutError:
            await abort(context, DeadlineExceeded(message="the rows or their sums were not there in time"))
        except EpmeshError as exc:
            await abort(context, exc)

    async def _forward(self, requests: AsyncIterator[wire.ForwardRowsRequest], context: _Context) -> None:
        first = await anext(requests, None)
        if first is None:
            raise InvalidRequest("ForwardRows needs a message that says what the rows are")
        if len(first.tensors) > MAX_TENSORS:
            raise InvalidRequest(f"{len(first.tensors)} tensors; at most {MAX_TENSORS} can travel together")
        sizes = [num_bytes(meta) for meta in first.tensors]
        view, ranks = self._serving(first)
        with self._budget.holding(sum(sizes)), self._turns.turn(ranks, sum(sizes)) as rank:
            tensors = await _gathered(first, requests, sizes)
            peer = front_peer(view, rank)
            assert peer is not None
            left_s = seconds_left(context, MAX_CALL_S)
            if left_s <= 0:
                raise TimeoutError
            reply = await self._caller.call(view.mesh_id, peer, _front_request(first), tensors, timeout_s=left_s)
            await _send(reply, context)

    def _serving(self, first: wire.ForwardRowsRequest) -> tuple[View, list[int]]:
        """The newest view, and those of the request's ranks that serve on this node by it.

        Raises:
            StaleEpoch: there are none.
        """
        view, slot = self._board.view, self._slot()
        if view is None or first.mesh_id != view.mesh_id:
            known = view.mesh_id if view else ""
            raise StaleEpoch(self._board.epoch, f"rows for mesh {first.mesh_id[:64]!r}; this node is in {known!r}")
        ranks = [
            rank
            for rank in first.ranks
            if rank in view.ranks
            and view.slot_of(rank) == slot
            and view.ranks[rank].mode is RankMode.SERVE
            and front_peer(view, rank) is not None
        ]
        if not ranks:
            raise StaleEpoch(view.epoch, f"none of ranks {list(first.ranks)[:16]} serves on this node now")
        return view, ranks


def _front_request(first: wire.ForwardRowsRequest) -> front_pb2.FrontRequest:
    rows = front_pb2.ServeRows(epoch=first.epoch, ranks=first.ranks)
    if first.HasField("layer"):
        rows.layer = first.layer
    return front_pb2.FrontRequest(serve_rows=rows, tensors=first.tensors)


async def _gathered(
    first: wire.ForwardRowsRequest, requests: AsyncIterator[wire.ForwardRowsRequest], sizes: Sequence[int]
) -> list[memoryview]:
    """The tensors, once all their bytes are here.

    Raises:
        InvalidRequest: there are fewer or more.
    """
    total = sum(sizes)
    buffer = memoryview(bytearray(total))
    end = _put(buffer, 0, first.data)
    async for request in requests:
        end = _put(buffer, end, request.data)
    if end < total:
        raise InvalidRequest(f"the tensors are {total} bytes; {end} came")
    ends = list(itertools.accumulate(sizes))
    return [buffer[stop - size : stop] for stop, size in zip(ends, sizes, strict=True)]


def _put(buffer: memoryview, start: int, data: bytes) -> int:
    end = start + len(data)
    if end > len(buffer):
        raise InvalidRequest(f"the tensors are {len(buffer)} bytes; more came")
    buffer[start:end] = data
    return end


async def _send(reply: FrontReply, context: _Context) -> None:
    response = wire.ForwardRowsResponse(tensors=reply.response.tensors)
    for tensor in reply.tensors:
        for start in range(0, len(tensor), CHUNK_BYTES):
            response.data = bytes(tensor[start : start + CHUNK_BYTES])
            await context.write(response)
            response = wire.ForwardRowsResponse()
    if response.tensors:  # no bytes at all
        await context.write(response)
