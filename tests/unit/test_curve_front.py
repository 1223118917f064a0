"""A rank's front with CURVE: whom it admits, and who may ask it for what."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from epmesh.channels import NodeAddress
from epmesh.curve import KeyPair
from epmesh.errors import EpmeshError, PeerLost, Unauthenticated
from epmesh.front import FrontClient, FrontPeer
from epmesh.v1 import front_pb2, key_service_pb2_grpc
from epmesh_server.node import key_authority
from epmesh_server.node.key_service import KeyService
from epmesh_server.ranks.curve_door import CurveDoor
from epmesh_server.ranks.front import Front, Incoming
from tests.unit.key_authority import MESH, PATIENCE_S, Authority

RANK, INCARNATION = 2, 12


class Guarded:
    """A front that answers everything it takes in, and remembers it."""

    def __init__(self, authority: Authority) -> None:
        self.took: list[front_pb2.FrontRequest] = []
        self.clients: list[str] = []  # for whom
        self.door = CurveDoor(str(authority.path))
        self.front = Front("127.0.0.1", on_request=self._take, door=self.door)
        self.front.identify(MESH, RANK, INCARNATION)
        self.peer = FrontPeer(RANK, INCARNATION, self.front.endpoint, self.door.pair.public)

    def _take(self, incoming: Incoming) -> None:
        self.took.append(incoming.request)
        self.clients.append(incoming.client)
        incoming.answer()


@pytest.fixture
def authority() -> Iterator[Authority]:
    with Authority() as made:
        yield made


@pytest.fixture
def guarded(authority: Authority) -> Iterator[Guarded]:
    made = Guarded(authority)
    yield made
    made.front.close(0)


@pytest.fixture
def client() -> Iterator[Callable[[KeyPair], FrontClient]]:
    made: list[FrontClient] = []

    def client(pair: KeyPair) -> FrontClient:
        made.append(FrontClient(MESH, pair=pair))
        return made[-1]

    yield client
    for each in made:
        each.close()


def ask(client: FrontClient, peer: FrontPeer, **request: object) -> EpmeshError | None:
    """What the front answered: `None` for a success."""
    message = front_pb2.FrontRequest(**request)  # type: ignore[arg-type]
    error = client.call(peer, message, timeout_s=PATIENCE_S).exception(PATIENCE_S)
    assert error is None or isinstance(error, EpmeshError)
    return error


ROWS, SHARE = {"serve_rows": front_pb2.ServeRows()}, {"serve_share": front_pb2.ServeShare(source=5)}


def test_a_client_asks_while_its_lease_runs_and_not_after(
    authority: Authority, guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    pair = KeyPair.generate()
    authority.call(authority.clients.lease, pair.public, "router", "a")
    router = client(pair)
    assert ask(router, guarded.peer, **ROWS) is None
    authority.call(authority.clients.release, pair.public, "a")
    guarded.door.take_leases(authority.call(authority.clients.notice))
    over = ask(router, guarded.peer, **ROWS)
    assert isinstance(over, Unauthenticated)
    assert "lease of client:1:a:router is over" in str(over)
    assert len(guarded.took) == 1
    authority.call(authority.clients.lease, pair.public, "router", "a")
    assert ask(router, guarded.peer, **ROWS) is None  # over another connection


def test_keys_of_one_owner_are_one_client_and_those_of_another_are_not(
    authority: Authority, guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    for name, owner in (("one", "router 'a'"), ("router 'b'", "router 'a'"), ("one", "router 'b'")):
        pair = KeyPair.generate()
        authority.call(authority.clients.lease, pair.public, name, owner)
        assert ask(client(pair), guarded.peer, **ROWS) is None
    assert guarded.clients == ["router 'a'", "router 'a'", "router 'b'"]


def test_a_lease_that_comes_just_after_the_connection_is_in_time(
    authority: Authority, guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    pair = KeyPair.generate()
    answer = client(pair).call(
        guarded.peer, front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows()), timeout_s=PATIENCE_S
    )
    authority.call(authority.clients.lease, pair.public, "router", "a")
    answer.result(PATIENCE_S)
    assert authority.authority.refusals.count == 0


def test_a_lease_that_comes_while_a_question_begins_to_wait_is_not_missed(
    authority: Authority,
    guarded: Guarded,
    client: Callable[[KeyPair], FrontClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = KeyPair.generate()
    decide = authority.authority._decide
    asked: list[Any] = []

    def decide_and_lease(question: Any) -> Any:
        decision = decide(question)
        asked.append(decision)
        if len(asked) == 2:  # it has just been put aside: the lease comes next on the loop, before anything waits
            lease = authority.clients.lease
            asyncio.get_running_loop().call_soon(lease, pair.public, "router", "a")
        return decision

    monkeypatch.setattr(authority.authority, "_decide", decide_and_lease)
    monkeypatch.setattr(key_authority, "HOLD_S", 60.0)  # so that only news of the lease can end the wait in time
    assert ask(client(pair), guarded.peer, **ROWS) is None
    assert len(asked) > 2


def test_a_notice_of_ended_leases_does_not_touch_those_granted_since(
    authority: Authority, guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    gone, later = KeyPair.generate(), KeyPair.generate()
    authority.call(authority.clients.lease, gone.public, "first", "a")
    authority.call(authority.clients.release, gone.public, "a")
    notice = authority.call(authority.clients.notice)
    authority.call(authority.clients.lease, later.public, "second", "a")
    guarded.door.take_leases(notice)
    assert ask(client(later), guarded.peer, **ROWS) is None


def test_an_unknown_key_is_refused_with_a_typed_error(
    guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    refused = ask(client(KeyPair.generate()), guarded.peer, **ROWS)
    assert isinstance(refused, Unauthenticated)
    assert "does not admit this client's CURVE key" in str(refused)
    assert guarded.took == []


def test_a_member_hands_over_shares_in_its_own_name_alone(
    authority: Authority, guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    pair = KeyPair.generate()
    authority.show(5, 15, pair.public)
    member = client(pair)
    assert ask(member, guarded.peer, **SHARE) is None
    as_another = ask(member, guarded.peer, serve_share=front_pb2.ServeShare(source=6))
    assert isinstance(as_another, Unauthenticated)
    assert isinstance(ask(member, guarded.peer, **ROWS), Unauthenticated)
    assert len(guarded.took) == 1
    assert guarded.door.refusals.count == 2


def test_a_client_hands_over_no_share(
    authority: Authority, guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    pair = KeyPair.generate()
    authority.call(authority.clients.lease, pair.public, "rank:5:f", "a")
    refused = ask(client(pair), guarded.peer, **SHARE)
    assert isinstance(refused, Unauthenticated)
    assert "is no member" in str(refused)
    assert guarded.took == []


def test_the_node_service_asks_for_its_callers(
    authority: Authority, guarded: Guarded, client: Callable[[KeyPair], FrontClient]
) -> None:
    assert ask(client(authority.pair), guarded.peer, **ROWS) is None
    assert ask(client(authority.pair), guarded.peer, driver_call=front_pb2.DriverCall()) is None


def test_a_client_without_curve_gets_nowhere(guarded: Guarded) -> None:
    plain = FrontClient(MESH)
    try:
        error = ask(plain, FrontPeer(RANK, INCARNATION, guarded.front.endpoint), **ROWS)
    finally:
        plain.close()
    assert error is not None
    assert guarded.took == []


def test_a_front_that_is_not_the_ranks_gets_nothing(
    authority: Authority, client: Callable[[KeyPair], FrontClient], guarded: Guarded
) -> None:
    pair = KeyPair.generate()
    authority.call(authority.clients.lease, pair.public, "router", "a")
    mistaken = FrontPeer(RANK, INCARNATION, guarded.front.endpoint, KeyPair.generate().public)
    assert ask(client(pair), mistaken, **ROWS) is not None
    assert guarded.took == []


@pytest.fixture
def short_lived() -> Iterator[Authority]:
    with Authority(lease_s=2.0) as made:  # a busy machine may be late to renew one, by less than that
        yield made


@pytest.fixture
def leasing(short_lived: Authority) -> Iterator[NodeAddress]:
    """A KeyService whose leases are short."""
    server, port = short_lived.run(_serve_keys(short_lived))
    yield NodeAddress(f"127.0.0.1:{port}")
    short_lived.run(server.stop(0))


async def _serve_keys(authority: Authority) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    service = KeyService(authority.clients, lambda _: False, curve=True)
    key_service_pb2_grpc.add_KeyServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


def test_a_client_leases_its_key_by_itself_renews_it_and_gives_it_back(
    short_lived: Authority, leasing: NodeAddress
) -> None:
    guarded = Guarded(short_lived)
    peer = FrontPeer(RANK, INCARNATION, guarded.front.endpoint, guarded.door.pair.public, leasing)
    router = FrontClient(MESH)
    try:
        assert ask(router, peer, **ROWS) is None
        until = time.monotonic() + 1.25 * short_lived.clients.lease_s
        while time.monotonic() < until:
            assert ask(router, peer, **ROWS) is None
            short_lived.call(short_lived.clients.end_late)
            guarded.door.take_leases(short_lived.call(short_lived.clients.notice))
        assert list(short_lived.call(short_lived.clients.notice).live) == [1]  # one lease, all the time
        router.close()
        assert short_lived.call(len, short_lived.clients) == 0
    finally:
        router.close()
        guarded.front.close(0)


def test_a_lease_that_nobody_renews_ends_and_its_connection_with_it(short_lived: Authority) -> None:
    guarded, pair = Guarded(short_lived), KeyPair.generate()
    router = FrontClient(MESH, pair=pair)
    try:
        short_lived.call(short_lived.clients.lease, pair.public, "router", "a")
        assert ask(router, guarded.peer, **ROWS) is None
        deadline = time.monotonic() + PATIENCE_S
        while len(short_lived.clients):
            assert time.monotonic() < deadline
            short_lived.call(short_lived.clients.end_late)
        guarded.door.take_leases(short_lived.call(short_lived.clients.notice))
        assert isinstance(ask(router, guarded.peer, **ROWS), Unauthenticated)  # over the connection that stands
        assert isinstance(ask(router, guarded.peer, **ROWS), Unauthenticated)  # and over another
        assert len(guarded.took) == 1
    finally:
        router.close()
        guarded.front.close(0)


def test_a_client_that_gets_no_lease_hears_why(short_lived: Authority) -> None:
    """Nobody listens where it would lease its key: that may pass, so it is a peer that is out of reach."""
    guarded = Guarded(short_lived)
    nowhere = FrontPeer(RANK, INCARNATION, guarded.front.endpoint, guarded.door.pair.public, NodeAddress("127.0.0.1:9"))
    router = FrontClient(MESH)
    try:
        assert isinstance(ask(router, nowhere, **ROWS), PeerLost)
        assert guarded.took == []
    finally:
        router.close()
        guarded.front.close(0)
