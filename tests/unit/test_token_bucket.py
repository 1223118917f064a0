"""A client gets a burst, then a steady rate, and takes nothing from another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.errors import Overloaded
from epmesh_server.node import client_keys
from epmesh_server.node.client_keys import ClientKeyTable
from epmesh_server.token_bucket import TokenBuckets


def test_a_burst_then_one_a_tick() -> None:
    buckets = TokenBuckets(rate_per_s=4.0, burst=3)
    assert [buckets.take("a", 10.0) for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a", 10.0) == pytest.approx(0.25)
    assert buckets.take("a", 10.1) == pytest.approx(0.15)  # asking in vain costs nothing
    assert buckets.take("b", 10.1) == 0
    assert buckets.take("a", 10.25) == 0
    assert buckets.take("a", 10.25) == pytest.approx(0.25)
    assert [buckets.take("a", 20.0) for _ in range(3)] == [0, 0, 0]
    assert buckets.take("a", 20.0) > 0


@given(st.lists(st.floats(0, 3), max_size=60))
def test_in_no_stretch_of_time_are_there_more_than_rate_and_burst(gaps: list[float]) -> None:
    buckets, now, taken = TokenBuckets(rate_per_s=2.0, burst=5), 0.0, []
    for gap in gaps:
        now += gap
        wait_s = buckets.take("a", now)
        if not wait_s:
            taken.append(now)
        else:
            assert buckets.take("a", now + wait_s) == 0
            now += wait_s
            taken.append(now)
    for first, begin in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= 5 + 2.0 * (taken[last] - begin) + 1e-6


def test_who_has_a_full_bucket_again_is_forgotten() -> None:
    buckets = TokenBuckets(rate_per_s=1.0, burst=2)
    for number in range(5000):
        assert buckets.take(number, float(number)) == 0
    assert len(buckets._full_at) <= 1025


def test_a_client_that_leases_and_releases_is_slowed_down_and_renews_and_others_are_not() -> None:
    now = [100.0]
    table = ClientKeyTable(clock=lambda: now[0])
    churned, kept = bytes([65]) * 32, bytes([66]) * 32
    table.lease(kept, "x", "router 'a'")
    for _ in range(client_keys.MAX_LEASES_A_CLIENT - 1):
        table.lease(churned, "x", "router 'a'")
        table.release(churned, "router 'a'")
    with pytest.raises(Overloaded, match="router 'a'") as refused:
        table.lease(churned, "x", "router 'a'")
    assert refused.value.retry_after_s == pytest.approx(1 / client_keys.NEW_LEASES_A_SECOND)
    table.lease(kept, "x", "router 'a'")
    table.lease(churned, "x", "router 'b'")
    table.release(churned, "router 'b'")
    now[0] += refused.value.retry_after_s
    table.lease(churned, "x", "router 'a'")
