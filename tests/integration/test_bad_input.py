"""Whatever is wrong is a typed error that names the value, the same on all ranks of a group, and the group goes on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import epmesh
from epmesh import EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.testing import LocalMesh
from epmesh_server.coordinator import CoordinatorSettings
from epmesh_server.node import NodeSettings
from epmesh_server.processes.child import Child, end_all
from epmesh_server.processes.raised import Raised
from epmesh_server.testing.messages import Bound, Join, Ready
from epmesh_server.testing.ports import Port
from epmesh_server.testing.rank_runner import RankSettings, rank_main
from epmesh_server.testing.services import coordinator_main, node_main
from tests.integration import refusals
from tests.integration.contract import Feature, Shape
from tests.integration.implementations import on
from tests.integration.refusals import ALONE, COLLECTIVE, Refused, Wrong
from tests.integration.targets import Target

GROUPS = ("ep", "uneven")
on_2x2 = on(Shape(2, 2))


def groups(target: Target) -> list[str]:
    return [group for group in GROUPS if group in target.groups]


def check(outcome: Refused, wrong: Wrong) -> None:
    assert outcome.error == wrong.error, outcome
    assert not [word for word in wrong.words if word not in outcome.text], outcome.text


@on_2x2
@pytest.mark.parametrize("name", COLLECTIVE)
def test_every_rank_gets_the_same_refusal_and_the_group_goes_on(target: Target, name: str) -> None:
    for feature in COLLECTIVE[name].needs:
        target.needs(feature)
    for group in groups(target):
        if "no rank holds" in name:
            target.run(group, refusals.hold_some)
        outcomes = target.run(group, refusals.attempt, name)
        for outcome in outcomes:
            check(outcome, COLLECTIVE[name])
            assert outcome.works
        assert len(set(outcomes)) == 1, outcomes


@on_2x2
@pytest.mark.parametrize("name", ALONE)
def test_calls_that_are_not_collective_refuse_the_caller_alone(target: Target, name: str) -> None:
    for feature in ALONE[name].needs:
        target.needs(feature)
    if "somebody else" in name:
        target.run("ep", refusals.elsewhere)
    *others, caller = target.run("ep", refusals.attempt_alone, name)
    check(caller, ALONE[name])
    assert {other.error for other in others} == {"NoneType"}
    assert all(each.works for each in (*others, caller))


@on_2x2
@pytest.mark.parametrize(("shape", "dtype", "word"), [((4,), torch.float32, "4"), ((3,), torch.int32, "int32")])
def test_recv_of_another_tensor_than_was_sent_is_refused(
    target: Target, shape: tuple[int, ...], dtype: torch.dtype, word: str
) -> None:
    for group in groups(target):
        *_, receiver = target.run(group, refusals.mismatched_recv, shape, dtype)
        assert receiver.error == "InvalidRequest"
        assert word in receiver.text
        assert receiver.works


@on_2x2
def test_a_second_thread_in_one_group_is_refused(target: Target, tmp_path: Path) -> None:
    fifos = [tmp_path / str(rank) for rank in range(1, target.shape.world_size)]
    for fifo in fifos:
        os.mkfifo(fifo)
    (refused, works), *others = target.run("ep", refusals.two_threads, fifos)
    assert len(refused) == 1
    assert "thread" in refused[0]
    assert works
    assert all(each == ([], True) for each in others)


@on_2x2
def test_a_destroyed_groups_communicator_says_so(target: Target) -> None:
    target.needs(Feature.GROUPS)
    found = target.run("ep", refusals.destroyed_group)
    assert len({tuple(each) for each in found}) == 1
    kind, text = found[0]
    assert kind == "InvalidRequest"
    assert "ended" in text


# Joining --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_mesh() -> Iterator[LocalMesh]:
    """One node with one rank of two, which declared 8 experts."""
    with LocalMesh(1, 1, num_experts=8) as mesh:
        yield mesh


@pytest.fixture
def free_address() -> Iterator[str]:
    """An address of loopback where nobody listens, nor will."""
    with closing(Port()) as port:
        yield port.address


def test_joining_where_nobody_listens_says_where_and_how_to_mend_it(free_address: str) -> None:
    with pytest.raises(MeshUnavailable, match=f"{free_address}.*epmesh serve"):
        epmesh.join(free_address, timeout_s=0.5)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:port", "127.0.0.1:70000", ""])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match=address or "address"):
        epmesh.join(address, timeout_s=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"world_size": 0}, "world_size is 0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"num_experts": -1}, "num_experts"),
        ({"experts": [1]}, "num_experts"),
        ({"num_experts": 4, "experts": [4]}, "4"),
        ({"num_experts": 4, "experts": [-1]}, "experts has -1; ids are 0 to 3"),
        ({"exchange_timeout_s": 0}, "exchange_timeout_s"),
        ({"exchange_timeout_s": float("nan")}, "exchange_timeout_s=nan"),
        ({"exchange_timeout_s": float("inf")}, "exchange_timeout_s=inf"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank is 0"),
        ({"local_rank": -1}, "local_rank is -1"),
        ({"layer": -1, "num_experts": 4}, "layer is -1"),
        ({"world_size": 1 << 40}, "world_size is 1099511627776"),
        ({"device": "abacus"}, "abacus"),
        ({"local_rank": 0}, "local rank 0"),
        ({"local_rank": 1}, "local rank 1"),
        ({}, "rank"),
    ],
    ids=str,
)
def test_wrong_arguments_of_join_are_named(small_mesh: LocalMesh, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        epmesh.join(small_mesh.address, timeout_s=5.0, **options)


def join_with_other_experts(comm: epmesh.Communicator, address: str) -> tuple[str, str]:
    if comm.global_rank:
        return "", ""
    try:
        epmesh.join(address, local_rank=1, num_experts=9, timeout_s=5.0)
    except EpmeshError as exc:
        return type(exc).__name__, str(exc)
    return "", ""


def test_a_rank_that_declares_another_number_of_experts_is_refused_and_the_others_go_on() -> None:
    with LocalMesh(1, 2, num_experts=8) as mesh:
        mesh.kill_rank(1)
        ((kind, text),) = mesh.run(join_with_other_experts, mesh.address)
        assert kind == "InvalidRequest"
        assert "9" in text
        assert "8" in text
        assert mesh.run(refusals.works) == [True]


# Services -------------------------------------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Callable[..., Child]]:
    """Starts ``entry(pipe, settings)`` in a process of its own, as `LocalMesh` does; all are ended after the test."""
    children: list[Child] = []

    def start_one(entry: Callable[..., None], settings: object) -> Child:
        children.append(Child(entry.__name__, entry, settings))
        return children[-1]

    yield start_one
    end_all(children, 1.0)


def message(child: Child, timeout_s: float = 10.0) -> Any:
    assert child.pipe.poll(timeout_s), f"{child.name} says nothing"
    return child.receive()


def refusal(child: Child) -> BaseException:
    """What a service that does not run says, be it after it was bound."""
    answer = message(child)
    if isinstance(answer, Bound):
        answer = message(child)
    assert isinstance(answer, Raised)
    return answer.error(child.name)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_node_service_says_that_its_port_is_in_use(
    start: Any, taken_port: int, free_address: str, tmp_path: Path
) -> None:
    node = start(node_main, NodeSettings(port=taken_port, coordinator=free_address, runtime_dir=tmp_path / "node"))
    error = refusal(node)
    assert isinstance(error, InvalidRequest)
    assert str(taken_port) in str(error)


def test_a_coordinator_says_that_its_port_is_in_use(start: Any, taken_port: int, tmp_path: Path) -> None:
    error = refusal(start(coordinator_main, CoordinatorSettings(port=taken_port, data_dir=tmp_path / "log")))
    assert isinstance(error, InvalidRequest)
    assert str(taken_port) in str(error)


def test_a_second_node_with_a_live_nodes_id_is_refused_and_the_first_goes_on(
    small_mesh: LocalMesh, start: Any, tmp_path: Path
) -> None:
    node_id = small_mesh.view().nodes[0].node_id
    coordinator = small_mesh.coordinator_address
    second = start(
        node_main, NodeSettings(port=0, node_id=node_id, coordinator=coordinator, runtime_dir=tmp_path / "n")
    )
    error = refusal(second)
    assert isinstance(error, InvalidRequest)
    assert node_id in str(error)
    assert small_mesh.run(refusals.works) == [True]


def test_joining_a_node_whose_coordinator_is_out_of_reach_names_the_coordinator(
    start: Any, free_address: str, tmp_path: Path
) -> None:
    node = start(node_main, NodeSettings(port=0, coordinator=free_address, runtime_dir=tmp_path / "node"))
    with pytest.raises(MeshUnavailable, match=free_address):
        epmesh.join(message(node).address, timeout_s=1.0)


def test_a_late_coordinator_is_waited_for(start: Any, tmp_path: Path) -> None:
    with closing(Port()) as port:
        node = start(node_main, NodeSettings(port=0, coordinator=port.address, runtime_dir=tmp_path / "node"))
        rank = start(rank_main, RankSettings(local_rank=0, timeout_s=20.0))
        rank.send(Join(message(node).address, world_size=1))
        assert not rank.pipe.poll(0.3), "joined without a coordinator"
        start(coordinator_main, CoordinatorSettings(port=port.number, data_dir=tmp_path / "log"))
        assert isinstance(message(rank, 20.0), Ready)
