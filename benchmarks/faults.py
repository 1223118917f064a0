"""How long a fault takes: ``python -m benchmarks.faults --trials 200``.

A mesh of real processes on this machine exchanges rows without a pause; then a rank or a node is killed, a rank is
stopped, or the coordinator is killed. Printed are median, p99 and worst of all trials beside what is promised, from the
fault to the last survivor's error, and to its next exchange being done; every sum is checked. Whoever was killed comes
back before the next trial.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.fault_works import EXPERTS_PER_RANK, Met, exchange_until_lost, exchange_until_told
from epmesh.errors import PeerLost
from epmesh.testing import LocalMesh
from epmesh.v1 import group_service_pb2, group_service_pb2_grpc

_POLL_S = 0.002
_READY_S = 30.0
_WITHIN_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        nodes, ranks: of the mesh, and of each node.
        tokens: rows a rank has in an exchange.
        trials: of each fault.
    """

    nodes: int = 2
    ranks: int = 2
    tokens: int = 32
    trials: int = 20
    seed: int = 1


@dataclass
class Figure:
    """One promise, seconds, and what was measured.

    Attributes:
        promised_s: the p99 that is promised.
    """

    name: str
    promised_s: float
    measured_s: list[float] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        """Of what was measured."""
        return float(np.percentile(self.measured_s, percent))


class Faults:
    """Trials on one mesh."""

    def __init__(self, mesh: LocalMesh, plan: Plan) -> None:
        self._mesh, self._plan = mesh, plan
        self._dice = random.Random(plan.seed)

    def kill_rank(self) -> tuple[float, float, float]:
        """Kills a rank somewhere in an exchange; seconds to `PeerLost`, to the next exchange, and until it is back."""
        victim = self._dice.randrange(self._plan.nodes * self._plan.ranks)
        return self._strike({victim}, lambda: self._mesh.kill_rank(victim))

    def kill_node(self) -> tuple[float, float, float]:
        """Kills a node service with its ranks."""
        slot = self._dice.randrange(self._plan.nodes)
        victims = set(range(slot * self._plan.ranks, (slot + 1) * self._plan.ranks))
        return self._strike(victims, lambda: self._mesh.kill_node(slot))

    def stop_rank(self) -> tuple[float, float, float]:
        """Stops a rank (SIGSTOP); it is killed once the others went on."""
        victim = self._dice.randrange(self._plan.nodes * self._plan.ranks)
        return self._strike({victim}, lambda: self._mesh.pause_rank(victim), end=lambda: self._mesh.kill_rank(victim))

    def kill_coordinator(self) -> float:
        """Kills the coordinator and starts it again while all exchange; seconds until it commits something."""
        with _folder() as folder:
            future = self._mesh.start(exchange_until_told, folder, self._plan.tokens)
            self._await_ready(folder)
            self._mesh.kill_coordinator()
            started = time.monotonic()
            self._mesh.start_coordinator()
            self._commit()
            back_s = time.monotonic() - started
            (folder / "stop").touch()
            future.result(_WITHIN_S)  # raises whatever an exchange met
        return back_s

    def _strike(
        self, victims: set[int], strike: Callable[[], None], end: Callable[[], None] = lambda: None
    ) -> tuple[float, float, float]:
        with _folder() as folder:
            future = self._mesh.start(exchange_until_lost, folder, self._plan.tokens)
            self._await_ready(folder)
            time.sleep(self._dice.uniform(0, 0.03))  # anywhere in an exchange
            struck_at = time.monotonic()
            strike()
            deadline = struck_at + _READY_S
            while len(self._mesh.view().ranks) > self._plan.nodes * self._plan.ranks - len(victims):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{victims} are still in the view")
                time.sleep(_POLL_S)
            end()
            results = future.result(_WITHIN_S)
        met = [result for result in results if isinstance(result, Met)]
        dead = {result.rank for result in results if isinstance(result, PeerLost)}
        if dead != victims or any(not set(each.ranks) <= victims for each in met):
            raise RuntimeError(f"{victims} were struck, but {dead} are dead, and survivors name {met}")
        back_s = self._replace(victims)
        return max(m.lost_at for m in met) - struck_at, max(m.resumed_at for m in met) - struck_at, back_s

    def _replace(self, victims: set[int]) -> float:
        started = time.monotonic()
        self._mesh.start_node(min(victims) // self._plan.ranks)
        return time.monotonic() - started

    def _await_ready(self, folder: Path) -> None:
        deadline = time.monotonic() + _READY_S
        while len(list(folder.glob("ready-*"))) < self._plan.nodes * self._plan.ranks:
            if time.monotonic() > deadline:
                raise TimeoutError("the ranks do not exchange")
            time.sleep(_POLL_S)

    def _commit(self) -> None:
        """Makes a group, which is one commit, as soon as the coordinator takes it."""
        name = f"g{uuid.uuid4().hex[:12]}"
        deadline = time.monotonic() + _READY_S
        with grpc.insecure_channel(self._mesh.address) as channel:
            stub = group_service_pb2_grpc.GroupServiceStub(channel)
            while True:
                request = group_service_pb2.CreateGroupRequest(request_id=name, name=name, ranks=[0])
                try:
                    stub.CreateGroup(request, timeout=1.0)
                    break
                except grpc.RpcError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_POLL_S)
            stub.DestroyGroup(group_service_pb2.DestroyGroupRequest(request_id=f"-{name}", name=name), timeout=5.0)


