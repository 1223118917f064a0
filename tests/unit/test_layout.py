"""The layout against the sentence it implements, for any routing, placement and topology."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.errors import ExpertUnavailable, InvalidRequest
from epmesh.layout import Topology, broadcast_layout, make_reach, make_routing, relay_ids, relay_rows, routed_layout
from epmesh.placement import Placement, linear_placement

Case = tuple[Topology, Placement, npt.NDArray[np.int64]]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    nodes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    slots = sorted(draw(st.permutations(range(5)))[: len(nodes)])
    ranks = [(slot * 8 + local, slot) for slot, count in zip(slots, nodes, strict=True) for local in range(count)]
    ranks = draw(st.permutations(ranks))
    return Topology(tuple(r for r, _ in ranks), tuple(s for _, s in ranks), draw(st.integers(0, len(ranks) - 1)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    topology = draw(topologies())
    num_experts = draw(st.integers(1, 6))
    holders = {
        expert: draw(st.lists(st.sampled_from(topology.ranks), min_size=1, max_size=3, unique=True))
        for expert in range(num_experts)
    }
    experts_of = {r: tuple(e for e in range(num_experts) if r in holders[e]) for r in topology.ranks}
    shape = (draw(st.integers(0, 6)), draw(st.integers(1, 3)))
    flat = draw(st.lists(st.integers(-1, num_experts - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return topology, Placement(num_experts, experts_of), np.array(flat, np.int64).reshape(shape)


@given(cases())
def test_every_id_is_computed_by_exactly_one_holder(case: Case) -> None:
    topology, placement, ids = case
    routing = make_routing(placement, topology, make_reach(topology, 8))
    layout = routed_layout(ids, routing, topology)
    assert layout.targets is not None
    for row, column in np.ndindex(*ids.shape):
        if ids[row, column] < 0:
            assert layout.targets[row, column] == -1
            continue
        computing = [
            position
            for position in range(topology.world_size)
            if row in layout.rows_to[position]
            and topology.ranks[position] in placement.holders[ids[row, column]]
            and layout.ids_for(ids, position)[list(layout.rows_to[position]).index(row), column] == ids[row, column]
        ]
        assert computing == [layout.targets[row, column]]


@given(cases())
def test_rows_travel_once_per_rank_and_once_per_node(case: Case) -> None:
    topology, placement, ids = case
    layout = routed_layout(ids, make_routing(placement, topology, make_reach(topology, 8)), topology)
    for rows in layout.rows_to:
        assert list(rows) == sorted(set(rows))
    for slot, rows in layout.rows_to_node.items():
        members = topology.members[slot]
        assert set(rows) == set().union(*(layout.rows_to[position] for position in members))


@given(cases())
def test_a_relay_passes_on_just_what_the_source_meant(case: Case) -> None:
    topology, placement, ids = case
    layout = routed_layout(ids, make_routing(placement, topology, make_reach(topology, 8)), topology)
    for slot, rows in layout.rows_to_node.items():
        codes = layout.codes_to_node[slot]
        for index, position in enumerate(topology.members[slot]):
            passed = relay_rows(codes, len(rows), index)
            assert list(rows[passed]) == list(layout.rows_to[position])
            assert np.array_equal(relay_ids(ids[rows], codes, passed, index), layout.ids_for(ids, position))


@given(topologies(), st.integers(0, 5), st.data())
def test_a_broadcast_reaches_every_eligible_member(topology: Topology, num_tokens: int, data: st.DataObject) -> None:
    eligible = data.draw(st.lists(st.sampled_from(range(topology.world_size)), unique=True))
    layout = broadcast_layout(num_tokens, topology, eligible)
    for position in range(topology.world_size):
        assert len(layout.rows_to[position]) == (num_tokens if position in eligible else 0)
    for slot, rows in layout.rows_to_node.items():
        for index, position in enumerate(topology.members[slot]):
            assert list(rows[relay_rows(layout.codes_to_node[slot], len(rows), index)]) == list(
                layout.rows_to[position]
            )


@given(topologies())
def test_rails_pair_every_member_with_one_rank_of_every_node(topology: Topology) -> None:
    for position, slot in enumerate(topology.slots):
        for other in topology.members:
            rail = topology.rail(position, other)
            assert topology.slots[rail] == other
            if len(topology.members[other]) >= len(topology.members[slot]):
                assert topology.rail(rail, slot) == position


@given(topologies())
def test_a_member_gets_every_row_itself_or_by_a_neighbour_and_none_twice(topology: Topology) -> None:
    for owner, sources in topology.awaited.items():
        relayed = Topology(topology.ranks, topology.slots, owner).relayed
        assert sorted([owner, *sources, *relayed]) == list(range(topology.world_size))


def test_replicas_prefer_the_same_rank_then_the_same_node_then_take_turns() -> None:
    placement = Placement(1, {0: (0,), 1: (0,), 8: (0,), 9: (0,)})
    ids = np.zeros((8, 1), np.int64)

    def counts(ranks: tuple[int, ...], slots: tuple[int, ...], me: int) -> list[int]:
        topology = Topology(ranks, slots, me)
        layout = routed_layout(ids, make_routing(placement, topology, make_reach(topology, 8)), topology)
        return [len(rows) for rows in layout.rows_to]

    assert counts((0, 1, 8, 9), (0, 0, 1, 1), 1) == [0, 8, 0, 0]
    assert counts((2, 1, 8, 9), (0, 0, 1, 1), 0) == [0, 8, 0, 0]
    assert counts((16, 1, 8, 9), (2, 0, 1, 1), 0) == [0, 3, 3, 2]


def test_ids_of_tensor_parallel_siblings_pass_unchanged() -> None:
    topology = Topology((0, 1), (0, 0), 0)
    routing = make_routing(linear_placement(4, (0, 1)), topology, make_reach(topology, 8, 2))
    layout = routed_layout(np.array([[0, 3], [2, 3]]), routing, topology)
    assert [list(rows) for rows in layout.rows_to] == [[0], []]
    assert layout.ids_for(np.array([[0, 3], [2, 3]]), 0).tolist() == [[0, 3]]


@given(st.data())
def test_ranks_with_the_same_tokens_together_compute_every_id_once(data: st.DataObject) -> None:
    size, nodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    ranks = [slot * 8 + local for slot in range(nodes) for local in range(size * data.draw(st.integers(1, 2)))]
    held = st.lists(st.sampled_from(ranks), min_size=1, max_size=4, unique=True)
    holders = [data.draw(held) for _ in range(4)]
    placement = Placement(4, {r: tuple(e for e in range(4) if r in holders[e]) for r in ranks})
    ids = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=8, max_size=8))).reshape(4, 2)
    first = data.draw(st.sampled_from([position for position, rank in enumerate(ranks) if rank % 8 % size == 0]))
    targets = []
    for me in range(first, first + size):
        topology = Topology(tuple(ranks), tuple(rank // 8 for rank in ranks), me)
        reach = make_reach(topology, 8, size)
        assert reach.siblings == tuple(range(first, first + size))
        layout = routed_layout(ids, make_routing(placement, topology, reach), topology)
        assert layout.targets is not None
        assert set(layout.targets[layout.targets >= 0]) <= set(reach.eligible)
        targets.append(layout.targets)
    assert np.array_equal((np.stack(targets) >= 0).sum(0), ids >= 0)


def test_experts_that_no_rank_with_these_tokens_may_send_to_are_not_available() -> None:
    topology = Topology((0, 8, 9), (0, 1, 1), 0)  # rank 1, which would send to rank 9, is dead
    routing = make_routing(linear_placement(3, (0, 8, 9)), topology, make_reach(topology, 8, 2))
    with pytest.raises(ExpertUnavailable) as caught:
        routed_layout(np.array([[0, 1], [1, 2]]), routing, topology)
    assert caught.value.experts == (2,)


@pytest.mark.parametrize("bad", [-2, 4])
def test_an_id_out_of_range_is_named_with_its_row(bad: int) -> None:
    topology = Topology((0,), (0,), 0)
    routing = make_routing(linear_placement(4, (0,)), topology, make_reach(topology, 8))
    with pytest.raises(InvalidRequest, match=rf"topk_ids has {bad} in row 1; ids are -1 \(none\) to 3"):
        routed_layout(np.array([[0], [bad]]), routing, topology)


def test_experts_without_a_living_holder_are_all_named() -> None:
    topology = Topology((0,), (0,), 0)
    routing = make_routing(linear_placement(6, (0, 1, 2)), topology, make_reach(topology, 8))
    with pytest.raises(ExpertUnavailable) as caught:
        routed_layout(np.array([[0, 5], [3, -1]]), routing, topology)
    assert caught.value.experts == (3, 5)


def test_the_linear_default_gives_the_first_ranks_one_more() -> None:
    assert linear_placement(7, (0, 1, 8)).experts_of == {0: (0, 1, 2), 1: (3, 4), 8: (5, 6)}
