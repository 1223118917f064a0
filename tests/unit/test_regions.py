"""Regions never overlap, come back whole, and the lowest that fits is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.errors import InvalidRequest
from epmesh.regions import ALIGNMENT, Regions


def test_the_lowest_region_that_fits_is_taken() -> None:
    regions = Regions(1024)
    first, second, third = (regions.take(100) for _ in range(3))
    assert (first, second, third) == (0, 128, 256)
    regions.give_back(128)
    assert regions.take(200) == 384
    assert regions.take(1) == 128


def test_there_is_none_where_nothing_fits() -> None:
    regions = Regions(128)
    assert regions.take(129) is None
    assert regions.take(128) == 0
    assert regions.take(0) is None


def test_what_was_not_taken_cannot_be_given_back() -> None:
    regions = Regions(256)
    regions.take(10)
    regions.give_back(0)
    for offset in (0, 7, 64, -1):
        with pytest.raises(InvalidRequest, match=str(offset)):
            regions.give_back(offset)


@given(st.lists(st.one_of(st.integers(0, 400), st.integers(-8, -1)), max_size=60))
def test_regions_never_overlap_and_all_of_the_memory_comes_back(steps: list[int]) -> None:
    """A step of 0 or more takes so many bytes; -n gives back the n-th region in use."""
    regions, taken = Regions(2048), dict[int, int]()
    for step in steps:
        if step >= 0:
            offset = regions.take(step)
            if offset is not None:
                assert offset % ALIGNMENT == 0
                assert offset + step <= 2048
                assert all(offset + step <= other or other + size <= offset for other, size in taken.items())
                taken[offset] = max(step, 1)
        elif len(taken) >= -step:
            offset = sorted(taken)[-step - 1]
            regions.give_back(offset)
            del taken[offset]
        assert regions.taken == len(taken)
    for offset in taken:
        regions.give_back(offset)
    assert regions.take(2048) == 0
