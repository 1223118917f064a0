"""For whom ranks wait: who is blamed in a rank, what a node keeps of it, and what a mesh's figures are together."""

from __future__ import annotations

from typing import cast

import pytest

from epmesh.v1 import frame_pb2
from epmesh.v1 import rank_service_pb2 as wire
from epmesh_server.cli.waits import summed
from epmesh_server.node.rank_stats import RECENT_S, StatsBook
from epmesh_server.node.ranks import LocalRank
from epmesh_server.ranks.waits import WaitLedger


def test_a_moment_is_shared_among_those_who_had_not_come() -> None:
    waits = WaitLedger()
    waits.share([1, 2, 3], 0.3)
    waits.share([3], 1.0)
    waits.share([], 5.0)
    assert waits.by_rank == pytest.approx({1: 0.1, 2: 0.1, 3: 1.1})


def test_blame_that_is_handed_on_is_never_more_than_there_was() -> None:
    waits = WaitLedger()
    waits.share([2], 1.0)
    waits.hand_on(2, 3, 0.6)
    assert waits.by_rank == pytest.approx({2: 0.4, 3: 0.6})
    waits.hand_on(2, 3, 9.0)
    assert waits.by_rank == pytest.approx({2: 0.0, 3: 1.0})
    waits.hand_on(7, 8, 1.0)
    assert waits.of(8) == 0


class Entry:
    """As much of a rank as a book needs."""

    def __init__(self, rank: int) -> None:
        self.rank = rank


class Book(StatsBook):
    def __init__(self) -> None:
        self.at = 100.0
        super().__init__(lambda: self.at)
        self.entry = cast("LocalRank", Entry(0))

    def report(self, seconds: dict[int, float], at: float) -> None:
        self.at = at
        waited = [frame_pb2.WaitedFor(rank=rank, seconds=each) for rank, each in seconds.items()]
        self.take(self.entry, wire.RankStats(groups=[wire.GroupStats(group="ep", waited_for=waited)]))

    def recent(self) -> tuple[float, dict[int, float]]:
        (recent,) = self.recent_waits()
        return recent.window_s, {one.rank: one.seconds for one in recent.waited_for}


def test_a_node_knows_for_whom_its_ranks_waited_in_the_last_ten_seconds() -> None:
    book = Book()
    for second in range(21):
        book.report({1: 0.1 * second, 2: min(0.5 * second, 2.5)}, 100.0 + second)
    window_s, waited = book.recent()
    assert window_s == pytest.approx(RECENT_S)
    assert waited == pytest.approx({1: 1.0})  # rank 2 was waited for earlier, and is no more


def test_a_rank_that_reports_no_more_waits_for_nobody() -> None:
    book = Book()
    book.report({}, 100.0)
    book.report({1: 1.0}, 102.0)
    assert book.recent()[1] == {1: 1.0}
    book.at = 106.0
    assert book.recent() == (6.0, {})


def test_a_flood_of_reports_takes_no_room() -> None:
    book = Book()
    for number in range(10_000):
        book.report({1: number * 1e-3}, 100.0 + number * 1e-3)
    ((_, record),) = book.records()
    assert len(record.earlier) < 50
    assert book.recent()[1] == pytest.approx({1: 9.999})


def test_reports_are_cut_to_their_bounds() -> None:
    book = Book()
    huge = wire.GroupStats(
        group="g",
        waited_for=[frame_pb2.WaitedFor(rank=rank, seconds=1) for rank in range(1000)],
        errors=[wire.ErrorCount(error=str(number), count=1) for number in range(1000)],
    )
    book.take(book.entry, wire.RankStats(groups=[huge] * 1000))
    ((_, record),) = book.records()
    assert len(record.stats.groups) == 64
    assert (len(record.stats.groups[0].waited_for), len(record.stats.groups[0].errors)) == (64, 32)


def test_a_share_is_the_part_of_their_time_that_the_others_waited() -> None:
    def report(rank: int, window_s: float, **seconds: float) -> wire.RecentWaits:
        waited = [frame_pb2.WaitedFor(rank=int(peer[1:]), seconds=each) for peer, each in seconds.items()]
        return wire.RecentWaits(rank=rank, window_s=window_s, waited_for=waited)

    waits = summed([report(0, 10, r3=8, r1=1), report(1, 10, r3=8), report(2, 10, r3=8), report(3, 10, r0=1)])
    assert waits.shares == pytest.approx({3: 0.8, 1: 1 / 30, 0: 1 / 30})
    assert [one["rank"] for one in waits.as_dict()["waited_for"]] == [3, 0, 1]
    assert summed([]).shares == {}
    assert summed([report(0, 5, r0=1)]).shares == {}  # nobody else is there
