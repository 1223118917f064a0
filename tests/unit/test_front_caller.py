"""How a node service asks its ranks' fronts."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterator

import pytest

from epmesh import MeshUnavailable, NodeInfo, Overloaded, RankInfo, RankMode, View
from epmesh.frames import tensor_meta
from epmesh.front import FrontPeer
from epmesh.v1 import front_pb2
from epmesh_server.node.front_caller import FrontCaller, front_peer
from epmesh_server.ranks.front import Front, Incoming

MESH, RANK, INCARNATION = "mesh-1", 3, 7


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front("127.0.0.1")
    made.identify(MESH, RANK, INCARNATION)
    yield made
    made.close()


def request() -> front_pb2.FrontRequest:
    return front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(), tensors=[tensor_meta("uint8", (3,))])


def echo(incoming: Incoming) -> None:
    incoming.answer(front_pb2.FrontResponse(tensors=incoming.request.tensors), [bytes(t) for t in incoming.tensors])


def test_answers_and_errors_reach_the_coroutine_that_asked(front: Front) -> None:
    async def ask() -> list[bytes]:
        caller, peer = FrontCaller(), FrontPeer(RANK, INCARNATION, front.endpoint)
        try:
            front.handle(echo)
            calls = [caller.call(MESH, peer, request(), [bytes([n] * 3)], timeout_s=20) for n in range(8)]
            replies = await asyncio.gather(*calls)
            front.handle(lambda incoming: incoming.refuse(Overloaded(0.25)))
            with pytest.raises(Overloaded):
                await caller.call(MESH, peer, request(), [b"abc"], timeout_s=20)
            return [bytes(reply.tensors[0]) for reply in replies]
        finally:
            caller.close()

    assert asyncio.run(ask()) == [bytes([n] * 3) for n in range(8)]


def test_a_cancelled_coroutine_has_the_rank_give_up(front: Front) -> None:
    taken: queue.Queue[Incoming] = queue.Queue()
    given_up: queue.Queue[bool] = queue.Queue()
    front.handle(taken.put)

    async def ask() -> None:
        caller = FrontCaller()
        peer = FrontPeer(RANK, INCARNATION, front.endpoint)
        call = asyncio.create_task(caller.call(MESH, peer, request(), [b"abc"], timeout_s=20))
        incoming = await asyncio.to_thread(taken.get, timeout=20)
        incoming.on_cancel(lambda: given_up.put(True))
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert await asyncio.to_thread(given_up.get, timeout=20)
        incoming.refuse(MeshUnavailable("given up"))
        caller.close()

    asyncio.run(ask())


def test_a_caller_fails_what_is_pending_when_it_is_closed(front: Front) -> None:
    taken: queue.Queue[Incoming] = queue.Queue()
    front.handle(taken.put)

    async def ask() -> None:
        caller = FrontCaller()
        peer = FrontPeer(RANK, INCARNATION, front.endpoint)
        call = asyncio.create_task(caller.call(MESH, peer, request(), [b"abc"], timeout_s=20))
        await asyncio.to_thread(taken.get, timeout=20)
        caller.close()
        with pytest.raises(MeshUnavailable):
            await call

    asyncio.run(ask())


def test_ranks_without_a_front_have_no_peer() -> None:
    ranks = (RankInfo(3, 7, "cpu", RankMode.SERVE, "", "tcp://1.2.3.4:5"), RankInfo(4, 8, "cpu", RankMode.SERVE, ""))
    view = View("m", 1, 1, 8, (NodeInfo(0, "n", 1, "h:1", ranks),))
    assert front_peer(view, 3) == FrontPeer(3, 7, "tcp://1.2.3.4:5")
    assert front_peer(view, 4) is None
    assert front_peer(view, 5) is None
