"""Which of the shares that wait go into the next call of the experts. Pure: no clock, no thread, no tensor.

Shares that can be computed together have the same key. The first in turn decides which key is next; others with its
key ride along, up to a number of rows. Turns go round the clients by rows, by start-time fair queuing (Goyal, Vin and
Cheng, 1996): a client's own shares keep their order, none waits for ever, and a client that sends more than it can be
given waits behind itself alone.

Whoever would be computed too late is refused. A queue may be as long as deadlines allow, which is what a burst needs;
but where it has not been empty for a while, more is offered than can be done, and its length gains nothing: then it is
kept to half of that, so that a stall makes nothing late. The distinction is CoDel's (Nichols and Jacobson, "Controlling
queue delay", 2012), used for admission as in Maurer, "Fail at scale", 2015.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from epmesh.errors import InvalidRequest, Overloaded
from epmesh_server.fair_budget import FairBudget

_SMOOTHING, _SMOOTHING_DOWN = 0.2, 0.5  # weight of the newest measurement
_LONGEST_GAP = 4.0  # times max_wait_s: a long pause must not outweigh the burst that comes after it
_SLACK = 1.25  # a queue that is filled up to the deadline would have every stall make everything late
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.001, 5.0
_MAY_COME = 2  # of what waits, at most: so a rank that is not busy refuses nobody for what others might send
_STANDING_S, _STANDING_BATCHES = 0.1, 4  # a queue that was not empty for longer than this, and so many batches, stands
_STANDING_PART = 0.5  # of its time that a share may wait in a queue that stands
_STARTS_KEPT = 64
_FIRST_RETRY_S = 0.05  # where nothing was measured yet


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """What bounds a batch and the queue before it.

    Attributes:
        max_batch_rows: most rows of one call; a single share may have more.
        max_wait_s: longest time a share waits for others while nothing is computed.
        max_queued_bytes: most bytes of shares that wait; beyond, or beyond a client's part of it, `Overloaded`.

    Raises:
        InvalidRequest: a value is out of range.
    """

    max_batch_rows: int = 4096
    max_wait_s: float = 0.0005
    max_queued_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if self.max_batch_rows < 1 or self.max_queued_bytes < 1:
            raise InvalidRequest(
                f"max_batch_rows={self.max_batch_rows}, max_queued_bytes={self.max_queued_bytes}; "
                "both must be 1 or more"
            )
        if not 0 <= self.max_wait_s <= 1:
            raise InvalidRequest(f"max_wait_s is {self.max_wait_s}; it must be 0 to 1")


class Share(Protocol):
    """What the queue asks of a share of rows."""

    @property
    def key(self) -> Hashable:
        """Shares with equal keys can be computed together."""

    @property
    def client(self) -> Hashable:
        """Whose it is; clients take turns."""

    @property
    def num_rows(self) -> int:
        """Its rows."""

    @property
    def num_bytes(self) -> int:
        """What it counts for in the queue's budget."""

    @property
    def deadline(self) -> float:
        """When nobody waits for it any more, by the clock that the queue is told."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""


@dataclass(frozen=True)
class Coming:
    """Rows that will be a share, as far as can be told before they are looked at."""

    key: Hashable
    client: Hashable
    num_rows: int
    deadline: float


_S = TypeVar("_S", bound=Share)


@dataclass(order=True)
class _Waiting(Generic[_S]):
    """A share that waits, in the order of turns."""

    start: int  # in rows, of the queue's virtual time
    number: int
    share: _S = field(compare=False)


@dataclass(eq=False)
class _Line(Generic[_S]):
    """Shares of one key, a heap; when the first of them came, and their rows."""

    since: float
    shares: list[_Waiting[_S]] = field(default_factory=list)
    num_rows: int = 0


class BatchQueue(Generic[_S]):
    """Shares that wait for the experts. Times are of one clock, in seconds, and never fall; one thread at a time.

    Attributes:
        queued_rows: of what waits, the dead included until they are met.
        dropped: shares that were cancelled or too old when their turn came; whoever takes batches empties it.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.queued_rows = 0
        self.dropped: list[_S] = []
        self._limits = limits
        self._budget = FairBudget(limits.max_queued_bytes)
        self._rows: Counter[Hashable] = Counter()  # of what waits or is coming, by client
        self._rows_of: dict[Hashable, Counter[Hashable]] = {}  # the same by key, then by client; none is empty
        self._now_serving = 0  # virtual time: the start of the share that was taken last
        self._next_start: dict[Hashable, int] = {}  # of a client's next share, where that is not the virtual time
        self._waiting: dict[Hashable, _Line[_S]] = {}  # by key; none is empty
        self._empty_at = float("-inf")  # when nothing waited last
        self._arrivals = 0
        self._last_arrival = 0.0
        self._gap_s = float("inf")  # mean time between arrivals
        self._computed_until = float("-inf")
        self._computing = False
        self._batch_s = 0.0  # mean time of a batch; 0 where none was computed yet

    @property
    def queued_bytes(self) -> int:
        """Bytes of what waits."""
        return self._budget.held

    def __len__(self) -> int:
        return sum(len(line.shares) for line in self._waiting.values())

    def put(self, share: _S, now: float) -> None:
        """Adds a share that arrived at `now`.

        Raises:
            Overloaded: its bytes do not fit, or its results will likely come after its deadline; with a hint.
        """
        self._check_time(share, now)
        if not self._budget.fits(share.client, share.num_bytes):
            raise Overloaded(
                self.retry_after_s(),
                f"{self.queued_bytes} bytes of rows wait here, {self._budget.held_by(share.client)} of them this "
                f"client's; {share.num_bytes} more do not fit into its part of {self._limits.max_queued_bytes}",
            )
        if self._arrivals:
            gap_s = min(now - self._last_arrival, _LONGEST_GAP * self._limits.max_wait_s)
            known = self._gap_s < float("inf")
            self._gap_s = self._gap_s + _SMOOTHING * (gap_s - self._gap_s) if known else gap_s
        self._arrivals += 1
        self._last_arrival = now
        self._file(share, now)

    def expect(self, coming: Coming, now: float) -> None:
        """Counts rows that will be put, so that what comes together is not taken in as if each came alone.

        Raises:
            Overloaded: they will likely be computed after their deadline; with a hint. Then they are not counted.
        """
        self._check_time(coming, now)
        self._count(coming.key, coming.client, coming.num_rows)

    def arrived(self, coming: Coming) -> None:
        """Expected rows are put now, or will never be."""
        self._count(coming.key, coming.client, -coming.num_rows)

    def _check_time(self, share: _S | Coming, now: float) -> None:
        needed_s, left_s = self.expected_s(share), share.deadline - now
        most_s = self.most_s(left_s, now)
        if 0 < most_s < needed_s:
            only = f", of which a queue that stands leaves {most_s:.3f} s" if most_s < left_s else ""
            raise Overloaded(
                min(max(needed_s - most_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S),
                f"the rows would take {needed_s:.3f} s here, and have {left_s:.3f} s left{only}",
            )

    def most_s(self, left_s: float, now: float) -> float:
        """How long a share may take that has `left_s`; two batches, of which one is computed now, always may."""
        standing_s = max(_STANDING_S, _STANDING_BATCHES * self._batch_s)
        if not self._waiting or now - self._empty_at <= standing_s:
            return left_s
        return min(left_s, max(_STANDING_PART * left_s, 2 * self._batch_s * _SLACK))

    def _count(self, key: Hashable, client: Hashable, rows: int) -> None:
        of_key = self._rows_of.setdefault(key, Counter())
        for counter in (of_key, self._rows):
            counter[client] += rows
            if not counter[client]:
                del counter[client]
        if not of_key:
            del self._rows_of[key]

    def _file(self, share: _S, now: float) -> None:
        client, rows = share.client, share.num_rows
        if not self._waiting:
            self._empty_at = now
        start = max(self._now_serving, self._next_start.get(client, 0))
        self._next_start[client] = start + rows
        self.queued_rows += rows
        self._count(share.key, client, rows)
        self._budget.hold(client, share.num_bytes)
        line = self._waiting.setdefault(share.key, _Line(now))
        line.num_rows += rows
        heapq.heappush(line.shares, _Waiting(start, self._arrivals, share))

    def take(self, now: float) -> list[_S]:
        """The next batch, all of one key; empty where none is due yet (`wait_s` says when to look again)."""
        self._skip_dead(now)
        first = self._first()
        if first is None or self._due_at(first) > now:
            return []
        line = self._waiting[first]
        batch: list[_S] = []
        rows = 0
        while line.shares:
            share = line.shares[0].share
            if self._dead(share, now):
                self.dropped.append(self._pop(line))
                continue
            if batch and rows + share.num_rows > self._limits.max_batch_rows:
                break
            self._now_serving = max(self._now_serving, line.shares[0].start)
            batch.append(self._pop(line))
            rows += share.num_rows
        if not line.shares:
            del self._waiting[first]
        self._forget_starts()
        self._computing = bool(batch)
        return batch

    def wait_s(self, now: float) -> float | None:
        """Seconds until a batch is due if nothing else comes; 0 where one is; `None` where nothing waits."""
        self._skip_dead(now)
        first = self._first()
        return None if first is None else max(0.0, self._due_at(first) - now)

    def computed(self, seconds: float, now: float) -> None:
        """A batch was computed; what arrived meanwhile goes together, at once."""
        self._computed_until = now
        self._computing = False
        # Down faster than up: the first batch may have compiled something, and must not keep others away for long.
        weight = _SMOOTHING if seconds > self._batch_s else _SMOOTHING_DOWN
        self._batch_s = self._batch_s + weight * (seconds - self._batch_s) if self._batch_s else seconds

    def expected_s(self, share: _S | Coming) -> float:
        """When `share` will likely be computed, in seconds from now, by how long batches took lately.

        0 where nothing waits and nothing is computed, however long they took: so there is always a newer measurement.
        """
        if not (self._rows_of or self._computing):
            return 0.0
        own = self._rows[share.client] + share.num_rows
        before = {key: self._rows_before(rows, share.client, own) for key, rows in self._rows_of.items()}
        waiting = {key: rows.total() for key, rows in self._rows_of.items()}
        batches = min(self._batches_with(before, share), _MAY_COME * self._batches_with(waiting, share))
        return (batches + self._computing) * self._batch_s * _SLACK

    def _rows_before(self, rows_of: Counter[Hashable], client: Hashable, own: int) -> float:
        """Rows of one key that come before the last of `own` rows of a client: of every other as many.

        Of one that has fewer, too: it may still send them, and they would come first.
        """
        others = (rows * own / max(self._rows[each], 1) for each, rows in rows_of.items() if each != client)
        return rows_of[client] + sum(others)

    def _batches_with(self, rows: Mapping[Hashable, float], share: _S | Coming) -> int:
        return self._batches({**rows, share.key: rows.get(share.key, 0) + share.num_rows}.values())

    def retry_after_s(self) -> float:
        """The hint where bytes do not fit: how long what waits may take."""
        if not self._batch_s:
            return _FIRST_RETRY_S
        wait_s = self._batches(rows.total() for rows in self._rows_of.values()) * self._batch_s
        return min(max(wait_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _batches(self, rows: Iterable[float]) -> int:
        return sum(max(1, math.ceil(each / self._limits.max_batch_rows)) for each in rows)

    def drain(self) -> list[_S]:
        """Takes out everything that waits, in the order it came in."""
        everything = sorted((each for line in self._waiting.values() for each in line.shares), key=lambda w: w.number)
        for line in list(self._waiting.values()):
            while line.shares:
                self._pop(line)
        self._waiting.clear()
        return [each.share for each in everything]

    def _first(self) -> Hashable | None:
        return min(self._waiting, key=lambda key: self._waiting[key].shares[0], default=None)

    def _due_at(self, key: Hashable) -> float:
        """When the batch that `key` heads goes, if nothing else comes: at once unless waiting is likely to pay."""
        line = self._waiting[key]
        arrived = line.since
        latest = arrived + self._limits.max_wait_s
        lonely = self._last_arrival + self._gap_s > latest or len(self._waiting) > 1
        if lonely or arrived <= self._computed_until:
            return arrived
        return arrived if line.num_rows >= self._limits.max_batch_rows else latest

    def _skip_dead(self, now: float) -> None:
        """Removes the dead from the heads, so that every head is alive."""
        for key, line in list(self._waiting.items()):
            while line.shares and self._dead(line.shares[0].share, now):
                self.dropped.append(self._pop(line))
            if not line.shares:
                del self._waiting[key]

    def _pop(self, line: _Line[_S]) -> _S:
        share = heapq.heappop(line.shares).share
        line.num_rows -= share.num_rows
        self._count(share.key, share.client, -share.num_rows)
        self.queued_rows -= share.num_rows
        self._budget.release(share.client, share.num_bytes)
        return share

    def _forget_starts(self) -> None:
        """Forgets clients whose next share would start now anyway."""
        if len(self._next_start) > 2 * len(self._rows) + _STARTS_KEPT:
            now = self._now_serving
            self._next_start = {client: start for client, start in self._next_start.items() if start > now}

    @staticmethod
    def _dead(share: _S, now: float) -> bool:
        return share.cancelled or share.deadline <= now
