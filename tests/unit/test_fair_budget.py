"""A budget that clients share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from epmesh_server.fair_budget import SHARE, FairBudget


def take_all(budget: FairBudget, *clients: str) -> dict[str, int]:
    """What each gets where all of them take one unit after another for as long as they get any."""
    while any(budget.fits(client, 1) for client in clients):
        for client in clients:
            if budget.fits(client, 1):
                budget.hold(client, 1)
    return {client: budget.held_by(client) for client in clients}


def test_one_client_leaves_a_fifth_for_whoever_comes() -> None:
    budget = FairBudget(1000)
    assert take_all(budget, "greedy") == {"greedy": 800}
    assert budget.fits("late", 200)
    assert not budget.fits("late", 201)


def test_clients_that_want_all_they_can_get_hold_the_same() -> None:
    held = take_all(FairBudget(1300), "a", "b", "c")
    assert max(held.values()) - min(held.values()) <= 1
    assert sum(held.values()) == 1300 * 3 * SHARE // (1 + 3 * SHARE)


def test_whoever_holds_nothing_may_have_all_that_is_free() -> None:
    budget = FairBudget(1000)
    assert budget.fits("only", 1000)
    assert not budget.fits("only", 1001)


def test_what_is_given_back_is_there_for_others() -> None:
    budget = FairBudget(100)
    budget.hold("a", 100)
    assert not budget.fits("b", 1)
    budget.release("a", 100)
    assert budget.fits("b", 100)
    assert budget.held == budget.held_by("a") == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 400), st.booleans()), max_size=100))
def test_no_more_than_the_limit_is_held_and_a_newcomer_finds_room(steps: list[tuple[str, int, bool]]) -> None:
    budget, held = FairBudget(1000), dict.fromkeys("abcd", 0)
    for client, units, giving_back in steps:
        if giving_back:
            budget.release(client, held[client])
            held[client] = 0
        elif budget.fits(client, units):
            first = not held[client]
            budget.hold(client, units)
            held[client] += units
            assert first or budget.fits("newcomer", held[client] // SHARE)
        assert budget.held == sum(held.values()) <= budget.limit
        assert all(budget.held_by(each) == units for each, units in held.items())
