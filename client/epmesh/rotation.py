"""Which address to try next, and how long to wait before. Decides, and does no I/O."""

from __future__ import annotations

import random
from collections.abc import Sequence

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
MOST_LEARNED = 8


class Rotation:
    """Rounds over addresses: first those given, in a circle that begins after the last one that worked, then a few of
    those learned meanwhile, chosen by chance, so that clients which lost one service spread over the others.

    The first round begins at once; before each later one is a pause, twice as long every time, up to
    `LONGEST_PAUSE_S`.
    """

    def __init__(self, given: Sequence[str], chance: random.Random | None = None) -> None:
        self._given = tuple(given)
        self._chance = chance or random.Random()
        self._left: list[str] = []
        self._rounds = 0
        self._last = self._given[-1]

    def next(self, learned: Sequence[str] = ()) -> tuple[str, float]:
        """The address to try, and the seconds to wait before at most. `learned` are addresses that may work too."""
        pause_s = 0.0
        if not self._left:
            pause_s = self._pause_s()
            self._left = [*self._circle(), *self._some(learned)]
            self._rounds += 1
        return self._left.pop(0), pause_s

    def worked(self, address: str) -> None:
        """`address` worked for a while: another round begins after it, at once."""
        self._left = []
        self._rounds = 0
        self._last = address

    def _pause_s(self) -> float:
        if self._rounds == 0:
            return 0.0
        return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._rounds - 1, 16)))

    def _circle(self) -> tuple[str, ...]:
        begin = self._given.index(self._last) + 1 if self._last in self._given else 0
        return self._given[begin:] + self._given[:begin]

    def _some(self, learned: Sequence[str]) -> list[str]:
        others = [address for address in dict.fromkeys(learned) if address not in self._given]
        return self._chance.sample(others, min(MOST_LEARNED, len(others)))
