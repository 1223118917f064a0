"""Calls of the experts: shares that wait become one batch, and each gets its rows of the results."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest
from epmesh_server.ranks.serving_batch import BatchLimits, BatchQueue, Coming
from epmesh_server.ranks.serving_rows import BatchKey, Rows
from epmesh_server.ranks.tensors import accumulator, dtype_from_name, dtype_name, from_bytes

_log = logging.getLogger(__name__)

Experts = Callable[[int | None, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""``experts(layer, hidden_states, topk_weights, topk_ids) -> hidden_states``: for rows ``[n, hidden]`` with weights and
ids ``[n, num_topk]`` their weighted sums over this rank's experts, ``[n, any width]``. An id of -1 is not this rank's
to compute; layer `None` stands for models with one placement for all layers."""

Outcome = torch.Tensor | EpmeshError


@dataclass
class ServeStats:
    """What a rank that serves did so far. Each number is written by one thread.

    Attributes:
        requests: routers' requests that were taken in.
        shares: shares of rows for this rank, its neighbours' requests included.
        batches, rows: calls of the experts, and their rows.
        experts_s: seconds in them.
        cancelled: requests that their routers gave up, and shares that were given up with them.
        overloaded: requests refused because too much waited, once they were looked into.
        refused_unseen: requests refused for that by their headers alone.
        failures: requests refused for any other reason.
    """

    requests: int = 0
    shares: int = 0
    batches: int = 0
    rows: int = 0
    experts_s: float = 0.0
    cancelled: int = 0
    overloaded: int = 0
    refused_unseen: int = 0
    failures: int = 0

    @property
    def rows_per_batch(self) -> float:
        """Mean rows of a call."""
        return self.rows / self.batches if self.batches else 0.0


@dataclass(eq=False)
class QueuedShare:
    """Rows that wait for this rank's experts.

    Attributes:
        rows: what is computed.
        deadline: ``time.monotonic()`` after which nobody waits.
        is_cancelled: whether nobody waits any more; called from several threads.
        deliver: takes the results ``[rows, width]`` or the error, on the computing thread; copies what it keeps.
        client: whose rows they are.
    """

    rows: Rows
    deadline: float
    is_cancelled: Callable[[], bool]
    deliver: Callable[[Outcome], None]
    client: Hashable = ""

    @property
    def key(self) -> BatchKey:
        """What it can be computed together with."""
        return self.rows.key

    @property
    def num_rows(self) -> int:
        """Its rows."""
        return self.rows.num_rows

    @property
    def num_bytes(self) -> int:
        """What it counts for in the queue's budget."""
        return self.rows.num_bytes

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.is_cancelled()


class ShareQueue:
    """The queue between the thread that takes shares in and the one that computes."""

    def __init__(self, limits: BatchLimits) -> None:
        self._queue: BatchQueue[QueuedShare] = BatchQueue(limits)
        self._changed = threading.Condition()  # guards _queue

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, share: QueuedShare) -> None:
        """Adds a share.

        Raises:
            Overloaded: too much waits.
        """
        with self._changed:
            self._queue.put(share, time.monotonic())
            self._changed.notify()

    def expect(self, coming: Coming, now: float) -> None:
        """As `BatchQueue.expect`."""
        with self._changed:
            self._queue.expect(coming, now)

    def arrived(self, coming: Coming) -> None:
        """As `BatchQueue.arrived`."""
        with self._changed:
            self._queue.arrived(coming)

    def take(self, timeout_s: float) -> tuple[list[QueuedShare], list[QueuedShare]]:
        """The next batch, and shares that nobody waits for any more; waits until there is one of them or time is up."""
        with self._changed:
            deadline = time.monotonic() + timeout_s
            while True:
                now = time.monotonic()
                batch = self._queue.take(now)
                dropped, self._queue.dropped = self._queue.dropped, []
                if batch or dropped or now >= deadline:
                    return batch, dropped
                due_s = self._queue.wait_s(now)
                self._changed.wait(deadline - now if due_s is None else min(due_s, deadline - now))

    def computed(self, seconds: float) -> None:
        """Says how long a batch took."""
        with self._changed:
            self._queue.computed(seconds, time.monotonic())

    def wake(self) -> None:
        """Ends a wait in `take` spuriously."""
        with self._changed:
            self._changed.notify()

    def drain(self) -> list[QueuedShare]:
        """Takes out everything."""
        with self._changed:
            return self._queue.drain()


