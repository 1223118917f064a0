"""What a node service shows at ``/metrics``: the node, and what each of its ranks reported."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from epmesh.v1 import rank_service_pb2 as wire
from epmesh_server.metrics_server import ServiceCollector, of_view
from epmesh_server.node.call_budget import CallBudget
from epmesh_server.node.drivers import Drivers
from epmesh_server.node.rank_stats import RankRecord, StatsBook
from epmesh_server.node.ranks import LocalRank, RankTable
from epmesh_server.node.views import ViewBoard

BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Upper bounds of `Durations` in the protos; a rank's own are the same (`ranks.open_exchange`, which needs torch)."""

_Record = tuple[LocalRank, RankRecord]
Families = Iterator[Metric]


class NodeCollector(ServiceCollector):
    """Metrics of one node service."""

    def __init__(
        self,
        table: RankTable,
        board: ViewBoard,
        book: StatsBook,
        drivers: Drivers,
        budgets: Mapping[str, CallBudget],
        *,
        coordinator_reachable: Callable[[], bool],
    ) -> None:
        """`budgets` are those of gRPC calls with tensors, by who calls."""
        self._table, self._board, self._book, self._drivers = table, board, book, drivers
        self._budgets = budgets
        self._coordinator_reachable = coordinator_reachable

    def collect(self) -> Iterable[Metric]:
        """All of them, as they are now."""
        yield from self._of_node()
        yield from self._of_calls()
        yield from self._of_pages()
        yield from of_ranks(self._book)

    def _of_node(self) -> Families:
        view = self._board.view
        yield from of_view(self._board.epoch, len(view.nodes) if view else 0, len(view.ranks) if view else 0)
        reachable = float(self._coordinator_reachable())
        yield GaugeMetricFamily("epmesh_coordinator_reachable", "1 while its control stream is up.", reachable)
        yield GaugeMetricFamily("epmesh_node_ranks", "Ranks with a living session on this node.", len(self._table))
        yield GaugeMetricFamily("epmesh_node_drivers", "Ranks of this node that have a driver.", len(self._drivers))

    def _of_calls(self) -> Families:
        held = GaugeMetricFamily("epmesh_node_call_bytes", "Held by gRPC calls with tensors.", labels=["caller"])
        refused = _counter("epmesh_node_overloaded", "gRPC calls with tensors that did not fit.", ["caller"])
        for caller, budget in self._budgets.items():
            held.add_metric([caller], budget.held)
            refused.add_metric([caller], budget.overloaded)
        yield from (held, refused)

    def _of_pages(self) -> Families:
        """What the ranks' control pages say, which needs nobody's interpreter lock."""
        sequence = GaugeMetricFamily(
            "epmesh_exchange_sequence",
            "Highest number in a group that the rank began, dispatched and completed.",
            labels=["rank", "group", "state"],
        )
        broken = GaugeMetricFamily(
            "epmesh_unreachable_peers", "Peers that the rank's links cannot reach.", labels=["rank"]
        )
        names = {group.group_id: group.name for group in self._board.view.groups} if self._board.view else {}
        for entry in self._table.all():
            rank = str(entry.rank)
            broken.add_metric([rank], len(entry.failures))
            for progress in entry.page.progress():
                group = names.get(progress.group_id, str(progress.group_id))
                sequence.add_metric([rank, group, "begun"], progress.begun)
                sequence.add_metric([rank, group, "dispatched"], progress.dispatched)
                sequence.add_metric([rank, group, "completed"], progress.completed)
        yield from (sequence, broken)


def of_ranks(book: StatsBook) -> Families:
    """What the ranks reported."""
    records = book.records()
    yield from _of_groups(records)
    yield from _of_links(records, book.now())
    yield from _of_serving(records)


