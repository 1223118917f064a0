"""`python -m tests.fuzz --minutes 2`: every target for its share of the time, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from tests.fuzz.engine import CRASHES
from tests.fuzz.targets import TARGETS

_START_S = 60.0  # to import torch, on a busy machine
_STATS = re.compile(r"number_of_executed_units: *(\d+)|^(\d+) inputs", re.MULTILINE)


def main() -> None:
    """Prints a line a target and a verdict; exit code 1 where a target let something through."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="for all targets together")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only these")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000, help="the same seed, the same inputs")
    arguments = parser.parse_args()
    names = arguments.target or list(TARGETS)
    how = "coverage" if importlib.util.find_spec("atheris") else "mutation"
    workers = min(os.cpu_count() or 1, len(names))
    share_s = max(arguments.minutes * 60 * workers / len(names), 1.0)
    guide = "guided by coverage (atheris)" if how == "coverage" else "by mutation (atheris is not installed)"
    print(f"fuzz: {len(names)} targets, {share_s:.0f} s each, {guide}, seed {arguments.seed}", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        good = list(pool.map(lambda name: _run(name, how, share_s, arguments.seed), names))
    print("fuzz: PASS" if all(good) else f"fuzz: FAIL (inputs under {CRASHES}; `make test` tries them from now on)")
    raise SystemExit(not all(good))


def _run(name: str, how: str, seconds: float, seed: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="epmesh-fuzz-") as corpus:
        command = [sys.executable, "-m", "tests.fuzz.engine", name, how, str(seconds), str(seed), corpus]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + _START_S, check=False)
        except subprocess.TimeoutExpired:
            print(f"  {name:20} FAIL: still running after {seconds + _START_S:.0f} s", flush=True)
            return False
    output = done.stdout + done.stderr
    counts = [int(one or other) for one, other in _STATS.findall(output)]
    if done.returncode == 0 and counts:
        print(f"  {name:20} {counts[-1]:>10,} inputs, nothing got through", flush=True)
        return True
    print(f"  {name:20} FAIL (exit {done.returncode}):\n{output[-4000:]}", flush=True)
    return False


if __name__ == "__main__":
    main()
