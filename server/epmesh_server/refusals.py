"""Counts refusals, and says each once in a while: what strangers send must not fill the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

EVERY_S = 10.0
MAX_REMEMBERED = 1024


class RefusalLog:
    """Logs the first refusal of everyone, and then one in `EVERY_S` that says how many there were.

    Attributes:
        count: of all refusals.
    """

    def __init__(self, log: logging.Logger, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` begins every line."""
        self.count = 0
        self._log = log
        self._what = what
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # who -> when the last line was, and refusals since

    def note(self, who: str, why: str) -> None:
        """One more refusal of `who`."""
        self.count += 1
        at, since = self._said.get(who, (-EVERY_S, 0))
        now = self._clock()
        if now - at < EVERY_S:
            self._said[who] = at, since + 1
            return
        more = f" (and {since} more since the last time)" if since else ""
        self._log.warning("%s: %s%s", self._what, why, more)
        self._said.pop(who, None)
        self._said[who] = now, 0
        if len(self._said) > MAX_REMEMBERED:
            del self._said[next(iter(self._said))]
