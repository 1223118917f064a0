"""Ranks in mode serve beside ranks that exchange."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import epmesh
from epmesh.errors import InvalidRequest, MeshUnavailable
from epmesh.testing import LocalMesh
from epmesh.view import RankMode
from epmesh_server.ranks.communicator import JoinedCommunicator
from tests.integration import mesh_works

ROWS = torch.ones(2, 4)
IDS = torch.zeros(2, 1, dtype=torch.int64)


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    """Ranks 0 and 1 exchange; local rank 2 is free."""
    with LocalMesh(nodes=1, ranks_per_node=3) as made:
        made.kill_rank(2)
        yield made


@pytest.fixture(scope="module")
def serving(mesh: LocalMesh) -> Iterator[epmesh.Communicator]:
    with epmesh.join(mesh.address, local_rank=2, mode="serve", num_experts=4, timeout_s=10.0) as comm:
        yield comm


def test_a_rank_may_join_to_serve(serving: epmesh.Communicator) -> None:
    view = serving.view
    assert (serving.unique_name, serving.global_rank, serving.is_ep_communicator) == ("world", 2, False)
    assert view.ranks[2].mode is RankMode.SERVE
    assert view.group("ep").ranks == (0, 1)
    assert view.placements[None].experts_of == {2: (0, 1, 2, 3)}


@pytest.mark.parametrize(
    "call",
    [
        lambda comm: comm.dispatch(ROWS, ROWS[:, :1], IDS),
        lambda comm: comm.dispatch_async(ROWS, ROWS[:, :1], IDS),
        lambda comm: comm.dispatch_router_logits(ROWS, ROWS),
        lambda comm: comm.combine(ROWS),
        lambda comm: comm.all_reduce(ROWS),
        lambda comm: comm.all_gather(ROWS),
        lambda comm: comm.reduce_scatter(ROWS),
        lambda comm: comm.broadcast(ROWS),
        lambda comm: comm.send(ROWS),
        lambda comm: comm.recv((2,), torch.float32),
        lambda comm: comm.create_group("g", [0, 2]),
        lambda comm: comm.destroy_group("g"),
        lambda comm: comm.set_expert_placement(4),
        lambda comm: comm.allocate_combine_input((2, 4), torch.float32, torch.device("cpu")),
        lambda comm: comm.cpu_group,
        lambda comm: comm.group("ep"),
    ],
)
def test_a_rank_that_serves_is_refused_collective_calls(serving: epmesh.Communicator, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidRequest, match="rank 2 serves routers"):
        call(serving)


def test_the_others_exchange_beside_it(mesh: LocalMesh, serving: epmesh.Communicator) -> None:
    assert mesh.run(mesh_works.total) == [1, 1]
    view, _ = serving.wait_ready(timeout_s=5.0)
    assert view.group("ep").ranks == (0, 1)
    serving.check()


def test_a_rank_that_serves_waits_for_others_of_its_kind_and_says_so(mesh: LocalMesh) -> None:
    with LocalMesh(nodes=1, ranks_per_node=1) as small:
        small.kill_rank(0)
        with pytest.raises(MeshUnavailable, match="2 ranks in mode serve"):
            epmesh.join(small.address, mode="serve", world_size=2, num_experts=4, timeout_s=1.0)


def test_a_rank_changes_its_mode_in_a_new_membership(mesh: LocalMesh) -> None:
    with LocalMesh(nodes=1, ranks_per_node=1) as small:
        small.kill_rank(0)
        with epmesh.join(small.address, timeout_s=10.0) as comm:
            assert isinstance(comm, JoinedCommunicator)
            before = comm.view
            view = comm._rank_process.become(RankMode.SERVE, "tcp://127.0.0.1:9")
            assert view.ranks[0].front_endpoint == "tcp://127.0.0.1:9"
            assert view.membership_epoch > before.membership_epoch
            with pytest.raises(InvalidRequest, match="rank 0 serves routers"):
                comm.all_reduce(ROWS)
            view = comm._rank_process.become(RankMode.EXCHANGE, "")
            assert view.group("ep").ranks == (0,)
            assert comm.wait_ready(5.0)[0].epoch >= view.epoch
            assert torch.equal(comm.all_reduce(ROWS.clone()), ROWS)


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="mode is 'both'"):
        epmesh.join("127.0.0.1:1", mode="both")
