"""A coordinator that restarts from its log."""

from __future__ import annotations

from epmesh.errors import InvalidRequest, MeshUnavailable
from epmesh_server.membership import EpochUsed, MeshCreated, NodeRegistered, ViewCommitted
from epmesh_server.membership.actions import Commit, Done, NodeGranted, Prepare
from epmesh_server.membership.events import CreateGroup, Tick
from epmesh_server.membership.records import MAX_REMEMBERED_PER_NODE, Remembered
from tests.unit.fake_mesh import FakeMesh, FakeNode, explicit, fold, linear, rank, two_nodes


def reconnect(mesh: FakeMesh, *nodes: FakeNode) -> None:
    for node in nodes:
        assert mesh.register(node) == NodeGranted(node.slot)
        mesh.open(node)
        mesh.report(node)


def test_nothing_is_committed_where_nothing_changed() -> None:
    mesh, a, b = two_nodes()
    later = mesh.restarted()
    reconnect(later, a, b)
    later.advance(5.0)
    assert later.view == mesh.view
    assert later.views == []
    assert not a.errors


def test_the_same_holds_with_experts_groups_and_tensor_parallel_ranks() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    a.ranks = {n: rank(n, world_size=2, tensor_parallel_size=2, experts=[linear(4)]) for n in range(2)}
    a.ranks[2] = rank(2, experts=[explicit(8, (1, 2), layer=5)])
    mesh.report(a)
    mesh.advance(0.1)
    mesh.ask(CreateGroup, "pair", (2, 0))
    mesh.advance(0.1)
    assert mesh.view.has_group("tp:0")
    later = mesh.restarted()
    reconnect(later, a)
    later.advance(5.0)
    assert later.view == mesh.view
    assert later.views == []


def test_registrations_survive() -> None:
    mesh, a, b = two_nodes()
    never_opened = FakeNode("c", 3)
    mesh.register(never_opened)
    later = mesh.restarted()
    reconnect(later, b, a)
    reconnect(later, never_opened)
    assert [node.slot for node in (a, b, never_opened)] == [0, 1, 2]


def test_who_does_not_come_back_within_a_lease_is_dead() -> None:
    mesh, a, _b = two_nodes()
    later = mesh.restarted()
    reconnect(later, a)
    later.advance(2.9)
    assert later.views == []
    later.advance(0.2)
    assert [node.node_id for node in later.view.nodes] == ["a"]
    assert later.view.epoch == 2
    assert a.lost == frozenset()


def test_nothing_is_decided_before_everybody_had_time_to_come_back() -> None:
    mesh, a, b = two_nodes()
    later = mesh.restarted()
    a.ranks[2] = rank(2)
    reconnect(later, a)
    later.advance(1.0)
    assert later.views == []
    reconnect(later, b)
    later.advance(0.1)
    assert len(later.view.ranks) == 5


def test_a_rank_that_died_meanwhile_is_found_dead_at_the_first_report() -> None:
    mesh, a, b = two_nodes()
    later = mesh.restarted()
    del a.ranks[1]
    reconnect(later, a, b)
    later.settle()
    assert list(later.view.ranks) == [0, 8, 9]
    assert later.view.epoch == 2


def test_a_restarted_node_waits_until_its_old_self_is_known_to_be_dead() -> None:
    mesh, a, _ = two_nodes()
    later = mesh.restarted()
    reconnect(later, a)
    refusal = later.register(FakeNode("b", 9))
    assert isinstance(refusal, MeshUnavailable)
    assert "try again" in str(refusal)
    later.advance(3.1)
    assert later.register(FakeNode("b", 9)) == NodeGranted(1)


def test_a_second_node_with_a_recovered_nodes_id_is_refused_once_that_is_back() -> None:
    mesh, a, b = two_nodes()
    later = mesh.restarted()
    reconnect(later, a, b)
    assert isinstance(later.register(FakeNode("b", 9)), InvalidRequest)


def test_a_prepared_epoch_is_never_used_again_and_its_fences_come_down() -> None:
    mesh, a, b = two_nodes()
    a.ranks[2] = rank(2)
    mesh.report(a)
    mesh.now += 0.05
    mesh.step(Tick())
    mesh.inbox.clear()  # crashed between Prepare and Commit
    assert mesh.records[-1] == EpochUsed(2, 65_536)
    del a.ranks[2]
    later = mesh.restarted()
    reconnect(later, a, b)
    later.settle()
    assert [view.epoch for view in later.views] == [3]
    assert later.view.membership_epoch == 1


