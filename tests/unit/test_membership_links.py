"""Whom to leave out when links are broken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from epmesh_server.membership.links import greedy_removal
from tests.unit.fake_mesh import FakeMesh, linear, rank, two_nodes

EDGES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40)


@given(EDGES)
def test_no_broken_link_is_left_among_the_others(edges: list[tuple[int, int]]) -> None:
    removed = set(greedy_removal(edges))
    assert all(a in removed or b in removed for a, b in edges if a != b)


@given(EDGES)
def test_order_and_repeats_do_not_matter(edges: list[tuple[int, int]]) -> None:
    assert greedy_removal(edges) == greedy_removal(edges[::-1] + edges)


@given(EDGES)
def test_only_ranks_with_a_broken_link_are_removed_and_each_once(edges: list[tuple[int, int]]) -> None:
    removed = greedy_removal(edges)
    assert len(set(removed)) == len(removed)
    assert set(removed) <= {rank for edge in edges for rank in edge if edge[0] != edge[1]}


def test_the_rank_with_most_broken_links_goes_and_the_higher_of_two() -> None:
    assert greedy_removal([(0, 8), (1, 8), (16, 8)]) == [8]
    assert greedy_removal([(0, 8), (8, 0)]) == [8]
    assert greedy_removal([(0, 8), (8, 0), (1, 9), (9, 1)]) == [9, 8]
    assert greedy_removal([(4, 4)]) == []


def test_of_two_the_one_that_says_nothing_goes() -> None:
    assert greedy_removal([(0, 8)]) == [8]
    assert greedy_removal([(8, 0)]) == [0]
    assert greedy_removal([(8, 0), (9, 0), (8, 16), (9, 17)]) == [0, 17, 16]


def test_reports_are_gathered_for_a_moment_before_anyone_is_evicted() -> None:
    mesh, a, b = two_nodes()
    mesh.report_links(a, (0, 8))
    mesh.advance(0.09)
    assert len(mesh.view.ranks) == 4
    mesh.advance(0.02)
    assert list(mesh.view.ranks) == [0, 1, 9]
    assert set(b.errors) == {(8, 2)}


def test_a_link_that_works_again_in_time_evicts_nobody() -> None:
    mesh, a, _ = two_nodes()
    mesh.report_links(a, (0, 8))
    mesh.advance(0.05)
    mesh.report_links(a)
    mesh.advance(0.2)
    assert len(mesh.views) == 1


def test_a_rank_that_many_cannot_reach_goes_and_not_those_who_say_so() -> None:
    mesh, a, b = two_nodes()
    mesh.report_links(a, (0, 9), (1, 9))
    mesh.report_links(b, (8, 9))
    mesh.advance(0.2)
    assert list(mesh.view.ranks) == [0, 1, 8]


def test_an_evicted_process_never_comes_back_and_its_successor_does() -> None:
    mesh, a, b = two_nodes()
    mesh.report_links(a, (0, 8))
    mesh.advance(0.2)
    b.ranks[8] = rank(8, 2)  # the very process that was evicted
    mesh.report(b)
    mesh.advance(0.1)
    assert 8 not in mesh.view.ranks
    b.ranks[8] = rank(8, 3)
    mesh.report(b)
    mesh.advance(0.1)
    assert mesh.view.ranks[8].incarnation == 3


def test_links_to_processes_that_are_gone_count_for_nothing() -> None:
    mesh, a, b = two_nodes()
    mesh.report_links(a, (0, 8))
    b.ranks[8] = rank(8, 3)
    mesh.report(b)
    mesh.advance(0.2)
    assert mesh.view.ranks[8].incarnation == 3
    assert not b.errors


def test_a_node_cannot_report_links_of_others_ranks() -> None:
    mesh, a, _ = two_nodes()
    mesh.report_links(a, (9, 8), (1, 1))
    mesh.advance(0.2)
    assert len(mesh.views) == 1


def test_eviction_keeps_the_placement_of_who_is_gone() -> None:
    mesh = FakeMesh()
    a, b = mesh.start("a"), mesh.start("b", 2)
    for node, number in ((a, 0), (b, 8)):
        node.ranks = {number: rank(number, world_size=2, experts=[linear(4)])}
        mesh.report(node)
    mesh.advance(0.1)
    mesh.report_links(a, (0, 8))
    mesh.advance(0.2)
    placement = mesh.view.placement(None)
    assert placement is not None
    assert placement.experts_of == {0: (0, 1), 8: (2, 3)}
