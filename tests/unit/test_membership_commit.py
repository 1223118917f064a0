"""Prepare, cut, finish, commit."""

from __future__ import annotations

from epmesh.errors import MeshUnavailable
from epmesh.placement import Placement
from epmesh.view import RankMode
from epmesh_server.membership import EpochUsed, GroupProgress, RanksLost, ViewCommitted
from epmesh_server.membership.actions import Append, Commit, Done, Finish, Prepare, Publish, Send
from epmesh_server.membership.events import Committed, CreateGroup, Finished, Prepared, ReportRanks, SetPlacement, Tick
from tests.unit.fake_mesh import FakeMesh, FakeNode, linear, rank, two_nodes


def commands(node: FakeNode, kind: type) -> list[object]:
    return [command for command in node.heard if isinstance(command, kind)]


def test_those_who_join_together_share_one_commit() -> None:
    mesh = FakeMesh()
    for number, name in enumerate("abcd", 1):
        mesh.start(name, number, num_ranks=2)
        mesh.advance(0.01)
    mesh.advance(0.1)
    assert [view.epoch for view in mesh.views] == [1]
    assert len(mesh.view.ranks) == 8


def test_a_stream_of_joins_cannot_put_a_commit_off_for_ever() -> None:
    mesh = FakeMesh()
    for number in range(1, 60):
        mesh.start(f"n{number}", number)
        mesh.advance(0.01)
    assert mesh.views
    assert len(mesh.views) <= 3


def test_a_commit_goes_through_its_steps_and_each_is_written_first() -> None:
    mesh = FakeMesh()
    node = mesh.start("a", num_ranks=1)
    session = node.session
    assert session is not None
    mesh.now += 0.1
    used, prepare = mesh.step(Tick())
    assert used == Append((EpochUsed(1, 65_536),))
    assert prepare == Send(session, Prepare(1, ()))
    (finish,) = mesh.step(Prepared(session, 1))
    assert finish == Send(session, Finish(1, (), False, False, 0.0))
    written, published, commit, *_ = mesh.step(Finished(session, 1))
    assert isinstance(written, Append)
    assert isinstance(written.records[0], ViewCommitted)
    assert published == Publish(mesh.view)
    assert commit == Send(session, Commit(mesh.view))
    assert mesh.step(Committed(session, 1)) == []
    assert mesh.view.epoch == 1


def test_every_node_has_to_answer_each_step() -> None:
    mesh, a, b = two_nodes()
    mesh.kill_rank(a, 1)
    assert [type(command) for _, command in mesh.inbox] == [Prepare, Prepare]
    assert a.session is not None
    assert b.session is not None
    assert mesh.step(Prepared(a.session, 2)) == []
    assert mesh.step(Prepared(a.session, 2)) == []  # once is enough, twice is not two
    assert mesh.step(Finished(b.session, 2)) == []  # out of turn
    assert mesh.step(Prepared(b.session, 1)) == []  # of another epoch
    assert [type(action) for action in mesh.step(Prepared(b.session, 2))] == [Send, Send]


def test_the_cut_is_the_highest_sequence_begun_and_completed_the_lowest_completed() -> None:
    mesh, a, b = two_nodes()
    a.begun = {(0, 1, 1): 12, (1, 1, 1): 11}
    b.begun = {(8, 2, 1): 10, (9, 2, 1): 12}
    a.completed = {(0, 1, 1): 11, (1, 1, 1): 11}
    b.completed = {(8, 2, 1): 9, (9, 2, 1): 11}
    mesh.kill_rank(a, 1)
    mesh.settle()
    (finish,) = commands(b, Finish)[-1:]
    assert finish == Finish(2, ((0, 0), (1, 12)), True, False, 0.0)
    group = mesh.view.group("ep")
    assert (group.sequence, group.completed) == (12, 9)


def test_a_member_without_progress_counts_as_being_where_the_last_view_left_it() -> None:
    mesh, a, b = two_nodes()
    assert a.session is not None
    mesh.kill_rank(b, 9)
    mesh.inbox.clear()
    mesh.step(Prepared(a.session, 2, (GroupProgress(1, 7, 6),)))
    assert b.session is not None
    mesh.step(Prepared(b.session, 2, (GroupProgress(77, 1000, 1000),)))  # no such group
    mesh.step(Finished(a.session, 2, (GroupProgress(1, 7, 6),)))
    mesh.step(Finished(b.session, 2))
    group = mesh.view.group("ep")
    assert (group.sequence, group.completed) == (7, 0)


