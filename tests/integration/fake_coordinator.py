"""A coordinator that does exactly what a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc

from epmesh.errors import EpmeshError
from epmesh.grpc_errors import abort
from epmesh.v1 import membership_service_pb2, membership_service_pb2_grpc, view_pb2
from tests.integration.waiting import PATIENCE_S, soon

STRIDE = 4
WORLD, EP = 0, 1
_Context = grpc.aio.ServicerContext[Any, Any]


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
