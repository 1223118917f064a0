"""Which expert placements a view has. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

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
    holders survived is begun anew by the first who declares it, unless that is just what it held before: then it is one
    of them that came back. The linear default is frozen over all ranks at once:
    over those that exchange and over those that serve, each for itself, since no row goes from one to the other.

    Args:
        base: the committed placements.
        ranks: all living ranks, ascending.
        newcomers: those of them whose process is in no committed view yet.
        survivors: those whose process is in the last committed view.
    """
    placements = dict(base)
    came = list(newcomers)
    declared = _by_layer(came)
    for layer, declarations in declared.items():
        known = placements.get(layer)
        if known is not None and survivors.isdisjoint(known.experts_of) and not _is_repeated(known, declarations):
            del placements[layer]
    for layer, declarations in declared.items():
        explicit = {rank: entry for rank, entry in declarations.items() if not entry.linear}
        if explicit:
            placements[layer] = _merged(placements.get(layer), explicit)
    for mode in RankMode:
        peers = {rank: known for rank, known in ranks.items() if known.info.mode is mode}
        for layer in _by_layer(known for known in came if known.info.mode is mode):
            frozen = _with_linear(placements.get(layer), _by_layer(peers.values())[layer], peers)
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


def _is_repeated(known: Placement, declarations: Mapping[int, ExpertDeclaration]) -> bool:
    """Whether somebody declares explicitly what `known` has at its number."""
    return any(
        not entry.linear and (entry.num_experts, entry.experts) == (known.num_experts, known.experts_of.get(rank))
        for rank, entry in declarations.items()
    )


def _with_linear(
    known: Placement | None, declarations: Mapping[int, ExpertDeclaration], peers: Mapping[int, RankDeclaration]
) -> Placement | None:
    """`known` with the linear default over `peers`, the living ranks of one mode (ascending).

    `None` where nobody declared it, where fewer are there than all of them wait for, or where one of the peers holds
    experts already: then it was frozen before, or somebody said explicitly who holds what.
    """
    linear = [rank for rank, entry in declarations.items() if entry.linear]
    if not linear or min(peers[rank].world_size for rank in linear) > len(peers):
        return None
    frozen = linear_placement(declarations[linear[0]].num_experts, list(peers))
    if known is None:
        return frozen
    if known.num_experts != frozen.num_experts or not peers.keys().isdisjoint(known.experts_of):
        return None
    return Placement(known.num_experts, {**known.experts_of, **frozen.experts_of})
