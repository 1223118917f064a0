"""Nobody gets into a secured mesh over ZeroMQ who should not, and while they try, it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest
import torch

import epmesh
from epmesh import InvalidRequest, PeerLost, Router, Unauthenticated, View
from epmesh.channels import open_channel
from epmesh.curve import KeyPair
from epmesh.errors import EpmeshError, from_rpc_error
from epmesh.front import FrontClient, FrontPeer
from epmesh.testing import LocalMesh
from epmesh.tls import TlsFiles
from epmesh.v1 import front_pb2, key_service_pb2, key_service_pb2_grpc
from epmesh.view import RankInfo
from tests.integration import curve_works
from tests.integration.curve_works import CLOSED, PATIENCE_S, Forgery, knock
from tests.integration.security_matrix import record

EXPERTS = list(range(8))
LINK, FRONT = "ZeroMQ link", "ZeroMQ front"


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    """Two nodes with two ranks each, which exchange; rank r holds experts 2r and 2r + 1."""
    with LocalMesh(2, 2, num_experts=8, tls=True) as made:
        yield made


@pytest.fixture
def view(mesh: LocalMesh) -> Iterator[View]:
    """The view; after the test an exchange over all links must still work."""
    works(mesh)
    yield mesh.view()
    works(mesh)


@pytest.fixture(scope="module")
def serving() -> Iterator[LocalMesh]:
    """Two nodes with a rank each that serves."""
    with LocalMesh(2, 1, num_experts=2, experts="tests.integration.hosted_experts:plus_id", tls=True) as made:
        yield made


def works(mesh: LocalMesh) -> None:
    assert mesh.run(curve_works.exchange_all, EXPERTS) == [[expert + 1.0 for expert in EXPERTS]] * 4


def forward(mesh: LocalMesh, router: Router) -> None:
    """A router's rows, of experts on both nodes, come back."""
    rows, weights = torch.ones(2, 4), torch.ones(2, 1)
    assert router.forward(rows, weights, torch.tensor([[0], [1]]), timeout=PATIENCE_S).shape == (2, 4)


def forged(view: View, source: int) -> list[bytes]:
    return Forgery(view.mesh_id, view.membership_epoch, source, view.ranks[source].incarnation).frames()


def refusals(mesh: LocalMesh, rank: int) -> int:
    return int(mesh.run(curve_works.refused)[rank])


def front_of(mesh: LocalMesh, rank: int) -> tuple[RankInfo, FrontPeer]:
    info = mesh.view().ranks[rank]
    return info, FrontPeer(rank, info.incarnation, info.front_endpoint, info.curve_key)


class Lease:
    """A client's key and its lease at one node."""

    def __init__(self, mesh: LocalMesh, address: str, tls: TlsFiles | None = None) -> None:
        self.pair = KeyPair.generate()
        self._channel = open_channel(address, tls=tls or mesh.tls)
        self._stub = key_service_pb2_grpc.KeyServiceStub(self._channel)

    def take(self, key: bytes | None = None) -> None:
        request = key_service_pb2.LeaseKeyRequest(public_key=key or self.pair.public, name="test")
        self._stub.LeaseKey(request, timeout=PATIENCE_S)

    def give_back(self) -> None:
        self._stub.ReleaseKey(key_service_pb2.ReleaseKeyRequest(public_key=self.pair.public), timeout=PATIENCE_S)

    def close(self) -> None:
        self._channel.close()


def test_every_rank_has_a_key_of_its_own_in_the_view(mesh: LocalMesh, view: View) -> None:
    keys = [info.curve_key for info in view.ranks.values()]
    assert keys == mesh.run(curve_works.curve_key)
    assert len(set(keys)) == 4
    assert {len(key) for key in keys} == {32}


def test_an_unknown_key_gets_into_no_link(view: View) -> None:
    victim = view.ranks[2]
    assert knock(victim.link_endpoint, KeyPair.generate(), victim.curve_key, forged(view, 0)) in CLOSED
    record("unknown CURVE key", LINK, "connection closed, no frame taken")


def test_no_curve_gets_into_no_link(view: View) -> None:
    victim = view.ranks[2]
    assert knock(victim.link_endpoint, None, b"", forged(view, 0)) in CLOSED
    record("NULL mechanism", LINK, "connection closed, no frame taken")


def test_a_member_cannot_speak_for_another(mesh: LocalMesh, view: View) -> None:
    victim, before = view.ranks[2], refusals(mesh, 2)
    forgery = Forgery(view.mesh_id, view.membership_epoch, 0, view.ranks[0].incarnation)
    told = mesh.run(curve_works.speak_for, 1, forgery, victim)
    assert told == [None, "HANDSHAKE_SUCCEEDED", None, None]
    deadline = time.monotonic() + PATIENCE_S
    while refusals(mesh, 2) == before:
        assert time.monotonic() < deadline
    assert refusals(mesh, 2) == before + 1
    record("key of rank 1 speaks as rank 0", LINK, "frame dropped and counted")


def test_a_client_gets_into_no_link(mesh: LocalMesh, view: View) -> None:
    victim = view.ranks[2]
    lease = Lease(mesh, mesh.addresses[1])
    try:
        lease.take()
        assert knock(victim.link_endpoint, lease.pair, victim.curve_key, forged(view, 0)) == "HANDSHAKE_FAILED_AUTH"
    finally:
        lease.close()
    record("client key on a link", LINK, "ZAP 400")


