"""Routers' rows over gRPC: RouterService of a node service, and a rank that serves behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import grpc
import pytest
import torch

from epmesh import DeadlineExceeded, EpmeshError, InvalidRequest, Overloaded, StaleEpoch
from epmesh.errors import from_rpc_error
from epmesh.frames import tensor_meta
from epmesh.testing import LocalMesh
from epmesh.v1 import router_service_pb2 as wire
from epmesh.v1 import router_service_pb2_grpc
from epmesh.view import View
from epmesh_server.node.call_budget import CallBudget
from epmesh_server.node.router_service import CHUNK_BYTES, DEFAULT_BUDGET_BYTES, Turns
from epmesh_server.ranks.tensors import as_bytes, dtype_from_name, dtype_name, from_bytes
from tests.integration import serve_works
from tests.integration.serve_works import reference, some_rows, wait_serving

EXPERTS = 4


@dataclass
class Served:
    """A mesh of one node, and its service's stub."""

    view: View
    stub: router_service_pb2_grpc.RouterServiceStub


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    stop = tmp_path_factory.mktemp("serve") / "stop"
    with LocalMesh(1, 2, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve, stop)
        view = wait_serving(mesh.view, [0, 1])
        with grpc.insecure_channel(mesh.address) as channel:
            yield Served(view, router_service_pb2_grpc.RouterServiceStub(channel))
        stop.touch()
        stats = done.result(30)
        assert all(each.requests for each in stats)  # they take turns


def header(view: View, tensors: Sequence[torch.Tensor], layer: int | None = 1) -> wire.ForwardRowsRequest:
    first = wire.ForwardRowsRequest(mesh_id=view.mesh_id, layer=layer, epoch=view.epoch, ranks=[0, 1])
    first.tensors.extend(tensor_meta(dtype_name(t.dtype), tuple(t.shape)) for t in tensors)
    return first


def rows(view: View, num_rows: int) -> list[torch.Tensor]:
    hidden, weights, ids = some_rows(num_rows, EXPERTS, 2, 5)
    placement = view.placement(None)
    assert placement is not None
    holder = torch.tensor([holders[0] for holders in placement.holders], dtype=torch.uint8)
    return [hidden, weights, ids, torch.where(ids >= 0, holder[ids.clamp(min=0)], 127).to(torch.uint8)]


def chunked(first: wire.ForwardRowsRequest, data: bytes, size: int) -> Iterator[wire.ForwardRowsRequest]:
    yield first
    for start in range(0, len(data), size):
        yield wire.ForwardRowsRequest(data=data[start : start + size])


def forward(served: Served, requests: Iterator[wire.ForwardRowsRequest], timeout_s: float = 20.0) -> torch.Tensor:
    try:
        responses = list(served.stub.ForwardRows(requests, timeout=timeout_s))
    except grpc.RpcError as exc:
        raise from_rpc_error(exc, "ForwardRows") from exc
    (meta,) = responses[0].tensors
    assert all(len(response.data) <= CHUNK_BYTES for response in responses)
    data = b"".join(response.data for response in responses)
    return from_bytes(memoryview(bytearray(data)), dtype_from_name(meta.dtype), tuple(meta.shape))


@pytest.mark.parametrize(("num_rows", "size"), [(0, 1), (3, 7), (100, 1 << 20), (40_000, 1 << 20)])
def test_sums_come_back_however_the_bytes_are_cut(served: Served, num_rows: int, size: int) -> None:
    tensors = rows(served.view, num_rows)
    data = b"".join(as_bytes(tensor).tobytes() for tensor in tensors)
    got = forward(served, chunked(header(served.view, tensors), data, size))
    torch.testing.assert_close(got.double(), reference(1, *tensors[:3]), rtol=1e-5, atol=1e-5)


def test_tensors_beyond_the_budget_are_refused_before_their_bytes_are_sent(served: Served) -> None:
    first = header(served.view, [])
    first.tensors.append(tensor_meta("uint8", (DEFAULT_BUDGET_BYTES + 1, 1)))
    with pytest.raises(InvalidRequest, match=f"at most {DEFAULT_BUDGET_BYTES} are taken"):
        forward(served, iter([first]))


@pytest.mark.parametrize("extra", [-1, 1])
def test_fewer_or_more_bytes_than_announced_are_refused(served: Served, extra: int) -> None:
    tensors = rows(served.view, 3)
    data = b"".join(as_bytes(tensor).tobytes() for tensor in tensors)
    data = data[:-1] if extra < 0 else data + b"!"
    with pytest.raises(InvalidRequest, match="came"):
        forward(served, chunked(header(served.view, tensors), data, 64))


def wrong(served: Served, **changes: object) -> EpmeshError:
    tensors = rows(served.view, 3)
    first = header(served.view, tensors)
    for name, value in changes.items():
        first.ClearField(name)
        first.MergeFrom(wire.ForwardRowsRequest(**{name: value}))  # type: ignore[arg-type]
    data = b"".join(as_bytes(tensor).tobytes() for tensor in tensors)
    with pytest.raises(EpmeshError) as caught:
        forward(served, chunked(first, data, 1 << 20))
    return caught.value


def test_rows_for_another_mesh_or_for_ranks_that_do_not_serve_here_are_stale(served: Served) -> None:
    for error in (wrong(served, mesh_id="another"), wrong(served, ranks=[7])):
        assert isinstance(error, StaleEpoch)
        assert error.epoch == served.view.epoch


def test_a_rows_errors_keep_their_type(served: Served) -> None:
    assert isinstance(wrong(served, ranks=[1]), InvalidRequest)  # a target names the second of one rank


def test_a_stream_without_a_message_or_with_an_open_end_is_refused(served: Served) -> None:
    with pytest.raises(InvalidRequest):
        forward(served, iter([]))
    tensors = rows(served.view, 3)

    call_is_over: Future[None] = Future()

    def unfinished() -> Iterator[wire.ForwardRowsRequest]:
        yield header(served.view, tensors)
        call_is_over.result(20)

    with pytest.raises(DeadlineExceeded):
        forward(served, unfinished(), timeout_s=0.2)
    call_is_over.set_result(None)


def test_a_budget_refuses_what_never_fits_for_good_and_what_does_not_fit_now_for_a_while() -> None:
    budget = CallBudget(100)
    with pytest.raises(InvalidRequest), budget.holding(101):
        pass
    with budget.holding(60):
        with pytest.raises(Overloaded), budget.holding(41, "other"):
            pass
        with budget.holding(40, "other"):
            assert budget.held == 100
    assert budget.held == 0


def test_the_rank_with_the_fewest_bytes_on_their_way_is_next_and_equals_take_turns() -> None:
    turns = Turns()
    with turns.turn([0, 1, 2], 10) as first, turns.turn([0, 1, 2], 5) as second, turns.turn([0, 1, 2], 20) as third:
        assert (first, second, third) == (0, 1, 2)
        with turns.turn([0, 1, 2], 1) as fourth:
            assert fourth == 1
        with turns.turn([0, 2], 1) as fifth:
            assert fifth == 0
    asked = []
    for _ in range(6):
        with turns.turn([0, 1, 2], 1) as rank:
            asked.append(rank)
    assert sorted(asked[:3]) == [0, 1, 2]
    assert asked[:3] == asked[3:]