def test_counters_never_fall_whatever_nodes_say() -> None:
    mesh, a, b = two_nodes()
    a.begun = {(0, 1, 1): 12}
    for node in (a, b):
        node.completed = {(*declared.key, 1): 12 for declared in node.ranks.values()}
    mesh.kill_rank(a, 1)
    mesh.settle()
    a.begun = {(0, 1, 1): 3}
    a.completed = {(0, 1, 1): 2}
    mesh.kill_rank(b, 9)
    mesh.settle()
    group = mesh.view.group("ep")
    assert (group.sequence, group.completed) == (12, 12)


def test_a_death_aborts_at_once_and_names_the_lost() -> None:
    mesh, a, b = two_nodes()
    mesh.break_session(b)
    assert [command for _, command in mesh.inbox] == [Prepare(2, (8, 9))]
    mesh.settle()
    assert commands(a, Finish)[-1] == Finish(2, ((0, 0), (1, 0)), True, False, 0.0)
    assert list(mesh.view.ranks) == [0, 1]
    assert mesh.view.membership_epoch == 2
    assert RanksLost(((8, 2), (9, 2))) in mesh.records


def test_ranks_that_leave_in_good_order_abort_nothing_even_if_their_node_goes_too() -> None:
    mesh, a, b = two_nodes()
    left = frozenset(b.living)
    b.ranks.clear()
    mesh.step(ReportRanks(b.session or 0, (), left))
    mesh.break_session(b, orderly=True)
    mesh.settle()
    assert list(mesh.view.ranks) == [0, 1]
    assert not any(finish.abort for finish in commands(a, Finish) if isinstance(finish, Finish))
    assert commands(a, Prepare)[-1] == Prepare(mesh.view.epoch, ())


def test_a_join_waits_for_the_cut_as_long_as_calls_wait_for_each_other() -> None:
    mesh, a, b = two_nodes()
    b.ranks[8] = rank(8, 2, exchange_timeout_s=7.0)
    mesh.report(b)
    a.ranks[2] = rank(2, exchange_timeout_s=9.0)  # no member yet: nobody waits for it
    mesh.report(a)
    mesh.advance(0.1)
    finish = commands(a, Finish)[-1]
    assert isinstance(finish, Finish)
    assert (finish.abort, finish.members_unchanged, finish.timeout_s) == (False, False, 7.0)


def test_members_are_unchanged_where_only_a_group_or_a_node_without_ranks_is_new() -> None:
    mesh, a, _b = two_nodes()
    mesh.ask(CreateGroup, "pair", (0, 8))
    mesh.start("c", 3)
    mesh.advance(0.1)
    assert (mesh.view.epoch, mesh.view.membership_epoch) == (2, 1)
    assert len(mesh.view.nodes) == 3
    finish = commands(a, Finish)[-1]
    assert isinstance(finish, Finish)
    assert finish.members_unchanged
    assert not finish.abort


def test_a_node_without_ranks_that_leaves_changes_the_view_and_no_membership() -> None:
    mesh, a, _ = two_nodes()
    c = mesh.start("c", 3)
    mesh.advance(0.1)
    mesh.break_session(c)
    mesh.settle()
    assert (mesh.view.epoch, mesh.view.membership_epoch) == (3, 1)
    finish = commands(a, Finish)[-1]
    assert isinstance(finish, Finish)
    assert finish.members_unchanged
    assert not finish.abort


def test_a_change_of_mode_changes_the_membership() -> None:
    mesh, a, _ = two_nodes()
    a.ranks[1] = rank(1, 1, mode=RankMode.SERVE)
    mesh.report(a)
    mesh.advance(0.1)
    assert (mesh.view.epoch, mesh.view.membership_epoch) == (2, 2)
    assert mesh.view.group("ep").ranks == (0, 8, 9)
    assert mesh.view.group("world").ranks == (0, 1, 8, 9)
    assert mesh.view.ranks[1].mode is RankMode.SERVE


def test_a_node_that_does_not_answer_prepare_is_left_out_and_it_is_tried_again() -> None:
    mesh, a, b = two_nodes()
    c = mesh.start("c", 3, num_ranks=1)
    mesh.advance(0.1)
    c.silent = {Prepared, Prepare}
    mesh.kill_rank(a, 1)
    mesh.advance(0.5)
    assert mesh.view.epoch == 2
    mesh.advance(0.6)
    assert mesh.view.epoch == 4
    assert list(mesh.view.ranks) == [0, 8, 9]
    assert isinstance(c.ended, MeshUnavailable)
    assert "did not answer Prepare of epoch 3" in str(c.ended)
    assert commands(b, Prepare)[-1] == Prepare(4, (1, 16))


