"""Weights on disk: one safetensors file whose metadata carries the model's shape."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import WEIGHTS, is_dense, load_config
from .experts import ExpertBackend, Experts
from .model import MoeLanguageModel


def save(model: MoeLanguageModel, path: Path) -> None:
    """Write all weights, rounded to fp16; compute is in fp32 whatever is stored."""
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"config": json.dumps(dataclasses.asdict(model.config))})


def load(
    path: Path = WEIGHTS, *, expert_ids: Sequence[int] | None = None, backend: ExpertBackend | None = None
) -> MoeLanguageModel:
    """Load the model in fp32, ready for inference.

    Args:
        path: a file that `save` wrote.
        expert_ids: the experts to hold in every layer; None holds all. The others' weights are never read.
        backend: where experts run; None is `LocalExperts`, which needs all of them.
    """
    config = load_config(path)
    with torch.device("meta"), _NoInitialisation():
        model = MoeLanguageModel(config, backend)
    model.set_experts(load_experts_share(path, range(config.num_experts) if expert_ids is None else expert_ids))
    model.load_state_dict(_load_dense(path), strict=False, assign=True)
    return model.eval().requires_grad_(False)


def load_experts_share(path: Path, expert_ids: Sequence[int]) -> list[Experts]:
    """Read only the named experts, one `Experts` per layer, in fp32.

    Raises:
        ValueError: an id is outside `0 .. num_experts - 1`.
    """
    config = load_config(path)
    if unknown := [expert_id for expert_id in expert_ids if not 0 <= expert_id < config.num_experts]:
        raise ValueError(f"experts {unknown} are outside 0..{config.num_experts - 1}")
    with safe_open(path, framework="pt") as file:
        return [_read_experts(file, f"blocks.{layer}.experts", expert_ids) for layer in range(config.num_layers)]


class _NoInitialisation(TorchFunctionMode):
    """Leaves out ``torch.nn.init``: a meta tensor has nothing to fill, and to learn that torch imports its compiler,
    which takes seconds in every rank."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def _read_experts(file: Any, prefix: str, expert_ids: Sequence[int]) -> Experts:
    up, down = (_read_rows(file.get_slice(f"{prefix}.{name}"), expert_ids) for name in ("up", "down"))
    return Experts(expert_ids, up, down)


def _read_rows(stacked: Any, rows: Sequence[int]) -> Tensor:
    if not rows:
        return torch.empty(0, *stacked.get_shape()[1:])
    return torch.cat([stacked[row : row + 1] for row in rows]).float()


def _load_dense(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).float() for name in filter(is_dense, file.keys())}
