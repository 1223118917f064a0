"""`LocalMesh` with hosted ranks: works run in their drivers, or they serve."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

import epmesh
from epmesh import Communicator, InvalidRequest
from epmesh.testing import LocalMesh
from epmesh.view import RankMode
from tests.integration import mesh_works
from tests.integration.commands import gone
from tests.integration.waiting import PATIENCE_S

EXPERTS = "tests.integration.hosted_experts"


def kind(comm: Communicator) -> tuple[str, int, int]:
    return type(comm).__name__, comm.global_rank, os.getpid()


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    with LocalMesh(nodes=2, ranks_per_node=2, hosted=True, num_experts=8) as made:
        yield made


def test_works_run_in_drivers(mesh: LocalMesh) -> None:
    found = mesh.run(kind)
    assert [(name, rank) for name, rank, _ in found] == [("AttachedCommunicator", rank) for rank in range(4)]
    assert mesh.run(mesh_works.total) == [6] * 4
    assert mesh.run(mesh_works.placement)[0] == epmesh.linear_placement(8, range(4))


@pytest.mark.fault
def test_a_killed_driver_costs_a_membership_and_is_replaced(mesh: LocalMesh) -> None:
    before = mesh.run(kind)
    mesh.kill_driver(1)
    after = mesh.run(kind)
    assert [after[rank] == before[rank] for rank in range(4)] == [True, False, True, True]
    assert mesh.run(mesh_works.total) == [6] * 4
    assert mesh.run(mesh_works.placement)[0] == epmesh.linear_placement(8, range(4))


@pytest.mark.fault
def test_a_node_is_killed_and_started_again_with_its_ranks_and_drivers(mesh: LocalMesh) -> None:
    mesh.kill_node(1)
    assert mesh.ranks == [0, 1]
    assert mesh.run(mesh_works.total) == [1, 1]
    mesh.start_node(1)
    assert mesh.run(mesh_works.total) == [6] * 4


@pytest.mark.fault
@pytest.mark.slow
def test_a_paused_rank_is_left_out_and_comes_back(mesh: LocalMesh) -> None:
    mesh.pause_rank(3)
    assert mesh.run(mesh_works.total) == [3] * 3
    mesh.resume_rank(3)
    assert mesh.run(mesh_works.total) == [6] * 4


@pytest.mark.parametrize("transport", ["shm", "zmq", "grpc"])
def test_drivers_use_the_transport_they_are_told(transport: str) -> None:
    with LocalMesh(nodes=1, ranks_per_node=2, hosted=True, transport=transport) as mesh:
        assert mesh.run(mesh_works.total) == [1, 1]


@pytest.mark.fault
def test_a_rank_killed_alone_is_left_out() -> None:
    with LocalMesh(nodes=1, ranks_per_node=3, hosted=True) as mesh:
        mesh.kill_rank(1)
        assert mesh.run(mesh_works.total) == [2, 2]
        mesh.start_node(0)
        assert mesh.run(mesh_works.total) == [3] * 3


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(3, 8), torch.ones(3, 2), torch.tensor([[0, 1], [2, 3], [3, -1]])


def check_forward(router: epmesh.Router) -> None:
    hidden, weights, ids = rows()
    found = router.forward(hidden, weights, ids, timeout=PATIENCE_S)
    wanted = hidden * torch.tensor([[2.0], [2.0], [1.0]]) + torch.tensor([[1.0], [5.0], [3.0]])
    torch.testing.assert_close(found, wanted)


def test_with_a_factory_the_ranks_serve_routers() -> None:
    with LocalMesh(nodes=2, ranks_per_node=1, experts=f"{EXPERTS}:plus_id", num_experts=4) as mesh:
        view = mesh.view()
        assert {info.mode for info in view.ranks.values()} == {RankMode.SERVE}
        assert all(info.front_endpoint for info in view.ranks.values())
        with epmesh.Router(mesh.address) as router:
            check_forward(router)
            with pytest.raises(InvalidRequest, match=r"serve with .*plus_id.*epmesh\.Router"):
                mesh.run(mesh_works.total)
            with pytest.raises(InvalidRequest, match="rank 0 has no driver"):
                mesh.kill_driver(0)


@pytest.mark.fault
def test_a_serving_node_is_killed_and_routers_go_on_with_replicas() -> None:
    everything = [range(4)] * 2
    with LocalMesh(nodes=2, ranks_per_node=1, experts=f"{EXPERTS}:plus_id", num_experts=4, held=everything) as mesh:
        assert mesh.view().placements[None].experts_of == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}
        with epmesh.Router(mesh.addresses) as router:
            mesh.kill_node(1)
            check_forward(router)
            mesh.start_node(1)
            assert sorted(mesh.view().ranks) == [0, 1]
            mesh.kill_rank(0)
            check_forward(router)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": "m:f"}, "needs num_experts"),
        ({"experts": "m:f", "num_experts": 4, "held": [[1]]}, "1 entries for 4 ranks"),
        ({"experts": [[0]] * 4, "held": [[0]] * 4, "num_experts": 4}, "held stands beside"),
        ({"transport": "zmq"}, "transport='zmq' is the drivers'"),
        ({"experts": "m:f", "num_experts": 4, "transport": "zmq"}, "transport='zmq' is the drivers'"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        LocalMesh(**options)  # type: ignore[arg-type]


def test_a_factory_that_fails_is_raised_here() -> None:
    with (
        pytest.raises(InvalidRequest, match=r"weights\.safetensors is not there"),
        LocalMesh(nodes=1, ranks_per_node=1, experts=f"{EXPERTS}:without_weights", num_experts=4),
    ):
        pass


@pytest.mark.parametrize("options", [{"hosted": True}, {"experts": f"{EXPERTS}:plus_id", "num_experts": 4}], ids=str)
def test_it_closes_within_two_seconds_and_leaves_no_process(options: dict[str, object]) -> None:
    with LocalMesh(nodes=1, ranks_per_node=2, **options) as mesh:  # type: ignore[arg-type]
        pids = [child.pid for child in (*mesh._rank_children.values(), *mesh._driver_children.values())]
        started = time.monotonic()
    assert time.monotonic() - started < 4 * 2.0
    assert len(pids) >= 2
    assert all(map(gone, pids))
