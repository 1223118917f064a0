"""What a node decides in a commit, without pages and sockets."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.view import GroupInfo, NodeInfo, RankInfo, RankMode, View
from epmesh_server.node.progress import evicted_ranks, is_member, lost_ranks, node_progress, past_cut
from epmesh_server.shared_memory import Progress

STRIDE = 4
EP = 1


def make_view(*ranks: int, sequence: int = 10, group_ranks: tuple[int, ...] | None = None) -> View:
    """A view with these ranks (incarnation = rank + 100), all of them in group `ep` unless told otherwise."""
    infos = [RankInfo(rank, rank + 100, "cpu", RankMode.EXCHANGE, "") for rank in ranks]
    slots = sorted({rank // STRIDE for rank in ranks})
    nodes = tuple(
        NodeInfo(slot, f"n{slot}", 1, "", tuple(info for info in infos if info.rank // STRIDE == slot))
        for slot in slots
    )
    members = ranks if group_ranks is None else group_ranks
    return View("mesh", 5, 5, STRIDE, nodes, (GroupInfo("ep", EP, members, members, sequence, sequence),))


def test_ranks_of_this_node_without_a_session_are_lost() -> None:
    assert lost_ranks(make_view(0, 1, 4), 0, {(0, 100)}, ()) == {1}


def test_another_incarnation_of_a_member_does_not_stand_for_it() -> None:
    assert lost_ranks(make_view(0, 1), 0, {(0, 100), (1, 999)}, ()) == {1}


def test_losses_on_other_nodes_are_what_the_coordinator_says() -> None:
    assert lost_ranks(make_view(0, 4, 8), 0, {(0, 100)}, [8]) == {8}


def test_nobody_is_lost_who_is_not_in_the_view() -> None:
    assert lost_ranks(make_view(0), 0, {(0, 100)}, [3, 77]) == frozenset()
    assert lost_ranks(None, 0, (), [1]) == frozenset()


def test_members_are_the_very_processes() -> None:
    view = make_view(0, 1)
    assert is_member(view, 1, 101)
    assert not is_member(view, 1, 7)
    assert evicted_ranks(view, [(0, 100), (1, 7), (2, 102)]) == [1, 2]


def test_progress_is_the_most_begun_and_the_least_completed() -> None:
    pages = {0: [Progress(EP, 14, 13, 12)], 1: [Progress(EP, 12, 12, 11)]}
    (group,) = node_progress(make_view(0, 1, 4), pages)
    assert (group.group_id, group.begun, group.completed) == (EP, 14, 11)


def test_a_member_that_shows_nothing_is_where_the_view_left_it() -> None:
    (group,) = node_progress(make_view(0, 1), {0: [Progress(EP, 14, 13, 12)], 1: []})
    assert (group.begun, group.completed) == (14, 10)


def test_begun_never_falls_below_the_view() -> None:
    (group,) = node_progress(make_view(0), {0: [Progress(EP, 8, 8, 7)]})
    assert (group.begun, group.completed) == (10, 7)


def test_groups_without_a_member_here_are_not_reported() -> None:
    assert node_progress(make_view(0, 4, group_ranks=(4,)), {0: [Progress(EP, 3, 3, 3)]}) == []
    assert node_progress(None, {0: []}) == []


@pytest.mark.parametrize(
    ("shown", "dispatched", "past"),
    [
        ([], True, True),
        ([Progress(EP, 10, 10, 10)], True, True),  # idle in this view
        ([Progress(EP, 11, 10, 10)], True, False),
        ([Progress(EP, 12, 12, 10)], True, True),
        ([Progress(EP, 12, 12, 11)], False, False),
        ([Progress(EP, 12, 12, 12)], False, True),
        ([Progress(77, 99, 0, 0)], False, True),  # a group that is gone
    ],
    ids=["nothing", "idle", "behind", "dispatched", "not combined", "combined", "another group"],
)
def test_a_rank_is_past_the_cut(shown: list[Progress], dispatched: bool, past: bool) -> None:
    assert past_cut(make_view(0), shown, {EP: 12}, dispatched=dispatched) is past


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4),
    st.integers(0, 20),
)
def test_once_all_completed_the_cut_nobody_waits(rows: list[tuple[int, int, int]], cut: int) -> None:
    view = make_view(*range(len(rows)), sequence=0)
    pages = {rank: [Progress(EP, *sorted(row, reverse=True))] for rank, row in enumerate(rows)}
    (group,) = node_progress(view, pages)
    assert group.begun >= group.completed
    if group.completed >= cut:
        assert all(past_cut(view, shown, {EP: cut}, dispatched=False) for shown in pages.values())


def test_placements_and_modes_do_not_matter_here() -> None:
    view = make_view(0, 1)
    serving = dataclasses.replace(view, tensor_parallel_size=2)
    assert node_progress(serving, {0: []}) == node_progress(view, {0: []})
