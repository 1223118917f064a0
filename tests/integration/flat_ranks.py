"""Ranks without a mesh: processes with a torch process group of their own, and a `DeviceCommunicator` over it."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from epmesh_server.processes import pickling
from epmesh_server.processes.child import Child, ask, end_all
from epmesh_server.processes.raised import Raised
from epmesh_server.testing.messages import Result, Work
from epmesh_server.testing.preload import start_mesh_fork_server
from tests.integration.contract import MAX_TOKENS, Shape
from tests.integration.targets import Runner

TIMEOUT_S = 20.0
_GRACE_S = 0.5


@dataclass(frozen=True)
class FlatRank:
    """One rank of a group that meets in a file."""

    meeting: str
    rank: int
    world_size: int
    tensor_parallel_size: int
    max_tokens_per_rank: int


def flat_rank_main(pipe: Connection[Any, Any], settings: FlatRank) -> None:
    """Does the works it is sent until the owner is gone."""
    import torch
    from torch import distributed as dist

    import epmesh

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{settings.meeting}",
        rank=settings.rank,
        world_size=settings.world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    group = dist.new_group(list(range(settings.world_size)), backend="gloo")
    comm = epmesh.DeviceCommunicator(
        group,
        torch.device("cpu"),
        group,
        "ep",
        tensor_parallel_size=settings.tensor_parallel_size,
        max_tokens_per_rank=settings.max_tokens_per_rank,
        exchange_timeout_s=TIMEOUT_S,
    )
    while True:
        try:
            message = pickling.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        pipe.send_bytes(pickling.dumps(_answer(comm, message)))


def _answer(comm: object, message: Work) -> object:
    sys.path.extend(path for path in message.path if path not in sys.path)
    try:
        work, args = pickling.loads(message.pickled)
        return Result(pickling.dumps(work(comm, *args)))
    except BaseException as exc:  # noqa: BLE001 - the owner raises it
        return Raised.of(exc)


@contextlib.contextmanager
def start_flat_ranks(shape: Shape, max_tokens_per_rank: int = MAX_TOKENS) -> Iterator[Runner]:
    """As many ranks as `shape` has, all in one group; one that dies returns `None`."""
    start_mesh_fork_server()  # with torch imported, once for all
    with tempfile.TemporaryDirectory(prefix="epmesh-") as folder:
        meeting = str(Path(folder) / "meeting")
        common = (shape.world_size, shape.tensor_parallel_size, max_tokens_per_rank)
        children = {
            rank: Child(f"flat-{rank}", flat_rank_main, FlatRank(meeting, rank, *common))
            for rank in range(shape.world_size)
        }

        def run(work: Callable[..., Any], *args: Any) -> list[Any]:
            answers = ask(children, Work(pickling.dumps((work, args)), tuple(sys.path)))
            for rank, answer in sorted(answers.items()):
                if isinstance(answer, Raised):
                    raise answer.error(f"rank {rank}")
            return [answer and pickling.loads(answer.pickled) for _, answer in sorted(answers.items())]

        try:
            yield run
        finally:
            end_all(children.values(), _GRACE_S)
