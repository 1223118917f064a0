"""The model's shape and where its files are: what its PyTorch form and its NumPy form share. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

WEIGHTS = Path(__file__).with_name("weights.safetensors")
VOCABULARY = Path(__file__).with_name("vocabulary.json")

NO_TOKEN = -1  # a hole in a batch: before a shorter prompt, or after a sequence's end


@dataclass(frozen=True)
class MoeConfig:
    """The model's shape; sizes are numbers of elements, `context` of tokens."""

    vocab_size: int = 2048
    hidden_size: int = 160
    num_layers: int = 4
    num_heads: int = 5
    num_experts: int = 16
    num_topk: int = 2
    expert_size: int = 192
    context: int = 256


def load_config(path: Path = WEIGHTS) -> MoeConfig:
    """Read the model's shape from the file's metadata."""
    with safe_open(path, framework="np") as file:
        return MoeConfig(**json.loads(file.metadata()["config"]))


def is_dense(name: str) -> bool:
    """Whether a tensor of the file belongs to no expert."""
    return ".experts." not in name


def rotary_turns(config: MoeConfig) -> NDArray[np.float32]:
    """Cosines and sines, fp32 `[context, 2, head_size / 2]`, by which each position turns queries and keys (RoPE)."""
    half = config.hidden_size // config.num_heads // 2
    speed = 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)
    angle = np.outer(np.arange(config.context, dtype=np.float32), speed.astype(np.float32))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)
