"""A coordinator that does exactly what a test says, and a rank of raw stubs: aids for tests of the node service."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, ParamSpec

import grpc

from epmesh.errors import EpmeshError, from_proto
from epmesh.grpc_errors import abort
from epmesh.v1 import (
    membership_service_pb2,
    membership_service_pb2_grpc,
    rank_service_pb2,
    rank_service_pb2_grpc,
    view_pb2,
)
from epmesh_server.node import NodeSettings, run_node
from epmesh_server.shared_memory import ControlPage

PATIENCE_S = 20.0
STRIDE = 4
WORLD, EP = 0, 1
_P = ParamSpec("_P")
_Context = grpc.aio.ServicerContext[Any, Any]


def on_event_loop(test: Callable[_P, Coroutine[Any, Any, None]]) -> Callable[_P, None]:
    """Runs a test that is a coroutine on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(happened: Callable[[], bool]) -> None:
    """Waits for a condition on shared memory, which cannot be awaited."""
    async with asyncio.timeout(PATIENCE_S):
        while not happened():  # noqa: ASYNC110 - nobody can set an event there
            await asyncio.sleep(0.001)


async def soon(awaitable: Any) -> Any:
    """Waits for what must happen, but not for ever."""
    return await asyncio.wait_for(awaitable, PATIENCE_S)


class FakeSession:
    """One control stream as the coordinator sees it."""

    def __init__(self) -> None:
        self.reports: asyncio.Queue[membership_service_pb2.NodeSessionRequest] = asyncio.Queue()
        self.commands: asyncio.Queue[membership_service_pb2.NodeSessionResponse | None] = asyncio.Queue()
        self.hello = membership_service_pb2.Hello()
        self.ranks: list[membership_service_pb2.RankDeclaration] = []
        self.answer_heartbeats = True
        self.left = asyncio.Event()
        self.broken = asyncio.Event()

    async def expect(self, kind: str) -> Any:
        """The next report of one kind; others are skipped, rank reports remembered."""
        while True:
            report = await soon(self.reports.get())
            if report.HasField("ranks"):
                self.ranks = list(report.ranks.ranks)
            if report.WhichOneof("report") == kind:
                return getattr(report, kind)

    async def expect_ranks(self, ranks: Iterable[int]) -> list[membership_service_pb2.RankDeclaration]:
        """Waits for a rank report with exactly these global ranks."""
        wanted = list(ranks)
        while [entry.rank.rank for entry in self.ranks] != wanted:
            await self.expect("ranks")
        return self.ranks

    def command(self, **command: Any) -> None:
        """Sends one command."""
        self.commands.put_nowait(membership_service_pb2.NodeSessionResponse(**command))

    async def prepare(self, epoch: int, lost: Iterable[int] = ()) -> membership_service_pb2.Prepared:
        """Prepares an epoch; returns the node's answer."""
        self.command(prepare=membership_service_pb2.Prepare(epoch=epoch, lost_ranks=lost))
        answer: membership_service_pb2.Prepared = await self.expect("prepared")
        return answer

    def finish(self, epoch: int, cuts: dict[int, int], **options: Any) -> None:
        """Announces the cuts; the answer is `expect("finished")`."""
        command = membership_service_pb2.Finish(epoch=epoch, timeout_s=options.pop("timeout_s", PATIENCE_S), **options)
        for group_id, sequence in cuts.items():
            command.cuts.add(group_id=group_id, sequence=sequence)
        self.command(finish=command)

    async def commit(self, view: view_pb2.View) -> None:
        """Commits a view."""
        self.command(commit=membership_service_pb2.Commit(view=view))
        await self.expect("committed")

    def make_view(self, epoch: int, membership_epoch: int = 0, sequence: int = 0) -> view_pb2.View:
        """A view of this node alone, with the ranks it last reported; groups world and ep have all of them."""
        view = view_pb2.View(mesh_id="mesh", epoch=epoch, membership_epoch=membership_epoch or epoch, stride=STRIDE)
        ranks = [entry.rank for entry in self.ranks]
        view.nodes.add(slot=self.hello.slot, node_id="n", incarnation=1, address="127.0.0.1:1", ranks=ranks)
        numbers = [rank.rank for rank in ranks]
        for name, group_id in (("world", WORLD), ("ep", EP)):
            view.groups.add(name=name, id=group_id, ranks=numbers, declared_ranks=numbers, sequence=sequence)
        return view


