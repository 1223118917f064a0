"""What all ranks of a mesh must agree on, whoever comes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from epmesh.errors import InvalidRequest
from epmesh.placement import MAX_EXPERTS, Placement
from epmesh_server.membership.declarations import ExpertDeclaration, RankDeclaration


class Agreement:
    """The number of experts of each layer and the tensor-parallel size that living ranks declared.

    Counted, so that a rank's coming and going costs no look at the others.
    """

    def __init__(self, stride: int) -> None:
        self._stride = stride
        self._num_experts: dict[int | None, Counter[int]] = {}
        self._tensor_parallel: Counter[int] = Counter()

    def add(self, rank: RankDeclaration) -> None:
        """Counts a rank that was accepted."""
        if rank.tensor_parallel_size > 1:
            self._tensor_parallel[rank.tensor_parallel_size] += 1
        for declared in rank.experts:
            self._num_experts.setdefault(declared.layer, Counter())[declared.num_experts] += 1

    def remove(self, rank: RankDeclaration) -> None:
        """Forgets a rank that was counted."""
        if rank.tensor_parallel_size > 1:
            _decrease(self._tensor_parallel, rank.tensor_parallel_size)
        for declared in rank.experts:
            _decrease(self._num_experts[declared.layer], declared.num_experts)

    @property
    def tensor_parallel_size(self) -> int:
        """The size living ranks declared first; 0 if none did."""
        return next(iter(self._tensor_parallel), 0)

    def check(
        self, rank: RankDeclaration, placements: Mapping[int | None, Placement], survives: Callable[[int], bool]
    ) -> None:
        """Refuses a rank that contradicts itself, the committed placements or living ranks.

        A placement none of whose holders survived binds nobody: the mesh may start anew with another model.

        Args:
            rank: who wants to join.
            placements: of the last view.
            survives: whether the process that the last view has behind a global rank lives.

        Raises:
            InvalidRequest: naming both values.
        """
        self._check_tensor_parallel(rank)
        layers = [declared.layer for declared in rank.experts]
        if len(set(layers)) != len(layers):
            raise InvalidRequest(f"rank {rank.info.rank} declares the experts of one layer twice; declare them once")
        for declared in rank.experts:
            _check_experts(rank.info.rank, declared)
            expected = self._expected(declared.layer, placements, survives)
            if expected is not None and expected != declared.num_experts:
                raise InvalidRequest(
                    f"rank {rank.info.rank} declares num_experts={declared.num_experts} for {_name(declared.layer)}, "
                    f"where the mesh has {expected}; declare {expected}, or change it with set_expert_placement"
                )

    def _check_tensor_parallel(self, rank: RankDeclaration) -> None:
        size = rank.tensor_parallel_size
        if size <= 1:
            return
        number, expected = rank.info.rank, self.tensor_parallel_size
        if expected and size != expected:
            raise InvalidRequest(
                f"rank {number} declares tensor_parallel_size={size}, the mesh has {expected}; use one size for all"
            )
        if number % self._stride // size >= self._stride // size:
            raise InvalidRequest(
                f"local rank {number % self._stride} cannot be in a block of tensor_parallel_size={size}: "
                f"a node has at most {self._stride} ranks; use fewer local ranks or another size"
            )

    def _expected(
        self, layer: int | None, placements: Mapping[int | None, Placement], survives: Callable[[int], bool]
    ) -> int | None:
        placement = placements.get(layer)
        if placement is not None and any(map(survives, placement.experts_of)):
            return placement.num_experts
        return next(iter(self._num_experts.get(layer, ())), None)


def _check_experts(rank: int, declared: ExpertDeclaration) -> None:
    if not 1 <= declared.num_experts <= MAX_EXPERTS:
        raise InvalidRequest(f"rank {rank} declares num_experts={declared.num_experts}; it must be 1 to {MAX_EXPERTS}")
    if declared.experts and not 0 <= min(declared.experts) <= max(declared.experts) < declared.num_experts:
        bad = next(expert for expert in declared.experts if not 0 <= expert < declared.num_experts)
        raise InvalidRequest(f"rank {rank} declares expert {bad}; ids are 0 to {declared.num_experts - 1}")


def _name(layer: int | None) -> str:
    return "all layers" if layer is None else f"layer {layer}"


def _decrease(counter: Counter[int], key: int) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
