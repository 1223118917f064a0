"""Where things stand in the memory that GPUs share, and what kernels report: pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.errors import DeadlineExceeded, ExpertUnavailable, InvalidRequest
from epmesh_server.kernels.plan import (
    HEAD_WORDS,
    SLOTS,
    TURNS,
    ArenaPlan,
    block_of,
    plan_rows,
    region_bytes_for,
    unit_of,
)
from epmesh_server.kernels.status import Code, Report, count_in, decode, done_report, encode, error_of, signature

WIDTHS = st.lists(st.integers(1, 20_000), min_size=1, max_size=8)


@given(rows=st.integers(1, 5_000), widths=WIDTHS)
def test_a_region_made_for_some_rows_holds_them_without_overlap(rows: int, widths: list[int]) -> None:
    size = region_bytes_for(rows, widths)
    planned = plan_rows(size, widths)
    assert planned.rows >= rows
    ends = [planned.rows * 4, *(at + planned.rows * width for at, width in zip(planned.offsets, widths, strict=True))]
    starts = [*planned.offsets, -(-size // 128) * 128]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    assert all(offset % 128 == 0 for offset in planned.offsets)


@given(region_bytes=st.integers(1, 1_000), widths=WIDTHS)
def test_a_region_that_is_too_small_holds_no_row(region_bytes: int, widths: list[int]) -> None:
    planned = plan_rows(region_bytes, widths)
    assert planned.rows * (sum(widths) + 4) <= region_bytes


@given(
    world_size=st.integers(1, 16),
    programs=st.integers(1, 132),
    region_bytes=st.integers(128, 1 << 20),
    out_bytes=st.integers(128, 1 << 20),
)
def test_the_parts_of_an_arena_follow_each_other(
    world_size: int, programs: int, region_bytes: int, out_bytes: int
) -> None:
    plan = ArenaPlan(world_size=world_size, rows=1, programs=programs, region_bytes=region_bytes, out_bytes=out_bytes)
    head_bytes = HEAD_WORDS * 4
    parts = [
        (plan.recv_flags_at, TURNS * world_size * programs * 8),
        (plan.out_flags_at, SLOTS * world_size * programs * 8),
        (plan.recv_heads_at, TURNS * world_size * programs * head_bytes),
        (plan.out_heads_at, SLOTS * world_size * programs * head_bytes),
        (plan.recv_at, TURNS * world_size * plan.region_stride),
        (plan.out_at, SLOTS * world_size * plan.out_stride),
        (plan.total_bytes, 0),
    ]
    for (start, size), (following, _) in zip(parts, parts[1:], strict=False):
        assert start % 128 == 0
        assert start + size <= following
    assert plan.region_stride >= region_bytes
    assert plan.out_stride >= out_bytes


@pytest.mark.parametrize("world_size", [0, 17])
def test_a_group_that_is_too_large_for_a_node_is_refused(world_size: int) -> None:
    with pytest.raises(InvalidRequest, match=str(world_size)):
        ArenaPlan(world_size=world_size, rows=1, programs=1, region_bytes=128, out_bytes=128)


def test_rows_are_moved_by_what_divides_their_width_and_their_address() -> None:
    assert unit_of(14_336, 0x7F00_0000_0000) == 16
    assert unit_of(24, 0x7F00_0000_0000) == 4
    assert unit_of(64, 0x7F00_0000_0004) == 4
    assert unit_of(7, 0x7F00_0000_0000) == 1
    assert [block_of(*each, 2048) for each in ((14_336, 16), (24, 4), (7, 1), (1, 1))] == [2048, 8, 8, 1]


@given(source=st.integers(0, 15), code=st.sampled_from(Code), value=st.integers(-(1 << 27), (1 << 27) - 1))
def test_reports_come_back_as_they_were_written(source: int, code: Code, value: int) -> None:
    word = encode(source, code, value)
    assert decode(word) == Report(source, code, value)
    assert done_report((5 << 40 | 3) % (1 << 23) << 40 | word, 3) == (True, Report(source, code, value))
    assert not done_report(4 << 40 | word, 3)[0]


def test_the_lowest_sources_report_counts() -> None:
    words = [encode(source, code) for source in range(3) for code in Code]
    assert decode(max(words)) == Report(0, max(Code), 0)
    assert decode(0) is None


def test_a_graph_with_an_old_table_is_told_to_be_captured_anew() -> None:
    error = error_of(Report(2, Code.OLD_TABLE, 3), 7, "an exchange")
    assert isinstance(error, InvalidRequest)
    assert "rank 7" in str(error)
    assert "capture anew" in str(error)


def test_counts_of_an_older_exchange_are_not_taken() -> None:
    stamp = 7 << 40 | 12
    assert count_in(12 << 32 | 99, stamp) == 99
    assert count_in(9 << 32 | 99, stamp) is None


def test_signatures_differ_where_calls_do() -> None:
    assert len({signature(f"dispatch layer={layer}") for layer in range(1000)}) == 1000


def test_reports_are_typed_errors_that_name_the_rank() -> None:
    errors = {code: error_of(Report(1, code, 9), 21, "an exchange") for code in Code}
    unavailable = errors[Code.NO_HOLDER]
    assert isinstance(unavailable, ExpertUnavailable)
    assert unavailable.experts == (9,)
    for code in (Code.BAD_ID, Code.REFUSED, Code.MISMATCH):
        assert isinstance(errors[code], InvalidRequest)
        assert "rank 21" in str(errors[code])
    for code in (Code.LATE, Code.ABORTED, Code.AHEAD):
        assert isinstance(errors[code], DeadlineExceeded)
        assert "rank 21" in str(errors[code])
