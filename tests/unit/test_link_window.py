"""A link's windows, against a connection that loses, keeps and reorders what is on its way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh_server.ranks.link_window import (
    FRUITLESS_ANSWERS,
    KEEP_BYTES,
    MAX_HELD,
    MAX_RANGES,
    REPORT_BYTES,
    REPORT_EVERY,
    Question,
    ReceiveWindow,
    Report,
    SendWindow,
)


def sent(number: int, window: SendWindow[int] | None = None) -> SendWindow[int]:
    """A window that has sent messages 1 to `number`, each of which is its own number, of 10 bytes."""
    window = window or SendWindow[int]()
    for _ in range(number):
        window.keep(window.number(), 10)
    return window


class Wire:
    """A sender, a receiver, and what is on its way between them: messages as (number, message), and questions."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self.sender = SendWindow[int](keep_bytes)
        self.receiver = ReceiveWindow[int]()
        self.queue: list[tuple[int, int] | Question] = []
        self.reports: list[Report] = []
        self.delivered: list[int] = []
        self.lost: list[int] = []

    def send(self, size: int = 10) -> None:
        number = self.sender.number()
        self.sender.keep(number, size)
        self.queue.append((number, number))

    def arrive(self, index: int = 0) -> None:
        """Something arrives; with an index above 0 it overtakes, as on a new connection beside an old one."""
        item = self.queue.pop(index)
        if isinstance(item, Question):
            lost, messages = self.receiver.skip(item.first_kept)
            self.lost += range(lost[0], lost[1] + 1) if lost else []
            self.delivered += messages
            self.reports.append(self.receiver.report(item))
        else:
            self.delivered += self.receiver.accept(item[0], item[1], 10)
            if self.receiver.report_due:
                self.reports.append(self.receiver.report())

    def answer(self) -> None:
        """One report reaches the sender."""
        mend = self.sender.take(self.reports.pop(0))
        self.queue += [(message, message) for message in mend.again]
        self.queue += [mend.question] if mend.question else []

    def reconnect(self, survives: list[bool]) -> None:
        """The connection breaks, loses some of what is on its way, and all reports; then it is made anew."""
        self.queue = [item for item, stays in zip(self.queue, survives, strict=False) if stays]
        self.reports = []
        question = self.sender.ask()
        self.queue += [question] if question else []

    def settle(self) -> None:
        """Everything arrives."""
        for _ in range(300_000):
            if self.queue:
                self.arrive()
            elif self.reports:
                self.answer()
            else:
                return
        raise AssertionError("the two ends never come to rest")


def test_what_is_acknowledged_is_kept_no_longer() -> None:
    window = sent(5)
    assert (window.first_kept, window.kept_bytes) == (1, 50)
    window.take(Report(3))
    assert (window.first_kept, window.kept_bytes, window.acknowledged) == (4, 20, 3)
    window.take(Report(2))  # an older one, late
    assert (window.first_kept, window.acknowledged) == (4, 3)


def test_a_receipt_for_what_was_never_sent_is_taken_for_all_that_was() -> None:
    window = sent(2)
    window.take(Report(1 << 60))
    assert (window.acknowledged, window.last, window.kept_bytes) == (2, 2, 0)
    assert window.number() == 3


def test_the_budget_bounds_what_is_kept_and_the_oldest_goes_first() -> None:
    window = sent(9, SendWindow[int](keep_bytes=35))
    assert (window.first_kept, window.kept_bytes) == (7, 30)


def test_what_is_larger_than_the_budget_is_not_kept() -> None:
    window = SendWindow[int](keep_bytes=35)
    window.keep(window.number(), 36)
    assert (window.first_kept, window.kept_bytes) == (2, 0)


def test_nothing_is_asked_where_everything_arrived() -> None:
    window = sent(2)
    window.take(Report(2))
    assert window.ask() is None
    assert not window.mending


def test_exactly_what_is_missing_is_sent_again_and_asked_for_until_it_is_there() -> None:
    window = sent(9)
    question = window.ask()
    assert question == Question(1, 1, 9)
    mend = window.take(Report(2, ((3, 4), (8, 9)), 1))
    assert mend.again == [3, 4, 8, 9]
    assert mend.question == Question(2, 3, 9)
    assert window.take(Report(9, (), 2)).again == ()
    assert not window.mending


def test_an_answer_to_an_older_question_mends_nothing() -> None:
    window = sent(3)
    window.ask()
    window.ask()  # the connection broke again
    assert window.take(Report(0, ((1, 3),), 1)).again == ()
    assert window.mending
    assert window.take(Report(0, ((1, 3),), 2)).again == [1, 2, 3]


@pytest.mark.parametrize("missing", [((0, 0),), ((5, 2),), ((9, 1 << 60),), ((1 << 60, 1 << 61),)])
def test_an_answer_that_makes_no_sense_does_no_harm(missing: tuple[tuple[int, int], ...]) -> None:
    window = sent(3)
    window.ask()
    assert list(window.take(Report(0, missing, 1)).again) == []


def test_what_never_arrives_however_often_it_is_sent_is_given_up() -> None:
    window = sent(3)
    question = window.ask()
    for answer in range(1, FRUITLESS_ANSWERS + 1):
        mend = window.take(Report(1, ((2, 2),), answer))
        question = mend.question
        assert (mend.again == [2]) == (answer < FRUITLESS_ANSWERS)
    assert question is not None
    assert question.first_kept == 4  # the receiver will know that 2 is lost
    assert not window.take(Report(3, (), question.number)).question


