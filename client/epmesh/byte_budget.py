"""A budget in bytes that waiters share, first come, first served. Pure but for a lock; any thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from epmesh.errors import InvalidRequest


class Claim:
    """Room in a budget: asked for, then held, then released."""

    def __init__(self, num_bytes: int, granted: Callable[[], None]) -> None:
        self.num_bytes = num_bytes
        self.granted = granted
        self.held = False
        self.ended = False


class ByteBudget:
    """At most `limit` bytes are held at once. Who asks first gets first, so that nobody starves."""

    def __init__(self, limit: Any) -> None:
        """Nothing is held.

        Args:
            limit: a whole number of bytes.

        Raises:
            InvalidRequest: `limit` is below 1.
        """
        if not isinstance(limit, int) or limit < 1:
            raise InvalidRequest(f"max_inflight_bytes is {limit!r}; it must be 1 or more")
        self.limit: int = limit
        self._lock = threading.Lock()  # guards what follows
        self._held_bytes = 0
        self._waiting: deque[Claim] = deque()

    @property
    def held_bytes(self) -> int:
        """What is held now."""
        return self._held_bytes

    def ask(self, num_bytes: int, granted: Callable[[], None]) -> Claim:
        """Asks for room: the claim is held on return, or later, when `granted` is called by whoever made room.

        Raises:
            InvalidRequest: it is more than the whole budget.
        """
        if num_bytes > self.limit:
            raise InvalidRequest(
                f"this forward sends and awaits about {num_bytes} bytes, and max_inflight_bytes is {self.limit}; "
                "send fewer tokens at once, or raise it"
            )
        claim = Claim(num_bytes, granted)
        with self._lock:
            if self._waiting or self._held_bytes + num_bytes > self.limit:
                self._waiting.append(claim)
            else:
                self._hold(claim)
        return claim

    def release(self, claim: Claim) -> None:
        """Gives a claim up, held or not; idempotent."""
        with self._lock:
            if claim.ended:
                return
            claim.ended = True
            if claim.held:
                self._held_bytes -= claim.num_bytes
            else:
                self._waiting.remove(claim)
            granted = self._grant()
        for one in granted:
            one.granted()

    def _grant(self) -> list[Claim]:
        granted = []
        while self._waiting and self._held_bytes + self._waiting[0].num_bytes <= self.limit:
            granted.append(self._waiting.popleft())
            self._hold(granted[-1])
        return granted

    def _hold(self, claim: Claim) -> None:
        claim.held = True
        self._held_bytes += claim.num_bytes
