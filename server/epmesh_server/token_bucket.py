"""How often clients may do something, each by itself: in bursts, and at a steady rate after that. Pure.

The generic cell rate algorithm (ITU-T I.371), which needs one number for each client: when its bucket is full again.
"""

from __future__ import annotations

from collections.abc import Hashable

_MAX_REMEMBERED = 1024


class TokenBuckets:
    """A bucket of `burst` tokens for every client, refilled by `rate_per_s` a second. One thread at a time."""

    def __init__(self, rate_per_s: float, burst: int) -> None:
        """All are full."""
        self._token_s = 1.0 / rate_per_s
        self._burst_s = burst * self._token_s
        self._full_at: dict[Hashable, float] = {}

    def take(self, client: Hashable, now: float) -> float:
        """Takes one token of `client`; seconds until there is one where there is none, else 0.

        Args:
            now: seconds of a clock that never goes back.
        """
        full_at = max(now, self._full_at.pop(client, now)) + self._token_s
        wait_s = full_at - now - self._burst_s
        if wait_s > 1e-9:
            self._full_at[client] = full_at - self._token_s
            return wait_s
        self._full_at[client] = full_at
        if len(self._full_at) > _MAX_REMEMBERED:
            self._full_at = {each: at for each, at in self._full_at.items() if at > now}
        return 0.0
