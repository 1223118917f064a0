"""The model without its experts in NumPy: what a router service runs, which holds no expert and needs no torch.

It computes what `model.MoeLanguageModel` does for one sequence. Where the experts' part is due it stops and says which
rows they are to work on, so that whoever runs it may wait for a mesh in whatever way suits: `run` waits in place, an
event loop awaits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from .config import WEIGHTS, MoeConfig, is_dense, load_config, rotary_turns

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class ExpertRows:
    """One layer's rows for the experts.

    Attributes:
        hidden_states: fp32 `[num_tokens, hidden_size]`.
        topk_weights: fp32 `[num_tokens, num_topk]`, each row's sum is one.
        topk_ids: int64 `[num_tokens, num_topk]`.
    """

    layer: int
    hidden_states: Floats
    topk_weights: Floats
    topk_ids: NDArray[np.int64]


Pass: TypeAlias = Generator[ExpertRows, Floats, Floats]
"""One pass of the model: gives rows for the experts, is sent their sums, returns logits."""


@dataclass
class SequenceCache:
    """Keys and values of the tokens seen so far, one `[num_heads, length, head_size]` pair per layer."""

    layers: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)
    length: int = 0

    def extend(self, layer: int, key: Floats, value: Floats) -> tuple[Floats, Floats]:
        """Append to `layer` and return all of its keys and values."""
        if layer in self.layers:
            old_key, old_value = self.layers[layer]
            key, value = np.concatenate([old_key, key], axis=1), np.concatenate([old_value, value], axis=1)
        self.layers[layer] = key, value
        return key, value


class NumpyModel:
    """Token ids in, logits of the next token out; any number of sequences may share one."""

    def __init__(self, config: MoeConfig, tensors: Mapping[str, Floats]) -> None:
        """`tensors` are fp32, named as in the file; those of experts are not needed."""
        self.config = config
        self._tensors = tensors
        self._turns = rotary_turns(config)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> NumpyModel:
        """Read everything but the experts, in fp32."""
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in filter(is_dense, file.keys())}
        return cls(load_config(path), tensors)

    def advance(self, tokens: list[int], cache: SequenceCache) -> Pass:
        """One pass over `tokens`, which come after those that `cache` has seen; it is extended.

        Gives `ExpertRows` once a layer, is sent fp32 `[num_tokens, hidden_size]`, and returns the logits of the token
        after the last, fp32 `[vocab_size]`. A pass that was left halfway leaves a cache that is of no use.

        Raises:
            ValueError: the sequence would outgrow the model's context.
        """
        end = cache.length + len(tokens)
        if end > self.config.context:
            raise ValueError(f"sequence of {end} tokens outgrows the context of {self.config.context}")
        turn = self._turns[cache.length : end]
        embedding = self._tensors["embedding.weight"]
        x = embedding[tokens]
        for layer in range(self.config.num_layers):
            x = x + self._attend(layer, self._norm(f"blocks.{layer}.attention_norm", x), turn, cache)
            x = x + (yield self._route(layer, self._norm(f"blocks.{layer}.expert_norm", x)))
        cache.length = end
        return np.asarray(self._norm("norm", x[-1:])[0] @ embedding.T)

    def _norm(self, name: str, x: Floats) -> Floats:
        mean = np.mean(np.square(x), axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean + np.finfo(np.float32).eps) * self._tensors[f"{name}.weight"])

    def _attend(self, layer: int, x: Floats, turn: Floats, cache: SequenceCache) -> Floats:
        """Causal self-attention of `x` `[length, hidden_size]`."""
        length, hidden_size = x.shape
        heads = x @ self._tensors[f"blocks.{layer}.attention.qkv.weight"].T
        heads = heads.reshape(length, 3, self.config.num_heads, -1).transpose(1, 2, 0, 3)
        query = rotate(heads[0], turn)
        key, value = cache.extend(layer, rotate(heads[1], turn), heads[2])
        scores = query @ key.transpose(0, 2, 1) / np.float32(query.shape[-1] ** 0.5)
        seen = key.shape[1]
        later = np.arange(seen) > np.arange(seen - length, seen)[:, None]
        mixed = softmax(np.where(later, np.float32(-np.inf), scores)) @ value
        out = self._tensors[f"blocks.{layer}.attention.out.weight"]
        return np.asarray(mixed.transpose(1, 0, 2).reshape(length, hidden_size) @ out.T)

    def _route(self, layer: int, rows: Floats) -> ExpertRows:
        probabilities = softmax(rows @ self._tensors[f"blocks.{layer}.router.scores.weight"].T)
        topk_ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, : self.config.num_topk]
        chosen = np.take_along_axis(probabilities, topk_ids, axis=-1)
        return ExpertRows(layer, rows, chosen / chosen.sum(axis=-1, keepdims=True), topk_ids)


def run(one: Pass, experts: Callable[[ExpertRows], Floats]) -> Floats:
    """Make a pass to its end, asking `experts` for their sums; returns the logits."""
    try:
        rows = next(one)
        while True:
            rows = one.send(experts(rows))
    except StopIteration as done:
        logits: Floats = done.value
        return logits


def softmax(x: Floats) -> Floats:
    """Over the last dimension."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def rotate(x: Floats, turn: Floats) -> Floats:
    """Turn `x` `[..., length, head_size]`, seen as pairs of halves, by `turn` `[length, 2, head_size / 2]`."""
    cos, sin = turn[:, 0], turn[:, 1]
    left, right = np.split(x, 2, axis=-1)
    return np.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)
