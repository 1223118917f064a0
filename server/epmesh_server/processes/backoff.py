"""How long to wait before a child that ended is started again."""

from __future__ import annotations

_FIRST_S, _LAST_S = 0.05, 5.0
_STEADY_S = 10.0


class Backoff:
    """Doubles from one end to the next; a child that lived for `_STEADY_S` has earned a fresh start."""

    def __init__(self) -> None:
        self._next_s = _FIRST_S

    def after(self, lived_s: float) -> float:
        """Seconds to wait now, after a child that lived for `lived_s`."""
        wait_s = _FIRST_S if lived_s > _STEADY_S else self._next_s
        self._next_s = min(2 * wait_s, _LAST_S)
        return wait_s
