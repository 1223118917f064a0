"""What a coordinator shows at ``/metrics``: who is in the mesh, how commits went, and why somebody is out."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from epmesh.view import View
from epmesh_server.membership import Membership
from epmesh_server.membership.actions import Action, Note, Prepare, Publish, Send
from epmesh_server.membership.nodes import NodeStatus
from epmesh_server.metrics_server import ServiceCollector, of_view

BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class CommitCounters:
    """Counts what the engine carries out.

    Attributes:
        commits: views that were committed.
        seconds: commits by bucket of `BUCKETS_S`, from the first `Prepare` of an epoch to its view, disk included.
        sum_s: of all of them.
        evictions: nodes and ranks that are out, by cause.
        ranks_lost: ranks of a view that the next one is without, whatever the cause.
    """

    def __init__(self, view: View) -> None:
        self.commits = 0
        self.seconds = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0
        self.evictions: Counter[str] = Counter()
        self.ranks_lost = 0
        self._began: dict[int, float] = {}
        self._view = view

    def observe(self, action: Action, now: float) -> None:
        """The engine carries an action out."""
        match action:
            case Send(command=Prepare(epoch=epoch)):
                self._began.setdefault(epoch, now)
            case Publish(view=view):
                self._committed(view, now)
            case Note(cause=cause) if cause:
                self.evictions[cause] += 1

    def _committed(self, view: View, now: float) -> None:
        seconds = now - self._began.get(view.epoch, now)
        self._began.clear()
        self.commits += 1
        self.seconds[bisect_left(BUCKETS_S, seconds)] += 1
        self.sum_s += seconds
        living = {(info.rank, info.incarnation) for info in view.ranks.values()}
        self.ranks_lost += sum((info.rank, info.incarnation) not in living for info in self._view.ranks.values())
        self._view = view


class CoordinatorCollector(ServiceCollector):
    """Metrics of one coordinator."""

    def __init__(
        self,
        machine: Membership,
        counters: CommitCounters,
        log_bytes: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._machine, self._counters, self._log_bytes, self._clock = machine, counters, log_bytes, clock

    def collect(self) -> Iterable[Metric]:
        """All of them, as they are now."""
        view = self._machine.view
        yield from of_view(view.epoch, len(view.nodes), len(view.ranks))
        yield from self._of_commits()
        yield from self._of_nodes()
        yield GaugeMetricFamily("epmesh_coordinator_log_bytes", "Size of the log.", self._log_bytes())

    def _of_commits(self) -> Iterator[Metric]:
        counters = self._counters
        yield CounterMetricFamily("epmesh_coordinator_commits", "Views that were committed.", counters.commits)
        seconds = HistogramMetricFamily("epmesh_coordinator_commit_seconds", "From the first prepare to the view.")
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        counted = itertools.accumulate(counters.seconds)
        seconds.add_metric([], list(zip(bounds, counted, strict=True)), sum_value=counters.sum_s)
        yield seconds
        text = "Ranks of a view that the next one was without."
        yield CounterMetricFamily("epmesh_coordinator_ranks_lost", text, counters.ranks_lost)
        evictions = CounterMetricFamily(
            "epmesh_coordinator_evictions", "Nodes and ranks that are out, by cause.", labels=["cause"]
        )
        for cause, count in sorted(counters.evictions.items()):
            evictions.add_metric([cause], count)
        yield evictions

    def _of_nodes(self) -> Iterator[Metric]:
        now, states = self._clock(), Counter(node.status for node in self._machine.nodes)
        nodes = GaugeMetricFamily("epmesh_coordinator_nodes", "Slots by what their node is.", labels=["status"])
        for status in NodeStatus:
            nodes.add_metric([status.name.lower()], states[status])
        age = GaugeMetricFamily(
            "epmesh_coordinator_heartbeat_age_seconds", "Since a node's last sign of life.", labels=["node", "slot"]
        )
        for node in self._machine.nodes:
            if node.status is NodeStatus.LIVE:
                seconds = max(0.0, self._machine.lease_s - (node.lease_until - now))
                age.add_metric([node.registration.node_id, str(node.slot)], seconds)
        yield from (nodes, age)
