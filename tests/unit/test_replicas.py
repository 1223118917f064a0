"""Rows of replicated experts: evenly over ranks, and to few nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.layout import Ints, Topology, make_reach, make_routing
from epmesh.placement import Placement
from epmesh.replicas import Replicas

STRIDE = 4


def make_replicas(experts_of: Mapping[int, tuple[int, ...]], num_experts: int) -> tuple[Replicas, Topology]:
    ranks = tuple(sorted(experts_of))
    topology = Topology(ranks, tuple(rank // STRIDE for rank in ranks), -1)
    routing = make_routing(Placement(num_experts, experts_of), topology, make_reach(topology, STRIDE))
    return Replicas(routing, topology), topology


def count(replicas: Replicas, topology: Topology, ids: Ints, turn: int = 0) -> dict[int, int]:
    targets = replicas.choose(ids, turn)
    return dict(Counter(topology.ranks[position] for position in targets[targets >= 0]))


@given(st.data())
def test_every_id_goes_to_a_holder(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.sampled_from(range(12)), min_size=1, max_size=6, unique=True))
    holders = [data.draw(st.sets(st.sampled_from(ranks), min_size=1)) for _ in range(4)]
    experts_of = {rank: tuple(e for e in range(4) if rank in holders[e]) for rank in ranks}
    replicas, topology = make_replicas(experts_of, 4)
    ids = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=12, max_size=12))).reshape(6, 2)
    targets = replicas.choose(ids, data.draw(st.integers(0, 1000)))
    for expert, target in zip(ids.flat, targets.flat, strict=True):
        assert target == -1 if expert < 0 else topology.ranks[target] in holders[expert]


def test_a_row_goes_to_one_node_where_every_node_has_all_experts() -> None:
    everything = tuple(range(8))
    replicas, topology = make_replicas(dict.fromkeys((0, 1, 4, 5, 8, 9), everything), 8)
    ids = np.random.default_rng(1).permuted(np.tile(np.arange(8), (60, 1)), axis=1)[:, :3]
    nodes = np.array(topology.slots)[replicas.choose(ids, 5)]
    assert (nodes == nodes[:, :1]).all()
    assert Counter(nodes[:, 0]) == {0: 20, 1: 20, 2: 20}


@pytest.mark.parametrize("holders", [(0, 4), (4, 8), (0, 8), (0, 4, 8), (0, 1, 4, 5), (8, 9)])
def test_replicas_share_the_rows_of_one_batch(holders: tuple[int, ...]) -> None:
    experts_of = {rank: ((0,) if rank in holders else (1,)) for rank in (0, 1, 4, 5, 8, 9)}
    replicas, topology = make_replicas(experts_of, 2)
    rows = 24 * len(holders)
    assert count(replicas, topology, np.zeros((rows, 1), np.int64)) == dict.fromkeys(holders, rows // len(holders))


@pytest.mark.parametrize("holders", [(0, 4), (0, 1, 4, 5), (0, 4, 8), (0, 1)])
def test_replicas_share_batches_of_one_row(holders: tuple[int, ...]) -> None:
    experts_of = {rank: ((0,) if rank in holders else (1,)) for rank in (0, 1, 4, 5, 8, 9)}
    replicas, topology = make_replicas(experts_of, 2)
    counts: Counter[int] = Counter()
    for turn in range(24 * len(holders)):
        counts.update(count(replicas, topology, np.zeros((1, 1), np.int64), turn))
    assert counts == dict.fromkeys(holders, 24)


def test_the_same_turn_gives_the_same_choice() -> None:
    replicas, _ = make_replicas({0: (0, 1), 4: (0, 1), 8: (0,)}, 2)
    ids = np.random.default_rng(2).integers(-1, 2, (20, 2))
    assert np.array_equal(replicas.choose(ids, 3), replicas.choose(ids, 3))
