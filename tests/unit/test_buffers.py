"""Symmetric buffers: what one member writes another finds, and nothing unread is overwritten."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.errors import InvalidRequest
from epmesh_server.ranks.buffers import GroupBuffers, payload_bytes, segments, stamp
from epmesh_server.shared_memory import PAGE_BYTES, BufferLayout


@given(st.integers(1, 9), st.integers(1, 4))
def test_regions_of_a_section_never_overlap(world_size: int, pages: int) -> None:
    layout = BufferLayout(world_size, pages * PAGE_BYTES)
    recv = [
        (layout.recv_offset(turn, source), layout.HEADER_BYTES + layout.region_bytes)
        for turn in range(layout.TURNS)
        for source in range(world_size)
    ]
    out = [(layout.out_offset(slot), layout.HEADER_BYTES + layout.out_bytes) for slot in range(layout.SLOTS)]
    spans = [(0, layout.num_flags * 8), *recv, *out]
    for (start, size), (after, _) in zip(spans, [*spans[1:], (layout.section_bytes, 0)], strict=True):
        assert start + size <= after
    assert all(start % PAGE_BYTES == 0 for start, _ in spans[1:])


@given(st.integers(0, 50), st.lists(st.integers(0, 300), max_size=5))
def test_arrays_of_a_payload_are_aligned_and_apart(num_rows: int, widths: list[int]) -> None:
    placed = segments(num_rows, widths)
    for (start, size), (after, _) in zip(placed, placed[1:], strict=False):
        assert start % 64 == 0
        assert start + size <= after
    assert payload_bytes(num_rows, widths) == (placed[-1][0] + placed[-1][1] if placed else 0)


@pytest.mark.parametrize("region_bytes", [0, -4096, 100])
def test_odd_sizes_are_refused(region_bytes: int) -> None:
    with pytest.raises(InvalidRequest, match=f"buffer bytes are {region_bytes}"):
        BufferLayout(2, region_bytes)


def make_pair() -> tuple[GroupBuffers, GroupBuffers]:
    """Positions 0 and 2 of a group of three, in two mappings of the same memory."""
    layout = BufferLayout(3, PAGE_BYTES)
    memfd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(memfd, 2 * layout.section_bytes)
    wakes = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    awaited = {0: (1, 2), 2: (0,)}  # source 1 is on another node, on the rail of position 2
    made = [GroupBuffers(layout, awaited, me, [os.dup(memfd), *map(os.dup, wakes)]) for me in (0, 2)]
    for fd in (memfd, *wakes):
        os.close(fd)
    return made[0], made[1]


def test_a_published_region_is_found_by_its_owner_alone() -> None:
    first, second = make_pair()
    try:
        flag = stamp(7, 4)
        region = first.recv(2, 4, 0)
        region.describe(2, b"call")
        region.arrays(2, [3, 8])[0][:] = 5
        first.publish_recv(2, 4, 0, flag)
        assert os.eventfd_read(second.wake_fd) == 1
        assert second.recv_flags(4).tolist() == [flag, 0, 0]
        assert first.recv_flags(4).tolist() == [0, 0, 0]
        found = second.recv(2, 4, 0)
        assert (found.num_rows, found.call) == (2, b"call")
        assert np.array_equal(found.arrays(2, [3, 8])[0], np.full((2, 3), 5))
    finally:
        first.close()
        second.close()


def test_three_exchanges_in_a_row_have_regions_of_their_own() -> None:
    first, second = make_pair()
    try:
        for sequence in (4, 5, 6):
            first.recv(2, sequence, 0).payload[:] = sequence
        assert [int(second.recv(2, sequence, 0).payload[0]) for sequence in (4, 5, 6)] == [4, 5, 6]
    finally:
        first.close()
        second.close()


def test_combine_inputs_are_flagged_by_slot() -> None:
    first, second = make_pair()
    try:
        second.publish_out(1, 9)
        assert first.out_flags(1).tolist() == [0, 9]
        assert first.out_flags(0).tolist() == [0, 0]
    finally:
        first.close()
        second.close()


def test_only_the_last_flag_wakes_who_waits_for_all() -> None:
    first, second = make_pair()
    try:
        second.publish_recv(0, 4, 2, 40)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(first.wake_fd)
        second.publish_recv(0, 4, 1, 40)
        assert os.eventfd_read(first.wake_fd) == 1
        first.publish_out(0, 9)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(second.wake_fd)
        second.publish_out(0, 9)
        assert os.eventfd_read(first.wake_fd) == 1
    finally:
        first.close()
        second.close()


@given(st.integers(0, 1 << 30), st.integers(1, 1 << 39), st.integers(0, 1 << 30), st.integers(1, 1 << 39))
def test_flags_differ_between_epochs_and_sequences(epoch: int, sequence: int, other: int, later: int) -> None:
    assert stamp(epoch, sequence) != 0
    same = (epoch % (1 << 24), sequence) == (other % (1 << 24), later)
    assert (stamp(epoch, sequence) == stamp(other, later)) == same
