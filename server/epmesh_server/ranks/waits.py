"""For whom a rank waited: the seconds by which others kept it, by their global ranks."""

from __future__ import annotations

from collections.abc import Collection


class WaitLedger:
    """Seconds of one group's waits. Each moment is shared out evenly among those who had not come by then, so the sum
    is the time that this rank waited. Written by the one thread that is inside the group."""

    def __init__(self) -> None:
        self.by_rank: dict[int, float] = {}

    def of(self, rank: int) -> float:
        """Seconds waited for a global rank so far."""
        return self.by_rank.get(rank, 0.0)

    def share(self, ranks: Collection[int], seconds: float) -> None:
        """Adds a moment in which `ranks` were waited for; where there are none, nobody is to blame."""
        for rank in ranks:
            self.by_rank[rank] = self.by_rank.get(rank, 0.0) + seconds / len(ranks)

    def hand_on(self, source: int, target: int, seconds: float) -> None:
        """`source` itself waited so long for `target`, which is who is to blame."""
        moved = min(seconds, self.of(source))
        if moved > 0:
            self.by_rank[source] -= moved
            self.by_rank[target] = self.of(target) + moved
