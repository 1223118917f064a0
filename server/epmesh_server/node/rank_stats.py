"""What the node's ranks report of themselves: the latest figures, and for whom they waited lately."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from epmesh.v1 import frame_pb2
from epmesh.v1 import rank_service_pb2 as wire
from epmesh_server.node.ranks import LocalRank

RECENT_S = 10.0
"""How far back `recent_waits` looks."""
_MAX_GROUPS, _MAX_WAITED_FOR, _MAX_ERRORS = 64, 64, 32
_LEAST_APART_S = 0.5
_QUIET_S = 3.0
"""A rank that reports nothing for so long waits for nobody: it reports whenever a figure changed."""


@dataclass
class RankRecord:
    """What one rank reported.

    Attributes:
        stats: its latest report.
        came_at: when, by the clock of the book.
        earlier: reports' (time, seconds waited by rank) of the last `RECENT_S`, the one before them included.
    """

    stats: wire.RankStats
    came_at: float
    earlier: deque[tuple[float, dict[int, float]]] = field(default_factory=deque)


class StatsBook:
    """Reports of the ranks that live here. Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[LocalRank, RankRecord] = {}

    def take(self, entry: LocalRank, stats: wire.RankStats) -> None:
        """Files a report; what is beyond the bounds of one is cut off, whoever sent it."""
        _cut(stats)
        now = self._clock()
        record = self._records.get(entry)
        if record is None:
            record = self._records[entry] = RankRecord(stats, now, deque([(now, {})]))
        record.stats, record.came_at = stats, now
        if len(record.earlier) > 1 and now - record.earlier[-2][0] < _LEAST_APART_S:
            record.earlier.pop()  # a flood of reports takes no more room than those that come in time
        record.earlier.append((now, _waited(stats)))
        while len(record.earlier) > 1 and record.earlier[1][0] <= now - RECENT_S:
            record.earlier.popleft()

    def forget(self, entry: LocalRank) -> None:
        """The rank is gone."""
        self._records.pop(entry, None)

    def records(self) -> list[tuple[LocalRank, RankRecord]]:
        """Every rank that reported, ascending."""
        return sorted(self._records.items(), key=lambda item: item[0].rank)

    def now(self) -> float:
        """The time, by the clock of `RankRecord.came_at`."""
        return self._clock()

    def recent_waits(self) -> list[wire.RecentWaits]:
        """For whom each rank waited in the last `RECENT_S`."""
        return [self._recent(entry.rank, record) for entry, record in self.records()]

    def _recent(self, rank: int, record: RankRecord) -> wire.RecentWaits:
        (began, before), (ended, after) = record.earlier[0], record.earlier[-1]
        now = self._clock()
        if now - ended > _QUIET_S:
            return wire.RecentWaits(rank=rank, window_s=now - began)
        waits = [
            frame_pb2.WaitedFor(rank=peer, seconds=seconds - before.get(peer, 0.0))
            for peer, seconds in sorted(after.items())
            if seconds > before.get(peer, 0.0)
        ]
        return wire.RecentWaits(rank=rank, window_s=ended - began, waited_for=waits)


def _waited(stats: wire.RankStats) -> dict[int, float]:
    """Seconds by the rank that was waited for, over all groups."""
    total: dict[int, float] = defaultdict(float)
    for group in stats.groups:
        for waited in group.waited_for:
            total[waited.rank] += waited.seconds
    return total


def _cut(stats: wire.RankStats) -> None:
    del stats.groups[_MAX_GROUPS:]
    for group in stats.groups:
        del group.waited_for[_MAX_WAITED_FOR:]
        del group.errors[_MAX_ERRORS:]
