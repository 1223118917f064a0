"""Which shares go into the next call of the experts."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh import InvalidRequest, Overloaded
from epmesh_server.ranks.serving_batch import BatchLimits, BatchQueue, Coming

LONG = 1e9


@dataclass(eq=False)
class Waiting:
    """A share."""

    key: str = "a"
    num_rows: int = 1
    num_bytes: int = 1
    deadline: float = LONG
    cancelled: bool = field(default=False)
    client: str = ""


def queue_of(*shares: Waiting, now: float = 0.0, **limits: Any) -> BatchQueue[Waiting]:
    queue: BatchQueue[Waiting] = BatchQueue(BatchLimits(**limits))
    for share in shares:
        queue.put(share, now)
    return queue


def test_a_lone_share_goes_at_once() -> None:
    share = Waiting()
    queue = queue_of(share, now=5.0, max_wait_s=0.5)
    assert queue.wait_s(5.0) == 0.0
    assert queue.take(5.0) == [share]
    assert queue.take(5.0) == []
    assert queue.wait_s(5.0) is None


def test_shares_of_one_key_go_together_and_others_after_them_in_the_order_of_their_oldest() -> None:
    a1, b1, a2, c1, b2 = (Waiting(key) for key in "abacb")
    queue = queue_of(a1, b1, a2, c1, b2, max_wait_s=0.0)
    assert [queue.take(0.0) for _ in range(4)] == [[a1, a2], [b1, b2], [c1], []]


def test_a_batch_has_no_more_rows_than_the_limit_unless_one_share_has() -> None:
    small = [Waiting(num_rows=4) for _ in range(3)]
    large = Waiting(num_rows=50)
    queue = queue_of(*small, large, max_batch_rows=10)
    assert [len(queue.take(0.0)) for _ in range(3)] == [2, 1, 1]
    assert queue.queued_rows == 0


def test_an_idle_rank_waits_for_company_only_where_requests_have_come_that_fast() -> None:
    slow = queue_of(max_wait_s=0.001)
    for now in (0.0, 1.0, 2.0):
        slow.put(Waiting(), now)
        assert len(slow.take(now)) == 1
    fast = queue_of(max_wait_s=0.001)
    for count in range(5):
        fast.put(Waiting(), count * 0.0001)
    assert fast.take(0.0004) == []
    assert fast.wait_s(0.0004) == pytest.approx(0.0006)
    assert len(fast.take(0.001)) == 5


def test_a_full_batch_another_key_or_arrival_during_a_computation_ends_the_wait() -> None:
    def busy(**limits: Any) -> BatchQueue[Waiting]:
        queue = queue_of(max_wait_s=0.001, **limits)
        for count in range(5):
            queue.put(Waiting(), count * 0.0001)
        return queue

    assert len(busy(max_batch_rows=5).take(0.0004)) == 5
    with_another = busy()
    with_another.put(Waiting("b"), 0.0004)
    assert len(with_another.take(0.0004)) == 5
    after_a_batch = busy()
    after_a_batch.computed(0.1, 0.0004)
    assert len(after_a_batch.take(0.0004)) == 5


def test_cancelled_and_expired_shares_are_passed_over_and_told_of() -> None:
    cancelled, expired, alive = Waiting(), Waiting(deadline=1.0), Waiting()
    queue = queue_of(cancelled, expired, alive, now=0.0)
    cancelled.cancelled = True
    assert queue.take(1.0) == [alive]
    assert queue.dropped == [cancelled, expired]
    assert (queue.queued_rows, queue.queued_bytes, len(queue)) == (0, 0, 0)


def test_bytes_beyond_the_budget_are_refused_with_how_long_the_rest_may_take() -> None:
    queue = queue_of(Waiting(num_rows=100, num_bytes=59), Waiting("b"), max_queued_bytes=100, max_batch_rows=40)
    with pytest.raises(Overloaded) as guess:
        queue.put(Waiting(num_bytes=21), 0.0)
    queue.computed(0.05, 0.0)
    with pytest.raises(Overloaded) as measured:
        queue.put(Waiting(num_bytes=21), 0.0)
    queue.put(Waiting(num_bytes=20), 0.0)
    assert guess.value.retry_after_s > 0
    assert measured.value.retry_after_s == pytest.approx(0.2)


def test_rows_that_would_wait_for_longer_than_they_have_are_refused_at_once() -> None:
    queue = queue_of(Waiting(num_rows=100), max_batch_rows=40)
    queue.put(Waiting(deadline=0.01), 0.0)  # nothing is known of how long batches take
    queue.computed(0.05, 0.0)
    with pytest.raises(Overloaded, match=r"would take 0\.188 s here, and have 0\.100 s left") as refused:
        queue.put(Waiting(deadline=0.1), 0.0)
    assert refused.value.retry_after_s == pytest.approx(0.0875)
    queue.put(Waiting(deadline=0.19), 0.0)
    with pytest.raises(Overloaded):
        queue.put(Waiting("b", deadline=0.19), 0.0)  # a batch of its own
    assert len(queue.take(0.0)) == 1
    with pytest.raises(Overloaded):
        queue.put(Waiting(deadline=0.12), 0.0)  # after the batch that is computed now
    queue.put(Waiting(deadline=0.13), 0.0)


def test_rows_that_are_on_their_way_count_until_they_arrive() -> None:
    queue = queue_of(max_batch_rows=10)
    queue.computed(0.1, 0.0)
    coming = [Coming("a", "", 10, 0.3) for _ in range(3)]
    queue.expect(coming[0], 0.0)
    queue.expect(coming[1], 0.0)
    with pytest.raises(Overloaded, match=r"would take 0\.375 s"):
        queue.expect(coming[2], 0.0)
    with pytest.raises(Overloaded, match=r"would take 0\.375 s"):
        queue.put(Waiting(num_rows=10, deadline=0.3), 0.0)
    queue.arrived(coming[0])
    queue.put(Waiting(num_rows=10, deadline=0.3), 0.0)
    with pytest.raises(Overloaded):
        queue.expect(coming[2], 0.0)
    queue.arrived(coming[1])
    queue.expect(coming[2], 0.0)


@pytest.mark.parametrize("standing", [False, True])
def test_a_queue_that_did_not_get_empty_for_a_while_is_kept_to_half_of_what_deadlines_allow(standing: bool) -> None:
    queue = queue_of(max_batch_rows=1)
    queue.computed(0.1, 0.0)
    for step in range(6):  # from one batch to the next as many come as are computed, or one more
        now = 0.1 * step
        for _ in range(2 if standing else 1):
            queue.put(Waiting(deadline=LONG), now)
        assert len(queue.take(now)) == 1
        queue.computed(0.1, now)
    assert bool(len(queue)) is standing
    assert queue.most_s(1.0, 0.6) == (0.5 if standing else 1.0)
    assert queue.most_s(0.3, 0.6) == (0.25 if standing else 0.3)  # the batch that is computed now, and the next
    assert queue.most_s(0.1, 0.6) == 0.1
    while len(queue):
        queue.take(0.6)
    queue.put(Waiting(), 5.0)  # it was empty
    assert queue.most_s(1.0, 5.1) == 1.0


def test_an_idle_rank_takes_everything_however_long_batches_took() -> None:
    queue = queue_of()
    queue.computed(30.0, 0.0)  # the first may have compiled something
    queue.put(Waiting(deadline=0.1), 0.0)
    assert len(queue.take(0.0)) == 1


def test_what_waits_can_be_taken_out_in_the_order_it_came_in() -> None:
    shares = [Waiting(key) for key in "abcab"]
    queue = queue_of(*shares)
    assert queue.drain() == shares
    assert (len(queue), queue.queued_bytes) == (0, 0)


@pytest.mark.parametrize("wrong", [{"max_batch_rows": 0}, {"max_wait_s": -1.0}, {"max_queued_bytes": 0}])
def test_limits_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        BatchLimits(**wrong)


SHARES = st.builds(
    Waiting,
    key=st.sampled_from("abc"),
    num_rows=st.integers(0, 12),
    num_bytes=st.integers(0, 40),
    deadline=st.one_of(st.just(LONG), st.floats(0, 10)),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), SHARES),
        st.tuples(st.just("take"), st.none()),
        st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("pass"), st.floats(0, 1)),
    ),
    max_size=60,
)


@given(STEPS)
def test_whatever_comes_every_share_leaves_once_in_order_and_within_bounds(steps: list[tuple[str, Any]]) -> None:
    limits = BatchLimits(max_batch_rows=10, max_wait_s=0.25, max_queued_bytes=100)
    queue: BatchQueue[Waiting] = BatchQueue(limits)
    now = 0.0
    accepted: list[Waiting] = []
    left: list[Waiting] = []

    def take() -> None:
        oldest = next((share for share in accepted if share not in left and alive(share)), None)
        batch = queue.take(now)
        left.extend(queue.dropped)
        assert all(not alive(share) for share in queue.dropped)
        queue.dropped = []
        if batch:
            assert batch[0] is oldest  # whoever waits longest is never passed over
            assert len({share.key for share in batch}) == 1
            assert all(alive(share) for share in batch)
            assert len(batch) == 1 or sum(share.num_rows for share in batch) <= limits.max_batch_rows
            assert batch == [share for share in accepted if share in batch]
            assert not set(map(id, batch)) & set(map(id, left))
            left.extend(batch)
            queue.computed(0.01 * len(batch), now)
        elif oldest is not None:
            wait_s = queue.wait_s(now)
            assert wait_s is not None
            assert 0 < wait_s <= limits.max_wait_s

    def alive(share: Waiting) -> bool:
        return not share.cancelled and share.deadline > now

    for what, value in steps:
        if what == "put":
            in_time = not 0 < queue.most_s(value.deadline - now, now) < queue.expected_s(value)
            free = limits.max_queued_bytes - queue.queued_bytes - value.num_bytes
            fits = queue.queued_bytes + value.num_bytes <= 4 * free if queue.queued_bytes else free >= 0
            if in_time and fits:
                queue.put(value, now)
                accepted.append(value)
            else:
                with pytest.raises(Overloaded) as refusal:
                    queue.put(value, now)
                assert 0 < refusal.value.retry_after_s <= 5
        elif what == "take":
            take()
        elif what == "cancel" and value < len(accepted):
            accepted[value].cancelled = True
        elif what == "pass":
            now += value
        assert queue.queued_bytes <= limits.max_queued_bytes
    while len(queue):
        now += limits.max_wait_s
        before = len(queue)
        take()
        assert len(queue) < before  # after the longest wait something always goes
    assert sorted(map(id, left)) == sorted(map(id, accepted))
    assert (queue.queued_rows, queue.queued_bytes) == (0, 0)


def by_client(shares: list[Waiting]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for share in shares:
        rows[share.client] = rows.get(share.client, 0) + share.num_rows
    return rows


def test_a_client_that_sends_little_does_not_wait_behind_one_that_sends_much() -> None:
    queue = queue_of(*(Waiting(client="greedy") for _ in range(100)), max_batch_rows=10)
    modest = Waiting(client="modest")
    queue.put(modest, 0.0)
    assert modest in queue.take(0.0)


def test_clients_that_both_want_more_get_the_same_rows_however_many_shares_they_cut_them_into() -> None:
    queue = queue_of(
        *(Waiting(client="many") for _ in range(100)),
        *(Waiting(client="few", num_rows=5) for _ in range(20)),
        max_batch_rows=10,
    )
    assert by_client([share for _ in range(8) for share in queue.take(0.0)]) == {"many": 40, "few": 40}


def test_whoever_was_away_gets_no_more_than_others_for_that() -> None:
    queue = queue_of(*(Waiting(client="a") for _ in range(60)), max_batch_rows=10)
    for _ in range(3):
        queue.take(0.0)
    for _ in range(30):
        queue.put(Waiting(client="b"), 0.0)
    assert by_client([share for _ in range(4) for share in queue.take(0.0)]) == {"a": 20, "b": 20}


def test_a_client_is_told_to_come_later_by_how_much_of_its_own_waits() -> None:
    queue = queue_of(*(Waiting(client="greedy", deadline=1.0) for _ in range(90)), max_batch_rows=10)
    queue.computed(0.1, 0.0)
    with pytest.raises(Overloaded):
        queue.put(Waiting(client="greedy", deadline=1.0), 0.0)
    queue.put(Waiting(client="modest", deadline=0.3), 0.0)


def test_bytes_are_left_for_a_client_that_comes_late() -> None:
    queue = queue_of(*(Waiting(client="greedy", num_bytes=10) for _ in range(80)), max_queued_bytes=1000)
    with pytest.raises(Overloaded, match="800 of them this client's"):
        queue.put(Waiting(client="greedy", num_bytes=10), 0.0)
    queue.put(Waiting(client="modest", num_bytes=100), 0.0)


CLIENTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.booleans()), max_size=80)


@given(CLIENTS)
def test_every_client_s_own_shares_keep_their_order_and_all_leave(steps: list[tuple[str, int, bool]]) -> None:
    queue: BatchQueue[Waiting] = BatchQueue(BatchLimits(max_batch_rows=10, max_wait_s=0))
    put: dict[str, list[Waiting]] = {client: [] for client in "abc"}
    left: dict[str, list[Waiting]] = {client: [] for client in "abc"}

    def take() -> None:
        for share in queue.take(0.0):
            left[share.client].append(share)

    for client, num_rows, taking in steps:
        put[client].append(share := Waiting(client=client, num_rows=num_rows))
        queue.put(share, 0.0)
        if taking:
            take()
    while len(queue):
        take()
    assert left == put
    assert queue.queued_rows == queue.queued_bytes == 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=60), st.lists(st.integers(1, 5), min_size=1, max_size=60))
def test_two_clients_with_rows_waiting_are_never_further_apart_than_a_share_and_a_batch(
    ours: list[int], theirs: list[int]
) -> None:
    queue: BatchQueue[Waiting] = BatchQueue(BatchLimits(max_batch_rows=10, max_wait_s=0))
    for rows in ours:
        queue.put(Waiting(client="ours", num_rows=rows), 0.0)
    for rows in theirs:
        queue.put(Waiting(client="theirs", num_rows=rows), 0.0)
    taken = {"ours": 0, "theirs": 0}
    while taken["ours"] < sum(ours) and taken["theirs"] < sum(theirs):
        assert abs(taken["ours"] - taken["theirs"]) <= 10
        for share in queue.take(0.0):
            taken[share.client] += share.num_rows


def test_what_is_taken_in_is_still_in_time_when_others_send_as_much() -> None:
    queue = queue_of(Waiting(client="b", deadline=1.0), max_batch_rows=10)
    queue.computed(0.1, 0.0)
    accepted = []
    with contextlib.suppress(Overloaded):
        for _ in range(200):
            accepted.append(Waiting(client="a", deadline=1.0))
            queue.put(accepted[-1], 0.0)
    accepted.pop()  # which was refused
    while True:  # and then `b` sends what it can
        try:
            queue.put(Waiting(client="b", deadline=1.0), 0.0)
        except Overloaded:
            break
    now, left = 0.0, 0
    while len(queue):
        now += 0.1
        left += sum(share.client == "a" for share in queue.take(now))
    assert left == len(accepted)
    assert not queue.dropped


def test_a_rank_that_is_not_busy_refuses_nobody_for_what_others_might_send() -> None:
    queue = queue_of(*(Waiting(client=str(number)) for number in range(50)), max_batch_rows=10)
    queue.computed(0.1, 0.0)
    for _ in range(20):  # 70 rows in all, and 0.9 s for them; had every client sent as many, there would be 1,000
        queue.put(Waiting(client="a", deadline=2.5), 0.0)
