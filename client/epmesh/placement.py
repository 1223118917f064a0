"""Expert placement: which ranks hold which expert. Pure; ranks are global."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from epmesh.errors import InvalidRequest
from epmesh.v1 import view_pb2

MAX_EXPERTS = 65_536


@dataclass(frozen=True)
class Placement:
    """Who holds what, living or not.

    Attributes:
        num_experts: logical experts have ids 0 to num_experts - 1.
        experts_of: global rank -> its experts, ascending. An expert at several ranks has replicas.
    """

    num_experts: int
    experts_of: Mapping[int, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not 0 < self.num_experts <= MAX_EXPERTS:
            raise InvalidRequest(f"num_experts is {self.num_experts}; it must be 1 to {MAX_EXPERTS}")
        for rank, experts in self.experts_of.items():
            if any(not 0 <= expert < self.num_experts for expert in experts):
                bad = next(expert for expert in experts if not 0 <= expert < self.num_experts)
                raise InvalidRequest(f"rank {rank} declares expert {bad}; ids are 0 to {self.num_experts - 1}")
            if any(a >= b for a, b in zip(experts, experts[1:], strict=False)):
                raise InvalidRequest(f"rank {rank}'s experts must be distinct and ascending: {experts[:16]}")

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """For each expert, the global ranks that hold it, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank in sorted(self.experts_of):
            for expert in self.experts_of[rank]:
                found[expert].append(rank)
        return tuple(map(tuple, found))

    def with_rank(self, rank: int, experts: Iterable[int]) -> Placement:
        """The same placement with `rank`'s experts replaced."""
        return Placement(self.num_experts, {**self.experts_of, rank: tuple(sorted(set(experts)))})

    def to_proto(self, layer: int | None) -> view_pb2.Placement:
        """The placement of `layer` as it crosses a wire."""
        message = view_pb2.Placement(layer=layer, num_experts=self.num_experts)
        for rank in sorted(self.experts_of):
            message.holders.add(rank=rank, experts=self.experts_of[rank])
        return message

    @classmethod
    def from_proto(cls, message: view_pb2.Placement) -> tuple[int | None, Placement]:
        """Layer and placement a message carries.

        Raises:
            InvalidRequest: an id is out of range.
        """
        layer = message.layer if message.HasField("layer") else None
        return layer, cls(message.num_experts, {entry.rank: tuple(entry.experts) for entry in message.holders})


def linear_placement(num_experts: int, ranks: Sequence[int]) -> Placement:
    """vLLM's linear default: contiguous blocks over `ranks`; the first ``num_experts % len(ranks)`` hold one more."""
    if not ranks:
        raise InvalidRequest("a linear placement needs at least one rank")
    base, extra = divmod(num_experts, len(ranks))
    experts_of: dict[int, tuple[int, ...]] = {}
    start = 0
    for position, rank in enumerate(ranks):
        count = base + (position < extra)
        experts_of[rank] = tuple(range(start, start + count))
        start += count
    return Placement(num_experts, experts_of)
