"""A budget that clients share, so that none of them can take it all. Pure.

The rule is that of dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet
switches", 1998): a client may hold at most `SHARE` times what is free. One alone gets four fifths of the budget, two
that want all they can get four ninths each, and something is always free for one more. Nobody has to know who is there.
"""

from __future__ import annotations

from collections.abc import Hashable

SHARE = 4


class FairBudget:
    """At most `limit` units are held at once. One thread at a time."""

    def __init__(self, limit: int) -> None:
        """Nothing is held."""
        self.limit = limit
        self.held = 0
        self._by_client: dict[Hashable, int] = {}  # none is 0

    def held_by(self, client: Hashable) -> int:
        """What one client holds."""
        return self._by_client.get(client, 0)

    def fits(self, client: Hashable, units: int) -> bool:
        """Whether `client` may hold so many more; one that holds nothing may have all that is free."""
        own, free = self._by_client.get(client, 0), self.limit - self.held - units
        return free >= 0 and (own == 0 or own + units <= SHARE * free)

    def hold(self, client: Hashable, units: int) -> None:
        """`client` holds so many more; after `fits`."""
        if units:
            self.held += units
            self._by_client[client] = self._by_client.get(client, 0) + units

    def release(self, client: Hashable, units: int) -> None:
        """`client` holds so many less."""
        if units:
            self.held -= units
            left = self._by_client.pop(client) - units
            if left:
                self._by_client[client] = left
