"""The plan of the benchmark, and its arithmetic."""

from __future__ import annotations

import pytest

from epmesh.errors import InvalidRequest
from epmesh_server.cli.bench import BenchPlan, _summary


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"topk": 9, "experts": 8}, "topk is 9 of 8 experts"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"tokens": (4, -1)}, "tokens"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        BenchPlan(**options)  # type: ignore[arg-type]


def test_a_row_is_the_median_of_the_slowest_rank() -> None:
    def rank(slow: float) -> dict[str, object]:
        return {
            "ours": [(0.001 * slow, 0.002), (0.003 * slow, 0.002), (0.002 * slow, 0.002)],
            "theirs": [(0.01 * slow, 0.0), (0.03, 0.0), (0.02, 0.0)],
            "sent": 110,
            "floor": 100,
        }

    row = _summary(7, [rank(1.0), rank(2.0)])
    assert (row.tokens, row.sent_bytes, row.floor_bytes) == (7, 220, 200)
    assert (row.dispatch_ms, row.combine_ms, row.agrs_ms) == pytest.approx((4.0, 2.0, 20.0))
    assert row.ratio == pytest.approx(20 / 6)
