"""The experts of one layer, and where they run: all in this process, or spread over a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Some or all experts of one layer: two-layer networks with squared ReLU, held as two stacked tensors.

    `expert_ids` are the logical ids of the experts held here, in storage order; `up` is fp32
    `[num_held, hidden_size, expert_size]`, `down` is fp32 `[num_held, expert_size, hidden_size]`.
    """

    def __init__(self, expert_ids: Sequence[int], up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.expert_ids = tuple(expert_ids)
        self.up = nn.Parameter(up)
        self.down = nn.Parameter(down)

    def run(self, slot: int, rows: Tensor) -> Tensor:
        """Apply the expert at storage index `slot` to fp32 rows `[num_rows, hidden_size]`."""
        return (rows @ self.up[slot]).relu().square() @ self.down[slot]


def run_expert_rows(layer: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sum, for every row, the weighted outputs of those of its experts that `layer` holds.

    Args:
        layer: the experts held here.
        x: `[num_rows, hidden_size]`, any float dtype; zero rows are fine.
        weights: fp32 `[num_rows, num_topk]`.
        ids: int64 `[num_rows, num_topk]`; -1 and ids that `layer` does not hold are skipped.

    Returns:
        fp32 `[num_rows, hidden_size]`; a row without a held expert is zero.
    """
    rows = x.float()
    total = rows.new_zeros(rows.shape)
    for slot, expert_id in enumerate(layer.expert_ids):
        row, choice = (ids == expert_id).nonzero(as_tuple=True)
        if row.numel():
            total = total.index_add(0, row, layer.run(slot, rows[row]) * weights[row, choice].unsqueeze(1))
    return total


class ExpertBackend(Protocol):
    """Where a layer's experts run. Ranks call in lock-step, the same calls in the same order; a router as it likes."""

    def forward(
        self, layer: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts
    ) -> Tensor:
        """Return fp32 `[num_tokens, hidden_size]`, the weighted sum of each token's experts.

        `hidden_states` is fp32 `[num_tokens, hidden_size]`, `topk_weights` fp32 and `topk_ids` int64, both
        `[num_tokens, num_topk]`; `num_tokens` may be zero and may differ from rank to rank.
        """
        ...


class LocalExperts:
    """Every expert is in this process: the reference that a mesh is compared with."""

    def forward(
        self, layer: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts
    ) -> Tensor:
        return run_expert_rows(experts, hidden_states, topk_weights, topk_ids)


class Communicator(Protocol):
    """The two calls of `epmesh.Communicator` that a mixture-of-experts layer needs."""

    def dispatch(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, layer: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def combine(self, hidden_states: Tensor) -> Tensor: ...


class MeshExperts:
    """Tokens travel to the ranks that hold their experts, and the sums come back."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def forward(
        self, layer: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts
    ) -> Tensor:
        x, weights, ids = self.comm.dispatch(hidden_states, topk_weights, topk_ids, layer=layer)
        return self.comm.combine(run_expert_rows(experts, x, weights, ids))


class Router(Protocol):
    """The one call of `epmesh.Router` that a mixture-of-experts layer needs."""

    def forward(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, *, layer: int | None = None
    ) -> Tensor: ...


class RoutedExperts:
    """No expert is in this process, and it is no rank: rows go to the ranks that serve, and the sums come back."""

    def __init__(self, router: Router) -> None:
        self.router = router

    def forward(
        self, layer: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts
    ) -> Tensor:
        return self.router.forward(hidden_states, topk_weights, topk_ids, layer=layer)


class ServedExperts:
    """A rank's experts of all layers as the callable that a serving rank answers routers with."""

    def __init__(self, shares: Sequence[Experts]) -> None:
        self._shares = shares

    def __call__(self, layer: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Return this rank's weighted sums, shaped and typed like `hidden_states` `[num_rows, hidden_size]`."""
        sums = run_expert_rows(self._shares[layer], hidden_states, topk_weights, topk_ids)
        return sums.to(hidden_states.dtype)


def linear_share(num_experts: int, world_size: int, rank: int) -> range:
    """The contiguous block of experts that `rank` holds by default; the first ranks hold one more if need be."""
    size, extra = divmod(num_experts, world_size)
    start = rank * size + min(rank, extra)
    return range(start, start + size + (rank < extra))


def empty_experts(num_experts: int, hidden_size: int, expert_size: int) -> Experts:
    """All `num_experts` experts of a layer, uninitialised."""
    up = torch.empty(num_experts, hidden_size, expert_size)
    return Experts(range(num_experts), up, up.new_empty(num_experts, expert_size, hidden_size))