def run(plan: Plan, *, as_json: bool = False) -> list[Figure]:
    """Runs all trials and prints the figures."""
    console = Console(file=sys.stderr if as_json else sys.stdout, soft_wrap=True)
    console.print(
        f"faults: {plan.nodes} nodes x {plan.ranks} ranks on this machine, {plan.tokens} tokens a rank, "
        f"{plan.trials} trials of each"
    )
    figures: list[Figure] = []
    experts = EXPERTS_PER_RANK * plan.nodes * plan.ranks
    with LocalMesh(plan.nodes, plan.ranks, num_experts=experts, exchange_timeout_s=10.0) as mesh:
        faults = Faults(mesh, plan)
        for name, strike, lost_s, resumed_s in (
            ("rank killed", faults.kill_rank, 0.5, 1.5),
            ("node killed", faults.kill_node, 0.5, 1.5),
            ("rank stopped", faults.stop_rank, 2.0, 3.0),
        ):
            lost, resumed = Figure(f"{name}: PeerLost", lost_s), Figure(f"{name}: next exchange done", resumed_s)
            back = Figure(f"{name}: replacement active", 2.0)
            for trial in range(plan.trials):
                for figure, seconds in zip((lost, resumed, back), strike(), strict=True):
                    figure.measured_s.append(seconds)
                _progress(console, name, trial, plan)
            figures += [lost, resumed, back]
        control = Figure("coordinator killed: control back", 2.0)
        for trial in range(plan.trials):
            control.measured_s.append(faults.kill_coordinator())
            _progress(console, "coordinator killed", trial, plan)
        figures.append(control)
    if as_json:
        print(json.dumps({figure.name: figure.measured_s for figure in figures}))
    else:
        console.print(_table(figures))
        console.print(
            "seconds, of the slowest survivor; every sum was right, and exchanges met no error of a coordinator"
        )
    return figures


def _progress(console: Console, name: str, trial: int, plan: Plan) -> None:
    if (trial + 1) % max(1, plan.trials // 4) == 0:
        console.print(f"faults: {name}, {trial + 1} of {plan.trials}")


def _table(figures: list[Figure]) -> Table:
    table = Table()
    for name in ("", "median", "p99", "worst", "promised p99"):
        table.add_column(name, justify="left" if not name else "right")
    for figure in figures:
        cells = (figure.percentile(50), figure.percentile(99), max(figure.measured_s), figure.promised_s)
        table.add_row(figure.name, *(f"{value:.3f}" for value in cells))
    return table


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="epmesh-faults-") as folder:
        yield Path(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("nodes", "ranks", "tokens", "trials", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Plan, name))
    parser.add_argument("--json", action="store_true", help="print all measured seconds as one JSON object")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    run(Plan(**given), as_json=as_json)


if __name__ == "__main__":
    main()
