"""Ten times more than a mesh can do: ``python -m benchmarks.overload``.

Ranks serve with experts of which each call takes a known time, so what they can do does not hang on this machine.
Routers in processes of their own first find the peak, each asking as soon as it is answered, and then offer a multiple
of it on a schedule that waits for nobody. Printed are goodput over the peak, how long refusals took, what each rank's
memory grew by, and how far behind its own schedule the load generator was: what it measures cannot be better than that.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.overload_works import EXPERTS_PER_RANK, Answers, Load, call, serve
from epmesh.testing import LocalMesh
from epmesh.view import RankMode

PROMISED_GOODPUT, PROMISED_REFUSAL_S = 0.9, 0.05
_LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        nodes, ranks: of the mesh, and of each node.
        routers: processes that call.
        times: the peak that is offered.
        load: of each router; its rate is set here.
    """

    nodes: int = 1
    ranks: int = 2
    routers: int = 2
    times: float = 10.0
    load: Load = field(default_factory=Load)

    @property
    def num_experts(self) -> int:
        """Of the mesh."""
        return EXPERTS_PER_RANK * self.nodes * self.ranks


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        peak, goodput: requests a second that were answered in time: at the peak, and under overload.
        offered: requests a second under overload.
        refused_p50_s, refused_p99_s: from a request to its refusal, as a router sees it.
        done_p99_s: of answered requests.
        lag_p50_s, lag_p99_s: of the load generator behind its own clock.
        hint_p50_s: `retry_after_s`.
        failed: requests that failed in another way, by error.
        grown_bytes: of each rank's resident memory, at most, over what it was before.
    """

    peak: float
    offered: float
    goodput: float
    refused: int
    refused_p50_s: float
    refused_p99_s: float
    done_p99_s: float
    lag_p50_s: float
    lag_p99_s: float
    hint_p50_s: float
    failed: dict[str, int]
    grown_bytes: dict[str, int]

    @property
    def ratio(self) -> float:
        """Goodput over the peak."""
        return self.goodput / self.peak


class Memory:
    """Watches how much resident memory processes have, on a thread, until closed."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = {name: _resident(pid) for name, pid in pids.items()}
        self._most = dict(self._before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> dict[str, int]:
        """By how many bytes each grew at most."""
        self._over.set()
        self._thread.join()
        return {name: most - self._before[name] for name, most in self._most.items()}

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            for name, pid in self._pids.items():
                self._most[name] = max(self._most[name], _resident(pid))


def run(plan: Plan) -> Result:
    """Runs it on a mesh of its own."""
    with _mesh(plan) as (mesh, folder), _processes(plan.routers) as pool:
        peak = _all(pool, mesh.addresses, [_each(plan, seed, rate=0.0) for seed in range(plan.routers)])
        rate = plan.times * _per_second(peak) / plan.routers
        pids = {path.stem: int(path.read_text()) for path in sorted(folder.glob("*.pid"))}
        memory = Memory(pids)
        try:
            flood = _all(pool, mesh.addresses, [_each(plan, seed, rate=rate) for seed in range(plan.routers)])
        finally:
            grown = memory.close()
        return _result(_per_second(peak), flood, grown)


@contextlib.contextmanager
def _mesh(plan: Plan) -> Iterator[tuple[LocalMesh, Path]]:
    count = plan.nodes * plan.ranks
    with (
        tempfile.TemporaryDirectory() as name,
        LocalMesh(plan.nodes, plan.ranks, num_experts=plan.num_experts) as mesh,
    ):
        folder = Path(name)
        done = mesh.start(serve, folder, plan.load)
        try:
            _await_serving(mesh, count)
            yield mesh, folder
        finally:
            (folder / "stop").touch()
            done.result(30)


def _await_serving(mesh: LocalMesh, count: int) -> None:
    waiting = threading.Event()
    for _ in range(1500):
        if sum(info.mode is RankMode.SERVE for info in mesh.view().ranks.values()) == count:
            return
        waiting.wait(_LOOK_S)
    raise TimeoutError(f"{count} ranks do not serve")


@contextlib.contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _all(pool: ProcessPoolExecutor, addresses: Sequence[str], loads: Sequence[Load]) -> list[Answers]:
    calls = [pool.submit(call, list(addresses), load) for load in loads]
    return [each.result() for each in calls]


def _each(plan: Plan, seed: int, rate: float) -> Load:
    return dataclasses.replace(plan.load, rate=rate, seed=seed, num_experts=plan.num_experts)


def _per_second(answers: Sequence[Answers]) -> float:
    return sum(len(each.done_s) / each.seconds for each in answers)


def _result(peak: float, flood: Sequence[Answers], grown: dict[str, int]) -> Result:
    refused = [one for each in flood for one in each.refused_s]
    done = [one for each in flood for one in each.done_s]
    lag = [one for each in flood for one in each.lag_s]
    failed: dict[str, int] = {}
    for each in flood:
        for name, count in each.failed.items():
            failed[name] = failed.get(name, 0) + count
    return Result(
        peak=peak,
        offered=sum(each.offered / each.seconds for each in flood),
        goodput=_per_second(flood),
        refused=len(refused),
        refused_p50_s=_percentile(refused, 50),
        refused_p99_s=_percentile(refused, 99),
        done_p99_s=_percentile(done, 99),
        lag_p50_s=_percentile(lag, 50),
        lag_p99_s=_percentile(lag, 99),
        hint_p50_s=_percentile([one for each in flood for one in each.hints_s], 50),
        failed=failed,
        grown_bytes=grown,
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


def _resident(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it ended
    return 0


def _show(plan: Plan, result: Result) -> None:
    load = plan.load
    print(
        f"{plan.nodes} x {plan.ranks} ranks, {plan.routers} routers, {load.rows} rows of {load.hidden} fp32, "
        f"{load.batch_rows} rows a call of {load.batch_s * 1000:g} ms, deadline {load.timeout_s:g} s, "
        f"hints {'honoured' if load.honour else 'ignored'}"
    )
    print(f"peak {result.peak:.1f} requests/s; offered {result.offered:.0f}, {result.offered / result.peak:.1f} times")
    print(f"goodput {result.goodput:.1f} requests/s, {result.ratio:.2f} of the peak; promised {PROMISED_GOODPUT}")
    print(
        f"{result.refused} refused, within {result.refused_p50_s * 1000:.1f} ms (median), "
        f"{result.refused_p99_s * 1000:.1f} ms (p99); promised {PROMISED_REFUSAL_S * 1000:g} ms; "
        f"hint {result.hint_p50_s * 1000:.0f} ms (median)"
    )
    print(f"load generator late by {result.lag_p50_s * 1000:.1f} ms (median), {result.lag_p99_s * 1000:.1f} ms (p99)")
    print(f"answered within {result.done_p99_s * 1000:.0f} ms (p99); failed otherwise: {result.failed or 'none'}")
    grown = ", ".join(f"{name} {size / (1 << 20):.1f}" for name, size in result.grown_bytes.items())
    print(f"memory grew by at most, MiB: {grown}")


def _parse(arguments: Sequence[str] | None) -> tuple[Plan, bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan, load = Plan(), Load()
    for name in ("nodes", "ranks", "routers", "times"):
        value = getattr(plan, name)
        parser.add_argument(f"--{name}", type=type(value), default=value)
    names = ("rows", "hidden", "batch_rows", "batch_s", "timeout_s", "seconds")
    for name in names:
        value = getattr(load, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--honour", action="store_true", help="wait as long as refusals say, then try once more")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args(arguments)
    load = dataclasses.replace(load, honour=parsed.honour, **{name: getattr(parsed, name) for name in names})
    plan = Plan(nodes=parsed.nodes, ranks=parsed.ranks, routers=parsed.routers, times=parsed.times, load=load)
    return plan, parsed.json


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it and prints what came of it; 1 where goodput or the memory is not what is promised."""
    plan, as_json = _parse(arguments)
    result = run(plan)
    if as_json:
        print(json.dumps({"plan": dataclasses.asdict(plan), **dataclasses.asdict(result), "ratio": result.ratio}))
    else:
        _show(plan, result)
    return 0 if result.ratio >= PROMISED_GOODPUT else 1


if __name__ == "__main__":
    sys.exit(main())
