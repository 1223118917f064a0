"""What a model's mixture-of-experts modules say of their experts. Duck-typed: no torch, no engine is imported.

The attributes are those of vLLM's ``FusedMoE``: ``global_num_experts``, and ``expert_map``, ``[global_num_experts]``,
which has the local index of each expert and -1 for those held elsewhere; ``layer_id`` where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from epmesh.errors import InvalidRequest

MOE_CLASSES = ("FusedMoE", "SharedFusedMoE")


@dataclass(frozen=True)
class HeldExperts:
    """What one rank holds of a layer: logical experts, and the ids of its own, ascending."""

    num_experts: int
    experts: tuple[int, ...]


def moe_modules(model: Any) -> list[Any]:
    """The modules of `model` whose class is called ``FusedMoE`` or ``SharedFusedMoE``, in the model's order."""
    return [module for module in model.modules() if type(module).__name__ in MOE_CLASSES]


def held_experts(modules: Sequence[Any]) -> dict[int | None, HeldExperts]:
    """What the modules say this rank holds: by layer, or under `None` where all that say anything say the same.

    A module without a map of its experts (one that holds them all, or none of vLLM's) says nothing. A layer's number is
    the module's ``layer_id``, or its place among `modules`.

    Raises:
        InvalidRequest: a map does not have one entry for each expert.
    """
    found: dict[int | None, HeldExperts] = {}
    for index, module in enumerate(modules):
        held = _held(module)
        if held is not None:
            layer = getattr(module, "layer_id", index)
            found[layer if isinstance(layer, int) else index] = held
    distinct = set(found.values())
    return {None: distinct.pop()} if len(distinct) == 1 else found


def _held(module: Any) -> HeldExperts | None:
    num_experts, expert_map = getattr(module, "global_num_experts", None), getattr(module, "expert_map", None)
    if num_experts is None or expert_map is None:
        return None
    entries = expert_map.tolist() if hasattr(expert_map, "tolist") else list(expert_map)
    if len(entries) != num_experts:
        raise InvalidRequest(
            f"a {type(module).__name__} has {num_experts} experts and an expert_map of {len(entries)}; make it one each"
        )
    return HeldExperts(num_experts, tuple(expert for expert, local in enumerate(entries) if local >= 0))
