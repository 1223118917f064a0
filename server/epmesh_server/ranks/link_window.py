"""What the two ends of a link know of its messages: what to keep, acknowledge, send again, deliver, drop. Pure.

A sender has a `SendWindow` for each (receiver, epoch), a receiver a `ReceiveWindow` for each (source, incarnation,
epoch). Messages are numbered from 1. A connection loses messages only when it breaks, so a sender asks after every
reconnect what arrived (`SendWindow.ask`); the receiver answers with what is missing (`ReceiveWindow.report`), which is
sent again, until nothing is missing. What the sender no longer keeps is lost for good, and the receiver learns that
from the next question (`ReceiveWindow.skip`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

KEEP_BYTES = 256 << 20
REPORT_EVERY, REPORT_BYTES = 64, 4 << 20  # how much a receiver takes in before it acknowledges
READ_EVERY, READ_BYTES = 16, 1 << 20  # how much a sender sends, or keeps, before it looks for acknowledgements
MAX_HELD, MAX_HELD_BYTES = 1 << 16, 1 << 30  # what waits behind a hole; more is dropped, and asked for again
MAX_RANGES = 256
FRUITLESS_ANSWERS = 5

_T = TypeVar("_T")
Range = tuple[int, int]  # lowest and highest number


@dataclass(frozen=True)
class Question:
    """What a sender asks after a reconnect.

    Attributes:
        number: of the question, from 1.
        first_kept: oldest message that can be sent again; ``last + 1`` where there is none.
        last: newest message that was sent.
    """

    number: int
    first_kept: int
    last: int


@dataclass(frozen=True)
class Report:
    """What a receiver says of a sender's messages.

    Attributes:
        acknowledged: all up to this one arrived.
        missing: what else did not arrive, up to the question's `last`; ascending, at most `MAX_RANGES`.
        answers: the question's number; 0 where nobody asked.
    """

    acknowledged: int
    missing: tuple[Range, ...] = ()
    answers: int = 0


@dataclass(frozen=True)
class Mend(Generic[_T]):
    """What a sender does about a report: sends messages again, then asks again."""

    again: Sequence[_T] = ()
    question: Question | None = None


class SendWindow(Generic[_T]):
    """The messages from one sender to one receiver in one epoch."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        """Starts before message 1; keeps at most `keep_bytes` of what is not acknowledged, the newest."""
        self.last = 0
        self.acknowledged = 0
        self.kept_bytes = 0
        self._keep_bytes = keep_bytes
        self._kept: deque[tuple[_T, int]] = deque()  # messages `first_kept` to `last`, with their sizes
        self._asked = 0
        self._open = False  # whether question `_asked` waits for its answer
        self._fruitless: deque[Report] = deque(maxlen=FRUITLESS_ANSWERS)

    @property
    def first_kept(self) -> int:
        """The oldest message that can be sent again."""
        return self.last + 1 - len(self._kept)

    @property
    def mending(self) -> bool:
        """Whether an answer is awaited."""
        return self._open

    @property
    def wants_reports(self) -> bool:
        """Whether it is time to look for acknowledgements."""
        return self._open or self.kept_bytes > READ_BYTES or not self.last % READ_EVERY

    def number(self) -> int:
        """The number of the next message, which `keep` must be called for."""
        self.last += 1
        return self.last

    def keep(self, message: _T, size: int) -> None:
        """Keeps message `last`, of `size` bytes, until it is acknowledged."""
        self._kept.append((message, size))
        self.kept_bytes += size
        while self.kept_bytes > self._keep_bytes:
            self._drop_oldest()

    def ask(self) -> Question | None:
        """After a reconnect: the question to send; `None` where everything is acknowledged."""
        self._fruitless.clear()
        return self._next_question() if self.acknowledged < self.last else None

    def take(self, report: Report) -> Mend[_T]:
        """What to do about a report."""
        self._acknowledge(min(report.acknowledged, self.last))
        if not self._open or report.answers != self._asked:
            return Mend()
        self._open = bool(report.missing)
        if not self._open:
            return Mend()
        if self._is_fruitless(report):
            self._forget_all()
        return Mend(self._messages(report.missing), self._next_question())

    def _next_question(self) -> Question:
        self._asked += 1
        self._open = True
        return Question(self._asked, self.first_kept, self.last)

    def _acknowledge(self, number: int) -> None:
        self.acknowledged = max(self.acknowledged, number)
        while self._kept and self.first_kept <= number:
            self._drop_oldest()

    def _is_fruitless(self, report: Report) -> bool:
        """Whether the same was missing again and again, although it was sent in between."""
        self._fruitless.append(report)
        seen = {(each.acknowledged, each.missing) for each in self._fruitless}
        return len(self._fruitless) == FRUITLESS_ANSWERS and len(seen) == 1

    def _messages(self, missing: Iterable[Range]) -> list[_T]:
        base, end = self.first_kept, self.last + 1
        found: list[_T] = []
        for first, last in missing:
            wanted = itertools.islice(self._kept, max(first, base) - base, max(min(last + 1, end), base) - base)
            found.extend(message for message, _ in wanted)
        return found

    def _forget_all(self) -> None:
        self._kept.clear()
        self.kept_bytes = 0

    def _drop_oldest(self) -> None:
        _, size = self._kept.popleft()
        self.kept_bytes -= size


class Held:
    """What waits behind holes, in all windows of one receiver.

    Attributes:
        messages, num_bytes: at most `MAX_HELD` of `MAX_HELD_BYTES`.
    """

    def __init__(self) -> None:
        self.messages = self.num_bytes = 0

    def take(self, size: int) -> bool:
        """Counts one more of `size` bytes, if there is room for it."""
        if self.messages >= MAX_HELD or self.num_bytes + size > MAX_HELD_BYTES:
            return False
        self.messages += 1
        self.num_bytes += size
        return True

    def give_back(self, sizes: Iterable[int]) -> None:
        """Those of `sizes` wait no more."""
        for size in sizes:
            self.messages -= 1
            self.num_bytes -= size


class ReceiveWindow(Generic[_T]):
    """The messages of one sender to this receiver in one epoch: delivered once each, in order."""

    def __init__(self, held: Held | None = None) -> None:
        """Starts before message 1; `held` is shared with the receiver's other windows."""
        self.expected = 1  # everything below was delivered, or skipped
        self.duplicates = 0
        self._held: dict[int, tuple[_T, int]] = {}  # behind a hole: message and size, by number
        self._budget = held if held is not None else Held()
        self._unreported = self._unreported_bytes = 0

    @property
    def has_hole(self) -> bool:
        """Whether messages wait for one that has not come."""
        return bool(self._held)

    @property
    def report_due(self) -> bool:
        """Whether enough came in to acknowledge it."""
        return self._unreported >= REPORT_EVERY or self._unreported_bytes >= REPORT_BYTES

    def accept(self, number: int, message: _T, size: int) -> Sequence[_T]:
        """Takes a message in; returns what can be delivered now, in order."""
        if number == self.expected and not self._held:
            self._count(size)
            return (message,)
        if number < self.expected or number in self._held:
            self.duplicates += 1
        elif number == self.expected:
            self._count(size)
            return [message, *self._released()]
        elif self._budget.take(size):
            self._held[number] = (message, size)
        return self._released()

    def close(self) -> None:
        """Drops what waits behind a hole."""
        self._budget.give_back(size for _, size in self._held.values())
        self._held.clear()

    def skip(self, first_kept: int) -> tuple[Range | None, Sequence[_T]]:
        """Gives up on what the sender no longer keeps.

        Returns:
            The numbers from the first to the last message that is lost, or `None`; and what can be delivered now.
        """
        lost = [number for numbers in self._missing(first_kept - 1) for number in numbers]
        if not lost:
            return None, ()
        skipped = [self._pop(number) for number in sorted(self._held) if number < first_kept]
        self.expected = first_kept
        return (lost[0], lost[-1]), [*skipped, *self._released()]

    def report(self, question: Question | None = None) -> Report:
        """What to tell the sender; in answer to its question, or unasked."""
        self._unreported = self._unreported_bytes = 0
        if question is None:
            return Report(self.expected - 1)
        missing = tuple(itertools.islice(self._missing(question.last), MAX_RANGES))
        return Report(self.expected - 1, missing, question.number)

    def _missing(self, last: int) -> Iterator[Range]:
        at = self.expected
        for number in sorted(self._held):
            if number > last:
                break
            if number > at:
                yield at, number - 1
            at = number + 1
        if at <= last:
            yield at, last

    def _released(self) -> Sequence[_T]:
        ready: list[_T] = []
        while self.expected in self._held:
            self._count(self._held[self.expected][1])
            ready.append(self._pop(self.expected - 1))
        return ready

    def _pop(self, number: int) -> _T:
        message, size = self._held.pop(number)
        self._budget.give_back([size])
        return message

    def _count(self, size: int) -> None:
        self.expected += 1
        self._unreported += 1
        self._unreported_bytes += size
