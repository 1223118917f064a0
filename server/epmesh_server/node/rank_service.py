"""RankService: tells local processes where the node's sockets are, and holds one session for every rank."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

import grpc

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.grpc_errors import abort
from epmesh.v1 import rank_service_pb2 as wire
from epmesh.v1 import rank_service_pb2_grpc
from epmesh_server.node.client_keys import ClientKeyTable
from epmesh_server.node.progress import is_member
from epmesh_server.node.ranks import LocalRank
from epmesh_server.node.views import ViewBoard

_log = logging.getLogger(__name__)
_OPEN_WITHIN_S = 10.0
_LAST_WORD_S = 0.5
_DEPART_WITHIN_S = 5.0
_Context = grpc.aio.ServicerContext[Any, Any]


class RankHost(Protocol):
    """What a session needs of the node."""

    async def open_rank(self, request: wire.OpenRank) -> LocalRank:
        """Gives out a rank, as soon as the node is registered."""

    def unreachable(self, entry: LocalRank, report: wire.UnreachablePeers) -> None:
        """The rank's links cannot reach these peers."""

    def update(self, entry: LocalRank, request: wire.UpdateRank) -> None:
        """The rank has another mode or front endpoint."""

    def stats(self, entry: LocalRank, report: wire.RankStats) -> None:
        """What the rank counted."""

    def left(self, entry: LocalRank) -> None:
        """The rank left in good order."""

    def died(self, entry: LocalRank, reason: str) -> None:
        """The rank's process is gone, or as good as gone."""


class RankService(rank_service_pb2_grpc.RankServiceServicer):
    """RankService of one node.

    Args:
        describe: makes the answer of DescribeNode.
        host: gives out ranks; `None` on servers that are not the unix socket.
        client_keys: whose changes ranks hear of; `None`: nobody leases keys here.
    """

    def __init__(
        self,
        describe: Callable[[], wire.DescribeNodeResponse],
        host: RankHost | None,
        board: ViewBoard,
        client_keys: ClientKeyTable | None = None,
    ) -> None:
        self._describe = describe
        self._host = host
        self._board = board
        self._client_keys = client_keys

    async def DescribeNode(self, request: wire.DescribeNodeRequest, context: _Context) -> wire.DescribeNodeResponse:
        """Who the node is and where its unix sockets are."""
        return self._describe()

    # Not a generator: one that is suspended in a `yield` would hear late that its caller is gone.
    async def RankSession(  # type: ignore[override]
        self, request_iterator: AsyncIterator[wire.RankSessionRequest], context: _Context
    ) -> None:
        """The control stream of one rank."""
        if self._host is None:
            where = self._describe().grpc_socket
            await abort(context, InvalidRequest(f"rank sessions are only served on this host, at unix:{where}"))
        try:
            async with asyncio.timeout(_OPEN_WITHIN_S):
                first = await anext(request_iterator, None)
        except TimeoutError:
            return
        if first is None:
            return
        if first.WhichOneof("report") != "open":
            await abort(context, InvalidRequest("the first message of a rank session must be `open`"))
        try:
            entry = await self._host.open_rank(first.open)
        except EpmeshError as exc:
            await context.write(wire.RankSessionResponse(error=exc.to_proto()))
            return
        await self._hold(self._host, entry, request_iterator, context)

    async def _hold(
        self, host: RankHost, entry: LocalRank, requests: AsyncIterator[wire.RankSessionRequest], context: _Context
    ) -> None:
        """Until the stream breaks, the rank leaves, or its membership ends."""
        notices = _Notices(context)
        reader = asyncio.create_task(_read(host, entry, requests))
        writer = asyncio.create_task(self._tell(entry, notices))
        ended = asyncio.create_task(entry.ended.wait())
        tasks = (reader, writer, ended)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # The handler is cancelled when the process is gone; nothing may come before this.
            host.died(entry, "its session broke")
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:  # also where this handler is cancelled once more
                entry.release()
        if entry.left:
            await self._departed(entry)
        else:
            await _last_word(entry, notices)

    async def _departed(self, entry: LocalRank) -> None:
        """Until no view has the rank, so that its links stay up for what its peers still finish."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DEPART_WITHIN_S if entry.admitted else 0):
                view = self._board.view
                while view is not None and is_member(view, *entry.member):
                    await self._board.newer_than(view.epoch)
                    view = self._board.view

    async def _tell(self, entry: LocalRank, notices: _Notices) -> None:
        opened = wire.RankOpened(rank=entry.rank, local_rank=entry.local_rank, token=entry.token)
        await notices.write(wire.RankSessionResponse(opened=opened))
        keys = self._client_keys
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tell_views(notices))
            if keys is not None:
                group.create_task(_tell_keys(keys, notices))

    async def _tell_views(self, notices: _Notices) -> None:
        epoch = 0
        while True:
            view = await self._board.newer_than(epoch)
            epoch = view.epoch
            await notices.write(wire.RankSessionResponse(view=view))


async def _tell_keys(keys: ClientKeyTable, notices: _Notices) -> None:
    """Which leases run, whenever one has ended; those granted since count without that."""
    ended = 0
    while True:
        if keys.ended > ended:
            ended = keys.ended
            await notices.write(wire.RankSessionResponse(client_keys=keys.notice()))
        else:
            await keys.changed()


class _Notices:
    """What is written to one rank, one after the other: gRPC refuses a write while another one is under way, also where
    whoever began that was cancelled meanwhile."""

    def __init__(self, context: _Context) -> None:
        self._context = context
        self._turn = asyncio.Lock()

    async def write(self, notice: wire.RankSessionResponse) -> None:
        """Writes a notice after those before it; a caller that is cancelled leaves it on its way."""
        await asyncio.shield(self._write(notice))

    async def _write(self, notice: wire.RankSessionResponse) -> None:
        async with self._turn:
            await self._context.write(notice)


async def _read(host: RankHost, entry: LocalRank, requests: AsyncIterator[wire.RankSessionRequest]) -> None:
    async for request in requests:
        report = request.WhichOneof("report")
        if report == "unreachable":
            host.unreachable(entry, request.unreachable)
        elif report == "update":
            host.update(entry, request.update)
        elif report == "stats":
            host.stats(entry, request.stats)
        elif report == "close":
            host.left(entry)
            return


async def _last_word(entry: LocalRank, notices: _Notices) -> None:
    """Says why the session is over, to a process that may be stopped."""
    error = entry.error or MeshUnavailable("the session is over")
    try:
        async with asyncio.timeout(_LAST_WORD_S):
            await notices.write(wire.RankSessionResponse(error=error.to_proto()))
    except (TimeoutError, grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as exc:
        _log.debug("rank %d: last word not heard: %s", entry.rank, exc)