class ExpertCalls:
    """Runs batches, on the thread that serves."""

    def __init__(self, experts: Experts, rank: int, device: torch.device, queue: ShareQueue, stats: ServeStats) -> None:
        self._experts = experts
        self._rank = rank
        self._device = device
        self._queue = queue
        self._stats = stats

    def run(self, timeout_s: float) -> bool:
        """Runs the next batch, waiting up to `timeout_s` for one; whether there was any."""
        batch, dropped = self._queue.take(timeout_s)
        for share in dropped:
            error = DeadlineExceeded(self._rank, 0, f"rank {self._rank} did not get to the rows in time")
            self._deliver(share, error)
        if batch:
            self._run(batch)
        return bool(batch)

    def _run(self, batch: Sequence[QueuedShare]) -> None:
        outcome = self._call(batch)
        if isinstance(outcome, EpmeshError):
            if len(batch) > 1:  # only who brought what the experts failed on shall hear of it
                for share in batch:
                    self._run([share])
            else:
                self._deliver(batch[0], outcome)
            return
        start = 0
        for share in batch:
            self._deliver(share, outcome[start : start + share.num_rows])
            start += share.num_rows

    def _deliver(self, share: QueuedShare, outcome: Outcome) -> None:
        try:
            share.deliver(outcome)
        except Exception:  # noqa: BLE001 - what cannot be delivered to one must not end the service of all
            _log.exception("rank=%d serve.failed: results of %d rows", self._rank, share.num_rows)

    def _call(self, batch: Sequence[QueuedShare]) -> Outcome:
        key, rows = batch[0].key, sum(share.num_rows for share in batch)
        began = time.monotonic()
        try:
            with torch.no_grad():
                results = self._experts(key.layer, *(tensor.to(self._device) for tensor in _tensors(batch)))
            return self._checked(results, rows)
        except EpmeshError as exc:
            return exc
        except Exception as exc:  # noqa: BLE001 - the experts are the user's; their routers hear of it
            _log.warning("rank=%d experts.failed: layer %s, %d rows", self._rank, key.layer, rows, exc_info=True)
            return EpmeshError(f"experts on rank {self._rank} failed: {type(exc).__name__}: {exc}")
        finally:
            took_s = time.monotonic() - began
            self._stats.batches += 1
            self._stats.rows += rows
            self._stats.experts_s += took_s
            self._queue.computed(took_s)

    def _checked(self, results: object, rows: int) -> torch.Tensor:
        if not isinstance(results, torch.Tensor) or results.dim() != 2 or len(results) != rows:
            got = f"{dtype_name(results.dtype)}{list(results.shape)}" if isinstance(results, torch.Tensor) else results
            raise InvalidRequest(
                f"experts on rank {self._rank} returned {got!s:.80}; it must be a tensor [{rows}, ...]"
            )
        accumulator(results.dtype, f"experts on rank {self._rank}")
        return results.detach().cpu()


def _tensors(batch: Sequence[QueuedShare]) -> list[torch.Tensor]:
    """hidden_states, topk_weights and topk_ids of the whole batch."""
    key = batch[0].key
    hidden_dtype, weights_dtype = dtype_from_name(key.hidden_dtype), dtype_from_name(key.weights_dtype)
    columns = [
        [_tensor(s.rows.hidden_states, hidden_dtype, s.num_rows, key.hidden) for s in batch],
        [_tensor(s.rows.topk_weights, weights_dtype, s.num_rows, key.num_topk) for s in batch],
        [_tensor(s.rows.topk_ids, dtype_from_name(key.ids_dtype), s.num_rows, key.num_topk) for s in batch],
    ]
    return [column[0] if len(column) == 1 else _cat(column) for column in columns]


def _tensor(array: npt.NDArray[Any], dtype: torch.dtype, rows: int, width: int) -> torch.Tensor:
    """A tensor over the array's bytes, which are copied only where torch could not use them."""
    if not array.flags.writeable or array.ctypes.data % dtype.itemsize:
        array = array.copy()
    return from_bytes(array.reshape(-1).view(np.uint8), dtype, (rows, width))


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    if tensors[0].dtype.itemsize == 1 and tensors[0].dtype.is_floating_point:  # cat knows no fp8
        return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)
    return torch.cat(tensors)
