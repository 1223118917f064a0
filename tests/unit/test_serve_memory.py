"""The memory that serving ranks of a node share."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh import InvalidRequest, NodeInfo, NotReady, RankInfo, RankMode, StaleEpoch, View
from epmesh_server.node.buffers import BufferPool
from epmesh_server.ranks.serve_memory import ServeMemory, Slabs
from epmesh_server.shared_memory import sealed_memfd

SECTION = 1 << 16


def memories(*ranks: int) -> list[ServeMemory]:
    """One memory as each of its ranks maps it."""
    memfd = sealed_memfd("test", len(ranks) * SECTION)
    made = [ServeMemory(5, rank, ranks, len(ranks) * SECTION, os.dup(memfd)) for rank in ranks]
    os.close(memfd)
    return made


def test_what_one_rank_writes_into_its_slab_its_neighbour_reads_there() -> None:
    four, six = memories(4, 6)
    slab = four.take(10)
    assert slab is not None
    slab.data[:] = 7
    assert six.at(4, slab.start, 10).tolist() == [7] * 10
    assert six.at(6, slab.start, 10).tolist() == [0] * 10
    six.at(4, slab.start, 1)[:] = 9
    assert slab.data[0] == 9


@pytest.mark.parametrize(("rank", "start", "size"), [(5, 0, 1), (4, -1, 1), (4, SECTION, 1), (4, 0, SECTION + 1)])
def test_nothing_outside_of_a_section_can_be_named(rank: int, start: int, size: int) -> None:
    with pytest.raises(InvalidRequest):
        memories(4, 6)[0].at(rank, start, size)


def test_a_slab_that_is_not_given_back_is_never_given_out_again() -> None:
    (memory,) = memories(4)
    lost, kept = memory.take(SECTION // 2), memory.take(SECTION // 4)
    assert lost is not None
    assert kept is not None
    kept.give_back()
    again = memory.take(SECTION // 2)
    assert again is not None
    assert not lost.start <= again.start < lost.start + SECTION // 2
    assert memory.take(1) is None


def test_a_slab_that_is_of_no_use_keeps_no_pages_and_may_still_be_written_to() -> None:
    memfd = sealed_memfd("test", SECTION)
    memory = ServeMemory(5, 4, [4], SECTION, os.dup(memfd))
    slab = memory.take(SECTION // 2)
    assert slab is not None
    slab.data[:] = 1
    before = os.fstat(memfd).st_blocks
    slab.discard()
    assert os.fstat(memfd).st_blocks < before / 4
    slab.data[:] = 2
    after = memory.take(SECTION // 2)
    assert after is not None
    assert after.start >= SECTION // 2
    os.close(memfd)


@given(st.lists(st.one_of(st.integers(0, 4000), st.none()), max_size=60), st.randoms(use_true_random=False))
def test_slabs_never_overlap_and_all_room_comes_back(steps: list[int | None], chance: Any) -> None:
    slabs = Slabs(1 << 14)
    taken: dict[int, int] = {}
    for size in steps:
        if size is None:
            if taken:
                start = chance.choice(list(taken))
                slabs.give_back(start)
                del taken[start]
            continue
        at = slabs.take(size)
        if at is not None:
            assert at + size <= 1 << 14
            assert all(at + size <= start or start + length <= at for start, length in taken.items())
            taken[at] = max(size, 1)
    for start in taken:
        slabs.give_back(start)
    assert slabs.taken_bytes == 0
    assert slabs.take(1 << 14) == 0


def view(membership_epoch: int, *ranks: int) -> View:
    infos = tuple(RankInfo(rank, 1, "cpu", RankMode.SERVE, "") for rank in ranks)
    nodes = (NodeInfo(0, "a", 1, "h:1", infos[:2]), NodeInfo(1, "b", 1, "h:2", infos[2:]))
    return View("m", membership_epoch + 1, membership_epoch, 2, nodes)


def test_the_node_makes_one_memory_a_membership_with_a_section_for_each_of_its_ranks() -> None:
    pool = BufferPool(4096)
    first = pool.get_serving(view(3, 0, 1, 2), 3, 1)
    assert first.ranks == (0, 1)
    assert os.fstat(first.memfd).st_size == first.memfd_bytes
    assert pool.get_serving(view(3, 0, 1, 2), 3, 0) is first
    with pytest.raises(NotReady):
        pool.get_serving(view(3, 0, 1, 2), 4, 0)
    with pytest.raises(InvalidRequest):
        pool.get_serving(view(3, 0, 2, 3), 3, 1)
    pool.keep_only(view(4, 0, 1, 2))
    second = pool.get_serving(view(4, 0, 1, 2), 4, 0)
    assert second is not first
    with pytest.raises(StaleEpoch):
        pool.get_serving(view(4, 0, 1, 2), 3, 0)
    pool.keep_only(None)
    assert len(pool) == 0
