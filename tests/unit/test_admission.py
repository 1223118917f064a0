"""Whom ZeroMQ endpoints admit, and what those may say: decisions without a socket."""

from __future__ import annotations

import asyncio
import logging

import pytest

from epmesh.curve import KeyPair
from epmesh.errors import InvalidRequest, Overloaded, Unauthenticated
from epmesh.v1 import frame_pb2, front_pb2
from epmesh.view import NodeInfo, RankInfo, RankMode, View
from epmesh_server import refusals
from epmesh_server.curve_users import (
    NODE,
    ClientUser,
    RankUser,
    account_of,
    front_refusal,
    lease_of,
    link_refusal,
    printable,
)
from epmesh_server.node import client_keys
from epmesh_server.node.admission import Admitted, Refused, decide, member_keys
from epmesh_server.node.client_keys import ClientKeyTable

MEMBER, CLIENT, OWN, STRANGER = (bytes([number]) * 32 for number in range(1, 5))
KNOWN = {MEMBER: "rank:3:7", CLIENT: "client:1:router", OWN: NODE}


def view(*keys: bytes) -> View:
    ranks = tuple(RankInfo(n, n + 10, "cpu", RankMode.EXCHANGE, "", "", key) for n, key in enumerate(keys))
    return View("mesh", 1, 1, 8, (NodeInfo(0, "node-0", 1, "h:1", ranks),))


@pytest.mark.parametrize("domain", ["link", "front"])
def test_members_and_the_node_service_are_admitted_everywhere(domain: str) -> None:
    assert decide(domain, "CURVE", [MEMBER], KNOWN) == Admitted("rank:3:7")
    assert decide(domain, "CURVE", [OWN], KNOWN) == Admitted("node")


def test_clients_are_admitted_at_fronts_and_not_at_links() -> None:
    assert decide("front", "CURVE", [CLIENT], KNOWN) == Admitted("client:1:router")
    refused = decide("link", "CURVE", [CLIENT], KNOWN)
    assert isinstance(refused, Refused)
    assert not refused.may_change


@pytest.mark.parametrize("domain", ["link", "front"])
def test_an_unknown_key_is_refused_but_may_be_in_the_next_view(domain: str) -> None:
    refused = decide(domain, "CURVE", [STRANGER], KNOWN)
    assert isinstance(refused, Refused)
    assert refused.may_change


@pytest.mark.parametrize(
    ("domain", "mechanism", "credentials"),
    [
        ("link", "NULL", []),
        ("front", "PLAIN", [b"user", b"password"]),
        ("front", "GSSAPI", [b"principal"]),
        ("link", "CURVE", []),
        ("link", "CURVE", [MEMBER, MEMBER]),
        ("", "CURVE", [MEMBER]),
        ("global", "CURVE", [MEMBER]),
    ],
)
def test_nothing_but_curve_at_an_endpoint_of_ours_is_admitted(
    domain: str, mechanism: str, credentials: list[bytes]
) -> None:
    refused = decide(domain, mechanism, credentials, KNOWN)
    assert isinstance(refused, Refused)
    assert not refused.may_change


def test_keys_of_a_view_name_rank_and_incarnation() -> None:
    assert member_keys(view(MEMBER, b"", CLIENT), OWN) == {MEMBER: "rank:0:a", CLIENT: "rank:2:c", OWN: NODE}
    assert member_keys(None, OWN) == {OWN: NODE}


def test_no_member_can_pass_for_the_node_service() -> None:
    assert member_keys(view(OWN), OWN) == {OWN: NODE}


def test_a_link_frame_must_come_from_the_rank_and_incarnation_it_names() -> None:
    header = frame_pb2.FrameHeader(source=3, incarnation=7)
    assert link_refusal(str(RankUser(3, 7)), header) is None
    for user in ("rank:2:7", "rank:3:8", "rank:3:70", "client:3:7", NODE, "", "rank:3"):
        assert link_refusal(user, header) is not None


def requests() -> dict[str, front_pb2.FrontRequest]:
    made = {name: front_pb2.FrontRequest() for name in ("serve_rows", "serve_share", "driver_call", "cancel")}
    for name, request in made.items():
        getattr(request, name).SetInParent()
    made["serve_share"].serve_share.source = 3
    made[""] = front_pb2.FrontRequest()
    return made


@pytest.mark.parametrize(
    ("user", "allowed"),
    [
        ("rank:3:7", {"serve_share", "cancel"}),
        ("rank:2:7", {"cancel"}),
        ("client:1:router", {"serve_rows", "driver_call", "cancel", ""}),
        (NODE, {"serve_rows", "driver_call", "cancel", ""}),
    ],
)
def test_members_hand_over_shares_in_their_own_name_and_clients_ask_for_the_rest(user: str, allowed: set[str]) -> None:
    assert {name for name, request in requests().items() if front_refusal(user, request) is None} == allowed


def test_a_clients_name_cannot_change_what_its_user_id_says() -> None:
    name = printable("rank:1:2\n\x00" + "x" * 100)
    assert name.startswith("rank:1:2??x")
    assert len(name) == 64
    assert lease_of(str(ClientUser(12, "router 'a'", name))) == 12
    assert lease_of("rank:1:2") is lease_of(NODE) is None


