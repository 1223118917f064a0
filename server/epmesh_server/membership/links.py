"""Whom to leave out when links are broken."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def greedy_removal(edges: Iterable[tuple[int, int]]) -> list[int]:
    """The ranks to evict so that no broken link is left among the others.

    Takes the rank with the most broken links away, the higher one of two that have as many, until there are none:
    the greedy approximation of a minimum vertex cover, the same for every order of `edges`.

    Args:
        edges: pairs of global ranks between which a link is broken; direction, repeats and self-loops do not matter.
    """
    broken: dict[int, set[int]] = {}
    for a, b in edges:
        if a != b:
            broken.setdefault(a, set()).add(b)
            broken.setdefault(b, set()).add(a)
    heap = [(-len(peers), -rank) for rank, peers in broken.items()]
    heapq.heapify(heap)
    removed = []
    while heap:
        degree, rank = -heap[0][0], -heapq.heappop(heap)[1]
        if degree == 0 or len(broken[rank]) != degree:
            continue  # an entry from before a peer was removed; the rank has a newer one
        removed.append(rank)
        for peer in broken.pop(rank):
            broken[peer].discard(rank)
            heapq.heappush(heap, (-len(broken[peer]), -peer))
        broken[rank] = set()
    return removed
