"""Slots, leases and control streams."""

from __future__ import annotations

import pytest

from epmesh.errors import InvalidRequest, MeshUnavailable, StaleEpoch
from epmesh_server.membership import Membership, MembershipSettings, MeshCreated, NodeRegistered, Registration
from epmesh_server.membership.actions import Append, EndSession, HeartbeatAck, NodeGranted, Reply, Send
from epmesh_server.membership.events import Heartbeat, OpenSession, RegisterNode, Stalled
from tests.unit.fake_mesh import VERSION, FakeMesh, FakeNode, fold, rank, two_nodes


def test_nodes_get_slots_in_the_order_they_register() -> None:
    mesh = FakeMesh()
    assert [mesh.register(FakeNode(name, n)) for n, name in enumerate("abc", 1)] == [NodeGranted(n) for n in range(3)]


def test_a_registration_is_written_before_it_is_answered() -> None:
    mesh = FakeMesh()
    registration = Registration("a", 1, "10.0.0.1:7400", VERSION)
    assert mesh.step(RegisterNode(1, registration)) == [
        Append((NodeRegistered(registration, 0),)),
        Reply(1, NodeGranted(0)),
    ]


def test_registering_again_with_the_same_incarnation_gives_the_same_slot_and_writes_nothing() -> None:
    mesh = FakeMesh()
    mesh.start("other", 9)
    node = mesh.start("a")
    before = list(mesh.records)
    assert mesh.register(node) == NodeGranted(1)
    assert mesh.records == before


def test_a_second_node_with_a_live_nodes_id_is_refused_with_slot_address_and_mend() -> None:
    mesh = FakeMesh()
    mesh.start("a", 1)
    refusal = mesh.register(FakeNode("a", 2))
    assert isinstance(refusal, InvalidRequest)
    for part in ("'a'", "slot 0", "10.0.0.1:7401", "stop it", "--node-id"):
        assert part in str(refusal)


def test_a_restarted_node_takes_its_old_slot_once_the_old_stream_broke() -> None:
    mesh, _a, b = two_nodes()
    mesh.break_session(b)
    mesh.settle()
    again = mesh.start("b", 3, num_ranks=1)
    mesh.advance(0.1)
    assert again.slot == 1
    assert [(node.slot, node.incarnation) for node in mesh.view.nodes] == [(0, 1), (1, 3)]


def test_a_node_that_registered_and_never_opened_its_stream_is_replaced_by_its_restart() -> None:
    mesh = FakeMesh()
    first = FakeNode("a", 1)
    mesh.register(first)
    mesh.start("a", 2)
    mesh.open(first)
    assert isinstance(first.ended, InvalidRequest)
    assert "incarnation" in str(first.ended)


def test_a_restart_is_asked_to_wait_while_the_silent_old_one_may_still_live() -> None:
    mesh = FakeMesh()
    mesh.start("a", 1).silent = {HeartbeatAck}
    mesh.advance(2.0)  # its host went down: the stream is open, and no heartbeat came
    refusal = mesh.register(FakeNode("a", 2))
    assert isinstance(refusal, MeshUnavailable)
    mesh.advance(1.5)
    assert mesh.register(FakeNode("a", 2)) == NodeGranted(0)


def test_a_replacement_claims_a_dead_nodes_slot_under_another_name() -> None:
    mesh, _, b = two_nodes()
    mesh.break_session(b)
    mesh.advance(0.1)
    replacement = mesh.start("c", 3, num_ranks=2, slot=1)
    mesh.advance(0.1)
    assert replacement.slot == 1
    assert [node.node_id for node in mesh.view.nodes] == ["a", "c"]
    assert mesh.register(FakeNode("b", 4)) == NodeGranted(2)  # the old name has no slot any more


def test_a_live_nodes_slot_cannot_be_claimed() -> None:
    mesh = FakeMesh()
    mesh.start("a", 1)
    refusal = mesh.register(FakeNode("b", 2), slot=0)
    assert isinstance(refusal, InvalidRequest)
    assert "slot 0 is taken: live node 'a' at 10.0.0.1:7401" in str(refusal)


