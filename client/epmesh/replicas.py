"""Which of an expert's replicas computes it for a row. Pure NumPy.

Ranks of nodes that hold the same experts share their rows evenly, and a row goes to as few nodes as that allows: each
row has an order of preference among all nodes, and each of its ids goes to the first node in it that holds the expert.
The orders take turns from row to row. They are the rotations of the nodes and of the nodes backwards: of any two nodes
each stands before the other in half of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epmesh.layout import Ints, Routing, Topology, occurrence


class Replicas:
    """The replicas of all experts of a placement.

    Attributes:
        orders: how many orders of preference take turns.
    """

    def __init__(self, routing: Routing, topology: Topology) -> None:
        """Of a routing in which every rank may get every row (its source is no member)."""
        slots = sorted(set(topology.slots))
        node_of = np.array([slots.index(slot) for slot in topology.slots] or [0], np.int64)
        found: list[list[list[int]]] = [[[] for _ in slots] for _ in range(routing.num_experts)]
        for expert, positions in enumerate(routing.candidates):
            for position in positions[positions >= 0]:
                found[expert][node_of[position]].append(int(position))
        self._counts = np.array([[len(held) for held in nodes] for nodes in found], np.int64)
        self._positions = _padded(found, int(self._counts.max(initial=1)))
        self._preferred = _first_holders(self._counts > 0)

    @property
    def orders(self) -> int:
        """How many orders of preference take turns."""
        return len(self._preferred)

    def choose(self, ids: Ints, turn: int) -> Ints:
        """The position that computes each id ``[num_tokens, num_topk]``; -1 for id -1.

        Args:
            ids: -1, or experts that somebody holds.
            turn: of the first row; calls with consecutive turns share rows evenly too.
        """
        wanted, safe = ids >= 0, np.where(ids >= 0, ids, 0)
        order = (np.arange(len(ids)) + turn) % self.orders
        nodes = self._preferred[order[:, None], safe]
        counts = np.maximum(self._counts[safe, nodes], 1)
        before = occurrence(np.where(wanted, safe * self._counts.shape[1] + nodes, -1))
        return np.where(wanted, self._positions[safe, nodes, (before + turn // self.orders) % counts], -1)


def _padded(found: Sequence[Sequence[Sequence[int]]], width: int) -> Ints:
    """``[num_experts, nodes, width]`` positions, -1 where there are no more."""
    padded = np.full((len(found), len(found[0]), width), -1, np.int64)
    for expert, nodes in enumerate(found):
        for node, positions in enumerate(nodes):
            padded[expert, node, : len(positions)] = positions
    return padded


def _first_holders(holds: npt.NDArray[np.bool_]) -> Ints:
    """``[orders, num_experts]``: the first node, in each order of preference, that holds the expert."""
    nodes = np.arange(holds.shape[1])
    orders = [np.roll(line, -start) for line in (nodes, nodes[::-1]) for start in nodes]
    return np.stack([order[holds[:, order].argmax(axis=1)] for order in orders])
