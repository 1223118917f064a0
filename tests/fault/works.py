"""What fault tests run in the ranks: each meets a death, tells what it saw, and goes on in the next view."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from epmesh import Communicator, EpmeshError, ExpertUnavailable
from tests.integration.mesh_works import tell


@dataclass
class Seen:
    """What one rank saw of a fault. Times are ``time.monotonic()``, one clock for all processes of the machine.

    Attributes:
        error: class of the error; "" for none.
        ranks: whom it names.
        at: when it was raised.
        resumed_at: when the next exchange was done.
        view: ranks of the view it went on in.
        sums: what that exchange gave for this rank's rows.
        unavailable: the experts that its rows could not reach after that.
    """

    error: str = ""
    text: str = ""
    ranks: tuple[int, ...] = ()
    at: float = 0.0
    resumed_at: float = 0.0
    epoch: int = 0
    view: list[int] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    unavailable: tuple[int, ...] = ()


def exchange(comm: Communicator, experts: list[int], layer: int | None = None) -> list[float]:
    """One row for each of `experts`; its holder answers with the row, so each sum is the expert's number + 1."""
    ids = torch.tensor(experts, dtype=torch.int64).reshape(-1, 1)
    rows = ids.float() + 1.0
    received = comm.dispatch(rows.expand(-1, 4), torch.ones(len(experts), 1), ids, True, layer=layer)[0]
    return [float(each) for each in comm.combine(received, True)[:, 0]]


def until_error(comm: Communicator, inbox: Path, plan: str, victims: list[int], experts: list[int]) -> Seen:
    """Does what `plan` says until an error comes, then goes on without the victims.

    Args:
        plan: "dispatch": victims stay away from the dispatch the others are in. "combine": from its combine.
            "exchanges": all exchange without a pause, and the victims are killed somewhere.
        experts: what every rank's rows want.
    """
    seen = Seen()
    try:
        if plan == "exchanges":
            _exchange_for_ever(comm, inbox, experts)
        _stay_away(comm, inbox, plan, victims, experts)
    except EpmeshError as error:
        seen.at = time.monotonic()
        seen.error, seen.text = type(error).__name__, str(error)
        seen.ranks = getattr(error, "ranks", ())
    tell(inbox, "saw", comm.global_rank)
    return go_on(comm, seen, experts)


def _exchange_for_ever(comm: Communicator, inbox: Path, experts: list[int]) -> None:
    done = 0
    while True:
        exchange(comm, experts)
        done += 1
        if done == 5:
            tell(inbox, "ready", comm.global_rank)


def _stay_away(comm: Communicator, inbox: Path, plan: str, victims: list[int], experts: list[int]) -> None:
    comm.all_reduce(torch.ones(1))  # buffers are there: the exchange itself is what is cut
    ids = torch.tensor(experts, dtype=torch.int64).reshape(-1, 1)
    rows = torch.ones(len(experts), 4)
    if plan == "dispatch":
        _enter(comm, inbox, victims)
    received = comm.dispatch(rows, torch.ones(len(experts), 1), ids, True)[0]
    if plan == "combine":
        _enter(comm, inbox, victims)
    comm.combine(received, True)


def _enter(comm: Communicator, inbox: Path, victims: list[int]) -> None:
    tell(inbox, "ready", comm.global_rank)
    while comm.global_rank in victims:
        time.sleep(60)


def go_on(comm: Communicator, seen: Seen, experts: list[int]) -> Seen:
    """Adopts the next view, exchanges rows of the experts that still have holders, then of all."""
    view, _ = comm.wait_ready(20.0)
    placement = view.placement(None)
    assert placement is not None
    held = [expert for expert in experts if any(rank in view.ranks for rank in placement.holders[expert])]
    seen.view, seen.epoch = list(view.ranks), view.epoch
    seen.sums = exchange(comm, held)
    seen.resumed_at = time.monotonic()
    try:
        exchange(comm, experts)
    except ExpertUnavailable as error:
        seen.unavailable = error.experts
    return seen


def wait_outside(comm: Communicator, inbox: Path, go: Path, experts: list[int]) -> Seen:
    """Idles until the file is there, then exchanges and meets what happened meanwhile."""
    exchange(comm, experts)
    tell(inbox, "ready", comm.global_rank)
    while not go.exists():
        time.sleep(0.002)
    seen = Seen()
    try:
        exchange(comm, experts)
    except EpmeshError as error:
        seen.at = time.monotonic()
        seen.error, seen.text, seen.ranks = type(error).__name__, str(error), getattr(error, "ranks", ())
    return go_on(comm, seen, experts)


def late(comm: Communicator, who: int, delay_s: float) -> tuple[Seen, int]:
    """One rank comes to an exchange too late; all come to the next one. What the first gave, and the epoch before."""
    exchange(comm, [0, 1])
    before, seen = comm.epoch, Seen()
    if comm.global_rank == who:
        time.sleep(delay_s)  # what is tested: a rank that is late, not dead
    try:
        exchange(comm, [0, 1])
    except EpmeshError as error:
        seen.error, seen.text, seen.ranks = type(error).__name__, str(error), (getattr(error, "rank", -1),)
    seen.sums = exchange(comm, [0, 1])
    seen.epoch, seen.view = comm.epoch, list(comm.view.ranks)
    return seen, before


def exchange_until(comm: Communicator, inbox: Path, stop: Path) -> tuple[int, int, float]:
    """Exchanges until the first rank finds the file; how many, the epoch at the end, and the longest pause."""
    done, longest, last = 0, 0.0, time.monotonic()
    while True:
        exchange(comm, [0, 1])
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        done += 1
        if done == 5:
            tell(inbox, "ready", comm.global_rank)
        if int(comm.broadcast(torch.tensor([int(stop.exists())]), src=0)):
            return done, comm.epoch, longest


def sums(comm: Communicator, experts: list[int]) -> tuple[list[float], list[int], int]:
    """One exchange, the ranks of the view, and its epoch."""
    return exchange(comm, experts), list(comm.view.ranks), comm.epoch
