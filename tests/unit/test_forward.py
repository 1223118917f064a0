"""One forward as a state machine: whatever fails on the way, every id is computed once, or the error is typed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.arrays import Rows
from epmesh.errors import (
    DeadlineExceeded,
    EpmeshError,
    ExpertUnavailable,
    InvalidRequest,
    MeshUnavailable,
    NotReady,
    Overloaded,
    PeerLost,
    StaleEpoch,
)
from epmesh.forward import CONFIRM_S, Forward, NodeCall, Tokens
from epmesh.routes import ELSEWHERE, Routes
from epmesh.row_transport import call_parts
from epmesh.view import View
from tests.unit.router_fakes import STRIDE, expected, make_view, node_sums

EVERYWHERE = {0: range(8), 1: range(8), 4: range(8), 5: range(8)}  # two nodes of two ranks, all experts on each
SPLIT = {0: (0, 1), 1: (2, 3), 4: (4, 5), 5: (6, 7)}


def make_tokens(num_tokens: int = 6, num_topk: int = 3, num_experts: int = 8, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-8, 8, (num_tokens, 4)).astype(np.float32)
    weights = rng.integers(1, 4, (num_tokens, num_topk)).astype(np.float32)
    ids = rng.integers(-1, num_experts, (num_tokens, num_topk))
    return Tokens(Rows.of(hidden), Rows.of(weights), ids)


def array(rows: Rows) -> npt.NDArray[Any]:
    return rows.data.reshape(-1).view(np.dtype(rows.dtype)).reshape(len(rows), rows.width)


def right(tokens: Tokens) -> npt.NDArray[Any]:
    return expected(array(tokens.hidden), array(tokens.weights), tokens.ids)


def plan(forward: Forward, view: View, now: float = 0.0, turn: int = 0, *, follows: bool = True) -> list[NodeCall]:
    forward.follow(view)
    return forward.plan(Routes(view), turn, lambda ranks: ranks[0], now, follows=follows)


def answer(forward: Forward, *calls: NodeCall) -> None:
    for call in calls:
        forward.succeed(call.number, node_sums(call_parts(call, forward.tokens)))


def check_right(forward: Forward) -> None:
    assert forward.done
    assert np.array_equal(array(forward.result()), right(forward.tokens))


def test_a_row_goes_once_to_each_node_and_every_id_to_one_rank() -> None:
    forward = Forward(make_tokens())
    calls = plan(forward, make_view(1, SPLIT))
    assert [call.part.node.slot for call in calls] == [0, 1]
    for call in calls:
        assert list(call.part.rows) == sorted(set(call.part.rows))
        for row, column in np.ndindex(*call.part.targets.shape):
            expert, target = forward.tokens.ids[call.part.rows[row], column], call.part.targets[row, column]
            held = target != ELSEWHERE and expert in SPLIT[call.part.ranks[target].rank]
            assert held == (expert // 4 == call.part.node.slot and expert >= 0)
    answer(forward, *calls)
    check_right(forward)


def test_only_ranks_that_serve_and_have_a_front_get_rows() -> None:
    forward = Forward(make_tokens())
    calls = plan(forward, make_view(1, EVERYWHERE, exchange=(0, 4, 5)))
    assert [info.rank for call in calls for info in call.part.ranks] == [1]


def test_a_lost_rank_is_not_noticed_where_replicas_are_left() -> None:
    forward = Forward(make_tokens())
    view = make_view(1, EVERYWHERE)
    first, second = plan(forward, view)
    answer(forward, first)
    forward.fail(second.number, PeerLost([second.entry.rank], 0), 0.0)
    calls = plan(forward, view)
    assert calls
    assert second.entry.rank not in {info.rank for call in calls for info in call.part.ranks}
    answer(forward, *calls)
    check_right(forward)
    assert forward.retries == 1


def test_a_late_answer_of_a_failed_call_is_dropped() -> None:
    forward = Forward(make_tokens())
    view = make_view(1, EVERYWHERE)
    calls = plan(forward, view)
    forward.fail(calls[0].number, PeerLost([calls[0].entry.rank], 0), 0.0)
    again = plan(forward, view)
    answer(forward, calls[0], *again, *calls)
    check_right(forward)


def test_the_only_holder_seems_lost_and_the_next_view_says_so() -> None:
    forward = Forward(make_tokens())
    view = make_view(1, SPLIT)
    _, second = plan(forward, view)
    forward.fail(second.number, PeerLost([4], 0), 10.0)
    assert plan(forward, view, 10.0) == []
    assert not forward.done
    assert forward.wake_at == 10.0 + CONFIRM_S
    assert plan(forward, make_view(2, SPLIT, alive=(0, 1, 5)), 10.2) == []
    with pytest.raises(ExpertUnavailable) as caught:
        forward.result()
    assert set(caught.value.experts) <= {4, 5}


def test_a_connection_that_broke_without_a_death_is_made_once_more() -> None:
    forward = Forward(make_tokens())
    view = make_view(1, SPLIT)
    first, second = plan(forward, view)
    answer(forward, first)
    forward.fail(second.number, PeerLost([4], 0), 10.0)
    assert plan(forward, view, 10.0) == []
    (again,) = plan(forward, view, 10.0 + CONFIRM_S)
    answer(forward, again)
    check_right(forward)


def lost_twice(follows: bool) -> tuple[Forward, View]:
    """A forward that lost its rank 4 at 10.0 and 11.5, and planned then."""
    forward = Forward(make_tokens())
    view = make_view(1, SPLIT)
    first, second = plan(forward, view)
    answer(forward, first)
    forward.fail(second.number, PeerLost([4], 0), 10.0)
    plan(forward, view, 10.0, follows=follows)
    (again,) = plan(forward, view, 10.0 + CONFIRM_S, follows=follows)
    forward.fail(again.number, PeerLost([4], 0), 11.5)
    assert plan(forward, view, 11.5, follows=follows) == []
    return forward, view


def test_a_holder_that_is_lost_twice_is_gone() -> None:
    forward, _ = lost_twice(follows=True)
    with pytest.raises(ExpertUnavailable):
        forward.result()


def test_while_nobody_tells_of_views_a_holder_is_asked_again_and_again() -> None:
    forward, view = lost_twice(follows=False)
    assert not forward.done
    assert forward.wake_at == 11.5 + CONFIRM_S
    (again,) = plan(forward, view, 11.5 + CONFIRM_S, follows=False)
    forward.fail(again.number, PeerLost([4], 0), 13.0)
    assert plan(forward, view, 13.0, follows=False) == []
    (again,) = plan(forward, view, 13.0 + CONFIRM_S)
    answer(forward, again)
    check_right(forward)


def test_the_view_that_comes_after_a_silence_says_who_is_gone() -> None:
    forward, _ = lost_twice(follows=False)
    restarted = make_view(3, SPLIT, incarnations={4: 2})
    answer(forward, *plan(forward, restarted, 11.6))
    check_right(forward)
    forward, _ = lost_twice(follows=False)
    assert plan(forward, make_view(3, SPLIT, alive=(0, 1, 5)), 11.6) == []
    with pytest.raises(ExpertUnavailable):
        forward.result()


def test_a_restarted_rank_is_asked_at_once() -> None:
    forward = Forward(make_tokens())
    first, second = plan(forward, make_view(1, SPLIT))
    answer(forward, first)
    forward.fail(second.number, PeerLost([4], 0), 0.0)
    (again,) = plan(forward, make_view(2, SPLIT, incarnations={4: 2}), 0.1)
    answer(forward, again)
    check_right(forward)


def test_an_expert_that_nobody_holds_is_unavailable_at_once() -> None:
    forward = Forward(make_tokens())
    assert plan(forward, make_view(1, SPLIT, alive=(0, 1, 4))) == []
    with pytest.raises(ExpertUnavailable) as caught:
        forward.result()
    assert set(caught.value.experts) <= {6, 7}


def test_a_refused_epoch_is_planned_anew_by_a_newer_view() -> None:
    forward = Forward(make_tokens())
    view = make_view(4, SPLIT)
    first, second = plan(forward, view)
    answer(forward, first)
    forward.fail(second.number, StaleEpoch(6), 0.0)
    assert plan(forward, make_view(5, SPLIT)) == []
    assert forward.wake_at == math.inf
    calls = plan(forward, make_view(6, {**SPLIT, 4: (), 1: (2, 3, 4, 5)}))
    assert {info.rank for call in calls for info in call.part.ranks} <= {1, 5}
    answer(forward, *calls)
    check_right(forward)


@pytest.mark.parametrize(
    "refusal", [StaleEpoch(0), StaleEpoch(3), NotReady("not yet"), MeshUnavailable("the rank is leaving")]
)
def test_a_rank_that_is_behind_or_leaving_is_avoided_and_asked_again_soon(refusal: EpmeshError) -> None:
    forward = Forward(make_tokens())
    view = make_view(4, SPLIT)
    first, second = plan(forward, view)
    answer(forward, first)
    for now in (0.0, 1.0, 2.0):
        forward.fail(second.number, refusal, now)
        assert plan(forward, view, now) == []
        assert now < forward.wake_at < now + 0.2
        (second,) = plan(forward, view, forward.wake_at)
    answer(forward, second)
    check_right(forward)


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("no"), Overloaded(0.1), DeadlineExceeded(4), ExpertUnavailable([3]), EpmeshError("experts raised")],
)
def test_other_errors_are_the_callers(error: EpmeshError) -> None:
    forward = Forward(make_tokens())
    first, second = plan(forward, make_view(1, EVERYWHERE))
    forward.fail(first.number, error, 0.0)
    assert forward.done
    answer(forward, second)
    with pytest.raises(type(error)) as caught:
        forward.result()
    assert caught.value is error


def test_calls_to_ranks_that_a_new_view_has_no_more_are_given_up() -> None:
    forward = Forward(make_tokens())
    first, second = plan(forward, make_view(1, EVERYWHERE))
    later = make_view(2, EVERYWHERE, alive=(0, 1, 5))
    assert forward.follow(later) == [second.number]
    answer(forward, first, *plan(forward, later))
    check_right(forward)


def test_another_meshs_epochs_count_anew() -> None:
    forward = Forward(make_tokens())
    _, second = plan(forward, make_view(4, SPLIT))
    forward.fail(second.number, StaleEpoch(9), 0.0)
    assert plan(forward, make_view(5, SPLIT)) == []
    assert plan(forward, make_view(1, SPLIT, mesh_id="other"))


def test_more_ranks_than_targets_can_name_get_several_calls() -> None:
    experts_of = {rank: (rank,) for rank in range(300)}
    view = make_view(1, experts_of, num_experts=300, stride=512)
    rng = np.random.default_rng(0)
    tokens = Tokens(
        Rows.of(np.ones((200, 2), np.float32)), Rows.of(np.ones((200, 4), np.float32)), rng.integers(-1, 300, (200, 4))
    )
    forward = Forward(tokens)
    calls = plan(forward, view)
    assert len(calls) > 2
    assert all(len(call.part.ranks) <= ELSEWHERE for call in calls)
    answer(forward, *calls)
    check_right(forward)


def test_shunned_ranks_get_rows_only_where_no_other_holds_the_expert() -> None:
    view = make_view(1, {0: (0, 1), 1: (1, 2)}, num_experts=3)
    one = Rows.of(np.ones((4, 1), np.float32))
    for ids, ranks in (([[1]] * 4, [0]), ([[2]] * 4, [1])):
        forward = Forward(Tokens(one, one, np.array(ids)))
        forward.follow(view)
        (call,) = forward.plan(Routes(view), 0, lambda ranks: ranks[0], 0.0, {(1, 1)})
        assert [info.rank for info in call.part.ranks] == ranks


def test_answers_that_do_not_fit_fail_the_forward() -> None:
    forward = Forward(make_tokens())
    first, _ = plan(forward, make_view(1, SPLIT))
    forward.succeed(first.number, Rows.of(np.zeros((1, 4), np.float32)))
    with pytest.raises(EpmeshError, match=r"rank 0 answered 1 rows for \d"):
        forward.result()


def test_fp8_results_cannot_be_summed() -> None:
    forward = Forward(make_tokens())
    first, _ = plan(forward, make_view(1, SPLIT))
    rows = len(first.part.rows)
    forward.succeed(first.number, Rows("float8_e4m3fn", 4, np.zeros((rows, 4), np.uint8)))
    with pytest.raises(InvalidRequest, match="float8_e4m3fn, which cannot be summed"):
        forward.result()


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (5, 0)])
def test_no_ids_are_zeros_without_a_call(shape: tuple[int, int]) -> None:
    hidden = np.ones((shape[0], 4), np.float16)
    tokens = Tokens(Rows.of(hidden), Rows.of(np.ones(shape, np.float32)), np.full(shape, -1))
    forward = Forward(tokens)
    assert forward.done
    assert np.array_equal(array(forward.result()), np.zeros_like(hidden))


# Any failures ------------------------------------------------------------------------------------------------------

RANKS = (0, 1, 4, 5, 8)


@st.composite
def placements(draw: st.DrawFn) -> dict[int, tuple[int, ...]]:
    holders = [draw(st.sets(st.sampled_from(RANKS), min_size=1, max_size=3)) for _ in range(4)]
    return {rank: tuple(e for e in range(4) if rank in holders[e]) for rank in RANKS}


class Trial:
    """A forward, a mesh around it, and whatever happens to both."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.experts_of = data.draw(placements())
        self.forward = Forward(make_tokens(5, 2, 4, seed=data.draw(st.integers(0, 1 << 16))))
        self.alive, self.now, self.epoch = set(RANKS), 0.0, 1
        self.calls: list[NodeCall] = []
        self.given_up: list[NodeCall] = []
        self.plan()

    @property
    def view(self) -> View:
        return make_view(self.epoch, self.experts_of, num_experts=4, alive=self.alive)

    def plan(self) -> None:
        turn = self.data.draw(st.integers(0, 3))
        self.calls += self.forward.plan(Routes(self.view), turn, lambda ranks: ranks[-1], self.now)

    def answer_one(self) -> None:
        if self.calls:
            answer(self.forward, self.calls.pop(self.data.draw(st.integers(0, len(self.calls) - 1))))

    def fail_one(self) -> None:
        if not self.calls:
            return
        call = self.calls.pop(self.data.draw(st.integers(0, len(self.calls) - 1)))
        lost = PeerLost(self.data.draw(st.sets(st.sampled_from(RANKS), max_size=2)), 0)
        errors = st.sampled_from((lost, StaleEpoch(self.epoch + 1), StaleEpoch(0), MeshUnavailable("leaving")))
        self.forward.fail(call.number, self.data.draw(errors), self.now)
        self.given_up.append(call)

    def answer_late(self) -> None:
        if self.given_up:
            answer(self.forward, self.data.draw(st.sampled_from(self.given_up)))

    def wait(self) -> None:
        self.now += 0.4

    def commit(self) -> None:
        self.epoch += 1
        if len(self.alive) > 1:
            self.alive -= self.data.draw(st.sets(st.sampled_from(RANKS), max_size=1))
        gone = set(self.forward.follow(self.view))
        self.given_up += [call for call in self.calls if call.number in gone]
        self.calls = [call for call in self.calls if call.number not in gone]

    def go_well(self) -> None:
        """From here on all is answered."""
        for _ in range(20):
            if self.forward.done:
                return
            answer(self.forward, *self.calls)
            self.now, self.epoch, self.calls = self.now + 2 * CONFIRM_S, self.epoch + 1, []
            self.plan()


