"""A node service's side of the coordinator's wire, by raw stubs: nothing happens that a test does not say."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import grpc

from epmesh.errors import EpmeshError, MeshUnavailable, from_rpc_error
from epmesh.v1 import discovery_service_pb2 as discovery
from epmesh.v1 import discovery_service_pb2_grpc as discovery_rpc
from epmesh.v1 import group_service_pb2_grpc as groups_rpc
from epmesh.v1 import membership_service_pb2 as pb
from epmesh.v1 import membership_service_pb2_grpc as rpc
from epmesh.v1 import view_pb2
from epmesh_server.coordinator import CoordinatorSettings, run_coordinator

TIMEOUT_S = 60.0
T = TypeVar("T")


class Client:
    """Everything one channel offers."""

    def __init__(self, address: str) -> None:
        self.address = address
        # A pool of its own: breaking one client's connection leaves the others'.
        self.channel = grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        self.membership: rpc.MembershipServiceAsyncStub = rpc.MembershipServiceStub(self.channel)
        self.discovery: discovery_rpc.DiscoveryServiceAsyncStub = discovery_rpc.DiscoveryServiceStub(self.channel)
        self.groups: groups_rpc.GroupServiceAsyncStub = groups_rpc.GroupServiceStub(self.channel)

    async def view(self) -> view_pb2.View:
        answer = await self.discovery.GetView(discovery.GetViewRequest(), timeout=TIMEOUT_S)
        return answer.view

    async def view_where(self, holds: Callable[[view_pb2.View], bool]) -> view_pb2.View:
        """The first view from now on for which `holds`."""
        async for answer in self.discovery.WatchViews(discovery.WatchViewsRequest(), timeout=TIMEOUT_S):
            if holds(answer.view):
                return answer.view
        raise AssertionError("the watch ended")


class RawNode:
    """One node: registers, opens its stream, and says what it is told to say."""

    def __init__(self, address: str, node_id: str, incarnation: int = 1) -> None:
        self.client = Client(address)
        self.node_id = node_id
        self.incarnation = incarnation
        self.granted: pb.RegisterNodeResponse | None = None
        self.heard: list[pb.NodeSessionResponse] = []
        self._outgoing: asyncio.Queue[pb.NodeSessionRequest | None] = asyncio.Queue()
        self._call: Any = None
        self.serving: asyncio.Task[None] | None = None

    @property
    def slot(self) -> int:
        assert self.granted is not None
        return self.granted.slot

    async def register(self, **fields: Any) -> pb.RegisterNodeResponse:
        known = {"address": "127.0.0.1:7400", "version": version("epmesh")} | fields
        request = pb.RegisterNodeRequest(node_id=self.node_id, incarnation=self.incarnation, **known)
        self.granted = await typed(self.client.membership.RegisterNode(request, timeout=TIMEOUT_S))
        return self.granted

    def open_raw(self) -> None:
        """Opens a stream and says nothing."""
        self._outgoing = asyncio.Queue()
        self._call = self.client.membership.NodeSession(self._requests())

    def open(self, epoch: int = 0) -> None:
        self.open_raw()
        self.say(hello=pb.Hello(slot=self.slot, incarnation=self.incarnation, epoch=epoch))

    async def join(self, *ranks: pb.RankDeclaration, epoch: int = 0) -> None:
        """Registers, opens the stream and reports ranks."""
        await self.register()
        self.open(epoch)
        self.report(*ranks)

    def say(self, **report: Any) -> None:
        self._outgoing.put_nowait(pb.NodeSessionRequest(**report))

    def report(self, *ranks: pb.RankDeclaration) -> None:
        self.say(ranks=pb.RankReport(ranks=ranks))

    async def hear(self) -> pb.NodeSessionResponse:
        """The next command.

        Raises:
            EpmeshError: the stream ended.
        """
        try:
            command = await asyncio.wait_for(self._call.read(), TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc, "NodeSession") from exc
        if not isinstance(command, pb.NodeSessionResponse):
            await self.ended()
            raise MeshUnavailable("the stream ended in good order")
        heard: pb.NodeSessionResponse = command
        self.heard.append(heard)
        return heard

    async def ended(self) -> None:
        """Waits until the stream ended.

        Raises:
            EpmeshError: why it did, unless it ended well.
        """
        code = await self._call.code()
        if code is not grpc.StatusCode.OK:
            trailing = await self._call.trailing_metadata()
            details = await self._call.details()
            raise from_rpc_error(_Ended(code, trailing, details), "NodeSession")

    async def serve(self) -> None:
        """Answers every command, and beats, until the stream ends."""
        beating = asyncio.create_task(self.beat())
        try:
            with contextlib.suppress(EpmeshError):
                while True:
                    self.answer(await self.hear())
        finally:
            beating.cancel()

    async def beat(self) -> None:
        """Sends heartbeats until cancelled."""
        for number in itertools.count():
            self.say(heartbeat=pb.Heartbeat(number=number))
            await asyncio.sleep(0.5)

    def answer(self, command: pb.NodeSessionResponse, *progress: pb.GroupProgress) -> None:
        match command.WhichOneof("command"):
            case "prepare":
                self.say(prepared=pb.Prepared(epoch=command.prepare.epoch, progress=progress))
            case "finish":
                self.say(finished=pb.Finished(epoch=command.finish.epoch, progress=progress))
            case "commit":
                self.say(committed=pb.Committed(epoch=command.commit.view.epoch))

    async def commit(self) -> view_pb2.View:
        """Answers until a view was committed and says so."""
        while True:
            command = await self.hear()
            self.answer(command)
            if command.WhichOneof("command") == "commit":
                return command.commit.view

    def leave(self) -> None:
        """Ends this side of the stream."""
        self._outgoing.put_nowait(None)

    def break_off(self) -> None:
        """Cancels the stream, as a process that dies does."""
        self._call.cancel()

    async def _requests(self) -> AsyncIterator[pb.NodeSessionRequest]:
        outgoing = self._outgoing
        while (request := await outgoing.get()) is not None:
            yield request


class _Ended(grpc.RpcError):
    """The end of a stream as `from_rpc_error` wants it."""

    def __init__(self, code: grpc.StatusCode, trailing: Any, details: str) -> None:
        self._fields = code, trailing, details

    def code(self) -> grpc.StatusCode:
        return self._fields[0]

    def trailing_metadata(self) -> Any:
        return self._fields[1]

    def details(self) -> str:
        return self._fields[2]


def rank(number: int, incarnation: int = 1, **fields: Any) -> pb.RankDeclaration:
    """A rank as its node service reports it."""
    shown = view_pb2.Rank(
        rank=number,
        incarnation=incarnation,
        device="cpu",
        mode=fields.pop("mode", view_pb2.RANK_MODE_EXCHANGE),
        link_endpoint=f"tcp://127.0.0.1:{20_000 + number}",
    )
    return pb.RankDeclaration(rank=shown, exchange_timeout_s=5.0, **fields)


async def typed(call: Awaitable[T]) -> T:
    """The call's answer.

    Raises:
        EpmeshError: it failed.
    """
    try:
        return await call
    except grpc.aio.AioRpcError as exc:
        raise from_rpc_error(exc, "call") from exc


class Running:
    """A coordinator in this process."""

    def __init__(self, address: str, stop: asyncio.Event, task: asyncio.Task[None]) -> None:
        self.address = address
        self.stop = stop
        self.task = task


@contextlib.asynccontextmanager
async def coordinator(data_dir: Path, *, batch_window_s: float | None = None, **changed: Any) -> AsyncIterator[Running]:
    """Runs a coordinator on a free port of loopback.

    Args:
        batch_window_s: how long it waits for more that is to be committed together, where a test goes by that.
        changed: of its settings.
    """
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    settings = CoordinatorSettings(**{"data_dir": data_dir, "port": 0, **changed})
    if batch_window_s is not None:
        longest_s = 4 * batch_window_s
        membership = replace(settings.membership, batch_window_s=batch_window_s, max_batch_window_s=longest_s)
        object.__setattr__(settings, "membership", membership)
    task = asyncio.create_task(run_coordinator(settings, stop, ready.set_result))
    await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
    if task.done():
        task.result()
    try:
        yield Running(ready.result(), stop, task)
    finally:
        stop.set()
        await asyncio.wait((task,), timeout=TIMEOUT_S)
