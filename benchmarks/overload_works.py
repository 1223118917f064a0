"""What the processes of `benchmarks.overload` do: ranks whose experts take a known time, and callers on a schedule."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from epmesh import AsyncRouter, Communicator, EpmeshError, Overloaded

EXPERTS_PER_RANK = 4
TOP_K = 2


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the mesh can do, and what one caller asks of it.

    Attributes:
        rows, hidden: of one request.
        num_experts: of the mesh.
        batch_rows, batch_s: most rows of one call of the experts, and how long it takes.
        timeout_s: deadline of a request.
        rate: requests a second that one caller offers, whatever becomes of them; 0: as many as it gets answers to.
        callers: requests under way at once where the rate is 0.
        honour: whether a refused request is offered once more after `retry_after_s`, if its deadline allows.
        seconds: how long it lasts; `warm_s` before that do not count.
    """

    rows: int = 8
    hidden: int = 1024
    num_experts: int = EXPERTS_PER_RANK
    batch_rows: int = 32
    batch_s: float = 0.1
    timeout_s: float = 1.0
    rate: float = 0.0
    callers: int = 12
    honour: bool = False
    seconds: float = 8.0
    warm_s: float = 2.0
    seed: int = 1


@dataclass
class Answers:
    """What one caller got, of what it offered after the warm-up; seconds.

    Attributes:
        offered, failed: requests; those that failed otherwise than by a refusal, by the error's name.
        done_s: of each request that was answered, how long it took.
        refused_s: of each refusal, how long it took.
        hints_s: the hints.
        lag_s: by how much the caller itself was behind its schedule, or its own loop.
    """

    seconds: float
    offered: int = 0
    done_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    hints_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)


class FileStop:
    """Set once a file is there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_set(self) -> bool:
        """Whether it is there."""
        return self._path.exists()


def serve(comm: Communicator, folder: Path, load: Load) -> None:
    """Serves until ``stop`` is in the folder; each call of the experts sleeps, so that only a rank's time is short."""
    (folder / f"rank-{comm.global_rank}.pid").write_text(str(os.getpid()))

    def experts(_: int | None, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        time.sleep(load.batch_s)
        return hidden * (weights * (ids >= 0)).sum(1, keepdim=True)

    comm.serve(experts, stop=FileStop(folder / "stop"), max_batch_rows=load.batch_rows)


def call(addresses: list[str], load: Load) -> Answers:
    """One caller, in a process of its own."""
    return asyncio.run(_call(addresses, load))


async def _call(addresses: list[str], load: Load) -> Answers:
    answers = Answers(load.seconds)
    async with AsyncRouter(addresses, timeout_s=load.timeout_s) as router:
        caller = _Caller(router, load, answers)
        await caller.once(0.0)  # the connection is there, and counted are those after the warm-up
        lag = asyncio.create_task(_watch_lag(answers))
        await (caller.on_schedule() if load.rate else caller.one_after_another())
        lag.cancel()
    return answers


class _Caller:
    def __init__(self, router: AsyncRouter, load: Load, answers: Answers) -> None:
        self._router, self._load, self._answers = router, load, answers
        self._dice = np.random.default_rng(load.seed)
        self._hidden = self._dice.standard_normal((load.rows, load.hidden), dtype=np.float32)
        self._weights = np.full((load.rows, TOP_K), 1 / TOP_K, np.float32)

    async def on_schedule(self) -> None:
        """Open loop: requests begin when they are due, whether or not earlier ones were answered."""
        began = time.monotonic()
        counts_from = began + self._load.warm_s
        tasks = set()
        for due in self._times():
            now = time.monotonic() - began
            if due > now:
                await asyncio.sleep(due - now)
            else:
                await asyncio.sleep(0)
            self._answers.lag_s.append(max(0.0, time.monotonic() - began - due))
            tasks.add(task := asyncio.create_task(self.once(counts_from)))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def one_after_another(self) -> None:
        """Closed loop, several at once: what the mesh can do at most."""
        began = time.monotonic()
        until = began + self._load.warm_s + self._load.seconds

        async def one() -> None:
            while time.monotonic() < until:
                await self.once(began + self._load.warm_s)

        await asyncio.gather(*(one() for _ in range(self._load.callers)))

    async def once(self, counts_from: float) -> None:
        """One request, and once more after a refusal where hints are honoured."""
        began, load = time.monotonic(), self._load
        counts = counts_from and began >= counts_from
        self._answers.offered += bool(counts)
        ids = self._dice.integers(0, load.num_experts, (load.rows, TOP_K))
        left_s = load.timeout_s
        while True:
            tried = time.monotonic()
            try:
                await self._router.forward(self._hidden, self._weights, ids, timeout=left_s)
            except Overloaded as exc:
                left_s = load.timeout_s - (time.monotonic() - began) - exc.retry_after_s
                if counts:
                    self._answers.refused_s.append(time.monotonic() - tried)
                    self._answers.hints_s.append(exc.retry_after_s)
                if not load.honour or left_s <= load.batch_s:
                    return
                await asyncio.sleep(exc.retry_after_s)
                continue
            except EpmeshError as exc:
                name = type(exc).__name__
                self._answers.failed[name] = self._answers.failed.get(name, 0) + bool(counts)
                return
            if counts:
                self._answers.done_s.append(time.monotonic() - began)
            return

    def _times(self) -> Iterator[float]:
        """When requests are due: at random, at the rate."""
        due = 0.0
        while due < self._load.warm_s + self._load.seconds:
            yield due
            due += self._dice.exponential(1 / self._load.rate)


async def _watch_lag(answers: Answers) -> None:
    """How late this process runs what is due: its own share of every time that it measures."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.005)
        answers.lag_s.append(time.monotonic() - began - 0.005)
