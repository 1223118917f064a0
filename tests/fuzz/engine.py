"""Runs one target for a while: with coverage guidance where atheris is installed, else by mutating what it knows.

The targets are imported late, because atheris instruments modules while they are imported.
"""

from __future__ import annotations

import logging
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

CRASHES = Path(__file__).parent / "crashes"
MAX_INPUT_BYTES = 4096
MAX_GROWTH_BYTES = 512 << 20
SLOWEST_S = 5.0
_ODD = (0, 1, 2, 127, 128, 255)


def inputs(target: Target) -> list[bytes]:
    """The seeds of a target and every input that broke it once."""
    return [*target.seeds, *(path.read_bytes() for path in sorted((CRASHES / target.name).glob("*")))]


def call(target: Target, data: bytes) -> None:
    """One input; a typed refusal is an answer."""
    from epmesh.errors import EpmeshError

    try:
        target.run(data)
    except EpmeshError:
        return


def mutate(data: bytes, others: list[bytes], source: random.Random) -> bytes:
    """A few random changes: flipped bits, odd bytes, cuts, repeats, and pieces of other inputs."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(changed) + 1)
        match source.randrange(6):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << source.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = source.choice(_ODD)
            case 2:
                del changed[at : at + source.randint(1, 16)]
            case 3:
                changed[at:at] = changed[at : at + source.randint(1, 64)]
            case 4:
                changed[at:at] = source.randbytes(source.randint(1, 8))
            case _:
                other = source.choice(others)
                start = source.randrange(len(other) + 1)
                changed[at:at] = other[start : start + source.randint(1, 128)]
    return bytes(changed[:MAX_INPUT_BYTES])


def by_mutation(target: Target, seconds: float, seed: int) -> int:
    """Tries mutations until time is up; returns how many.

    Raises:
        Exception: what a target let through; `CRASHES` has the input then.
        AssertionError: memory grew, or one input took long.
    """
    known, source = inputs(target), random.Random(seed)
    for data in known:
        call(target, data)
    before, ends = _resident_bytes(), time.monotonic() + seconds
    for count, data in enumerate(_mutations(known, source), start=1):
        began = time.process_time()  # what other processes take of a busy machine is no input's fault
        try:
            call(target, data)
            assert time.process_time() - began < SLOWEST_S, f"one input took {time.process_time() - began:.1f} s"
            assert _resident_bytes() - before < MAX_GROWTH_BYTES, "memory grew without bound"
        except Exception:
            keep(target, data)
            raise
        if time.monotonic() > ends:
            return count
    raise AssertionError("unreachable")


def by_coverage(name: str, seconds: float, seed: int, corpus: Path) -> None:
    """Lets atheris look for inputs that reach new code; ends the process, with another code than 0 at a finding."""
    import atheris

    with atheris.instrument_imports(include=["epmesh", "epmesh_server"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    folder = CRASHES / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(inputs(target)):
        (corpus / f"seed-{number}").write_bytes(data)
    options = [
        f"-max_total_time={seconds:.0f}",
        f"-seed={seed}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={SLOWEST_S:.0f}",
        f"-artifact_prefix={folder}/",
        "-rss_limit_mb=4096",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], lambda data: call(target, data))
    atheris.Fuzz()


def keep(target: Target, data: bytes) -> Path:
    """Files an input that broke a target, so that it is tried in every later run."""
    folder = CRASHES / target.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(data)}-{random.Random(data).randrange(1 << 32):08x}"
    path.write_bytes(data)
    return path


def _mutations(known: list[bytes], source: random.Random) -> Iterator[bytes]:
    """Endless; half are mutations of mutations."""
    recent = list(known)
    while True:
        data = mutate(source.choice(known if source.random() < 0.5 else recent), known, source)
        if len(recent) < 64:
            recent.append(data)
        else:
            recent[source.randrange(64)] = data
        yield data


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main(name: str, how: str, seconds: float, seed: int, corpus: str) -> None:
    """What a process of `python -m tests.fuzz` does."""
    logging.disable(logging.CRITICAL)  # refusals are logged; millions of them are no news
    if how == "coverage":
        by_coverage(name, seconds, seed, Path(corpus))
        return
    from tests.fuzz.targets import TARGETS

    sys.stdout.write(f"{by_mutation(TARGETS[name], seconds, seed)} inputs\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
