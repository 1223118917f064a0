"""What a router did so far, counted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

_KEPT = 512
"""Latest answers of a node that its latency is taken from."""


@dataclass(frozen=True)
class NodeLatency:
    """How long a node's answers took, from sending rows to having their sums, over the latest of them.

    Attributes:
        answers: of the node so far.
        median_s, p99_s: of the latest.
    """

    answers: int
    median_s: float
    p99_s: float


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Counts since the router was made.

    Attributes:
        calls: forwards that ended, well or not.
        failed: those of them that raised.
        rows: tokens of the forwards that ended well.
        retries: calls to nodes whose rows went elsewhere after a failure; no caller saw it.
        bytes_sent, bytes_received: tensors' bytes of calls to nodes and of their answers.
        floor_bytes: least possible for the answered: a row each way per (row, node), its ids and its weights.
        inflight_bytes: of the budget, held now.
        latency: of each node, by slot.
    """

    calls: int = 0
    failed: int = 0
    rows: int = 0
    retries: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    floor_bytes: int = 0
    inflight_bytes: int = 0
    latency: Mapping[int, NodeLatency] = field(default_factory=dict)


class StatsRecorder:
    """Counts; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._counts: dict[str, int] = {}
        self._answers: dict[int, int] = {}
        self._latest: dict[int, deque[float]] = {}

    def add(self, **counts: int) -> None:
        """Adds to counts, by their names in `RouterStats`."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] = self._counts.get(name, 0) + count

    def answered(self, slot: int, seconds: float) -> None:
        """A node answered."""
        with self._lock:
            self._answers[slot] = self._answers.get(slot, 0) + 1
            self._latest.setdefault(slot, deque(maxlen=_KEPT)).append(seconds)

    def snapshot(self, inflight_bytes: int) -> RouterStats:
        """The counts now."""
        with self._lock:
            latest = {slot: sorted(kept) for slot, kept in self._latest.items()}
            answers, counts = dict(self._answers), dict(self._counts)
        latency = {slot: _latency(answers[slot], latest[slot]) for slot in sorted(latest)}
        return RouterStats(**counts, inflight_bytes=inflight_bytes, latency=latency)


def _latency(answers: int, ordered: list[float]) -> NodeLatency:
    last = len(ordered) - 1
    return NodeLatency(answers, ordered[last // 2], ordered[round(0.99 * last)])
