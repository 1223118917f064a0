"""Rows over gRPC to a node service that answers in every wrong way; fronts that can or cannot be reached."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest

from epmesh.arrays import Rows
from epmesh.errors import (
    METADATA_KEY,
    DeadlineExceeded,
    EpmeshError,
    InvalidRequest,
    MeshUnavailable,
    PeerLost,
    StaleEpoch,
)
from epmesh.forward import Forward, NodeCall, Tokens
from epmesh.routes import Routes
from epmesh.row_transport import CHUNK_BYTES, FrontRows, GrpcRows, call_parts, fronts_reachable
from epmesh.v1 import frame_pb2, router_service_pb2, router_service_pb2_grpc
from tests.unit.router_fakes import make_view, node_sums

Response = router_service_pb2.ForwardRowsResponse
Answers = Iterator[Response]


@contextmanager
def port_of_nobody() -> Iterator[int]:
    """A port that is bound, and where nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@dataclass
class Node(router_service_pb2_grpc.RouterServiceServicer):
    """A node service whose answers a test makes; it keeps what came."""

    answer: Callable[[grpc.ServicerContext], Answers]
    requests: list[Any] = field(default_factory=list)

    def ForwardRows(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Answers:
        self.requests = list(request_iterator)
        yield from self.answer(context)


@dataclass
class Wire:
    """A call to a node on loopback."""

    node: Node
    tokens: Tokens
    call: NodeCall
    transport: GrpcRows

    def ask(self, timeout_s: float = 10.0) -> Rows:
        future = self.transport.send(self.call, call_parts(self.call, self.tokens), timeout_s)
        future.exception(20)
        return self.transport.sums(self.call, future)


@pytest.fixture
def wire() -> Iterator[Wire]:
    node = Node(lambda context: iter(()))
    server = grpc.server(ThreadPoolExecutor(4))
    router_service_pb2_grpc.add_RouterServiceServicer_to_server(node, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    transport = GrpcRows()
    yield Wire(node, *make_call(port), transport)
    transport.close()
    server.stop(0).wait()


def make_call(port: int, num_tokens: int = 3) -> tuple[Tokens, NodeCall]:
    hidden = np.arange(num_tokens * 4, dtype=np.float32).reshape(num_tokens, 4)
    tokens = Tokens(
        Rows.of(hidden), Rows.of(np.ones((num_tokens, 1), np.float32)), np.zeros((num_tokens, 1), np.int64), 7
    )
    view = make_view(5, {0: (0,), 1: (1,)}, num_experts=2, node_port=port)
    forward = Forward(tokens)
    forward.follow(view)
    (call,) = forward.plan(Routes(view), 0, lambda ranks: ranks[0], 0.0)
    return tokens, call


def meta(*shape: int, dtype: str = "float32") -> frame_pb2.TensorMeta:
    return frame_pb2.TensorMeta(dtype=dtype, shape=shape)


def test_tensors_go_and_come_in_pieces(wire: Wire) -> None:
    wire.tokens, wire.call = make_call(int(wire.call.part.node.address.rpartition(":")[2]), CHUNK_BYTES // 10)
    parts = call_parts(wire.call, wire.tokens)
    sums = node_sums(parts)

    def answer(context: grpc.ServicerContext) -> Answers:
        data = bytes(sums.buffer())
        yield Response(tensors=[meta(len(sums), 4)], data=data[:10])
        for start in range(10, len(data), 1000_000):
            yield Response(data=data[start : start + 1000_000])

    wire.node.answer = answer
    assert np.array_equal(wire.ask().data, sums.data)
    first, *rest = wire.node.requests
    assert (first.mesh_id, first.layer, first.epoch, list(first.ranks)) == ("mesh", 7, 5, [0])
    assert list(first.tensors) == parts[0]
    assert all(len(message.data) <= CHUNK_BYTES for message in rest)
    assert len(rest) > 4
    assert b"".join(message.data for message in rest) == b"".join(map(bytes, parts[1]))


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        ([], "node 0 answered without sums"),
        ([Response(data=b"1234")], "node 0 answered without sums"),
        ([Response(tensors=[meta(3, 4), meta(3, 4)])], "node 0 answered without sums"),
        ([Response(tensors=[meta(2, 4)])], r"node 0 answered \[2, 4\] for 3 rows"),
        ([Response(tensors=[meta(3)])], r"node 0 answered \[3\] for 3 rows"),
        ([Response(tensors=[meta(3, 1)], data=b"x" * 13)], "13 bytes came"),
        ([Response(tensors=[meta(3, 1)], data=b"x" * 11), Response(data=b"xx")], "more than the 12 bytes it announced"),
        ([Response(tensors=[meta(3, 1)], data=b"x" * 11)], "11 bytes came"),
        ([Response(tensors=[meta(3, 1 << 40)])], "at most"),
        ([Response(tensors=[meta(3, 1, dtype="object")])], "dtype 'object' is unknown"),
    ],
)
def test_an_answer_that_is_none_is_a_typed_error(wire: Wire, answers: list[Response], text: str) -> None:
    wire.node.answer = lambda context: iter(answers)
    with pytest.raises(EpmeshError, match=text):
        wire.ask()


def test_what_the_node_refuses_comes_typed(wire: Wire) -> None:
    def answer(context: grpc.ServicerContext) -> Answers:
        error = StaleEpoch(9, "epoch 5 is over")
        context.set_trailing_metadata(((METADATA_KEY, error.to_proto().SerializeToString()),))
        context.set_code(grpc.StatusCode.FAILED_PRECONDITION)
        return iter(())

    wire.node.answer = answer
    with pytest.raises(StaleEpoch, match="epoch 5 is over") as caught:
        wire.ask()
    assert caught.value.epoch == 9


def test_a_node_out_of_reach_has_lost_its_ranks() -> None:
    transport = GrpcRows()
    with port_of_nobody() as port:
        tokens, call = make_call(port)
        future = transport.send(call, call_parts(call, tokens), 10)
        with pytest.raises(PeerLost) as caught:
            future.result(20)
    assert caught.value.ranks == (0,)
    transport.close()


def test_a_node_that_is_silent_is_late(wire: Wire) -> None:
    over = threading.Event()

    def answer(context: grpc.ServicerContext) -> Answers:
        over.wait(20)
        yield Response()

    wire.node.answer = answer
    with pytest.raises(DeadlineExceeded, match="node 0 did not answer in time") as caught:
        wire.ask(0.1)
    assert caught.value.rank == 0
    over.set()


def test_cancelling_cancels_the_call_at_the_node(wire: Wire) -> None:
    came, ended = threading.Event(), threading.Event()

    def answer(context: grpc.ServicerContext) -> Answers:
        context.add_callback(ended.set)
        came.set()
        ended.wait(20)
        yield Response()

    wire.node.answer = answer
    future = wire.transport.send(wire.call, call_parts(wire.call, wire.tokens), 20)
    assert came.wait(10)
    assert future.cancel()
    assert ended.wait(10)
    with pytest.raises(CancelledError):
        wire.transport.sums(wire.call, future)


@pytest.mark.parametrize("make", [FrontRows, GrpcRows])
def test_a_closed_transport_sends_nothing(make: type[FrontRows | GrpcRows]) -> None:
    transport = make()
    transport.close()
    transport.close()
    tokens, call = make_call(1)
    with pytest.raises(MeshUnavailable, match="this router was closed"):
        transport.send(call, call_parts(call, tokens), 1)


def test_fronts_that_are_no_address_cannot_be_reached() -> None:
    (info,) = make_view(1, {0: (0,)}, front_port=1 << 20).ranks.values()
    assert not fronts_reachable([info], 0.1)
    assert not fronts_reachable([], 0.1)


def test_an_unknown_dtype_is_not_taken_for_rows() -> None:
    with pytest.raises(InvalidRequest):
        Rows.over("object", (1, 1), b"12345678")