@given(st.data())
def test_every_id_is_computed_once_or_the_error_is_typed(data: st.DataObject) -> None:
    trial = Trial(data)
    steps = st.lists(st.sampled_from(("answer_one", "fail_one", "answer_late", "wait", "commit")), max_size=20)
    for step in data.draw(steps):
        getattr(trial, step)()
        trial.plan()
        if trial.forward.done:
            break
    trial.go_well()
    assert trial.forward.done
    try:
        trial.forward.result()
    except ExpertUnavailable as error:
        for expert in error.experts:  # not one of its holders is without a blemish
            holders = [rank for rank in RANKS if expert in trial.experts_of[rank]]
            assert trial.forward.retries or not trial.alive.issuperset(holders)
    else:
        check_right(trial.forward)


@given(st.data())
def test_no_error_as_long_as_every_expert_has_a_living_replica(data: st.DataObject) -> None:
    survivors: list[int] = data.draw(st.sampled_from([[0, 1], [4, 5], [0, 5, 8]]))
    held = st.sets(st.integers(0, 3))
    experts_of = {rank: set(range(4)) if rank in survivors else data.draw(held) for rank in RANKS}
    forward = Forward(make_tokens(5, 2, 4, seed=data.draw(st.integers(0, 1 << 16))))
    view = make_view(1, experts_of, num_experts=4)
    calls = plan(forward, view)
    for step in range(40):
        if forward.done:
            break
        for call in calls:
            dead = [info.rank for info in call.part.ranks if info.rank not in survivors]
            if dead and bool(data.draw(st.booleans())):
                forward.fail(call.number, PeerLost(dead, 0), 0.01 * step)
            else:
                answer(forward, call)
        calls = plan(forward, view, 0.01 * step)
    check_right(forward)


def test_ranks_are_numbered_by_the_stride_of_the_view() -> None:
    assert make_view(1, SPLIT).slot_of(5) == 5 // STRIDE == 1
