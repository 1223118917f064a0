"""Typed errors cross gRPC whole, through a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from epmesh.errors import (
    DeadlineExceeded,
    EpmeshError,
    ExpertUnavailable,
    InvalidRequest,
    MeshUnavailable,
    NotReady,
    Overloaded,
    PeerLost,
    StaleEpoch,
    Unauthenticated,
    from_rpc_error,
    status_code,
)
from epmesh.grpc_errors import abort
from epmesh.v1 import discovery_service_pb2 as pb
from epmesh.v1 import discovery_service_pb2_grpc as rpc

Context = grpc.aio.ServicerContext[Any, Any]
ERRORS: list[EpmeshError] = [
    PeerLost([3, 1], 7),
    StaleEpoch(9),
    ExpertUnavailable([5, 2]),
    DeadlineExceeded(2, 41),
    Overloaded(0.25),
    InvalidRequest("stride is 0; use 1 or more"),
    Unauthenticated("no certificate"),
    NotReady("tp:0 is not formed yet"),
    MeshUnavailable("no coordinator at 127.0.0.1:1"),
    EpmeshError("of another version"),
]


class _Failing(rpc.DiscoveryServiceServicer):
    def __init__(self, error: EpmeshError) -> None:
        self.error = error

    async def GetView(self, request: pb.GetViewRequest, context: Context) -> pb.GetViewResponse:
        await abort(context, self.error)

    async def WatchViews(self, request: pb.WatchViewsRequest, context: Context) -> AsyncIterator[pb.WatchViewsResponse]:
        yield pb.WatchViewsResponse()
        await abort(context, self.error)


async def _raised_by_calls(error: EpmeshError) -> list[EpmeshError]:
    server = grpc.aio.server()
    rpc.add_DiscoveryServiceServicer_to_server(_Failing(error), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = rpc.DiscoveryServiceStub(channel)
            return [await _unary(stub), await _stream(stub)]
    finally:
        await server.stop(0)


async def _unary(stub: rpc.DiscoveryServiceAsyncStub) -> EpmeshError:
    try:
        await stub.GetView(pb.GetViewRequest(), timeout=20)
    except grpc.RpcError as exc:
        return from_rpc_error(exc, "GetView")
    raise AssertionError("not refused")


async def _stream(stub: rpc.DiscoveryServiceAsyncStub) -> EpmeshError:
    try:
        async for _ in stub.WatchViews(pb.WatchViewsRequest(), timeout=20):
            pass
    except grpc.RpcError as exc:
        return from_rpc_error(exc, "WatchViews")
    raise AssertionError("not refused")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_out_of_both_kinds_of_calls_as_it_went_in(error: EpmeshError) -> None:
    for raised in asyncio.run(_raised_by_calls(error)):
        assert type(raised) is type(error)
        assert str(raised) == str(error)
        assert raised.to_proto() == error.to_proto()
        assert status_code(raised) is status_code(error)


@pytest.mark.parametrize("text", ["x" * 100_000, "\u00e9\u4e16" * 3000, "tab\tline\nend"])
def test_a_long_or_odd_text_is_shortened_and_the_type_survives(text: str) -> None:
    for raised in asyncio.run(_raised_by_calls(PeerLost(range(10_000), 7, text))):
        assert isinstance(raised, PeerLost)
        assert raised.epoch == 7
        assert str(raised)[:100] == text[:100]
