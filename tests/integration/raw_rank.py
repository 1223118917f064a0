"""A rank made of raw stubs, for tests of the node service."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import grpc

from epmesh.errors import from_proto
from epmesh.v1 import membership_service_pb2, rank_service_pb2, rank_service_pb2_grpc, view_pb2
from epmesh_server.shared_memory import ControlPage
from tests.integration.waiting import PATIENCE_S, soon


def declaration(
    incarnation: int = 7, link_endpoint: str = "", front_endpoint: str = "", **fields: Any
) -> membership_service_pb2.RankDeclaration:
    """What a rank says of itself."""
    rank = view_pb2.Rank(
        incarnation=incarnation,
        device="cpu",
        mode=view_pb2.RANK_MODE_EXCHANGE,
        link_endpoint=link_endpoint,
        front_endpoint=front_endpoint,
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
        front_endpoint: str = "",
    ) -> None:
        """Opens the session; raises what the node answers."""
        declared = [membership_service_pb2.ExpertDeclaration(**experts)] if experts else []
        request = rank_service_pb2.OpenRank(
            local_rank=local_rank,
            pid=os.getpid(),
            declaration=declaration(incarnation, link_endpoint, front_endpoint, experts=declared),
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
