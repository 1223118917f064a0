"""Bytes between the members of a group, by a torch process group that the caller made.

Collective calls are made by one thread at a time and in the same order on all members; sends and receives may go on
beside them, for torch keeps the two apart. The group's methods are called directly, so it need not be known to
``torch.distributed``. A Gloo group in which something failed or timed out is of no use afterwards, and is not asked
again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from epmesh.errors import DeadlineExceeded, EpmeshError, MeshUnavailable
from epmesh_server.ranks.tensors import Bytes

_T = TypeVar("_T")
_SLICE = timedelta(milliseconds=250)  # between two looks at the clock, and for Python at its signals
_FOR_EVER_S = 365 * 86400.0
_TAG = 1 << 30  # of sends and receives, far from those that callers use


class Mail:
    """One member's end of a process group. Peers are positions in it."""

    def __init__(self, group: Any, ranks: Sequence[int], timeout_s: float) -> None:
        """Takes the group as it is.

        Args:
            group: a torch ``ProcessGroup`` or backend that moves CPU tensors.
            ranks: the members as global ranks, for errors.
            timeout_s: how long one operation may wait for other members.
        """
        self._group = group
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._failure: EpmeshError | None = None
        self._receiving: dict[int, Any] = {}  # the work of the receive that is under way, by peer

    def check(self) -> None:
        """Raises `MeshUnavailable` where an operation failed before."""
        if self._failure is not None:
            raise MeshUnavailable(f"the process group failed before: {self._failure}; make new ones on all ranks")

    def scatter(self, data: Bytes, sizes: Sequence[int], coming: Sequence[int]) -> Bytes:
        """Gives every member its segment of `data`; collective.

        Args:
            data: flat; segment i, of ``sizes[i]`` bytes, is for member i.
            coming: bytes that come from every member.

        Returns:
            What came, flat, in the order of members.
        """
        if len(sizes) == 1:
            return data.copy()
        self.check()
        into = np.empty(sum(coming), np.uint8)
        work = self._group.alltoall_base(
            torch.from_numpy(into), torch.from_numpy(data), list(map(int, coming)), list(map(int, sizes))
        )
        self._finish(work)
        return into

    def broadcast(self, data: Bytes, src: int) -> None:
        """Overwrites flat `data` with that of `src`; collective."""
        if len(self._ranks) == 1 or not data.size:
            return
        self.check()
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._finish(self._group.broadcast([torch.from_numpy(data)], options))

    def send(self, data: Bytes, dst: int) -> Any:
        """Starts to send; the work that is returned keeps `data`, and `await_peer` waits for it."""
        self.check()
        return self._group.send([torch.from_numpy(data)], dst, _TAG)

    def recv(self, size: int, src: int, *, patient: bool = False) -> Bytes:
        """The next `size` bytes of `src`, which must have sent as many at once; `patient`: however late they come."""
        self.check()
        data = np.empty(size, np.uint8)
        if size:
            work = self._group.recv([torch.from_numpy(data)], src, _TAG)
            self._receiving[src] = work
            try:
                self.await_peer(work, src, _FOR_EVER_S if patient else self._timeout_s)
            finally:
                del self._receiving[src]
        return data

    def end_recv(self, src: int) -> None:
        """Fails the receive from `src` that another thread waits for, if any, and all else in the group with it."""
        work = self._receiving.get(src)
        if work is not None:
            self._failed(MeshUnavailable("the process ends"))
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(milliseconds=1))  # a wait that times out takes all of Gloo's connections down

    def await_peer(self, work: Any, peer: int, timeout_s: float | None = None) -> None:
        """Waits for a send to or a receive from `peer`."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        started = time.monotonic()
        try:
            # Not in slices: a wait that times out takes all of Gloo's connections down with it.
            work.wait(timedelta(seconds=limit_s))
        except RuntimeError as exc:
            if time.monotonic() - started >= limit_s:
                raise self._failed(self._late(peer)) from exc
            raise self._failed(MeshUnavailable(f"rank {self._ranks[peer]} is out of reach: {exc}")) from exc

    def await_future(self, future: Future[_T], peer: int) -> _T:
        """The result of what another thread receives of `peer`."""
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            raise self._failed(self._late(peer)) from None

    def _late(self, peer: int) -> DeadlineExceeded:
        rank = self._ranks[peer]
        return DeadlineExceeded(rank, 0, f"rank {rank} neither took nor sent a message within {self._timeout_s:g} s")

    def _finish(self, work: Any) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError as exc:
                if work.is_completed() and not _succeeded(work):
                    raise self._failed(MeshUnavailable(f"some rank is out of reach: {exc}")) from exc
            if time.monotonic() > deadline:
                text = f"some rank did not come to a collective call within {self._timeout_s:g} s"
                raise self._failed(DeadlineExceeded(message=text))

    def _failed(self, error: EpmeshError) -> EpmeshError:
        self._failure = error
        return error


def _succeeded(work: Any) -> bool:
    """Whether work that is done went well; it may have been done just after a slice was over."""
    try:
        work.wait()
    except RuntimeError:
        return False
    return True