def ask(pair: KeyPair | None, peer: FrontPeer, mesh_id: str, **request: object) -> EpmeshError | None:
    client = FrontClient(mesh_id, pair=pair)
    try:
        message = front_pb2.FrontRequest(**request)  # type: ignore[arg-type]
        error = client.call(peer, message, timeout_s=PATIENCE_S).exception(PATIENCE_S)
    finally:
        client.close()
    assert error is None or isinstance(error, EpmeshError)
    return error


def test_fronts_refuse_unknown_keys_and_sockets_without_curve(serving: LocalMesh) -> None:
    mesh_id, (info, peer) = serving.view().mesh_id, front_of(serving, 1)
    with Router(serving.addresses, transport="zmq", tls=serving.tls) as router:
        forward(serving, router)
        assert isinstance(ask(KeyPair.generate(), peer, mesh_id), Unauthenticated)
        record("unknown CURVE key", FRONT, "UNAUTHENTICATED")
        plain = ask(None, FrontPeer(1, info.incarnation, info.front_endpoint), mesh_id)
        assert isinstance(plain, PeerLost)
        assert knock(info.front_endpoint, None, b"") in CLOSED
        record("NULL mechanism", FRONT, "connection closed")
        forward(serving, router)


def test_a_front_refuses_a_client_whose_lease_is_over_and_one_that_plays_a_member(serving: LocalMesh) -> None:
    mesh_id, (_, peer) = serving.view().mesh_id, front_of(serving, 1)
    lease = Lease(serving, serving.addresses[1])
    client = FrontClient(mesh_id, pair=lease.pair)
    share = front_pb2.FrontRequest(serve_share=front_pb2.ServeShare(source=0))
    try:
        lease.take()
        # A request without tensors is wrong, and said to be by the rank itself: the key got in.
        empty = front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(epoch=serving.view().epoch, ranks=[1]))
        answer = client.call(peer, empty, timeout_s=PATIENCE_S).exception(PATIENCE_S)
        assert isinstance(answer, InvalidRequest)
        played = client.call(peer, share, timeout_s=PATIENCE_S).exception(PATIENCE_S)
        assert isinstance(played, Unauthenticated)
        assert "is no member" in str(played)
        record("client hands over a share as rank 0", FRONT, "UNAUTHENTICATED")
        assert isinstance(client.call(peer, empty, timeout_s=PATIENCE_S).exception(PATIENCE_S), InvalidRequest)
        lease.give_back()
        deadline = time.monotonic() + PATIENCE_S
        while isinstance(
            over := client.call(peer, empty, timeout_s=PATIENCE_S).exception(PATIENCE_S), InvalidRequest
        ):  # the rank hears of it a moment later
            assert time.monotonic() < deadline
        assert isinstance(over, Unauthenticated)
        assert "is over" in str(over)
        record("client after the end of its lease", FRONT, "UNAUTHENTICATED")
    finally:
        client.close()
        lease.close()
    with Router(serving.addresses, transport="zmq", tls=serving.tls) as router:
        forward(serving, router)


def test_a_key_is_leased_to_one_client_and_no_member_key_is(serving: LocalMesh) -> None:
    lease = Lease(serving, serving.addresses[1])
    try:
        for key, problem in ((b"short", InvalidRequest), (serving.view().ranks[0].curve_key, Unauthenticated)):
            with pytest.raises(grpc.RpcError) as caught:
                lease.take(key)
            assert isinstance(from_rpc_error(caught.value, "LeaseKey"), problem)
        record("lease of a member's key", "gRPC KeyService", "UNAUTHENTICATED")
    finally:
        lease.close()


def test_nobody_leases_a_key_without_a_certificate(serving: LocalMesh) -> None:
    _, peer = front_of(serving, 1)
    with open_channel(serving.addresses[1]) as channel:
        request = key_service_pb2.LeaseKeyRequest(public_key=KeyPair.generate().public)
        with pytest.raises(grpc.RpcError) as caught:
            key_service_pb2_grpc.KeyServiceStub(channel).LeaseKey(request, timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    record("lease without a certificate", "gRPC KeyService", "connection refused by TLS")
    assert isinstance(ask(KeyPair.generate(), peer, serving.view().mesh_id), Unauthenticated)


def test_a_router_may_forward_at_once(serving: LocalMesh) -> None:
    """Its first rows go out beside its first lease."""
    for _ in range(5):
        with Router(serving.addresses, transport="zmq", tls=serving.tls) as router:
            forward(serving, router)


def test_a_driver_drives_over_zeromq() -> None:
    with LocalMesh(1, 1, hosted=True, transport="zmq", tls=True) as made:
        assert made.run(curve_total) == [0]


def curve_total(comm: epmesh.Communicator) -> int:
    return int(comm.all_reduce(torch.tensor([comm.global_rank])))


def test_peers_connect_to_a_rank_that_holds_its_interpreter_lock() -> None:
    """It is late, not dead: whom it admits is decided without its interpreter."""
    with LocalMesh(2, 1, num_experts=8, tls=True) as made:
        results = made.run(curve_works.exchange_beside_a_held_lock, 1, 3.0, EXPERTS)
        assert results == [[expert + 1.0 for expert in EXPERTS]] * 2
        assert len(made.view().ranks) == 2


def test_a_rank_that_comes_again_has_another_key_and_is_let_in() -> None:
    with LocalMesh(2, 2, num_experts=8, tls=True) as made:
        works(made)
        old = made.view().ranks[3]
        made.kill_rank(3)
        made.start_node(1)
        works(made)
        new = made.view().ranks[3]
        assert new.incarnation != old.incarnation
        assert new.curve_key != old.curve_key
        assert [made.view().ranks[rank].curve_key for rank in range(3)] == made.run(curve_works.curve_key)[:3]
