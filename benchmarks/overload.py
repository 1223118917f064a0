"""Ten times more than a mesh can do: ``python -m benchmarks.overload``.

Ranks serve with experts of which each call takes a known time, so what they can do does not hang on this machine.
Senders in processes of their own first find the peak, each asking as soon as it is answered, and then offer a multiple
of it on a schedule that waits for nobody; so in turns, and each goodput is compared with the peak just before it.

Senders write requests that are made beforehand straight to the fronts: their refusals are what ranks and this machine's
kernel take. A witness is an ordinary router in a process of its own, which offers more than its part, too: its
refusals are what a user sees, a router's threads and event loop among it. Both say how late they were themselves, and
how long answers may have waited for them: their times are not cleaned of that.

On a machine that others use, have it go first: ``nice -n -15``, and where the kernel shares out processors by sessions
(``/proc/sys/kernel/sched_autogroup_enabled``) ``echo -15 > /proc/self/autogroup`` in the shell before it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.overload_works import EXPERTS_PER_RANK, Answers, Load, send, serve, watch
from epmesh.testing import LocalMesh
from epmesh.view import RankMode

PROMISED_GOODPUT, PROMISED_REFUSAL_S = 0.9, 0.05
_LOOK_S = 0.02
_STARTING_S = 0.5  # until every process is ready to begin


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        nodes, ranks: of the mesh, and of each node.
        senders: processes that flood; there is one witness besides.
        times: the peak that they offer together.
        rounds: a peak and a flood each.
        load: of each process; rate and beginning are set here.
    """

    nodes: int = 1
    ranks: int = 2
    senders: int = 2
    times: float = 10.0
    rounds: int = 5
    load: Load = field(default_factory=Load)

    @property
    def num_experts(self) -> int:
        """Of the mesh."""
        return EXPERTS_PER_RANK * self.nodes * self.ranks


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of many values; seconds where they are times."""

    count: int
    median: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Zeros where there are none."""
        if not values:
            return cls(count=0, median=0.0, p99=0.0, most=0.0)
        median, p99, most = (float(each) for each in np.percentile(values, (50, 99, 100)))
        return cls(count=len(values), median=median, p99=p99, most=most)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What senders, or the witness, saw of all floods together; as `Answers` has it."""

    offered: int
    refused: Spread
    done: Spread
    hints: Spread
    late: Spread
    turn: Spread
    failed: dict[str, int]

    @classmethod
    def of(cls, answers: Sequence[Answers]) -> Seen:
        """Of all of them."""

        def spread(name: str) -> Spread:
            return Spread.of([value for each in answers for value in getattr(each, name)])

        return cls(
            offered=sum(each.offered for each in answers),
            refused=spread("refused_s"),
            done=spread("done_s"),
            hints=spread("hints_s"),
            late=spread("late_s"),
            turn=spread("turn_s"),
            failed=dict(sum((Counter(each.failed) for each in answers), Counter())),
        )


@dataclass(frozen=True, kw_only=True)
class Round:
    """One peak and the flood after it, in requests a second that were answered in time; seconds of processors."""

    peak: float
    offered: float
    goodput: float
    ranks_cpu_s: float
    senders_cpu_s: float

    @property
    def ratio(self) -> float:
        """Goodput over the peak."""
        return self.goodput / self.peak


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of it; `grown_bytes` is of each rank's resident memory, at most, over what it was before the flood."""

    rounds: list[Round]
    senders: Seen
    witness: Seen
    grown_bytes: dict[str, int]

    @property
    def ratios(self) -> list[float]:
        """Ascending."""
        return sorted(each.ratio for each in self.rounds)

    @property
    def kept(self) -> bool:
        """Whether the promise was."""
        goodput, refused = float(np.median(self.ratios)), max(self.senders.refused.p99, self.witness.refused.p99)
        return goodput >= PROMISED_GOODPUT and refused <= PROMISED_REFUSAL_S


class Processes:
    """Watches processes on a thread, until closed: the most resident memory of each, and what they have computed."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = {name: _resident(pid) for name, pid in pids.items()}
        self._cpu_before = sum(map(_cpu_s, pids.values()))
        self._most = dict(self._before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> tuple[dict[str, int], float]:
        """By how many bytes each grew at most, and processors' seconds of all."""
        self._over.set()
        self._thread.join()
        cpu_s = sum(map(_cpu_s, self._pids.values())) - self._cpu_before
        return {name: most - self._before[name] for name, most in self._most.items()}, cpu_s

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            for name, pid in self._pids.items():
                self._most[name] = max(self._most[name], _resident(pid))


