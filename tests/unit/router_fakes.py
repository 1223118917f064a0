"""Views, and a transport that computes sums in this process, for tests of routers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from epmesh.arrays import Rows
from epmesh.errors import EpmeshError
from epmesh.forward import NodeCall
from epmesh.frames import Buffer
from epmesh.placement import Placement
from epmesh.routes import ELSEWHERE
from epmesh.row_transport import Parts
from epmesh.view import NodeInfo, RankInfo, RankMode, View

STRIDE = 4


def make_view(
    epoch: int,
    experts_of: Mapping[int, Iterable[int]],
    *,
    num_experts: int = 8,
    incarnations: Mapping[int, int] | None = None,
    alive: Iterable[int] | None = None,
    exchange: Iterable[int] = (),
    layers: Iterable[int | None] = (None,),
    mesh_id: str = "mesh",
    front_port: int = 9000,
    node_port: int = 7000,
    stride: int = STRIDE,
) -> View:
    """A view in which the ranks of `experts_of`, or `alive` of them, serve; those in `exchange` do not."""
    ranks = sorted(experts_of if alive is None else alive)
    infos = {
        rank: RankInfo(
            rank=rank,
            incarnation=(incarnations or {}).get(rank, 1),
            device="cpu",
            mode=RankMode.EXCHANGE if rank in set(exchange) else RankMode.SERVE,
            link_endpoint="",
            front_endpoint=f"tcp://127.0.0.1:{front_port + rank}",
        )
        for rank in ranks
    }
    slots = sorted({rank // stride for rank in ranks})
    nodes = tuple(
        NodeInfo(
            slot,
            f"node-{slot}",
            1,
            f"127.0.0.1:{node_port + slot}",
            tuple(infos[r] for r in ranks if r // stride == slot),
        )
        for slot in slots
    )
    placement = Placement(num_experts, {rank: tuple(sorted(experts)) for rank, experts in experts_of.items()})
    placements = dict.fromkeys(layers, placement)
    return View(mesh_id, epoch, epoch, stride, nodes, (), placements)


class FakeMesh:
    """A mesh whose views a test sets."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.tls = None
        self.connected = True
        self.closed = False
        self._callbacks: list[Callable[[View], None]] = []

    def on_view(self, callback: Callable[[View], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def set(self, view: View) -> None:
        self.view = view
        for callback in list(self._callbacks):
            callback(view)

    def close(self) -> None:
        self.closed = True


def expert_rows(
    hidden: npt.NDArray[Any], weights: npt.NDArray[Any], ids: npt.NDArray[Any], mine: npt.NDArray[np.bool_]
) -> npt.NDArray[Any]:
    """What the experts of these tests give: expert e multiplies by e + 1."""
    factor = np.where(mine, weights.astype(np.float64) * (ids + 1), 0).sum(axis=1)
    rows: npt.NDArray[Any] = (hidden.astype(np.float64) * factor[:, None]).astype(hidden.dtype)
    return rows


def expected(hidden: npt.NDArray[Any], weights: npt.NDArray[Any], ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sums of a forward, computed in one place."""
    return expert_rows(hidden, weights, ids, ids >= 0)


class FakeTransport:
    """Answers at once, or when a test says so; `before` may fail a call with what it returns.

    Attributes:
        calls: every call that was sent.
        held: whether answers wait for `release`.
        cancelled: numbers of calls whose futures were cancelled.
    """

    name = "fake"

    def __init__(self, before: Callable[[NodeCall], EpmeshError | None] = lambda call: None) -> None:
        self.before = before
        self.calls: list[NodeCall] = []
        self.cancelled: list[NodeCall] = []
        self.held = False
        self.closed = False
        self.sent = threading.Semaphore(0)
        self._waiting: list[tuple[NodeCall, Parts, Future[Rows]]] = []
        self._lock = threading.Lock()

    def send(self, call: NodeCall, parts: Parts, timeout_s: float) -> Future[Rows]:
        future: Future[Rows] = Future()
        future.add_done_callback(lambda done: self.cancelled.append(call) if done.cancelled() else None)
        with self._lock:
            self.calls.append(call)
            if self.held:
                self._waiting.append((call, parts, future))
        if not self.held:
            self._answer(call, parts, future)
        self.sent.release()
        return future

    def release(self) -> None:
        """Answers what waits, and what comes from now on."""
        with self._lock:
            self.held = False
            waiting, self._waiting = self._waiting, []
        for one in waiting:
            self._answer(*one)

    def sums(self, call: NodeCall, done: Future[Any]) -> Rows:
        rows: Rows = done.result()
        return rows

    def close(self) -> None:
        self.closed = True

    def _answer(self, call: NodeCall, parts: Parts, future: Future[Rows]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        error = self.before(call)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(node_sums(parts))


def node_sums(parts: Parts) -> Rows:
    """What a node answers to a call: the sums of the ids that are its own, float32 or float64 rows."""
    hidden, weights, ids, targets = (_array(meta.dtype, meta.shape, data) for meta, data in zip(*parts, strict=True))
    return Rows.of(np.ascontiguousarray(expert_rows(hidden, weights, ids, (targets != ELSEWHERE) & (ids >= 0))))


def _array(dtype: str, shape: Iterable[int], data: Buffer) -> npt.NDArray[Any]:
    return np.frombuffer(data, np.dtype(dtype)).reshape(tuple(shape))
