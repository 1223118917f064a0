"""What the membership machine is set to. Frozen, validated once."""

from __future__ import annotations

from dataclasses import dataclass

from epmesh.errors import InvalidRequest
from epmesh_server.shared_memory import MAX_RANKS

DEFAULT_EXCHANGE_TIMEOUT_S = 30.0
MAX_EXCHANGE_TIMEOUT_S = 3600.0
ANSWER_S_PER_NODE = 0.004
# A commit with n nodes is 6 n messages, and n nodes that join one by one would need n of them.
BATCH_S_PER_NODE = 0.0001
MAX_BATCH_S_PER_NODE = 0.005


@dataclass(frozen=True, kw_only=True)
class MembershipSettings:
    """Constants of one mesh's membership.

    Attributes:
        version: this package's version; nodes of another major.minor are refused.
        stride: most ranks a node may have.
        min_nodes: a view with fewer nodes is never committed; `None` means half of the last view's.
        heartbeat_interval_s: seconds between a node's heartbeats.
        lease_s: seconds after its last sign of life at which a node is dead.
        answer_timeout_s: seconds within which a node service answers Prepare, Finish (beyond its own wait) and Commit;
            somewhat more in a large mesh.
        batch_window_s: a commit waits until this long nobody joined, so that those who join together need one.
        max_batch_window_s: ... but never longer than this; both are longer in a large mesh, where a commit costs more.
        link_grace_s: link failures are gathered this long before anyone is evicted for them.
    """

    version: str
    stride: int = 8
    min_nodes: int | None = None
    heartbeat_interval_s: float = 1.0
    lease_s: float = 3.0
    answer_timeout_s: float = 1.0
    batch_window_s: float = 0.02
    max_batch_window_s: float = 0.25
    link_grace_s: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= MAX_RANKS:
            raise InvalidRequest(f"stride is {self.stride}; it must be 1 to {MAX_RANKS}")
        if self.min_nodes is not None and self.min_nodes < 0:
            raise InvalidRequest(f"min_nodes is {self.min_nodes}; it must be 0 or more")
        for name in ("heartbeat_interval_s", "lease_s", "answer_timeout_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise InvalidRequest(f"{name} is {value}; it must be a positive number of seconds")
        if self.lease_s < 2 * self.heartbeat_interval_s:
            raise InvalidRequest(
                f"lease_s is {self.lease_s}, which a single lost heartbeat ends; "
                f"use at least {2 * self.heartbeat_interval_s}, twice heartbeat_interval_s"
            )
        if not 0 <= self.batch_window_s <= self.max_batch_window_s:
            raise InvalidRequest(
                f"batch_window_s is {self.batch_window_s}; "
                f"it must be 0 to max_batch_window_s, which is {self.max_batch_window_s}"
            )

    @property
    def max_slots(self) -> int:
        """Slots are 0 to this, exclusive: control pages have room for `MAX_RANKS` ranks."""
        return MAX_RANKS // self.stride

    def answer_s(self, num_nodes: int) -> float:
        """How long to wait for the answers of `num_nodes` nodes; pushing a view to a thousand takes about 1 s."""
        return self.answer_timeout_s + ANSWER_S_PER_NODE * num_nodes

    def batch_s(self, num_nodes: int) -> tuple[float, float]:
        """How long a commit waits after the last change and after the first, with `num_nodes` nodes to tell."""
        longest_s = self.max_batch_window_s + MAX_BATCH_S_PER_NODE * num_nodes
        return self.batch_window_s + BATCH_S_PER_NODE * num_nodes, longest_s

    def least_nodes(self, last: int) -> int:
        """The fewest nodes a view may have after one with `last` nodes."""
        return self.min_nodes if self.min_nodes is not None else (last + 1) // 2
