"""What the ranks of `benchmarks.faults` run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from epmesh import Communicator, PeerLost

EXPERTS_PER_RANK = 2
_BEFORE_READY = 3  # exchanges
_READY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Met:
    """What one survivor met. Times are ``time.monotonic()``, one clock for all processes of a machine.

    Attributes:
        lost_at: when `PeerLost` was raised.
        resumed_at: when the next exchange, of the experts that still have holders, was done.
        ranks: whom the error named.
    """

    lost_at: float
    resumed_at: float
    ranks: tuple[int, ...]


def exchange(comm: Communicator, num_tokens: int, experts: list[int]) -> None:
    """One dispatch with its combine, of rows that want two of `experts` each; checked against what they must give.

    Raises:
        AssertionError: a sum is wrong.
    """
    ids = torch.tensor(experts)[torch.randint(len(experts), (num_tokens, 2))]
    rows = torch.randn(num_tokens, 64)
    received, weights, row_ids = comm.dispatch(rows, torch.full((num_tokens, 2), 0.5), ids, True)
    placement = comm.view.placement(None)
    assert placement is not None
    mine = torch.isin(row_ids, torch.tensor(placement.experts_of[comm.global_rank]))
    out = comm.combine(received * (weights * mine).sum(1, keepdim=True), True)
    torch.testing.assert_close(out, rows)


def exchange_until_lost(comm: Communicator, folder: Path, num_tokens: int) -> Met:
    """Exchanges without a pause until somebody is lost, then goes on with the others."""
    everybody = [expert for held in _experts_of(comm).values() for expert in held]
    done = 0
    try:
        while True:
            exchange(comm, num_tokens, everybody)
            done += 1
            if done == _BEFORE_READY:
                (folder / f"ready-{comm.global_rank}").touch()
    except PeerLost as error:
        lost_at, ranks = time.monotonic(), error.ranks
    view, _ = comm.wait_ready(_READY_TIMEOUT_S)
    held = [expert for rank, experts in _experts_of(comm).items() if rank in view.ranks for expert in experts]
    exchange(comm, num_tokens, held)
    return Met(lost_at, time.monotonic(), ranks)


def exchange_until_told(comm: Communicator, folder: Path, num_tokens: int) -> int:
    """Exchanges until rank 0 finds the file ``stop``; how many exchanges that were. Any error is raised."""
    everybody = [expert for held in _experts_of(comm).values() for expert in held]
    done = 0
    while True:
        exchange(comm, num_tokens, everybody)
        done += 1
        if done == _BEFORE_READY:
            (folder / f"ready-{comm.global_rank}").touch()
        if int(comm.broadcast(torch.tensor([int((folder / "stop").exists())]))):
            return done


def _experts_of(comm: Communicator) -> dict[int, tuple[int, ...]]:
    placement = comm.view.placement(None)
    assert placement is not None
    return dict(placement.experts_of)