class FakeCoordinator(membership_service_pb2_grpc.MembershipServiceServicer):
    """Accepts every node at one slot, or refuses with `refusal`."""

    def __init__(self, slot: int = 0, lease_s: float = 3.0) -> None:
        self.slot = slot
        self.mesh_id = "mesh"
        self.lease_s = lease_s
        self.refusal: EpmeshError | None = None
        self.registrations: asyncio.Queue[membership_service_pb2.RegisterNodeRequest] = asyncio.Queue()
        self._sessions: asyncio.Queue[FakeSession] = asyncio.Queue()

    async def RegisterNode(
        self, request: membership_service_pb2.RegisterNodeRequest, context: _Context
    ) -> membership_service_pb2.RegisterNodeResponse:
        self.registrations.put_nowait(request)
        if self.refusal:
            await abort(context, self.refusal)
        return membership_service_pb2.RegisterNodeResponse(
            slot=self.slot,
            mesh_id=self.mesh_id,
            stride=STRIDE,
            heartbeat_interval_s=self.lease_s / 6,
            lease_s=self.lease_s,
        )

    async def NodeSession(  # type: ignore[override]
        self, request_iterator: AsyncIterator[membership_service_pb2.NodeSessionRequest], context: _Context
    ) -> None:
        session = FakeSession()
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            while (command := await session.commands.get()) is not None:
                await context.write(command)
        finally:
            session.broken.set()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def session(self) -> FakeSession:
        """The next control stream that a node opened, its hello received."""
        session: FakeSession = await soon(self._sessions.get())
        session.hello = await session.expect("hello")
        return session

    async def _read(
        self, session: FakeSession, requests: AsyncIterator[membership_service_pb2.NodeSessionRequest]
    ) -> None:
        self._sessions.put_nowait(session)
        async for request in requests:
            if request.HasField("heartbeat"):
                if session.answer_heartbeats:
                    session.command(heartbeat=request.heartbeat)
            else:
                session.reports.put_nowait(request)
        session.left.set()
        session.commands.put_nowait(None)


