"""Drivers made of nothing but generated stubs and NumPy, and calls that no driver of ours would make."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from epmesh import EpmeshError, InvalidRequest, NotReady, Unauthenticated
from epmesh.errors import from_rpc_error
from epmesh.v1 import communicator_service_pb2 as pb
from epmesh.v1 import communicator_service_pb2_grpc as rpc
from epmesh.v1 import error_pb2, frame_pb2, front_pb2, view_pb2
from tests.integration.hosted_mesh import HostedMesh

TIMEOUT_S = 30.0


class BareDriver:
    """What a program in another language would have."""

    def __init__(self, address: str, rank: int) -> None:
        self.rank = rank
        self._channel = grpc.insecure_channel(address)
        self.stub = rpc.CommunicatorServiceStub(self._channel)
        self.token = self._attach()

    def _attach(self) -> bytes:
        """Asks until the rank is there."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            self._stream = self.stub.AttachRank(pb.AttachRankRequest(rank=self.rank, driver=f"bare stub {self.rank}"))
            try:
                granted: pb.AttachRankResponse = next(self._stream)
            except grpc.RpcError as exc:
                error = from_rpc_error(exc, "AttachRank")
                if not isinstance(error, NotReady) or time.monotonic() > deadline:
                    raise error from exc
                time.sleep(0.05)  # nothing tells when a rank comes
            else:
                return granted.token

    def header(self, *tensors: np.ndarray[Any, Any], group: str = "ep", **fields: Any) -> pb.CallHeader:
        metas = [frame_pb2.TensorMeta(dtype=tensor.dtype.name, shape=tensor.shape) for tensor in tensors]
        return pb.CallHeader(**{"rank": self.rank, "token": self.token, "group": group, "tensors": metas, **fields})

    def call(
        self, method: str, arguments: Any, *tensors: np.ndarray[Any, Any], cut: int = 7, **fields: Any
    ) -> tuple[front_pb2.DriverResult, list[np.ndarray[Any, Any]]]:
        """Calls a method, its data in messages of `cut` bytes."""
        make = getattr(pb, f"{method}Request")
        data = b"".join(tensor.tobytes() for tensor in tensors)
        first = make(call=self.header(*tensors, **fields), arguments=arguments)
        rest = [make(data=data[at : at + cut]) for at in range(0, len(data), cut)]
        return self.send(method, [first, *rest])

    def send(self, method: str, messages: list[Any]) -> tuple[front_pb2.DriverResult, list[np.ndarray[Any, Any]]]:
        """Sends these messages, whatever they are; reads the answer."""
        try:
            answers = list(getattr(self.stub, method)(iter(messages), timeout=TIMEOUT_S))
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, method) from exc
        data, tensors = b"".join(answer.data for answer in answers), []
        for meta in answers[0].result.tensors:
            size = int(np.prod(meta.shape)) * np.dtype(meta.dtype).itemsize
            tensors.append(np.frombuffer(data[:size], meta.dtype).reshape(tuple(meta.shape)))
            data = data[size:]
        assert not data
        return answers[0].result.result, tensors

    def close(self) -> None:
        self.stub.DetachRank(pb.DetachRankRequest(rank=self.rank, token=self.token), timeout=TIMEOUT_S)
        self._channel.close()


@pytest.fixture(scope="module")
def drivers() -> Iterator[list[BareDriver]]:
    """Of two ranks on two nodes."""
    with HostedMesh(2, 1) as mesh, contextlib.ExitStack() as stack:
        made = [BareDriver(address, rank) for rank, address in enumerate(mesh.addresses)]
        for driver in made:
            stack.callback(driver.close)
            ready = front_pb2.WaitReadyArguments(timeout_s=20.0, world_size=2)
            _ready(driver, ready)
        yield made


