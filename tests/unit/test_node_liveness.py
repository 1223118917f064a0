"""The probe that tells a stopped process from a busy one, against real sockets."""

from __future__ import annotations

import asyncio

import pytest
import zmq
import zmq.asyncio

from epmesh_server.node.liveness import LivenessSettings, watch_process

FAST = LivenessSettings(interval_s=0.05, timeout_s=0.1, grace_s=0.2, first_s=0.3)
# A heartbeat that a busy machine delays is an interruption, and no death.
PATIENT = LivenessSettings(interval_s=0.05, timeout_s=0.1, grace_s=2.0, first_s=10.0)


def watched(endpoint: str, settings: LivenessSettings = FAST) -> str:
    async def watch() -> str:
        context = zmq.asyncio.Context(io_threads=1)
        try:
            return await asyncio.wait_for(watch_process(context, endpoint, settings), 20)
        finally:
            context.destroy(0)

    return asyncio.run(watch())


def test_an_endpoint_where_nobody_answers_is_dead() -> None:
    with zmq.Context(io_threads=1) as context, context.socket(zmq.ROUTER) as closed:
        port = closed.bind_to_random_port("tcp://127.0.0.1")
    assert f"nothing answers at its link endpoint tcp://127.0.0.1:{port}" in watched(f"tcp://127.0.0.1:{port}")


@pytest.mark.parametrize("endpoint", ["tcp://nowhere", "tcp://127.0.0.1:x", "carrier-pigeon://7"])
def test_an_endpoint_that_is_no_address_is_dead(endpoint: str) -> None:
    assert "is no address" in watched(endpoint)


def test_a_process_is_alive_for_as_long_as_its_io_thread_answers_and_dead_after() -> None:
    async def scenario() -> str:
        context = zmq.asyncio.Context(io_threads=1)
        peer = zmq.Context(io_threads=1)
        router = peer.socket(zmq.ROUTER)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        try:
            # Nobody reads from `router`: only ZeroMQ's own thread answers.
            watching = asyncio.create_task(watch_process(context, f"tcp://127.0.0.1:{port}", PATIENT))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(watching), 0.8)
            router.close(0)
            return await asyncio.wait_for(watching, 20)
        finally:
            peer.destroy(0)
            context.destroy(0)

    assert "its process is stopped" in asyncio.run(scenario())
