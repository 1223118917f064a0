"""Who refused what a moment ago, so that as much is not asked of them again before they said. Any thread; no I/O.

A refusal says after how long a retry may succeed. Until then what is no easier is refused where it would be sent: a
client that floods a rank then costs that rank next to nothing. It is client-side throttling ("Handling Overload" in
Google's Site Reliability Engineering, 2016), but by what the refusal says, not by chance. The time is cut at random,
so that those who were refused together do not come back together, and never long: asking too early costs one refusal.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

LONGEST_S = 0.25
MOST = 1024
_LEAST_PART = 0.5  # of the time that a refusal says
_AS_LONG = 1.1  # times as long a deadline is no more than the refused one had


@dataclass(frozen=True)
class _Refusal:
    """What was refused: so many rows with so much time; and until when that is remembered."""

    rows: int
    left_s: float
    until: float


class HoldOffs:
    """Remembers the newest refusal of each of `MOST` parties at most."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        """`draw` gives numbers from 0 to 1."""
        self._draw = draw
        self._lock = threading.Lock()  # guards what follows
        self._refusals: dict[Hashable, _Refusal] = {}

    def note(self, who: Hashable, *, rows: int, left_s: float, retry_after_s: float, now: float) -> None:
        """`who` refused `rows` rows, for which there were `left_s` seconds."""
        wait_s = min(retry_after_s, LONGEST_S) * (_LEAST_PART + (1 - _LEAST_PART) * self._draw())
        with self._lock:
            self._refusals.pop(who, None)
            self._refusals[who] = _Refusal(rows, left_s, now + wait_s)
            if len(self._refusals) > MOST:
                del self._refusals[next(iter(self._refusals))]

    def wait_s(self, who: Hashable, *, rows: int, left_s: float, now: float) -> float:
        """Seconds until `who` may be asked for `rows` rows in `left_s` seconds; 0: now."""
        refusal = self._refusals.get(who)
        if refusal is None or rows < refusal.rows or left_s > refusal.left_s * _AS_LONG:
            return 0.0
        return max(0.0, refusal.until - now)
