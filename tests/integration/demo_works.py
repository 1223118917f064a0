"""What ranks do instead of the demo's work: things that must not pass. They are sent to ranks by name."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from epmesh import Communicator
from epmesh.errors import InvalidRequest
from epmesh_server.cli.demo import DemoPlan
from epmesh_server.cli.demo.rank_work import RankReport, generate_share
from epmesh_server.ranks.communicator import JoinedCommunicator
from examples.moe_lm import serving


def refuse(comm: JoinedCommunicator, root: Path, plan: DemoPlan, progress_path: str) -> RankReport:
    """Rank 2 does not like what it is given."""
    if comm.global_rank == 2:
        raise InvalidRequest("rank 2 does not like it")
    return generate_share(comm, root, plan, progress_path)


def die(comm: JoinedCommunicator, root: Path, plan: DemoPlan, progress_path: str) -> RankReport:
    """Rank 3 dies in the middle of a step."""
    if comm.global_rank == 3:
        _after(5, comm, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    return generate_share(comm, root, plan, progress_path)


def miscalculate(comm: JoinedCommunicator, root: Path, plan: DemoPlan, progress_path: str) -> RankReport:
    """One of rank 1's results, in one layer of one step, is off by a hair."""
    if comm.global_rank == 1:
        _after(9, comm, lambda results: results[:1].mul_(1.01))
    return generate_share(comm, root, plan, progress_path)


def _after(calls: int, comm: JoinedCommunicator, act: Callable[[torch.Tensor], object]) -> None:
    """Has `act` look at what the rank's experts give back, once, after that many combines."""
    combine, seen = comm.combine, 0

    def acting(hidden_states: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += bool(len(hidden_states))
        if seen == calls:
            act(hidden_states)
        return combine(hidden_states)

    comm.combine = acting  # type: ignore[method-assign,assignment]


class _NearlyRight:
    """Served experts whose first result is off by a hair on rank 2."""

    def __init__(self, comm: Communicator) -> None:
        self._served, self._wrong = serving.experts(comm), comm.global_rank == 2

    def __call__(self, layer: int, hidden_states: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        results = self._served(layer, hidden_states, *rest)
        self._wrong, wrong = False, self._wrong
        return results * 1.01 if wrong else results


def wrong_experts(comm: Communicator) -> _NearlyRight:
    """A factory of the second act."""
    return _NearlyRight(comm)


def failing_experts(comm: Communicator) -> Callable[..., torch.Tensor]:
    """A factory whose experts fail."""

    def fail(*_: object) -> torch.Tensor:
        raise ArithmeticError("no result today")

    return fail
