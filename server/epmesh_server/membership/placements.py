"""Which expert placements a view has. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from epmesh.placement import Placement, linear_placement
from epmesh.view import RankMode
from epmesh_server.membership.declarations import ExpertDeclaration, RankDeclaration

Placements = dict[int | None, Placement]


def compose_placements(
    base: Mapping[int | None, Placement],
    ranks: Mapping[int, RankDeclaration],
    newcomers: Iterable[RankDeclaration],
    survivors: Set[int],
) -> Placements:
    """The placements after `newcomers` joined.

    What a rank declared stays after its death and is replaced when the rank declares again. A layer none of whose
    holders survived is begun anew by the first who declares it. The linear default is frozen over all ranks at once.

    Args:
        base: the committed placements.
        ranks: all living ranks, ascending.
        newcomers: those of them whose process is in no committed view yet.
        survivors: those whose process is in the last committed view.
    """
    placements = dict(base)
    declared = _by_layer(newcomers)
    for layer in declared:
        if layer in placements and survivors.isdisjoint(placements[layer].experts_of):
            del placements[layer]
    for layer, declarations in declared.items():
        explicit = {rank: entry for rank, entry in declarations.items() if not entry.linear}
        if explicit:
            placements[layer] = _merged(placements.get(layer), explicit)
    for layer, declarations in _by_layer(ranks.values()).items():
        if layer not in placements:
            frozen = _frozen_linear(declarations, ranks)
            if frozen is not None:
                placements[layer] = frozen
    return placements


def _by_layer(ranks: Iterable[RankDeclaration]) -> dict[int | None, dict[int, ExpertDeclaration]]:
    found: dict[int | None, dict[int, ExpertDeclaration]] = {}
    for rank in ranks:
        for entry in rank.experts:
            found.setdefault(entry.layer, {})[rank.info.rank] = entry
    return found


def _merged(known: Placement | None, explicit: Mapping[int, ExpertDeclaration]) -> Placement:
    """`known` with the entries of `explicit`; those of another number of experts came too late for it."""
    num_experts = known.num_experts if known else next(iter(explicit.values())).num_experts
    entries = dict(known.experts_of) if known else {}
    for rank, entry in explicit.items():
        if entry.num_experts == num_experts:
            entries[rank] = entry.experts
    return Placement(num_experts, entries)


def _frozen_linear(
    declarations: Mapping[int, ExpertDeclaration], ranks: Mapping[int, RankDeclaration]
) -> Placement | None:
    """The linear default, if somebody declared it and as many ranks as they wait for are there."""
    exchange: Sequence[int] = [rank for rank, known in ranks.items() if known.info.mode is RankMode.EXCHANGE]
    linear = [rank for rank, entry in declarations.items() if entry.linear]
    if not linear or not exchange or min(ranks[rank].world_size for rank in linear) > len(exchange):
        return None
    return linear_placement(declarations[linear[0]].num_experts, exchange)
