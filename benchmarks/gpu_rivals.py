"""What else moves rows between the GPUs of a node, to be timed beside epmesh: over torch's own process group on NCCL.

Each moves the same rows, weights and ids; each checks what it moved by its sums, as epmesh's are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
There = Callable[[], torch.Tensor]
Back = Callable[[torch.Tensor], torch.Tensor]

_TIMEOUT_S = 60


@contextmanager
def nccl_group(path: Path, rank: int, world_size: int, device: torch.device) -> Iterator[None]:
    """torch's default group over NCCL, met through a file."""
    store = FileStore(str(path), world_size)
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device)
    try:
        yield
    finally:
        dist.destroy_process_group()


class AllGather:
    """vLLM's default: all rows to all ranks, and a reduce-scatter back; what a rank has no expert for counts as 0."""

    name = "NCCL all-gather/reduce-scatter"
    graph = True

    def __init__(self, inputs: Inputs, world_size: int, experts: int) -> None:
        self._inputs = inputs
        self._gathered = [each.new_empty((world_size * len(each), *each.shape[1:])) for each in inputs]
        self._sums = torch.empty_like(inputs[0])
        self._held = (experts * dist.get_rank() // world_size, experts * (dist.get_rank() + 1) // world_size)

    def there(self) -> torch.Tensor:
        """Dispatches."""
        for into, each in zip(self._gathered, self._inputs, strict=True):
            dist.all_gather_into_tensor(into, each)
        return self._gathered[0]

    def results(self, received: torch.Tensor) -> torch.Tensor:
        """What this rank's experts would give back: the rows that are for them."""
        ids = self._gathered[2]
        mine = ((ids >= self._held[0]) & (ids < self._held[1])).any(dim=1, keepdim=True)
        return torch.where(mine, received, 0)

    def back(self, results: torch.Tensor) -> torch.Tensor:
        """Combines."""
        dist.reduce_scatter_tensor(self._sums, results)
        return self._sums


class CountedAllToAll:
    """Rows where they are routed, by `all_to_all_single`: counts go first, and the host reads them."""

    name = "all_to_all_single with counts"
    graph = False  # the host reads counts

    def __init__(self, inputs: Inputs, world_size: int, experts: int) -> None:
        self._inputs, self._world, self._experts = inputs, world_size, experts

    def there(self) -> torch.Tensor:
        """Dispatches."""
        rows, weights, ids = self._inputs
        holders = torch.div(ids * self._world, self._experts, rounding_mode="floor")
        wanted = torch.stack([(holders == rank).any(dim=1) for rank in range(self._world)])
        self._targets, self._order = wanted.nonzero(as_tuple=True)  # by rank, then by row
        counts = wanted.sum(dim=1)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        self._sent, self._got = counts.tolist(), theirs.tolist()
        received = []
        for each in (rows, weights, ids):
            into = each.new_empty((sum(self._got), *each.shape[1:]))
            dist.all_to_all_single(into, each.index_select(0, self._order), self._got, self._sent)
            received.append(into)
        return received[0]

    def results(self, received: torch.Tensor) -> torch.Tensor:
        """What this rank's experts would give back."""
        return received

    def back(self, results: torch.Tensor) -> torch.Tensor:
        """Combines: sums in float32."""
        rows = self._inputs[0]
        came = rows.new_empty((len(self._order), rows.shape[1]))
        dist.all_to_all_single(came, results, self._sent, self._got)
        total = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        return total.index_add_(0, self._order, came.float()).to(rows.dtype)


RIVALS = (AllGather, CountedAllToAll)


class PeerCopy:
    """The ceiling: as many bytes as cross the wire, to the next GPU, by one copy; all ranks at once."""

    def __init__(self, size: int, rank: int, world_size: int, device: torch.device) -> None:
        self._source = torch.empty(max(1, size), dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source, device=f"cuda:{(rank + 1) % world_size}")

    def copy(self) -> None:
        """Copies once."""
        self._target.copy_(self._source, non_blocking=True)
