"""Which address is tried next, and after which pause."""

from __future__ import annotations

import random

from epmesh.rotation import LONGEST_PAUSE_S, MOST_LEARNED, Rotation


def names(rotation: Rotation, count: int, learned: list[str] | None = None) -> str:
    return "".join(rotation.next(learned or [])[0] for _ in range(count))


def test_given_addresses_are_tried_in_their_order_over_and_over() -> None:
    assert names(Rotation("abc"), 7) == "abcabca"


def test_after_one_that_worked_comes_the_next_and_it_itself_last() -> None:
    rotation = Rotation("abc")
    assert names(rotation, 2) == "ab"
    rotation.worked("b")
    assert names(rotation, 6) == "cabcab"


def test_learned_addresses_come_after_the_given_ones_and_no_given_one_twice() -> None:
    assert names(Rotation("ab"), 6, ["b", "x", "x"]) == "abxabx"


def test_a_learned_address_that_worked_is_followed_by_those_given() -> None:
    rotation = Rotation("ab")
    assert names(rotation, 3, ["x"]) == "abx"
    rotation.worked("x")
    assert names(rotation, 3, ["x"]) == "abx"


def test_of_many_learned_addresses_chance_picks_a_few_every_round() -> None:
    learned = [f"node-{i}" for i in range(1000)]
    rotation = Rotation(["a"], random.Random(7))
    rounds = [[rotation.next(learned)[0] for _ in range(1 + MOST_LEARNED)] for _ in range(3)]
    assert [each[0] for each in rounds] == ["a"] * 3
    assert len({address for each in rounds for address in each[1:]}) > MOST_LEARNED


def test_pauses_come_before_rounds_and_grow_up_to_a_bound() -> None:
    rotation = Rotation("ab")
    assert [rotation.next()[1] for _ in range(8)] == [0, 0, 0.05, 0, 0.1, 0, 0.2, 0]
    for _ in range(10_000):
        rotation.next()
    assert {rotation.next()[1] for _ in range(2)} == {0, LONGEST_PAUSE_S}


def test_once_one_worked_the_next_round_begins_at_once() -> None:
    rotation = Rotation("a")
    assert [rotation.next()[1] for _ in range(3)] == [0, 0.05, 0.1]
    rotation.worked("a")
    assert [rotation.next()[1] for _ in range(3)] == [0, 0.05, 0.1]
