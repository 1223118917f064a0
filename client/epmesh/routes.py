"""A view as routers use it: which ranks serve, and which of them computes what. Pure."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from epmesh.errors import ExpertUnavailable, InvalidRequest, NotReady
from epmesh.layout import Ints, Routing, Topology, check_ids, make_reach, make_routing
from epmesh.replicas import Replicas
from epmesh.view import NodeInfo, RankInfo, RankMode, View

ELSEWHERE = 127
"""A target of this value is not the node's to compute."""
_MAX_VARIANTS = 16

Identity = tuple[int, int]
"""Global rank and incarnation: a restarted rank is another one."""


@dataclass(frozen=True, eq=False)
class NodeRows:
    """The rows of one node.

    Attributes:
        node: which.
        ranks: those that compute something, ascending by global rank.
        rows: ``[n]`` indices of the source's rows, ascending.
        targets: ``[n, num_topk]`` uint8: index into `ranks`, `ELSEWHERE` for what is not this node's to compute.
    """

    node: NodeInfo
    ranks: tuple[RankInfo, ...]
    rows: Ints
    targets: npt.NDArray[np.uint8]


class Routes:
    """The serving ranks of one view, less those that a forward has reason to avoid.

    Attributes:
        view: the view.
        without: ranks that are left out.
    """

    def __init__(self, view: View, without: frozenset[Identity] = frozenset()) -> None:
        self.view, self.without = view, without
        infos = [info for info in view.ranks.values() if serves(info) and identity(info) not in without]
        self._infos = tuple(infos)
        self._nodes = {node.slot: node for node in view.nodes}
        self._topology = Topology(
            tuple(info.rank for info in infos), tuple(view.slot_of(info.rank) for info in infos), -1
        )
        self._slots = np.array([*self._topology.slots, -1], np.int64)  # the last is what target -1 finds
        self._routings: dict[int | None, Routing] = {}
        self._replicas: dict[int | None, Replicas] = {}
        self._variants: dict[frozenset[Identity], Routes] = {}

    def avoiding(self, without: Set[Identity]) -> Routes:
        """The same view without these ranks as well."""
        present = frozenset(one for one in without if one in self._identities)
        if not present:
            return self
        found = self._variants.get(present)
        if found is None:
            if len(self._variants) >= _MAX_VARIANTS:
                self._variants.clear()
            found = self._variants[present] = Routes(self.view, self.without | present)
        return found

    def split(self, topk_ids: Ints, layer: int | None, turn: int) -> list[NodeRows]:
        """The rows of each node that computes something, ascending by slot: a row once a node.

        Args:
            topk_ids: ``[num_tokens, num_topk]``, -1 means no expert.
            layer: whose placement decides.
            turn: where the turns among replicas start.

        Raises:
            NotReady: no rank declares experts yet.
            InvalidRequest: there are placements but none for `layer`, or an id is out of range.
            ExpertUnavailable: an id's expert has no serving rank.
        """
        if layer not in self.view.placements:
            if None not in self.view.placements:
                raise self._no_placement(layer)
            layer = None
        routing = self._routing(layer)
        if not self._infos and (topk_ids >= 0).any():
            raise ExpertUnavailable(map(int, np.unique(topk_ids[topk_ids >= 0])))
        check_ids(topk_ids, routing)
        targets = self._choose(topk_ids, layer, routing, turn)
        slots = self._slots[targets]
        found = [self._node_rows(int(slot), slots == slot, targets) for slot in np.unique(slots) if slot >= 0]
        return [rows for of_node in found for rows in of_node]

    def _choose(self, ids: Ints, layer: int | None, routing: Routing, turn: int) -> Ints:
        """The position that computes each id, -1 for none."""
        if routing.candidates.shape[1] == 1:
            return np.where(ids >= 0, routing.candidates[ids, 0], -1)
        found = self._replicas.get(layer)
        if found is None:
            found = self._replicas[layer] = Replicas(routing, self._topology)
        return found.choose(ids, turn)

    @cached_property
    def _identities(self) -> frozenset[Identity]:
        return frozenset(map(identity, self._infos))

    def _node_rows(self, slot: int, here: npt.NDArray[np.bool_], targets: Ints) -> list[NodeRows]:
        positions = np.unique(targets[here])
        if len(positions) > ELSEWHERE:  # more than targets can tell apart
            middle = positions[len(positions) // 2]
            halves = here & (targets < middle), here & (targets >= middle)
            return [rows for half in halves for rows in self._node_rows(slot, half, targets)]
        rows = np.flatnonzero(here.any(axis=1))
        index = np.searchsorted(positions, targets[rows])
        codes = np.where(here[rows], index, ELSEWHERE).astype(np.uint8)
        return [NodeRows(self._nodes[slot], tuple(self._infos[p] for p in positions), rows, codes)]

    def _routing(self, layer: int | None) -> Routing:
        found = self._routings.get(layer)
        if found is None:
            reach = make_reach(self._topology, self.view.stride)
            found = self._routings[layer] = make_routing(self.view.placements[layer], self._topology, reach)
        return found

    def _no_placement(self, layer: int | None) -> NotReady | InvalidRequest:
        if not self.view.placements:
            return NotReady(f"no rank declares experts in epoch {self.view.epoch}; start ranks that serve, ask again")
        known = ", ".join(str(key) for key in list(self.view.placements)[:16])
        return InvalidRequest(f"no placement for layer {layer}; there are placements for: {known}")


def serves(info: RankInfo) -> bool:
    """Whether a rank answers routers."""
    return info.mode is RankMode.SERVE and bool(info.front_endpoint)


def identity(info: RankInfo) -> Identity:
    """What tells a rank from the one that takes its place."""
    return info.rank, info.incarnation