def test_a_node_with_a_slot_cannot_claim_another() -> None:
    mesh = FakeMesh()
    a = mesh.start("a", 1)
    mesh.break_session(a)
    refusal = mesh.register(FakeNode("a", 2), slot=5)
    assert isinstance(refusal, InvalidRequest)
    assert "slot 0" in str(refusal)
    assert "slot 5" in str(refusal)


def test_a_slot_that_was_never_given_may_be_claimed_and_leaves_a_hole() -> None:
    mesh = FakeMesh()
    assert mesh.start("a", 1, slot=3).slot == 3
    assert mesh.start("b", 2).slot == 0
    mesh.advance(0.1)
    assert [node.slot for node in mesh.view.nodes] == [0, 3]


@pytest.mark.parametrize("slot", [2048, 2**32 - 1])
def test_a_slot_beyond_what_control_pages_hold_is_refused(slot: int) -> None:
    refusal = FakeMesh().register(FakeNode("a", 1), slot=slot)
    assert isinstance(refusal, InvalidRequest)
    assert "0 to 2047" in str(refusal)


def test_a_full_mesh_refuses_a_new_name_and_keeps_old_ones() -> None:
    mesh = FakeMesh(stride=8192)
    mesh.start("a", 1)
    b = mesh.start("b", 2)
    assert isinstance(mesh.register(FakeNode("c", 3)), InvalidRequest)
    mesh.break_session(b)
    assert mesh.register(FakeNode("b", 4)) == NodeGranted(1)


@pytest.mark.parametrize("version", ["0.2.0", "1.1.0", "", "x"])
def test_another_version_is_refused_and_both_are_named(version: str) -> None:
    refusal = FakeMesh().register(FakeNode("a", 1), version=version)
    assert isinstance(refusal, InvalidRequest)
    assert repr(version) in str(refusal)
    assert VERSION in str(refusal)


def test_another_patch_version_is_accepted() -> None:
    assert FakeMesh().register(FakeNode("a", 1), version="0.1.99.dev3") == NodeGranted(0)


@pytest.mark.parametrize(
    ("node_id", "incarnation", "address"),
    [("", 1, "h:1"), ("x" * 257, 1, "h:1"), ("a\n", 1, "h:1"), ("a", 0, "h:1"), ("a", 1, ""), ("a", 1, "h" * 513)],
)
def test_a_registration_that_makes_no_sense_is_refused(node_id: str, incarnation: int, address: str) -> None:
    with pytest.raises(InvalidRequest):
        Registration(node_id, incarnation, address, VERSION)


def test_a_heartbeat_is_answered_with_its_number_and_renews_the_lease() -> None:
    mesh = FakeMesh()
    node = mesh.start("a")
    assert node.session is not None
    node.silent = {HeartbeatAck}
    for number in range(5):
        mesh.advance(2.9)
        assert mesh.step(Heartbeat(node.session, number)) == [Send(node.session, HeartbeatAck(number))]
    mesh.inbox.clear()
    assert [node.node_id for node in mesh.view.nodes] == ["a"]


def test_a_node_without_heartbeats_is_dead_when_its_lease_ends() -> None:
    mesh, _, b = two_nodes()
    b.silent = {HeartbeatAck}
    mesh.advance(4.0)
    assert [node.node_id for node in mesh.view.nodes] == ["a"]
    assert isinstance(b.ended, MeshUnavailable)
    assert "no sign of life for 3 s" in str(b.ended)
    assert isinstance(b.errors[8, 2], StaleEpoch)


def test_a_node_that_was_declared_dead_comes_back_in_its_slot_and_its_ranks_do_not() -> None:
    mesh, _a, b = two_nodes()
    was = dict(b.ranks)
    mesh.break_session(b)
    mesh.settle()
    b.view = None  # it heard of no view since
    mesh.register(b)
    b.ranks = dict(was)
    mesh.open(b)
    mesh.report(b)
    mesh.advance(0.1)
    assert b.slot == 1
    assert set(b.errors) == {(8, 2), (9, 2)}
    assert list(mesh.view.ranks) == [0, 1]
    assert [len(node.ranks) for node in mesh.view.nodes] == [2, 0]
    b.ranks = {8: rank(8, 77)}
    mesh.report(b)
    mesh.advance(0.1)
    assert list(mesh.view.ranks) == [0, 1, 8]