class Runner:
    """Runs rounds on one mesh."""

    def __init__(self, plan: Plan, addresses: Sequence[str], pids: dict[str, int], pool: ProcessPoolExecutor) -> None:
        self._plan, self._addresses, self._pids, self._pool = plan, list(addresses), pids, pool
        self._senders: list[Answers] = []
        self._witness: list[Answers] = []
        self._grown: Counter[str] = Counter()

    def run(self) -> Result:
        """All of them."""
        rounds = [self._round(number) for number in range(self._plan.rounds)]
        return Result(
            rounds=rounds,
            senders=Seen.of(self._senders),
            witness=Seen.of(self._witness),
            grown_bytes=dict(self._grown),
        )

    def _round(self, number: int) -> Round:
        plan = self._plan
        peak = self._per_second(*self._run(number, [send] * plan.senders, [0.0] * plan.senders))
        witness_rate = 2 * peak / (plan.senders + 1)
        rate = (plan.times * peak - witness_rate) / plan.senders
        watched = Processes(self._pids)
        try:
            load, answers = self._run(number, [send] * plan.senders + [watch], [rate] * plan.senders + [witness_rate])
        finally:
            grown, cpu_s = watched.close()
        *senders, witness = answers
        self._senders += senders
        self._witness.append(witness)
        self._grown |= Counter(grown)
        return Round(
            peak=peak,
            offered=sum(each.offered for each in answers) / load.seconds,
            goodput=self._per_second(load, answers),
            ranks_cpu_s=cpu_s,
            senders_cpu_s=sum(each.cpu_s for each in answers),
        )

    def _run(
        self, number: int, works: Sequence[Callable[[list[str], Load], Answers]], rates: Sequence[float]
    ) -> tuple[Load, list[Answers]]:
        """One after the other begins at the same moment."""
        plan = self._plan
        load = dataclasses.replace(plan.load, begin_at=time.monotonic() + _STARTING_S, num_experts=plan.num_experts)
        calls: list[Future[Answers]] = [
            self._pool.submit(work, self._addresses, dataclasses.replace(load, rate=rate, seed=100 * number + index))
            for index, (work, rate) in enumerate(zip(works, rates, strict=True))
        ]
        return load, [each.result() for each in calls]

    @staticmethod
    def _per_second(load: Load, answers: Sequence[Answers]) -> float:
        """Answers that came in time, in the seconds that count."""
        since = load.begin_at + load.warm_s
        return sum(since <= at < since + load.seconds for each in answers for at in each.done_at) / load.seconds


def run(plan: Plan) -> Result:
    """Runs it on a mesh of its own."""
    with _mesh(plan) as (mesh, folder), _processes(plan.senders + 1) as pool:
        pids = {path.stem: int(path.read_text()) for path in sorted(folder.glob("*.pid"))}
        return Runner(plan, mesh.addresses, pids, pool).run()


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
        list(pool.map(time.sleep, [_STARTING_S] * count))  # all have started, and have imported what they need
        yield pool


def _resident(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it ended
    return 0


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it ended
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _show(plan: Plan, result: Result) -> None:
    load, rounds = plan.load, result.rounds
    print(
        f"{plan.nodes} x {plan.ranks} ranks, {plan.senders} senders and a witness ({load.transport}), {plan.rounds} "
        f"rounds, {load.rows} rows of {load.hidden} fp32, {load.batch_rows} rows a call of {load.batch_s * 1000:g} ms, "
        f"deadline {load.timeout_s:g} s; nice {os.nice(0)}, {os.cpu_count()} cores"
    )
    peak, offered, goodput = (
        float(np.median([getattr(each, name) for each in rounds])) for name in ("peak", "offered", "goodput")
    )
    print(f"peak {peak:.1f} requests/s, offered {offered:.0f}, goodput {goodput:.1f} (medians)")
    least, median, most = np.percentile(result.ratios, (0, 50, 100))
    print(
        f"goodput over the peak just before: {least:.2f} least, {median:.2f} median, {most:.2f} most; "
        f"promised {PROMISED_GOODPUT}"
    )
    for name, seen in (("senders", result.senders), ("witness", result.witness)):
        _show_seen(name, seen)
    floods_s = len(rounds) * (load.warm_s + load.seconds)
    ranks, senders = (sum(getattr(each, name) for each in rounds) for name in ("ranks_cpu_s", "senders_cpu_s"))
    print(f"processors that floods took: ranks {ranks / floods_s:.2f}, senders and witness {senders / floods_s:.2f}")
    grown = ", ".join(f"{name} {size / (1 << 20):.1f}" for name, size in result.grown_bytes.items())
    print(f"memory grew by at most, MiB: {grown}")


def _show_seen(name: str, seen: Seen) -> None:
    refused = seen.refused
    print(
        f"{name}: {seen.offered} offered; {refused.count} refused within {_ms(refused)}, promised "
        f"{PROMISED_REFUSAL_S * 1000:g}; hint {seen.hints.median * 1000:.0f} ms (median)"
    )
    print(f"  {seen.done.count} answered within {_ms(seen.done)}; failed otherwise: {seen.failed or 'none'}")
    print(f"  of its own: sent late by {_ms(seen.late)}; looked again after {_ms(seen.turn)}")


def _ms(spread: Spread) -> str:
    median, p99, most = (1000 * each for each in (spread.median, spread.p99, spread.most))
    return f"{median:.1f} / {p99:.1f} / {most:.1f} ms (median, p99, most)"


def _parse(arguments: Sequence[str] | None) -> tuple[Plan, bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan, load = Plan(), Load()
    plans, loads = (
        ("nodes", "ranks", "senders", "times", "rounds"),
        (
            "rows",
            "hidden",
            "batch_rows",
            "batch_s",
            "timeout_s",
            "seconds",
            "transport",
        ),
    )
    for name in (*plans, *loads):
        value = getattr(plan if name in plans else load, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args(arguments)
    load = dataclasses.replace(load, **{name: getattr(parsed, name) for name in loads})
    return Plan(load=load, **{name: getattr(parsed, name) for name in plans}), parsed.json


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it and prints what came of it; 1 where the promise was not kept."""
    plan, as_json = _parse(arguments)
    result = run(plan)
    if as_json:
        print(json.dumps({"plan": dataclasses.asdict(plan), **dataclasses.asdict(result), "ratios": result.ratios}))
    else:
        _show(plan, result)
    return 0 if result.kept else 1


if __name__ == "__main__":
    sys.exit(main())
