"""Whom to leave out when links are broken."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def greedy_removal(failures: Iterable[tuple[int, int]]) -> list[int]:
    """The ranks to evict so that no broken link is left among the others.

    Takes the rank with the most broken links away until there are none: the greedy approximation of a minimum vertex
    cover. Of two that have as many, one that reports nothing goes first, for a stopped process says nothing while the
    healthy end of its links does; then the higher one. The same for every order of `failures`.

    Args:
        failures: (reporter, target) pairs of global ranks; a rank that reports itself means nothing.
    """
    broken: dict[int, set[int]] = {}
    reporters = set()
    for reporter, target in failures:
        if reporter != target:
            reporters.add(reporter)
            broken.setdefault(reporter, set()).add(target)
            broken.setdefault(target, set()).add(reporter)
    heap = [(-len(peers), rank in reporters, -rank) for rank, peers in broken.items()]
    heapq.heapify(heap)
    removed = []
    while heap:
        degree, _, rank = heapq.heappop(heap)
        degree, rank = -degree, -rank
        if degree == 0 or len(broken[rank]) != degree:
            continue  # an entry from before a peer was removed; the rank has a newer one
        removed.append(rank)
        for peer in broken[rank]:
            broken[peer].discard(rank)
            heapq.heappush(heap, (-len(broken[peer]), peer in reporters, -peer))
        broken[rank] = set()
    return removed