def test_all_leases_of_an_owner_share_one_account_whatever_they_call_themselves() -> None:
    for owner in ("router 'a'", "driver 'x:y', router 'a:1:b'", "router 'é\n'"):
        users = [str(ClientUser(lease, owner, name)) for lease, name in ((1, "one"), (2, "router 'b'"), (9, "a:b"))]
        assert {account_of(user) for user in users} == {owner}
    long = [str(ClientUser(1, "router " + letter * 1000, "x" * 64)) for letter in "ab"]
    assert len({account_of(user) for user in long}) == 2
    assert max(map(len, long)) < 256  # what a ZAP user id may have
    assert account_of("rank:4:9f") == "rank:4:9f"
    assert account_of(NODE) == NODE


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def table() -> tuple[ClientKeyTable, Clock]:
    clock = Clock()
    return ClientKeyTable(30.0, clock), clock


def test_a_lease_runs_until_its_end_unless_it_is_renewed() -> None:
    keys, clock = table()
    keys.lease(CLIENT, "router", "a")
    keys.lease(STRANGER, "other", "a")
    clock.now += 20
    keys.lease(CLIENT, "router", "a")
    clock.now += 15
    assert keys.users(STRANGER) == {}
    assert keys.users(CLIENT) == {CLIENT: "client:1:a:router"}
    assert keys.end_late() == pytest.approx(15)
    assert (keys.notice().newest, list(keys.notice().live)) == (2, [1])
    keys.release(CLIENT, "a")
    assert keys.users(CLIENT) == {}
    assert len(keys) == 0
    assert keys.end_late() is None


def test_a_lease_after_one_that_ended_has_another_number() -> None:
    keys, clock = table()
    keys.lease(CLIENT, "router", "a")
    clock.now += 31
    keys.lease(CLIENT, "router", "a")
    assert keys.users(CLIENT) == {CLIENT: "client:2:a:router"}
    assert list(keys.notice().live) == [2]


def test_only_the_owner_renews_and_releases_a_lease() -> None:
    keys, _ = table()
    keys.lease(CLIENT, "router", "a")
    with pytest.raises(Unauthenticated, match="router"):
        keys.lease(CLIENT, "mine", "b")
    keys.release(CLIENT, "b")
    assert keys.users(CLIENT) == {CLIENT: "client:1:a:router"}


def test_leases_are_bounded_for_each_owner_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_keys, "MAX_LEASES_A_CLIENT", 2)
    monkeypatch.setattr(client_keys, "MAX_LEASES", 3)
    keys, clock = table()
    numbered = [bytes([number]) * 32 for number in range(10, 20)]
    keys.lease(numbered[0], "x", "a")
    keys.lease(numbered[1], "x", "a")
    with pytest.raises(Overloaded, match="a has 2 keys"):
        keys.lease(numbered[2], "x", "a")
    keys.lease(numbered[0], "x", "a")  # renewing takes no room
    keys.lease(numbered[3], "x", "b")
    with pytest.raises(Overloaded, match="3 keys"):
        keys.lease(numbered[4], "x", "c")
    clock.now += 31
    keys.lease(numbered[4], "x", "a")
    assert len(keys) == 1


@pytest.mark.parametrize("key", [b"", b"short", bytes(32), bytes(33)])
def test_what_is_no_key_is_not_leased(key: bytes) -> None:
    keys, _ = table()
    with pytest.raises(InvalidRequest, match="CURVE public key"):
        keys.lease(key, "router", "a")


def test_whoever_waits_for_leases_hears_of_each_change() -> None:
    async def heard() -> None:
        keys, _ = table()
        waiting = asyncio.create_task(keys.changed())
        await asyncio.sleep(0)
        keys.lease(CLIENT, "x", "a")
        await asyncio.wait_for(waiting, 10)
        waiting = asyncio.create_task(keys.changed())
        await asyncio.sleep(0)
        keys.lease(CLIENT, "x", "a")  # renewed: nobody else is admitted, so nobody need look again
        await asyncio.sleep(0)
        assert not waiting.done()
        keys.release(CLIENT, "a")
        await asyncio.wait_for(waiting, 10)

    asyncio.run(heard())


def test_a_key_pair_does_not_show_its_secret() -> None:
    pair = KeyPair.generate()
    assert len(pair.public) == len(pair.secret) == 32
    assert pair.secret not in pair.public
    assert repr(pair.secret)[2:-1] not in repr(pair)
    assert "secret" not in repr(pair)


def test_refusals_are_counted_and_logged_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "MAX_REMEMBERED", 3)
    clock = Clock()
    log = refusals.RefusalLog(logging.getLogger("test"), "frame.refused", clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            log.note("a", "no")
        log.note("b", "nor that")
        clock.now += 11
        log.note("a", "no")
    assert log.count == 7
    assert caplog.messages == [
        "frame.refused: no",
        "frame.refused: nor that",
        "frame.refused: no (and 4 more since the last time)",
    ]
    for number in range(10):
        log.note(str(number), "no")
    assert len(log._said) == 3
