"""Callers of CommunicatorService, over bare stubs, that stop in the middle: what all calls share comes back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from epmesh.errors import DeadlineExceeded, EpmeshError, MeshUnavailable, Unauthenticated
from epmesh.frames import tensor_meta
from epmesh.grpc_errors import abort
from epmesh.v1 import communicator_service_pb2 as pb
from epmesh.v1 import communicator_service_pb2_grpc as rpc
from epmesh.v1 import front_pb2
from epmesh_server.node import communicator_service, service
from epmesh_server.node.communicator_service import CommunicatorService
from epmesh_server.ranks.front import Front, Incoming
from tests.integration.node_under_test import mesh, typed
from tests.integration.raw_rank import RawRank
from tests.integration.waiting import on_event_loop, soon, until

INCARNATION = 7
ANNOUNCED = 200_000  # bytes; two such calls do not fit beside each other
SHORT_S = 0.3


class Caller:
    """A driver of rank 0, and the node service that it calls."""

    def __init__(self, channel: grpc.aio.Channel, rank: RawRank, node: CommunicatorService) -> None:
        self.stub = rpc.CommunicatorServiceStub(channel)
        self.rank = rank
        self.node = node
        self.token = b""
        self._session: Any = None

    async def attach(self) -> None:
        self._session = self.stub.AttachRank(pb.AttachRankRequest(rank=0))
        self.token = (await soon(self._session.read())).token

    async def detach(self) -> None:
        await soon(self.stub.DetachRank(pb.DetachRankRequest(rank=0, token=self.token), timeout=20))

    async def announce(self, num_bytes: int = ANNOUNCED, data: bytes = b"") -> Any:
        """A call whose header is there and has its share of the budget."""
        header = pb.CallHeader(rank=0, token=self.token, group="ep", tensors=[tensor_meta("uint8", (num_bytes,))])
        call: Any = self.stub.AllReduce(timeout=60)
        await soon(
            call.write(pb.AllReduceRequest(call=header, arguments=front_pb2.AllReduceArguments(), data=data)),
        )
        return call

    async def all_reduce(self, num_bytes: int) -> int:
        """A whole call; bytes of the answer."""
        call = await self.announce(num_bytes, bytes(num_bytes))
        await call.done_writing()
        return len(b"".join([answer.data async for answer in call]))

    @property
    def held(self) -> int:
        """Bytes of the budget that calls hold."""
        return self.node._budget.held


@contextlib.asynccontextmanager
async def caller(monkeypatch: pytest.MonkeyPatch, idle_s: float, answer: bytes = b"") -> AsyncIterator[Caller]:
    """Attached to a rank whose front answers every call with `answer`."""
    made: list[CommunicatorService] = []

    def make(*args: Any, **options: Any) -> CommunicatorService:
        made.append(CommunicatorService(*args, idle_s=idle_s, **options))
        return made[-1]

    def respond(incoming: Incoming) -> None:
        incoming.answer(front_pb2.FrontResponse(tensors=[tensor_meta("uint8", (len(answer),))]), [answer])

    monkeypatch.setattr(service, "CommunicatorService", make)
    with contextlib.closing(Front("127.0.0.1")) as front:
        async with mesh() as running, grpc.aio.insecure_channel(running.node.address) as channel:
            front.identify((await running.node.registered()).mesh_id, 0, INCARNATION)
            front.handle(respond)
            async with running.node.rank(incarnation=INCARNATION, front_endpoint=front.endpoint) as rank:
                attached = Caller(channel, rank, made[0])
                await attached.attach()
                yield attached


async def refused(call: Any, error: type[EpmeshError]) -> str:
    return await typed(call.read(), error)


@on_event_loop
async def test_a_call_that_sends_no_more_is_ended_and_its_bytes_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with caller(monkeypatch, SHORT_S, b"sums") as driver:
        text = await refused(await driver.announce(data=b"x" * 7), DeadlineExceeded)
        assert f"AllReduce on rank 0: {ANNOUNCED - 7} of {ANNOUNCED} bytes of tensors did not come in time" in text
        assert driver.held == 0
        driver.node._idle_s = 60.0
        assert await soon(driver.all_reduce(ANNOUNCED)) == 4


@on_event_loop
async def test_a_call_that_says_nothing_at_all_or_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with caller(monkeypatch, SHORT_S) as driver:
        silent: Any = driver.stub.AllReduce(timeout=60)
        assert "its first message did not come" in await refused(silent, DeadlineExceeded)
        whole = await driver.announce(9, bytes(9))
        assert "its requests did not end" in await refused(whole, DeadlineExceeded)


@on_event_loop
async def test_a_call_that_sends_drop_by_drop_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async with caller(monkeypatch, SHORT_S) as driver:
        call = await driver.announce()

        async def drip() -> None:
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                for _ in itertools.count():
                    await call.write(pb.AllReduceRequest(data=b"x"))
                    await asyncio.sleep(SHORT_S / 10)  # its pace is what is tested

        dripping = asyncio.create_task(drip())
        await refused(call, DeadlineExceeded)
        await soon(dripping)
        await until(lambda: driver.held == 0)


@on_event_loop
async def test_a_call_does_not_outlive_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    async with caller(monkeypatch, 60.0) as driver:
        call = await driver.announce()
        await until(lambda: driver.held == ANNOUNCED)
        await driver.detach()
        assert "gave the rank back" in await refused(call, Unauthenticated)
        assert driver.held == 0
        await driver.attach()
        call = await driver.announce()
        await until(lambda: driver.held == ANNOUNCED)
        await driver.rank.hang_up()
        assert "rank 0" in await refused(call, MeshUnavailable)
        assert driver.held == 0


@on_event_loop
async def test_an_answer_that_nobody_reads_is_dropped_and_whoever_reads_later_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gave_up = asyncio.Event()

    async def noted(context: Any, error: EpmeshError) -> None:
        gave_up.set()
        await abort(context, error)

    monkeypatch.setattr(communicator_service, "abort", noted)
    answer = bytes(64 << 20)
    async with caller(monkeypatch, SHORT_S, answer) as driver:
        call = await driver.announce(9, bytes(9))
        await call.done_writing()
        await soon(gave_up.wait())
        came, error = await soon(read(call))
        assert "was not read in time" in error
        assert came < len(answer)


async def read(call: Any) -> tuple[int, str]:
    """Bytes of an answer, and how it ended."""
    came = 0
    try:
        async for message in call:
            came += len(message.data)
    except grpc.aio.AioRpcError as exc:
        return came, str(exc.details())
    return came, ""
