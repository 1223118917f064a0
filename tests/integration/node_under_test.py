"""A node service on the test's own event loop, alone or with a fake coordinator."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from epmesh.channels import open_aio_channel
from epmesh.errors import EpmeshError, from_rpc_error
from epmesh.tls import TlsFiles
from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from epmesh_server.node import NodeSettings, run_node
from tests.integration.fake_coordinator import FakeCoordinator, FakeSession, serving
from tests.integration.raw_rank import RawRank
from tests.integration.waiting import PATIENCE_S, soon


class NodeUnderTest:
    """A running node service."""

    def __init__(self, address: str, task: asyncio.Task[None], stop: asyncio.Event) -> None:
        self.address = address
        self.task = task
        self._stop = stop

    async def stop(self) -> None:
        """Stops it as a signal does; raises what it raised."""
        self._stop.set()
        await soon(asyncio.shield(self.task))

    async def describe(self, tls: TlsFiles | None = None) -> rank_service_pb2.DescribeNodeResponse:
        """What DescribeNode answers over TCP."""
        async with open_aio_channel(self.address, (), tls=tls) as channel:
            stub = rank_service_pb2_grpc.RankServiceStub(channel)
            return await stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=PATIENCE_S)

    async def registered(self, tls: TlsFiles | None = None) -> rank_service_pb2.DescribeNodeResponse:
        """What DescribeNode answers once the coordinator accepted the node."""
        while True:
            node = await self.describe(tls)
            if node.registered:
                return node
            await asyncio.sleep(0.005)

    @contextlib.asynccontextmanager
    async def rank(self, **options: Any) -> AsyncIterator[RawRank]:
        """An open rank in this process."""
        rank = RawRank(await self.registered())
        try:
            await rank.open(**options)
            yield rank
        finally:
            await rank.hang_up()


@contextlib.asynccontextmanager
async def node_service(coordinator: str, **settings: Any) -> AsyncIterator[NodeUnderTest]:
    """Runs a node service on this event loop; gives it once it listens, and stops it at the end."""
    stop = asyncio.Event()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = {"port": 0, "buffer_bytes": 1 << 16, "coordinator": coordinator, **settings}
    task = asyncio.create_task(run_node(NodeSettings(**settings), stop, ready.set_result))
    await asyncio.wait((task, ready), timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        task.result()
    node = NodeUnderTest(ready.result(), task, stop)
    try:
        yield node
    finally:
        await node.stop()


class Mesh:
    """A node service, its fake coordinator, and the control stream between them."""

    def __init__(self, fake: FakeCoordinator, node: NodeUnderTest, session: FakeSession) -> None:
        self.fake = fake
        self.node = node
        self.session = session
        self.exit = contextlib.AsyncExitStack()

    async def rank(self, incarnation: int, **options: Any) -> RawRank:
        """One more rank in this process."""
        return await self.exit.enter_async_context(self.node.rank(incarnation=incarnation, **options))

    async def commit(self, epoch: int, ranks: list[int], **options: Any) -> None:
        """Commits a view with these ranks, which must be those the node reports."""
        await self.session.expect_ranks(ranks)
        await self.session.commit(self.session.make_view(epoch, **options))


@contextlib.asynccontextmanager
async def mesh(**settings: Any) -> AsyncIterator[Mesh]:
    fake = FakeCoordinator()
    async with serving(fake) as coordinator, node_service(coordinator, **settings) as node:
        made = Mesh(fake, node, await fake.session())
        async with made.exit:
            yield made


async def typed(call: Any, error: type[EpmeshError]) -> str:
    """Awaits a call that must fail with a typed error; returns its text."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await soon(call)
    found = from_rpc_error(caught.value, "call")
    assert type(found) is error
    return str(found)
