"""Runs probes side by side. One that hangs, in a name server or a driver, keeps nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def run_together(
    calls: Mapping[str, Callable[[], T]], within_s: float
) -> tuple[dict[str, T], dict[str, BaseException | None]]:
    """Calls all of `calls`, each on a thread of its own that the interpreter does not wait for.

    Returns:
        what they returned, and, of the others, what they raised; `None` where one did not end within `within_s`.
    """
    done: dict[str, T] = {}
    raised: dict[str, BaseException | None] = {}

    def run(name: str, call: Callable[[], T]) -> None:
        try:
            done[name] = call()
        except Exception as exc:  # noqa: BLE001 - whatever it is becomes a finding of its own
            raised[name] = exc

    threads = [threading.Thread(target=run, args=item, daemon=True, name=f"doctor-{item[0]}") for item in calls.items()]
    deadline = time.monotonic() + within_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    finished, failed = dict(done), dict(raised)  # a late one may still write
    return finished, {name: failed.get(name) for name in calls if name not in finished}


def run_alone(call: Callable[[], T], within_s: float) -> T:
    """What `call` returns.

    Raises:
        TimeoutError: it did not end in time; it goes on and nobody hears of it.
        Exception: what it raised.
    """
    done, failed = run_together({"call": call}, within_s)
    if "call" in done:
        return done["call"]
    raise failed["call"] or TimeoutError(f"no answer within {within_s:g} s")
