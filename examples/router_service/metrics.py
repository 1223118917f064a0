"""What the service counts, for Prometheus: its requests, and what its router says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from epmesh.router_stats import RouterStats

_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class ServiceMetrics:
    """Counters of one service in a registry of their own."""

    def __init__(self, stats: Callable[[], RouterStats], epoch: Callable[[], int], ready: Callable[[], bool]) -> None:
        """`stats`, `epoch` and `ready` are asked at every scrape."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("router_requests", "Answers to /v1/generate.", ["code"], registry=registry)
        self.seconds = Histogram(
            "router_request_seconds", "From a request to its last byte.", buckets=_BUCKETS_S, registry=registry
        )
        self.tokens = Counter("router_generated_tokens", "Passes that brought text.", registry=registry)
        self.open = Gauge("router_open_requests", "Requests under way.", registry=registry)
        Gauge("router_ready", "1 where /healthz answers 200.", registry=registry).set_function(lambda: float(ready()))
        epochs = Gauge("epmesh_epoch", "The newest view that this process knows.", registry=registry)
        epochs.set_function(lambda: float(epoch()))
        registry.register(RouterCollector(stats))


class RouterCollector(Collector):
    """`epmesh.RouterStats` as metrics."""

    def __init__(self, stats: Callable[[], RouterStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """All of them, as they are now."""
        stats = self._stats()
        counted = {
            "epmesh_router_forwards": ("Forwards that ended, well or not.", stats.calls),
            "epmesh_router_forwards_failed": ("Forwards that raised.", stats.failed),
            "epmesh_router_rows": ("Rows of forwards that ended well.", stats.rows),
            "epmesh_router_retries": ("Calls to nodes whose rows went elsewhere after a failure.", stats.retries),
            "epmesh_router_sent_bytes": ("Tensors' bytes sent to nodes.", stats.bytes_sent),
            "epmesh_router_received_bytes": ("Tensors' bytes of their answers.", stats.bytes_received),
            "epmesh_router_floor_bytes": ("Least possible bytes for what was answered.", stats.floor_bytes),
        }
        for name, (text, value) in counted.items():
            yield CounterMetricFamily(name, text, value)
        yield GaugeMetricFamily("epmesh_router_inflight_bytes", "Held of the byte budget.", stats.inflight_bytes)
        answers = CounterMetricFamily("epmesh_router_answers", "Answers by the node's slot.", labels=["slot"])
        latency = GaugeMetricFamily(
            "epmesh_router_answer_seconds", "Of a node's latest answers.", labels=["slot", "quantile"]
        )
        for slot, of_node in stats.latency.items():
            answers.add_metric([str(slot)], of_node.answers)
            latency.add_metric([str(slot), "0.5"], of_node.median_s)
            latency.add_metric([str(slot), "0.99"], of_node.p99_s)
        yield from (answers, latency)
