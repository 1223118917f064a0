"""RouterService: takes routers' rows over gRPC and hands them to a rank of this node that serves."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc

from epmesh.communicator_methods import Assembly
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, StaleEpoch
from epmesh.front import FrontReply
from epmesh.grpc_errors import abort
from epmesh.v1 import front_pb2, router_service_pb2_grpc
from epmesh.v1 import router_service_pb2 as wire
from epmesh.view import RankMode, View
from epmesh_server.node.call_budget import CallBudget
from epmesh_server.node.call_waits import DEFAULT_IDLE_S, CallWaits, gather
from epmesh_server.node.front_caller import FrontCaller, front_peer
from epmesh_server.node.rpc import seconds_left
from epmesh_server.node.views import ViewBoard
from epmesh_server.secure_server import client_of

CHUNK_BYTES = 2 << 20
DEFAULT_BUDGET_BYTES = 1 << 30
MAX_CALL_S = 3600.0
_Context = grpc.aio.ServicerContext[Any, Any]


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
        self,
        board: ViewBoard,
        slot: Callable[[], int | None],
        caller: FrontCaller,
        budget: CallBudget | None = None,
        *,
        idle_s: float = DEFAULT_IDLE_S,
    ) -> None:
        """See the class.

        Args:
            slot: of this node, once it has one.
            idle_s: how long a router may take to send, or to read, its next message; beyond, `DeadlineExceeded`.
        """
        self._idle_s = idle_s
        self._board = board
        self._slot = slot
        self._caller = caller
        self._budget = budget or CallBudget(DEFAULT_BUDGET_BYTES)
        self._turns = Turns()

    @property
    def budget(self) -> CallBudget:
        """What calls hold."""
        return self._budget

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
        waits = CallWaits("ForwardRows", context, self._idle_s)
        first = await waits.until(anext(requests, None), lambda: "its first message did not come")
        if first is None:
            raise InvalidRequest("ForwardRows needs a message that says what the rows are")
        assembly = Assembly(first.tensors, self._budget.most)
        view, ranks = self._serving(first)
        client = client_of(context)
        with self._budget.holding(assembly.num_bytes, client), self._turns.turn(ranks, assembly.num_bytes) as rank:
            assembly.add(first.data)
            await gather(assembly, requests, waits)
            tensors = assembly.tensors()
            peer = front_peer(view, rank)
            assert peer is not None
            left_s = seconds_left(context, MAX_CALL_S)
            if left_s <= 0:
                raise TimeoutError
            reply = await self._caller.call(
                view.mesh_id, peer, _front_request(first, client), tensors, timeout_s=left_s
            )
            await _send(reply, context, waits)

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


def _front_request(first: wire.ForwardRowsRequest, client: str) -> front_pb2.FrontRequest:
    rows = front_pb2.ServeRows(epoch=first.epoch, ranks=first.ranks, client=client)
    if first.HasField("layer"):
        rows.layer = first.layer
    return front_pb2.FrontRequest(serve_rows=rows, tensors=first.tensors)


async def _send(reply: FrontReply, context: _Context, waits: CallWaits) -> None:
    size = sum(map(len, reply.tensors))
    waits.begin(size)

    async def write(response: wire.ForwardRowsResponse) -> None:
        await waits.until(context.write(response), lambda: f"its sums of {size} bytes were not read")

    response = wire.ForwardRowsResponse(tensors=reply.response.tensors)
    for tensor in reply.tensors:
        for start in range(0, len(tensor), CHUNK_BYTES):
            response.data = bytes(tensor[start : start + CHUNK_BYTES])
            await write(response)
            response = wire.ForwardRowsResponse()
    if response.tensors:  # no bytes at all
        await write(response)
