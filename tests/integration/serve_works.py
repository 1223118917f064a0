"""Ranks that serve in tests, and the plainest router there can be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from epmesh import Communicator, InvalidRequest, StaleEpoch, View
from epmesh.frames import tensor_meta
from epmesh.front import FrontClient, FrontPeer, FrontReply
from epmesh.v1 import front_pb2
from epmesh.view import RankMode
from epmesh_server.ranks.communicator import JoinedCommunicator
from epmesh_server.ranks.serve_memory import ServeMemories, ServeMemory
from epmesh_server.ranks.serving_experts import ServeStats
from epmesh_server.ranks.tensors import as_bytes, dtype_from_name, dtype_name, from_bytes

HIDDEN = 16
ODD = 2**53 + 1  # what no float of 64 bits can be
POISON = 999.0  # a row that begins with it makes `experts` fail


class FileStop:
    """Set once a file is there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_set(self) -> bool:
        return self._path.exists()


def experts(
    layer: int | None, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Expert e makes (e + 1) x + layer of a row x."""
    if (hidden_states[:, 0] == POISON).any():
        raise ArithmeticError("poison")
    scale = torch.where(topk_ids >= 0, topk_ids + 1, 0).float()
    present = (topk_ids >= 0).float()
    weights = topk_weights.float()
    total = (weights * scale).sum(1, keepdim=True) * hidden_states.float()
    total += (weights * present).sum(1, keepdim=True) * (layer or 0)
    return total.to(hidden_states.dtype)


def reference(layer: int | None, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """What a mesh of any shape must come near to."""
    return experts(layer, hidden.double(), weights.double(), ids)


def serve(
    comm: Communicator, stop: Path, delay_s: float = 0.0, max_batch_rows: int = 4096, **options: float
) -> ServeStats:
    """Serves until the file is there; `delay_s` is what each call of the experts takes besides."""

    def slow(layer: int | None, *tensors: torch.Tensor) -> torch.Tensor:
        time.sleep(delay_s)  # what is tested: experts that take their time
        return experts(layer, *tensors)

    batch: dict[str, Any] = {"max_batch_rows": max_batch_rows, **options}
    comm.serve(slow if delay_s else experts, stop=FileStop(stop), **batch)
    assert isinstance(comm, JoinedCommunicator)
    return comm.serving_stats


def serve_held(comm: Communicator, folder: Path, rank: int, options: dict[str, Any]) -> ServeStats:
    """As `serve`, until ``stop`` is in the folder; while ``hold`` is, the experts of `rank` stand still.

    They write what comes in meanwhile to the folder, for `seen`.
    """
    assert isinstance(comm, JoinedCommunicator)
    stats = comm.serving_stats

    def held(layer: int | None, *tensors: torch.Tensor) -> torch.Tensor:
        while comm.global_rank == rank and (folder / "hold").exists():
            (folder / "writing").write_text(f"{stats.shares} {stats.cancelled}")
            (folder / "writing").rename(folder / "seen")
            time.sleep(0.002)
        return experts(layer, *tensors)

    comm.serve(held, stop=FileStop(folder / "stop"), **options)
    return stats


def serve_held_and_count(comm: Communicator, folder: Path, rank: int) -> int:
    """As `serve_held`; bytes of this rank's section of shared memory that are taken when it ends."""
    made: list[ServeMemory] = []
    map_memory = ServeMemory.__init__

    def noted(memory: ServeMemory, *args: Any) -> None:
        map_memory(memory, *args)
        made.append(memory)

    ServeMemory.__init__ = noted  # type: ignore[method-assign, assignment]
    serve_held(comm, folder, rank, {})
    return sum(memory.slabs.taken_bytes for memory in made)


def seen(folder: Path) -> tuple[int, int]:
    """Shares that came in, and those that were cancelled, at the rank that stands still."""
    try:
        shares, cancelled = (folder / "seen").read_text().split()
    except FileNotFoundError:
        return 0, 0
    return int(shares), int(cancelled)


def serve_unmapped(comm: Communicator, stop: Path, rank: int) -> ServeStats:
    """As `serve`; `rank` comes too late to map any memory in which it is handed rows."""

    def never(_: ServeMemories, membership_epoch: int) -> ServeMemory:
        raise StaleEpoch(membership_epoch + 1)

    if comm.global_rank == rank:
        ServeMemories.of = never  # type: ignore[method-assign, assignment]
    return serve(comm, stop)


def serve_wrong(comm: Communicator, stop: Path, kind: str) -> None:
    """Serves with experts whose results are of an unusual kind."""

    def wrong(layer: int | None, hidden_states: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        rows = len(hidden_states)
        made = {
            "float8": torch.zeros(rows, 4).to(torch.float8_e4m3fn),
            "complex": torch.zeros(rows, 4, dtype=torch.complex64),
            "wrong_rows": torch.zeros(rows + 1, 4),
            "not_a_tensor": None,
            "integers": torch.full((rows, 1), ODD),
        }
        return made[kind]  # type: ignore[return-value]

    comm.serve(wrong, stop=FileStop(stop))


def serve_and_call(comm: Communicator) -> list[str]:
    """What a rank hears that makes other calls while it serves."""
    stop = threading.Event()
    texts = []

    def call() -> None:
        try:
            for each in (lambda: comm.all_reduce(torch.ones(1)), lambda: comm.serve(experts)):
                with pytest.raises(InvalidRequest) as refused:
                    each()
                texts.append(str(refused.value)[: len("rank 0 serves already")])
        finally:
            stop.set()

    def call_first(layer: int | None, *tensors: torch.Tensor) -> torch.Tensor:
        return experts(layer, *tensors)

    class CallsFirst:
        """Set once the other thread has called."""

        thread: threading.Thread | None = None

        def is_set(self) -> bool:
            if self.thread is None:
                self.thread = threading.Thread(target=call)
                self.thread.start()
            return stop.is_set()

    comm.serve(call_first, stop=CallsFirst())
    return texts


def wait_serving(view: Callable[[], View], ranks: list[int], timeout_s: float = 20.0) -> View:
    """The first view in which exactly `ranks` serve."""
    deadline = time.monotonic() + timeout_s
    while True:
        newest = view()
        if serving(newest) == ranks:
            return newest
        assert time.monotonic() < deadline, newest
        time.sleep(0.005)


def serving(view: View) -> list[int]:
    return [rank for rank, info in view.ranks.items() if info.mode is RankMode.SERVE and info.front_endpoint]


@dataclass(frozen=True)
class Call:
    """Rows for the node `slot`, on their way."""

    slot: int
    reply: Future[FrontReply]


class PlainRouter:
    """Sends every id to the first serving rank that holds its expert."""

    def __init__(self, view: View) -> None:
        self.view = view
        self._client = FrontClient(view.mesh_id)

    def close(self) -> None:
        self._client.close()

    def targets(self, layer: int | None, ids: torch.Tensor) -> torch.Tensor:
        """The global rank for each id, -1 for none."""
        placement = self.view.placement(layer)
        assert placement is not None
        alive = serving(self.view)
        first = [next(rank for rank in holders if rank in alive) for holders in placement.holders]
        return torch.where(ids >= 0, torch.tensor(first)[ids.clamp(min=0).long()], -1)

    def start(
        self,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        *,
        layer: int | None = None,
        timeout_s: float = 20.0,
        entry: int | None = None,
        targets: torch.Tensor | None = None,
    ) -> list[Call]:
        """Asks every node that has experts for the rows; `entry` says by which of its ranks (default: the lowest)."""
        targets = self.targets(layer, ids) if targets is None else targets
        calls = []
        for node in self.view.nodes:
            ranks = [rank for rank in serving(self.view) if self.view.slot_of(rank) == node.slot]
            codes = torch.full(ids.shape, 127, dtype=torch.uint8)
            for index, rank in enumerate(ranks):
                codes[targets == rank] = index
            if not (codes != 127).any():
                continue
            request = front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(epoch=self.view.epoch, ranks=ranks))
            if layer is not None:
                request.serve_rows.layer = layer
            rank = entry if entry in ranks else ranks[0]
            calls.append(Call(node.slot, self.call(rank, request, [hidden, weights, ids, codes], timeout_s)))
        return calls

    def call(
        self, rank: int, request: front_pb2.FrontRequest, tensors: list[torch.Tensor], timeout_s: float = 20.0
    ) -> Future[FrontReply]:
        """One request to the front of `rank`."""
        request.tensors.extend(tensor_meta(dtype_name(t.dtype), tuple(t.shape)) for t in tensors)
        info = self.view.ranks[rank]
        peer = FrontPeer(rank, info.incarnation, info.front_endpoint)
        return self._client.call(peer, request, [as_bytes(t).data for t in tensors], timeout_s=timeout_s)

    def forward(
        self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, **options: object
    ) -> torch.Tensor:
        """The sums, in slot order and fp32."""
        return total(hidden, self.start(hidden, weights, ids, **options))  # type: ignore[arg-type]


def total(hidden: torch.Tensor, calls: list[Call]) -> torch.Tensor:
    """Adds the nodes' answers up."""
    result = torch.zeros(hidden.shape, dtype=torch.float32)
    dtype = hidden.dtype
    for call in calls:
        reply = call.reply.result(30)
        (meta,) = reply.response.tensors
        dtype = dtype_from_name(meta.dtype)
        result = result + from_bytes(reply.tensors[0], dtype, tuple(meta.shape)).float()
    return result.to(dtype)


def some_rows(
    num_rows: int, num_experts: int, num_topk: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_states, topk_weights, topk_ids; some ids are -1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    weights = torch.rand(num_rows, num_topk, generator=generator)
    order = torch.rand(num_rows, num_experts, generator=generator).argsort(1)
    ids = order[:, :num_topk].clone()
    ids[torch.rand(num_rows, num_topk, generator=generator) < 0.1] = -1
    return hidden, weights, ids
