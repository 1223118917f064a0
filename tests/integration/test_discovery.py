"""A mesh seen from outside, with real services: whoever dies and comes back, the view says so."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

import epmesh
from epmesh.channels import open_channel
from epmesh.testing import LocalMesh
from epmesh.v1.discovery_service_pb2 import GetViewRequest, WatchViewsRequest
from epmesh.v1.discovery_service_pb2_grpc import DiscoveryServiceStub

TIMEOUT_S = 15.0


@pytest.fixture(scope="module")
def local() -> Iterator[LocalMesh]:
    """Two nodes with one rank each; tests leave it whole."""
    with LocalMesh(nodes=2, ranks_per_node=1, num_experts=4) as local:
        yield local


def ranks(view: epmesh.View) -> list[int]:
    return list(view.ranks)


@pytest.mark.parametrize("which", ["node service", "coordinator"])
def test_services_of_both_kinds_say_who_is_there(local: LocalMesh, which: str) -> None:
    address = local.address if which == "node service" else local.coordinator_address
    with epmesh.connect(address) as mesh:
        view = mesh.wait_view(lambda view: ranks(view) == [0, 1], TIMEOUT_S)
        assert view == local.view()
        assert mesh.node_of(1).address == local.addresses[1]
        assert mesh.groups["ep"].ranks == (0, 1)
        assert mesh.placement() == epmesh.linear_placement(4, [0, 1])


@pytest.mark.parametrize("which", ["node service", "coordinator"])
def test_a_watch_counts_from_the_epoch_of_its_own_mesh_only(local: LocalMesh, which: str) -> None:
    address = local.address if which == "node service" else local.coordinator_address
    far = 1 << 40
    with open_channel(address) as channel:
        stub = DiscoveryServiceStub(channel)
        stranger = stub.WatchViews(WatchViewsRequest(after_epoch=far, mesh_id="another"), timeout=TIMEOUT_S)
        answer = next(iter(stranger))
        stranger.cancel()
        assert answer.view == local.view().to_proto()
        assert answer.version == stub.GetView(GetViewRequest(), timeout=TIMEOUT_S).version == epmesh.__version__
        for mesh_id in ("", answer.view.mesh_id):
            with pytest.raises(grpc.RpcError) as caught:
                next(iter(stub.WatchViews(WatchViewsRequest(after_epoch=far, mesh_id=mesh_id), timeout=0.1)))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.fault
def test_a_watch_sees_a_killed_rank_and_its_replacement(local: LocalMesh) -> None:
    with epmesh.connect(local.address) as mesh:
        before = mesh.wait_view(lambda view: ranks(view) == [0, 1], TIMEOUT_S)
        watch = mesh.watch(after_epoch=before.epoch)
        local.kill_rank(1)
        without = next(watch)
        assert (ranks(without), without.epoch) == ([0], before.epoch + 1)
        local.start_node(1)
        assert ranks(mesh.wait_view(lambda view: view.epoch > without.epoch, TIMEOUT_S)) == [0, 1]
        assert ranks(next(watch)) == [0, 1]


@pytest.mark.fault
def test_a_client_outlives_the_services_it_used_one_after_the_other(local: LocalMesh) -> None:
    addresses = [*local.addresses, local.coordinator_address]
    with epmesh.connect(addresses) as mesh:
        assert mesh.address == addresses[0]
        local.kill_node(0)
        mesh.wait_view(lambda view: ranks(view) == [1], TIMEOUT_S)
        assert mesh.address == addresses[1]
        local.start_node(0)
        mesh.wait_view(lambda view: ranks(view) == [0, 1], TIMEOUT_S)
        local.kill_node(1)
        mesh.wait_view(lambda view: ranks(view) == [0], TIMEOUT_S)
        assert mesh.address == addresses[2]
        local.start_node(1)
        whole = mesh.wait_view(lambda view: ranks(view) == [0, 1], TIMEOUT_S)
        local.kill_coordinator()
        local.start_coordinator()
        local.kill_rank(0)
        assert mesh.wait_view(lambda view: ranks(view) == [1], TIMEOUT_S).epoch > whole.epoch
        local.start_node(0)
        mesh.wait_view(lambda view: ranks(view) == [0, 1], TIMEOUT_S)


@pytest.mark.fault
def test_one_address_is_enough_once_the_view_named_the_others(local: LocalMesh) -> None:
    with epmesh.connect(local.addresses[0]) as mesh:
        mesh.wait_view(lambda view: ranks(view) == [0, 1], TIMEOUT_S)
        local.kill_node(0)
        mesh.wait_view(lambda view: ranks(view) == [1], TIMEOUT_S)
        assert mesh.address == local.addresses[0]  # of the node that is left
        local.start_node(0)
        mesh.wait_view(lambda view: ranks(view) == [0, 1], TIMEOUT_S)
