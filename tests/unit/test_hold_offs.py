"""Who refused what a moment ago."""

from __future__ import annotations

import pytest

from epmesh.hold_offs import LONGEST_S, MOST, HoldOffs


def held(draw: float = 1.0) -> HoldOffs:
    """`a` refused 8 rows that had a second, at 10.0, for 0.2 s."""
    made = HoldOffs(lambda: draw)
    made.note("a", rows=8, left_s=1.0, retry_after_s=0.2, now=10.0)
    return made


def test_as_much_is_not_asked_again_before_the_time_that_the_refusal_said() -> None:
    assert held().wait_s("a", rows=8, left_s=1.0, now=10.05) == pytest.approx(0.15)
    assert held().wait_s("a", rows=9, left_s=0.5, now=10.05) == pytest.approx(0.15)
    assert held().wait_s("a", rows=8, left_s=1.0, now=10.2) == 0.0


@pytest.mark.parametrize(
    ("who", "rows", "left_s"), [("b", 8, 1.0), ("a", 7, 1.0), ("a", 8, 2.0)], ids=["others", "fewer rows", "more time"]
)
def test_what_is_easier_is_asked(who: str, rows: int, left_s: float) -> None:
    assert held().wait_s(who, rows=rows, left_s=left_s, now=10.0) == 0.0


def test_chance_cuts_the_time_to_half_at_most_and_nobody_waits_for_long() -> None:
    assert held(0.0).wait_s("a", rows=8, left_s=1.0, now=10.0) == pytest.approx(0.1)
    assert held(0.5).wait_s("a", rows=8, left_s=1.0, now=10.0) == pytest.approx(0.15)
    long = held()
    long.note("a", rows=8, left_s=1.0, retry_after_s=5.0, now=10.0)
    assert long.wait_s("a", rows=8, left_s=1.0, now=10.0) == pytest.approx(LONGEST_S)


def test_the_newest_refusals_are_remembered() -> None:
    made = held()
    for number in range(MOST):
        made.note(number, rows=1, left_s=1.0, retry_after_s=0.2, now=10.0)
    assert made.wait_s("a", rows=8, left_s=1.0, now=10.0) == 0.0
    assert all(made.wait_s(number, rows=1, left_s=1.0, now=10.0) for number in range(MOST))