def test_a_node_that_does_not_answer_finish_is_left_out_after_its_wait() -> None:
    mesh, _a, b = two_nodes()
    b.silent = {Finish}
    c = mesh.start("c", 3, num_ranks=1)  # exchange_timeout_s is 5
    mesh.advance(0.1)
    mesh.advance(5.8)
    assert mesh.view.epoch == 1
    assert c.epoch == 1
    mesh.advance(0.5)
    assert mesh.view.epoch == 3
    assert list(mesh.view.ranks) == [0, 1, 16]


def test_a_node_that_does_not_answer_commit_holds_nobody_up() -> None:
    mesh, _a, b = two_nodes()
    b.silent = {Commit}
    call = mesh.ask(CreateGroup, "pair", (0, 8))
    mesh.advance(0.1)
    assert mesh.view.has_group("pair")
    assert call not in mesh.replies
    mesh.advance(1.1)
    assert mesh.replies[call] == Done(2)
    assert len(mesh.view.nodes) == 2


def test_a_death_during_a_commit_begins_the_next_attempt_at_once() -> None:
    mesh, a, b = two_nodes()
    a.ranks[2] = rank(2)
    mesh.report(a)
    mesh.now += 0.05
    mesh.step(Tick())
    mesh.deliver()
    mesh.kill_rank(b, 9)
    assert [command for _, command in mesh.inbox][-1] == Prepare(3, (9,))
    mesh.settle()
    assert mesh.view.epoch == 3
    assert list(mesh.view.ranks) == [0, 1, 2, 8]
    assert [view.epoch for view in mesh.views] == [1, 3]


def test_a_death_of_somebody_who_only_just_joined_is_no_reason_to_abort() -> None:
    mesh, a, b = two_nodes()
    a.ranks[2] = rank(2)
    mesh.report(a)
    mesh.now += 0.05
    mesh.step(Tick())
    mesh.kill_rank(a, 2)
    mesh.settle()
    finish = commands(b, Finish)[-1]
    assert isinstance(finish, Finish)
    assert not finish.abort
    assert mesh.view.epoch == 3
    assert list(mesh.view.ranks) == [0, 1, 8, 9]
    assert mesh.view.membership_epoch == 1


def test_attempts_that_break_do_not_make_the_wait_for_the_cut_longer() -> None:
    mesh, a, b = two_nodes()
    for incarnation in range(10, 14):
        a.ranks[2] = rank(2, incarnation)
        b.silent = {Finish}
        mesh.report(a)
        mesh.advance(0.8)
    finishes = [finish for finish in commands(a, Finish) if isinstance(finish, Finish)]
    assert finishes[-1].timeout_s < finishes[1].timeout_s - 2.0


def test_an_attempt_that_broke_is_followed_by_a_commit_even_if_nothing_changed() -> None:
    mesh, a, _b = two_nodes()
    a.ranks[2] = rank(2)
    mesh.report(a)
    mesh.now += 0.05
    mesh.step(Tick())
    mesh.settle()
    assert mesh.view.epoch == 2
    a.ranks[3] = rank(3)
    mesh.report(a)
    mesh.now += 0.05
    mesh.step(Tick())
    mesh.kill_rank(a, 3)
    mesh.settle()
    assert mesh.view.epoch == 4  # or the fences of 3 stayed up
    assert mesh.view.membership_epoch == 2


def test_a_report_that_changes_nothing_commits_nothing() -> None:
    mesh, a, b = two_nodes()
    mesh.report(a)
    mesh.report(b)
    mesh.ask(SetPlacement, None, Placement(2, {0: (0, 1)}))
    mesh.advance(0.1)
    call = mesh.ask(SetPlacement, None, Placement(2, {0: (0, 1)}))
    mesh.advance(0.1)
    assert mesh.replies[call] == Done(2)
    assert len(mesh.views) == 2