def test_a_view_that_was_written_and_not_sent_is_sent_to_who_comes_back() -> None:
    mesh, a, b = two_nodes()
    a.silent = b.silent = {Commit}
    mesh.kill_rank(a, 1)
    while not isinstance(mesh.inbox[0][1], Commit):
        mesh.deliver()
    assert mesh.view.epoch == 2
    assert a.epoch == b.epoch == 1
    later = mesh.restarted()
    reconnect(later, a, b)
    later.advance(4.0)
    assert a.epoch == b.epoch == 2
    assert later.views == []


def test_an_evicted_process_stays_out_although_its_node_has_not_heard_of_it() -> None:
    mesh, a, b = two_nodes()
    mesh.report_links(a, (0, 8))
    mesh.advance(0.09)
    b.silent = {Commit}
    mesh.now += 0.02
    mesh.step(Tick())
    while not isinstance(mesh.inbox[0][1], Commit):
        mesh.deliver()
    later = mesh.restarted()
    assert 8 in b.ranks
    was = b.ranks[8]
    reconnect(later, a)
    later.register(b)
    later.open(b)
    later.inbox.clear()
    later.report(b)
    later.advance(4.0)
    assert 8 not in later.view.ranks
    assert was.key in b.errors


def test_a_request_repeated_after_the_restart_is_answered_as_if_done_now() -> None:
    mesh, a, b = two_nodes()
    mesh.ask(CreateGroup, "pair", (0, 8), request_id="r1")
    mesh.advance(0.1)
    later = mesh.restarted()
    reconnect(later, a, b)
    call = later.ask(CreateGroup, "pair", (0, 8), request_id="r1")
    later.advance(0.1)
    assert later.replies[call] == Done(2)


def test_operations_wait_until_it_is_known_who_lives() -> None:
    mesh, a, b = two_nodes()
    later = mesh.restarted()
    reconnect(later, a)
    call = later.ask(CreateGroup, "pair", (0, 8))
    later.advance(1.0)
    assert call not in later.replies
    reconnect(later, b)
    later.advance(0.1)
    assert later.replies[call] == Done(2)


def test_counters_of_groups_survive() -> None:
    mesh, a, b = two_nodes()
    a.begun = {(0, 1, 1): 40}
    b.completed = a.completed = {(0, 1, 1): 40, (8, 2, 1): 39, (9, 2, 1): 40}
    mesh.kill_rank(a, 1)
    mesh.settle()
    later = mesh.restarted()
    reconnect(later, a, b)
    later.kill_rank(b, 9)
    later.settle()
    group = later.view.group("ep")
    assert group.sequence == 40
    assert group.completed >= 39


def test_a_snapshot_folds_into_itself() -> None:
    mesh, a, b = two_nodes()
    mesh.report_links(a, (0, 8))
    mesh.advance(0.2)
    mesh.break_session(b)
    mesh.advance(0.1)
    mesh.start("b", 9)
    mesh.advance(0.1)
    snapshot = fold(mesh.records)
    short = list(snapshot.records())
    again = fold(short)
    assert list(again.records()) == short
    assert (again.view, again.nodes, again.used_epoch) == (snapshot.view, snapshot.nodes, snapshot.used_epoch)
    assert len(short) < len(mesh.records)
    assert [type(record) for record in short[:3]] == [MeshCreated, NodeRegistered, NodeRegistered]
    assert isinstance(short[-1], ViewCommitted)


def test_a_coordinator_of_the_snapshot_decides_as_one_of_the_whole_log() -> None:
    mesh, a, b = two_nodes()
    mesh.break_session(b)
    mesh.advance(0.1)
    mesh.records = list(fold(mesh.records).records())
    later = mesh.restarted()
    b.ranks = {8: rank(8, 2)}
    b.view = None
    reconnect(later, a, b)
    later.advance(4.0)
    assert list(later.view.ranks) == [0, 1]
    assert (8, 2) in b.errors


def test_only_so_many_processes_are_remembered_for_a_node() -> None:
    remembered = Remembered((8, incarnation) for incarnation in range(5000))
    assert len(remembered) == MAX_REMEMBERED_PER_NODE
    assert (8, 4999) in remembered
    assert (8, 0) not in remembered


def test_prepare_after_a_restart_goes_to_everybody() -> None:
    mesh, a, b = two_nodes()
    later = mesh.restarted()
    reconnect(later, a, b)
    later.inbox.clear()
    later.kill_rank(b, 9)
    assert [command for _, command in later.inbox] == [Prepare(2, (9,)), Prepare(2, (9,))]