def _ready(driver: BareDriver, arguments: front_pb2.WaitReadyArguments) -> None:
    """A rank that is about to join is not ready yet."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            result, (encoded,) = driver.call("WaitReady", arguments)
        except NotReady:
            assert time.monotonic() < deadline
            continue
        assert list(result.description.ranks) == [0, 1]
        assert [len(node.ranks) for node in view_pb2.View.FromString(encoded.tobytes()).nodes] == [1, 1]
        return


def both(drivers: list[BareDriver], work: Callable[[BareDriver], Any]) -> list[Any]:
    """`work` for both ranks at once; an error is a result, too."""

    def attempt(driver: BareDriver) -> Any:
        try:
            return work(driver)
        except EpmeshError as exc:
            return type(exc).__name__, str(exc)

    with ThreadPoolExecutor(len(drivers)) as pool:
        return list(pool.map(attempt, drivers))


def sum_of_ranks(driver: BareDriver) -> list[float]:
    tensor = np.full((2, 3), driver.rank + 1, np.float32)
    _, (result,) = driver.call("AllReduce", front_pb2.AllReduceArguments(), tensor)
    assert result.shape == (2, 3)
    return sorted(set(result.reshape(-1).tolist()))


def test_stubs_and_numpy_are_enough_for_collectives(drivers: list[BareDriver]) -> None:
    assert both(drivers, sum_of_ranks) == [[3.0], [3.0]]
    gathered = both(
        drivers,
        lambda driver: driver.call(
            "AllGather", front_pb2.AllGatherArguments(dim=0), np.full(2, driver.rank, np.int16), cut=1
        )[1][0].tolist(),
    )
    assert gathered == [[0, 0, 1, 1]] * 2


def exchange(driver: BareDriver) -> tuple[list[int], list[list[float]], bool]:
    """Each rank sends one row to the expert that it holds itself and one to the other's."""
    rows = np.array([[driver.rank + 0.25], [driver.rank + 0.5]], np.float32)
    ids, weights = np.array([[0], [1]], np.int64), np.ones((2, 1), np.float32)
    arguments = front_pb2.DispatchArguments(is_sequence_parallel=True, layer=7)
    result, (received, _, received_ids) = driver.call("Dispatch", arguments, rows, weights, ids)
    assert received_ids.reshape(-1).tolist() == [driver.rank] * len(received)
    combine = front_pb2.CombineArguments(is_sequence_parallel=True, sequence=result.sequence)
    _, (sums,) = driver.call("Combine", combine, received * (10 ** (driver.rank + 1)))
    return sorted(received.reshape(-1).tolist()), sums.tolist(), result.sequence > 0


def test_stubs_and_numpy_are_enough_for_an_exchange(drivers: list[BareDriver]) -> None:
    place = front_pb2.PlaceExpertsArguments(num_experts=2, layer=7)
    both(drivers, lambda driver: driver.call("PlaceExperts", place))
    assert both(drivers, exchange) == [
        ([0.25, 1.25], [[2.5], [50.0]], True),
        ([0.5, 1.5], [[12.5], [150.0]], True),
    ]


def test_a_started_dispatch_is_waited_for_by_its_number(drivers: list[BareDriver]) -> None:
    def work(driver: BareDriver) -> tuple[int, list[list[float]]]:
        rows, ids = np.full((1, 2), driver.rank + 1, np.float32), np.zeros((1, 1), np.int32)
        start = front_pb2.StartDispatchArguments(
            dispatch=front_pb2.DispatchArguments(is_sequence_parallel=True, layer=99)
        )
        started, nothing = driver.call("StartDispatch", start, rows, np.ones((1, 1), np.float32), ids)
        assert not nothing
        _, received = driver.call("WaitDispatch", front_pb2.WaitDispatchArguments(sequence=started.sequence))
        combine = front_pb2.CombineArguments(is_sequence_parallel=True, sequence=started.sequence)
        return len(received[0]), driver.call("Combine", combine, received[0])[1][0].tolist()

    assert both(drivers, work) == [(2, [[2.0, 2.0]]), (2, [[4.0, 4.0]])]