def test_never_fewer_than_half_of_the_nodes() -> None:
    mesh = FakeMesh()
    nodes = [mesh.start(name, number, num_ranks=1) for number, name in enumerate("abcde", 1)]
    mesh.advance(0.1)
    for node in nodes[3:]:
        mesh.break_session(node)
    mesh.settle()
    assert len(mesh.view.nodes) == 3  # of five
    for node in nodes[1:3]:
        mesh.break_session(node)
    mesh.advance(10.0)
    assert len(mesh.view.nodes) == 3  # one of three is too few
    call = mesh.ask(SetPlacement, None, Placement(2, {0: (0, 1)}))
    mesh.advance(0.1)
    assert isinstance(mesh.replies[call], MeshUnavailable)


def test_one_node_after_the_other_may_go() -> None:
    mesh = FakeMesh()
    nodes = [mesh.start(name, number, num_ranks=1) for number, name in enumerate("abcde", 1)]
    mesh.advance(0.1)
    for node in nodes[1:]:
        mesh.break_session(node)
        mesh.settle()
    assert list(mesh.view.ranks) == [0]


def test_too_few_nodes_leave_the_view_as_it_is_and_fail_calls() -> None:
    mesh = FakeMesh()
    nodes = [mesh.start(name, number, num_ranks=1) for number, name in enumerate("abcde", 1)]
    mesh.advance(0.1)
    for node in nodes[2:]:
        node.silent = {Prepare}
    mesh.kill_rank(nodes[0], 0)
    mesh.advance(1.1)
    assert [view.epoch for view in mesh.views] == [1]
    call = mesh.ask(CreateGroup, "g", (8,))
    mesh.advance(0.1)
    refusal = mesh.replies[call]
    assert isinstance(refusal, MeshUnavailable)
    assert "only 2 of the 5 nodes of epoch 1 are left" in str(refusal)
    assert "--min-nodes 2" in str(refusal)
    for number, name in enumerate("cde", 10):
        mesh.start(name, number, num_ranks=1)
    mesh.advance(0.1)
    assert len(mesh.view.ranks) == 4
    assert mesh.view.nodes[4].incarnation == 12


def test_min_nodes_overrides_half() -> None:
    mesh, a, b = two_nodes(min_nodes=2)
    mesh.break_session(b)
    mesh.settle()
    assert len(mesh.view.nodes) == 2
    mesh, a, b = two_nodes(min_nodes=0)
    mesh.break_session(b)
    mesh.break_session(a)
    mesh.settle()
    assert mesh.view.nodes == ()


def test_nodes_that_leave_by_themselves_are_not_missed() -> None:
    mesh, a, b = two_nodes()
    mesh.break_session(a, orderly=True)
    mesh.break_session(b, orderly=True)
    mesh.advance(0.1)
    assert mesh.view.nodes == ()
    assert mesh.view.epoch == 3 or mesh.view.epoch == 2


def test_a_coordinator_that_was_cut_off_from_everybody_evicts_nobody_who_comes_back() -> None:
    mesh = FakeMesh(min_nodes=4)
    nodes = [mesh.start(name, number, num_ranks=1) for number, name in enumerate("abcd", 1)]
    mesh.advance(0.1)
    for node in nodes:
        mesh.break_session(node)
    mesh.advance(20.0)
    assert len(mesh.views) == 1
    for node in nodes:
        mesh.register(node)
        mesh.open(node)
        mesh.report(node)
        mesh.advance(0.5)
    assert len(mesh.views) == 1
    assert not any(node.errors for node in nodes)


def test_of_those_cut_off_only_who_was_said_to_be_lost_has_to_join_again() -> None:
    mesh = FakeMesh()
    nodes = [mesh.start(name, number, num_ranks=1) for number, name in enumerate("abcd", 1)]
    mesh.advance(0.1)
    for node in nodes:
        mesh.break_session(node)  # a, then b are said to be lost; with c too few are left
    for node in nodes:
        mesh.register(node)
        mesh.open(node)
        mesh.report(node)
    mesh.advance(4.0)
    assert list(mesh.view.ranks) == [16, 24]
    assert [bool(node.errors) for node in nodes] == [True, True, False, False]


def test_linear_placement_waits_for_the_world_size() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    a.ranks = {0: rank(0, world_size=3, experts=[linear(6)]), 1: rank(1, world_size=3, experts=[linear(6)])}
    mesh.report(a)
    mesh.advance(0.1)
    assert mesh.view.placement(None) is None
    a.ranks[2] = rank(2, world_size=3, experts=[linear(6)])
    mesh.report(a)
    mesh.advance(0.1)
    placement = mesh.view.placement(None)
    assert placement is not None
    assert placement.experts_of == {0: (0, 1), 1: (2, 3), 2: (4, 5)}