def test_messages_are_delivered_once_and_in_order() -> None:
    window = ReceiveWindow[str]()
    assert window.accept(1, "a", 1) == ("a",)
    assert window.accept(3, "c", 1) == []
    holes = [window.has_hole]
    assert window.accept(3, "c", 1) == []
    assert window.accept(1, "a", 1) == []
    assert window.accept(2, "b", 1) == ["b", "c"]
    assert [*holes, window.has_hole] == [True, False]
    assert window.duplicates == 2


def test_a_receiver_acknowledges_in_batches() -> None:
    window = ReceiveWindow[int]()
    due = []
    for number in range(1, REPORT_EVERY + 1):
        window.accept(number, number, 1)
        due.append(window.report_due)
    assert due == [False] * (REPORT_EVERY - 1) + [True]
    assert window.report() == Report(REPORT_EVERY)
    due = [window.report_due]
    window.accept(REPORT_EVERY + 1, 0, REPORT_BYTES)
    assert [*due, window.report_due] == [False, True]


def test_a_question_is_answered_with_the_holes_and_what_is_missing_at_the_end() -> None:
    window = ReceiveWindow[int]()
    for number in (1, 3, 4, 7):
        window.accept(number, number, 1)
    assert window.report(Question(5, 1, 9)) == Report(1, ((2, 2), (5, 6), (8, 9)), 5)
    assert window.report(Question(6, 1, 4)) == Report(1, ((2, 2),), 6)


def test_what_the_sender_does_not_keep_is_lost_and_the_rest_delivered() -> None:
    window = ReceiveWindow[int]()
    for number in (1, 3, 6, 7):
        window.accept(number, number, 1)
    assert window.skip(2) == (None, ())
    assert window.skip(6) == ((2, 5), [3, 6, 7])
    assert window.expected == 8
    assert window.skip(6) == (None, ())


def test_a_number_far_ahead_costs_nothing() -> None:
    window = ReceiveWindow[int]()
    assert window.skip(1 << 63) == ((1, (1 << 63) - 1), [])
    window = ReceiveWindow[int]()
    window.accept(1 << 63, 1, 1)
    assert window.report(Question(1, 1, 1 << 63)).missing == ((1, (1 << 63) - 1),)


def test_what_waits_behind_a_hole_is_bounded_and_mended_all_the_same() -> None:
    wire = Wire()
    for _ in range(MAX_HELD + 10):
        wire.send()
    wire.queue.pop(0)
    wire.reconnect([True] * len(wire.queue))
    wire.settle()
    assert wire.delivered == list(range(1, MAX_HELD + 11))
    assert wire.lost == []


def test_more_holes_than_fit_an_answer_are_mended_in_rounds() -> None:
    wire = Wire()
    number = 2 * MAX_RANGES + 20
    for _ in range(number):
        wire.send()
    wire.reconnect([bool(index % 2) for index in range(number)])
    wire.settle()
    assert wire.delivered == list(range(1, number + 1))


@pytest.mark.parametrize("lost", [[0], [4], [0, 1, 2, 3, 4]])
def test_the_last_message_of_all_is_mended_like_any_other(lost: list[int]) -> None:
    wire = Wire()
    for _ in range(5):
        wire.send()
    wire.reconnect([index not in lost for index in range(5)])
    wire.settle()
    assert wire.delivered == [1, 2, 3, 4, 5]


@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 300), cuts=st.floats(0, 0.3), overtakes=st.booleans())
def test_whatever_breaks_every_message_is_delivered_once_and_in_order(
    seed: int, steps: int, cuts: float, overtakes: bool
) -> None:
    chance, wire = random.Random(seed), Wire()
    for _ in range(steps):
        if chance.random() < cuts:
            wire.reconnect([chance.random() < 0.5 for _ in wire.queue])
        elif wire.queue and chance.random() < 0.5:
            wire.arrive(chance.randrange(min(3, len(wire.queue))) if overtakes else 0)
        elif wire.reports and chance.random() < 0.5:
            wire.answer()
        else:
            wire.send()
    wire.reconnect([True] * len(wire.queue))
    wire.settle()
    assert wire.delivered == list(range(1, wire.sender.last + 1))
    assert wire.lost == []
    assert not wire.sender.mending


@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 200), keep=st.integers(0, 60))
def test_with_a_small_budget_each_message_is_delivered_in_order_or_told_as_lost(
    seed: int, steps: int, keep: int
) -> None:
    chance, wire = random.Random(seed), Wire(keep)
    for _ in range(steps):
        if chance.random() < 0.1:
            wire.reconnect([chance.random() < 0.5 for _ in wire.queue])
        elif wire.queue and chance.random() < 0.5:
            wire.arrive()
        elif wire.reports and chance.random() < 0.5:
            wire.answer()
        else:
            wire.send()
        assert wire.sender.kept_bytes <= keep
    wire.reconnect([True] * len(wire.queue))
    wire.settle()
    assert wire.delivered == sorted(set(wire.delivered))
    assert set(wire.delivered) | set(wire.lost) == set(range(1, wire.sender.last + 1))
