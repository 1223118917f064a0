"""A node's calls when it turns from one coordinator to another."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import grpc
import pytest

from epmesh.v1 import group_service_pb2 as wire
from epmesh.v1 import group_service_pb2_grpc as rpc
from epmesh_server.node.coordinator_channel import CoordinatorChannel
from epmesh_server.node.groups import Groups
from epmesh_server.node.views import ViewBoard


def test_a_call_that_waits_as_the_node_turns_hears_mesh_unavailable() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
            silent.setblocking(False)
            first = f"127.0.0.1:{silent.getsockname()[1]}"
            channel = CoordinatorChannel((first, "127.0.0.1:1"), None)
            server = grpc.aio.server()
            rpc.add_GroupServiceServicer_to_server(Groups(channel, ViewBoard()), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as client:
                request = wire.CreateGroupRequest(request_id="a", name="a", ranks=[0])
                call = rpc.GroupServiceStub(client).CreateGroup(request, timeout=20)
                waiting = asyncio.ensure_future(call)
                connection, _ = await loop.sock_accept(silent)  # the node calls, and nobody answers
                await channel.turn()
                assert channel.address == "127.0.0.1:1"
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await waiting
                connection.close()
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "turned to another coordinator" in str(error.value.details())
            await channel.turn()
            assert channel.address == first
            await channel.close()
            await server.stop(0)

    asyncio.run(asyncio.wait_for(main(), 30))