@contextlib.asynccontextmanager
async def serving(fake: FakeCoordinator, port: int = 0) -> AsyncIterator[str]:
    """Serves `fake` on loopback; gives its address."""
    server = grpc.aio.server(
        options=[("grpc.so_reuseport", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 100)]
    )
    membership_service_pb2_grpc.add_MembershipServiceServicer_to_server(fake, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(0)


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

    async def describe(self) -> rank_service_pb2.DescribeNodeResponse:
        """What DescribeNode answers over TCP."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = rank_service_pb2_grpc.RankServiceStub(channel)
            return await stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=PATIENCE_S)

    async def registered(self) -> rank_service_pb2.DescribeNodeResponse:
        """What DescribeNode answers once the coordinator accepted the node."""
        while True:
            node = await self.describe()
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


def declaration(incarnation: int = 7, link_endpoint: str = "", **fields: Any) -> membership_service_pb2.RankDeclaration:
    """What a rank says of itself."""
    rank = view_pb2.Rank(
        incarnation=incarnation, device="cpu", mode=view_pb2.RANK_MODE_EXCHANGE, link_endpoint=link_endpoint
    )
    return membership_service_pb2.RankDeclaration(rank=rank, world_size=1, exchange_timeout_s=5.0, **fields)


class RawRank:
    """A rank session over raw stubs, in the test's own process."""

    def __init__(self, node: rank_service_pb2.DescribeNodeResponse) -> None:
        self.node = node
        self._channel = grpc.aio.insecure_channel(f"unix:{node.grpc_socket}")
        self._call = rank_service_pb2_grpc.RankServiceStub(self._channel).RankSession()
        self.opened = rank_service_pb2.RankOpened()
        self._fds: list[int] = []
        self._wake_fd = -1

    async def open(
        self,
        local_rank: int | None = None,
        incarnation: int = 7,
        link_endpoint: str = "",
        experts: dict[str, Any] | None = None,
    ) -> None:
        """Opens the session; raises what the node answers."""
        declared = [membership_service_pb2.ExpertDeclaration(**experts)] if experts else []
        request = rank_service_pb2.OpenRank(
            local_rank=local_rank,
            pid=os.getpid(),
            declaration=declaration(incarnation, link_endpoint, experts=declared),
        )
        await self.send(open=request)
        self.opened = (await self.notice("opened")).opened

    async def send(self, **report: Any) -> None:
        """Sends one report."""
        await self._call.write(rank_service_pb2.RankSessionRequest(**report))

    async def notice(self, kind: str) -> rank_service_pb2.RankSessionResponse:
        """The next notice of one kind; an error is raised unless it is what is waited for."""
        while True:
            notice = await soon(self._call.read())
            if notice is grpc.aio.EOF:
                raise EOFError(f"the session ended before {kind}")
            if notice.WhichOneof("notice") == kind:
                assert isinstance(notice, rank_service_pb2.RankSessionResponse)
                return notice
            if notice.HasField("error"):
                raise from_proto(notice.error)

    async def view(self, epoch: int) -> view_pb2.View:
        """The view of an epoch, or a later one."""
        while True:
            view = (await self.notice("view")).view
            if view.epoch >= epoch:
                return view

    async def view_with(self, rank: int) -> view_pb2.View:
        """A view that has a rank."""
        while True:
            view = (await self.notice("view")).view
            if any(one.rank == rank for node in view.nodes for one in node.ranks):
                return view

    async def page(self) -> ControlPage:
        """Maps the control page."""
        request = rank_service_pb2.DescriptorRequest(
            token=self.opened.token, control_page=rank_service_pb2.ControlPage()
        )
        _, fds = await asyncio.to_thread(ask_descriptors, Path(self.node.descriptor_socket), request)
        self._fds += fds
        self._wake_fd = fds[1]
        return ControlPage(fds[0])

    @property
    def wake_fd(self) -> int:
        """The eventfd that came with the page."""
        return self._wake_fd

    async def buffers(
        self, group_id: int, membership_epoch: int
    ) -> tuple[rank_service_pb2.DescriptorResponse, list[int]]:
        """A group's buffers; raises what the node answers."""
        request = rank_service_pb2.DescriptorRequest(
            token=self.opened.token,
            group_buffers=rank_service_pb2.GroupBuffers(group_id=group_id, membership_epoch=membership_epoch),
        )
        response, fds = await asyncio.to_thread(ask_descriptors, Path(self.node.descriptor_socket), request)
        self._fds += fds
        return response, fds

    async def hang_up(self) -> None:
        """Breaks the session, as a process that dies does."""
        self._call.cancel()
        await self._channel.close()
        while self._fds:
            os.close(self._fds.pop())


def ask_descriptors(
    path: Path, request: rank_service_pb2.DescriptorRequest | bytes
) -> tuple[rank_service_pb2.DescriptorResponse, list[int]]:
    """One question at the descriptor socket; raises the typed error of a refusal."""
    data = request if isinstance(request, bytes) else request.SerializeToString()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(str(path))
        connection.sendall(data)
        answer, fds, _, _ = socket.recv_fds(connection, 65_536, 253)
    response = rank_service_pb2.DescriptorResponse.FromString(answer)
    if response.HasField("error"):
        raise from_proto(response.error)
    return response, list(fds)