def _of_groups(records: Sequence[_Record]) -> Families:
    seconds = HistogramMetricFamily(
        "epmesh_exchange_seconds", "Duration of a dispatch, and of a combine.", labels=["rank", "group", "phase"]
    )
    waits = _counter(
        "epmesh_wait_seconds",
        "Time that the rank waited for a peer, shared among all that had not come.",
        ["rank", "group", "peer"],
    )
    rows = _counter("epmesh_rows", "Rows that travelled.", ["rank", "group", "scope", "direction"])
    sent = _counter("epmesh_sent_bytes", "Bytes of exchanges.", ["rank", "group", "scope"])
    floor = _counter("epmesh_floor_bytes", "Least possible bytes between nodes for what was sent.", ["rank", "group"])
    errors = _counter("epmesh_errors", "Calls that raised, by the error's class.", ["rank", "group", "error"])
    for entry, record in records:
        for group in record.stats.groups:
            key = [str(entry.rank), group.group]
            _add_durations(seconds, [*key, "dispatch"], group.dispatches)
            _add_durations(seconds, [*key, "combine"], group.combines)
            for waited in group.waited_for:
                waits.add_metric([*key, str(waited.rank)], waited.seconds)
            rows.add_metric([*key, "inside", "sent"], group.rows_sent_inside)
            rows.add_metric([*key, "inside", "received"], group.rows_received_inside)
            rows.add_metric([*key, "between", "sent"], group.rows_sent_between)
            rows.add_metric([*key, "between", "received"], group.rows_received_between)
            sent.add_metric([*key, "inside"], group.bytes_sent_inside)
            sent.add_metric([*key, "between"], group.bytes_sent_between)
            floor.add_metric(key, group.floor_bytes)
            for error in group.errors:
                errors.add_metric([*key, error.error], error.count)
    yield from (seconds, waits, rows, sent, floor, errors)


def _of_links(records: Sequence[_Record], now: float) -> Families:
    moved = _counter("epmesh_link_bytes", "Bytes that crossed links, everything included.", ["rank", "direction"])
    refused = _counter("epmesh_frames_refused", "Frames of another mesh or epoch, or malformed.", ["rank"])
    resent = _counter("epmesh_messages_resent", "Messages sent again after a connection broke.", ["rank"])
    inbox = GaugeMetricFamily("epmesh_inbox_bytes", "Came for an exchange, not asked for yet.", labels=["rank"])
    age = GaugeMetricFamily("epmesh_rank_report_age_seconds", "Since the rank's figures last changed.", labels=["rank"])
    for entry, record in records:
        rank, stats = str(entry.rank), record.stats
        moved.add_metric([rank, "sent"], stats.link_bytes_sent)
        moved.add_metric([rank, "received"], stats.link_bytes_received)
        refused.add_metric([rank], stats.frames_refused)
        resent.add_metric([rank], stats.messages_resent)
        inbox.add_metric([rank], stats.inbox_bytes)
        age.add_metric([rank], now - record.came_at)
    yield from (moved, refused, resent, inbox, age)


def _of_serving(records: Sequence[_Record]) -> Families:
    counters = {
        name: _counter(f"epmesh_serving_{name}", text, ["rank"])
        for name, text in (
            ("requests", "Routers' requests that were taken in."),
            ("batches", "Calls of the experts."),
            ("rows", "Rows of those calls."),
            ("experts_seconds", "Time in the experts."),
            ("cancelled", "Requests and shares that were given up."),
            ("overloaded", "Requests refused because too much waited."),
            ("failures", "Requests refused for any other reason."),
            ("front_refused", "Requests that the front refused."),
        )
    }
    requests = GaugeMetricFamily("epmesh_front_open_requests", "Taken in and not answered yet.", labels=["rank"])
    held = GaugeMetricFamily("epmesh_front_open_bytes", "Bytes of those requests.", labels=["rank"])
    for entry, record in records:
        if not record.stats.HasField("serving"):
            continue
        rank, stats = [str(entry.rank)], record.stats.serving
        for name, counter in counters.items():
            counter.add_metric(rank, stats.experts_s if name == "experts_seconds" else getattr(stats, name))
        requests.add_metric(rank, stats.open_requests)
        held.add_metric(rank, stats.open_bytes)
    yield from (*counters.values(), requests, held)


def _counter(name: str, text: str, labels: Sequence[str]) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, labels=labels)


def _add_durations(family: HistogramMetricFamily, labels: Sequence[str], durations: wire.Durations) -> None:
    """A histogram's buckets count all that is below them; those of another number of buckets say nothing."""
    if len(durations.counts) != len(BUCKETS_S) + 1:
        return
    bounds = [*map(str, BUCKETS_S), "+Inf"]
    family.add_metric(
        labels, list(zip(bounds, itertools.accumulate(durations.counts), strict=True)), sum_value=durations.sum_s
    )