def test_a_newer_stream_of_a_node_takes_the_olders_place() -> None:
    mesh, _a, b = two_nodes()
    old = b.session
    actions = []
    b.session = next(mesh.numbers)
    mesh.nodes[b.session] = b
    actions = mesh.step(OpenSession(b.session, 1, 2, b.epoch))
    assert [action.session for action in actions if isinstance(action, EndSession)] == [old]
    mesh.advance(0.1)
    assert len(mesh.view.ranks) == 4
    assert len(mesh.views) == 1


def test_a_stream_for_a_slot_that_was_never_given_is_ended() -> None:
    actions = FakeMesh().step(OpenSession(1, 7, 1, 0))
    assert [type(action) for action in actions] == [EndSession]


def test_a_node_of_a_later_epoch_than_this_coordinators_is_refused() -> None:
    mesh = FakeMesh()
    node = FakeNode("a", 1)
    mesh.register(node)
    (ended,) = mesh.step(OpenSession(5, 0, 1, 12))
    assert isinstance(ended, EndSession)
    assert "epoch 12" in str(ended.error)
    assert "lost its log" in str(ended.error)


def test_reports_of_an_unknown_stream_mean_nothing() -> None:
    mesh = FakeMesh()
    assert mesh.step(Heartbeat(99, 1)) == []


def test_ranks_beyond_the_stride_are_refused_with_the_mend() -> None:
    mesh = FakeMesh(stride=2)
    node = mesh.start("a", num_ranks=3)
    mesh.advance(0.1)
    assert list(mesh.view.ranks) == [0, 1]
    assert isinstance(node.errors[2, 1], InvalidRequest)
    assert "--stride" in str(node.errors[2, 1])


def test_a_refused_rank_is_refused_once_a_session() -> None:
    mesh = FakeMesh(stride=2)
    node = mesh.start("a", num_ranks=2)
    mesh.advance(0.1)
    node.ranks[7] = rank(7)
    mesh.report(node)
    assert len([entry for entry in mesh.inbox if entry[0] == node.session]) == 1
    mesh.report(node)
    assert len([entry for entry in mesh.inbox if entry[0] == node.session]) == 1


def test_silence_after_a_standstill_of_the_coordinator_proves_nothing() -> None:
    mesh, a, b = two_nodes()
    mesh.now += 20.0
    mesh.step(Stalled())
    mesh.break_session(a)
    mesh.break_session(b)
    mesh.settle()
    assert len(mesh.views) == 1
    for node in (a, b):
        mesh.register(node)
        mesh.open(node)
        mesh.report(node)
    mesh.advance(0.1)
    assert len(mesh.views) == 1
    assert not a.errors
    mesh.break_session(a)
    mesh.settle()
    assert [node.node_id for node in mesh.view.nodes] == ["b"]


def test_the_log_of_a_mesh_with_another_stride_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="--stride 4"):
        Membership(MembershipSettings(version=VERSION), fold([MeshCreated("m", 4)]), 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stride": 0},
        {"stride": 20_000},
        {"min_nodes": -1},
        {"lease_s": 0.0},
        {"lease_s": float("nan")},
        {"lease_s": 1.5},
        {"heartbeat_interval_s": -1.0},
        {"answer_timeout_s": float("inf")},
        {"batch_window_s": 1.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        MembershipSettings(version=VERSION, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("secured", [True, False])
def test_a_node_with_curve_and_one_without_do_not_get_into_one_mesh(secured: bool) -> None:
    mesh = FakeMesh()
    assert mesh.register(FakeNode("a", 1), curve=secured) == NodeGranted(0)
    refusal = mesh.register(FakeNode("b", 2), curve=not secured)
    assert isinstance(refusal, InvalidRequest)
    for part in (
        "'a'",
        "slot 0",
        "'b'",
        "CURVE off" if secured else "CURVE on",
        "it on" if secured else "it off",
        "or none",
    ):
        assert part in str(refusal)
    assert mesh.register(FakeNode("c", 3), curve=secured) == NodeGranted(1)


def test_a_node_may_come_back_with_curve_where_no_other_lives() -> None:
    mesh = FakeMesh()
    node = FakeNode("a", 1)
    mesh.register(node)
    mesh.advance(60)
    assert mesh.register(FakeNode("a", 2), curve=True) == NodeGranted(0)
    assert mesh.register(FakeNode("b", 3), curve=True) == NodeGranted(1)