def only_on_rank_1(driver: BareDriver, wrong: Callable[[BareDriver], Any]) -> Any:
    return wrong(driver) if driver.rank else sum_of_ranks(driver)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda d: d.call("AllReduce", front_pb2.AllReduceArguments()), ("1 tensors", "0 came")),
        (
            lambda d: d.call("AllReduce", front_pb2.AllReduceArguments(), np.ones(1), np.ones(1)),
            ("1 tensors", "2 came"),
        ),
        (lambda d: d.call("Dispatch", front_pb2.DispatchArguments(), np.ones((1, 1))), ("3 tensors or more", "1 came")),
        (
            lambda d: d.call("MakeGroup", front_pb2.MakeGroupArguments(name="odd"), np.ones(1)),
            ("create_group", "1 came"),
        ),
        (
            lambda d: d.call(
                "Broadcast",
                front_pb2.BroadcastArguments(),
                refusal=error_pb2.Error(code=error_pb2.ERROR_CODE_PEER_LOST, message="my own input is odd"),
            ),
            ("broadcast on rank 1", "my own input is odd"),
        ),
        (lambda d: d.call("Gather", front_pb2.GatherArguments(dst=1 << 30), np.ones(1)), ("gather", str(1 << 30))),
    ],
    ids=["no tensor", "a tensor too many", "ids missing", "a tensor for none", "a refusal", "a rank that is not there"],
)
def test_calls_that_make_no_sense_are_refused_on_all_ranks(
    drivers: list[BareDriver], wrong: Callable[[BareDriver], Any], words: tuple[str, ...]
) -> None:
    errors = both(drivers, lambda driver: only_on_rank_1(driver, wrong))
    assert errors[0] == errors[1]
    kind, text = errors[0]
    assert kind == "InvalidRequest"
    assert not [word for word in words if word not in text], text
    assert both(drivers, sum_of_ranks) == [[3.0], [3.0]]


ONES = np.ones(2, np.float32)
ARGUMENTS = front_pb2.AllReduceArguments()


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        (lambda _: [], InvalidRequest, "first message"),
        (lambda _: [pb.AllReduceRequest(data=b"x")], InvalidRequest, "first message"),
        (
            lambda d: [pb.AllReduceRequest(call=d.header(ONES, token=b"guess"), arguments=ARGUMENTS)],
            Unauthenticated,
            "attach",
        ),
        (
            lambda d: [pb.AllReduceRequest(call=d.header(ONES, rank=d.rank + 1), arguments=ARGUMENTS)],
            Unauthenticated,
            "attach",
        ),
        (lambda d: [pb.AllReduceRequest(call=d.header(ONES), arguments=ARGUMENTS)], InvalidRequest, "0 bytes of data"),
        (
            lambda d: [pb.AllReduceRequest(call=d.header(ONES), arguments=ARGUMENTS, data=bytes(9))],
            InvalidRequest,
            "more data",
        ),
        (
            lambda d: [
                pb.AllReduceRequest(
                    call=d.header(tensors=[frame_pb2.TensorMeta(dtype="float32", shape=[1 << 31])]), arguments=ARGUMENTS
                )
            ],
            InvalidRequest,
            str(4 << 31),
        ),
        (
            lambda d: [pb.AllReduceRequest(call=d.header(ONES, group="nowhere"), arguments=ARGUMENTS, data=bytes(8))],
            InvalidRequest,
            "nowhere",
        ),
    ],
    ids=["nothing", "no header", "wrong token", "wrong rank", "too little", "too much", "too large", "no such group"],
)
def test_what_never_becomes_a_call_is_refused_to_its_sender_alone(
    drivers: list[BareDriver], messages: Callable[[BareDriver], list[Any]], error: type[EpmeshError], words: str
) -> None:
    with pytest.raises(error, match=words):
        drivers[0].send("AllReduce", messages(drivers[0]))
    assert both(drivers, sum_of_ranks) == [[3.0], [3.0]]


def test_the_communicator_of_ep_is_not_destroyed_by_a_call(drivers: list[BareDriver]) -> None:
    with pytest.raises(InvalidRequest, match="DetachRank"):
        drivers[0].call("DestroyCommunicator", front_pb2.DestroyArguments())


def test_a_driver_of_another_version_is_refused(drivers: list[BareDriver]) -> None:
    stream = drivers[0].stub.AttachRank(pb.AttachRankRequest(rank=0, version="17.3.0"))
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    found = from_rpc_error(caught.value, "AttachRank")
    assert isinstance(found, InvalidRequest)
    assert "17.3.0" in str(found)
