"""Tells the node service once a second what this rank counted, from a thread of its own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from epmesh.v1 import frame_pb2, rank_service_pb2
from epmesh_server.ranks.open_exchange import Durations, ExchangeStats
from epmesh_server.ranks.waits import WaitLedger

if TYPE_CHECKING:
    from epmesh_server.ranks.rank import RankProcess

PERIOD_S = 1.0
MAX_WAITED_FOR = 64
_MAX_GROUPS = 64


class StatsReporter:
    """Reports what changed, at most once a second, until it is closed."""

    def __init__(self, rank: RankProcess) -> None:
        self._rank = rank
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="epmesh-stats", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; idempotent."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        told = None
        while not self._ended.wait(PERIOD_S):
            stats = rank_stats(self._rank)
            if stats != told and self._rank.session.error is None:
                self._rank.session.report_stats(stats)
                told = stats


def rank_stats(rank: RankProcess) -> rank_service_pb2.RankStats:
    """What a rank counted so far. Counters go on meanwhile: each is right, and two may be of moments a little apart."""
    communicators = sorted(rank.communicators.items())[:_MAX_GROUPS]
    stats = rank_service_pb2.RankStats(
        groups=[group_stats(name, communicator.stats, communicator.waits) for name, communicator in communicators],
        link_bytes_sent=rank.hub.bytes_sent,
        link_bytes_received=rank.hub.bytes_received,
        frames_refused=rank.hub.refused,
        messages_resent=rank.hub.resent,
        inbox_bytes=rank.hub.inbox_bytes,
    )
    if rank.front is not None or rank.serving_stats.requests:
        stats.serving.CopyFrom(_serving_stats(rank))
    return stats


def group_stats(name: str, stats: ExchangeStats, waits: WaitLedger) -> rank_service_pb2.GroupStats:
    """What a rank counted in one group."""
    longest = sorted(waits.by_rank.copy().items(), key=lambda item: -item[1])[:MAX_WAITED_FOR]
    return rank_service_pb2.GroupStats(
        group=name,
        dispatches=_durations(stats.dispatches),
        combines=_durations(stats.combines),
        rows_sent_inside=stats.inside.sent,
        rows_received_inside=stats.inside.received,
        rows_sent_between=stats.between.sent,
        rows_received_between=stats.between.received,
        bytes_sent_inside=stats.inside_bytes,
        bytes_sent_between=stats.bytes_sent,
        floor_bytes=stats.floor_bytes,
        waited_for=[frame_pb2.WaitedFor(rank=rank, seconds=seconds) for rank, seconds in longest],
        errors=[
            rank_service_pb2.ErrorCount(error=error, count=count)
            for error, count in sorted(stats.errors.copy().items())
        ],
    )


def _durations(durations: Durations) -> rank_service_pb2.Durations:
    return rank_service_pb2.Durations(counts=durations.counts, sum_s=durations.sum_s)


def _serving_stats(rank: RankProcess) -> rank_service_pb2.ServingStats:
    counted, front = rank.serving_stats, rank.front
    return rank_service_pb2.ServingStats(
        requests=counted.requests,
        batches=counted.batches,
        rows=counted.rows,
        experts_s=counted.experts_s,
        cancelled=counted.cancelled,
        overloaded=counted.overloaded + counted.refused_unseen,
        failures=counted.failures,
        open_requests=front.open_requests if front is not None else 0,
        open_bytes=front.open_bytes if front is not None else 0,
        front_refused=front.refused if front is not None else 0,
    )
