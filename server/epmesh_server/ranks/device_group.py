"""Device groups: torch process groups inside one node, made by us, never torch's default one.

`DeviceGroup` is the seam: Gloo on CPU. Every wait has a deadline and an interruption; a group that was interrupted is
aborted and formed anew under another prefix, because members can no longer know who took part in what.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from epmesh.errors import DeadlineExceeded
from epmesh_server.ranks.store import NodeStore

_SLICE = timedelta(milliseconds=20)  # between two looks at what else may have happened

# torch has no public way to make a Gloo group outside of its registry of groups.
_Gloo: Any = dist.ProcessGroupGloo


class DeviceGroup(Protocol):
    """Collectives among the members of a group on one node; ranks are positions among them."""

    process_group: Any

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums in place."""

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Overwrites `tensor` with that of `src`."""

    def abort(self) -> None:
        """Ends whatever is in flight; the group is of no use afterwards."""


class GlooDeviceGroup:
    """Gloo over loopback: the members are on one host."""

    def __init__(self, store: NodeStore, rank: int, size: int, timeout_s: float, check: Callable[[], None]) -> None:
        """Connects to the other members.

        Args:
            timeout_s: longest wait in one operation.
            check: called while waiting; takes in messages, and raises what ends the wait.
        """
        options = _Gloo._Options()
        options._devices = [_Gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=timeout_s)
        self.process_group = _Gloo(store, rank, size, options)
        self._store = store  # the group keeps only a C++ reference
        self._timeout_s = timeout_s
        self._check = check

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sums in place; the same bits on all members."""
        self._finish(self.process_group.allreduce([tensor]), "all_reduce")

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Overwrites `tensor` with that of `src`."""
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._finish(self.process_group.broadcast([tensor], options), "broadcast")

    def abort(self) -> None:
        """Ends whatever is in flight."""
        self.process_group.abort()

    def _finish(self, work: Any, what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError:
                self._check()
                if work.is_completed():
                    work.wait()  # it failed, or was done just after the slice: this tells
                    return
            if time.monotonic() > deadline:
                raise DeadlineExceeded(message=f"{what} of the device group took over {self._timeout_s:g} s")
