"""A small decoder-only language model whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import NO_TOKEN, MoeConfig, rotary_turns
from .experts import ExpertBackend, Experts, LocalExperts, empty_experts


class Routing(NamedTuple):
    """One layer's decision: fp32 weights and int64 ids `[num_tokens, num_topk]`, probabilities `[num_tokens, E]`."""

    topk_weights: Tensor
    topk_ids: Tensor
    probabilities: Tensor


@dataclass
class KeyValueCache:
    """Keys and values of the tokens seen so far, one `[batch, num_heads, length, head_size]` pair per layer."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    present: Tensor | None = None  # bool [batch, length]; False where the batch has a hole

    @property
    def length(self) -> int:
        return 0 if self.present is None else self.present.shape[1]

    def copy(self) -> KeyValueCache:
        """A cache that can be extended without changing this one; tensors are shared, never written to."""
        return KeyValueCache(dict(self.layers), self.present)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append to `layer` and return all of its keys and values."""
        if layer in self.layers:
            old_key, old_value = self.layers[layer]
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self.layers[layer] = key, value
        return key, value


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor | None, layer: int, cache: KeyValueCache | None) -> Tensor:
        """Mix `x` `[batch, length, hidden_size]` over time; `mask` is bool `[batch, 1, length, seen]`, None: causal."""
        batch, length, hidden_size = x.shape
        heads = self.qkv(x).view(batch, length, 3, self.num_heads, hidden_size // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden_size))  # type: ignore[no-any-return]


class Router(nn.Module):
    """A learned choice of `num_topk` experts per token, computed in fp32."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.num_topk = config.num_topk
        self.scores = nn.Linear(config.hidden_size, config.num_experts, bias=False)

    def forward(self, rows: Tensor) -> Routing:
        """Route `rows` `[num_tokens, hidden_size]`; the chosen weights of a token sum to one."""
        probabilities = self.scores(rows.float()).softmax(dim=-1)
        chosen, topk_ids = probabilities.topk(self.num_topk, dim=-1)
        return Routing(chosen / chosen.sum(dim=-1, keepdim=True), topk_ids, probabilities)


class Block(nn.Module):
    """Attention, then a mixture of experts, both added to the residual stream."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size)
        self.attention = Attention(config)
        self.expert_norm = nn.RMSNorm(config.hidden_size)
        self.router = Router(config)
        self.experts: Experts = empty_experts(config.num_experts, config.hidden_size, config.expert_size)


class MoeLanguageModel(nn.Module):
    """Token ids in, next-token logits out; `backend` says where the experts run."""

    def __init__(self, config: MoeConfig, backend: ExpertBackend | None = None) -> None:
        super().__init__()
        self.config = config
        self.backend: ExpertBackend = backend or LocalExperts()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.register_buffer(
            "_turns", torch.from_numpy(rotary_turns(config)), persistent=False
        )  # not stored with the weights
        self._initialise()

    def forward(
        self, tokens: Tensor, cache: KeyValueCache | None = None, routings: list[Routing] | None = None
    ) -> Tensor:
        """Predict the token after each token. Makes one call of the backend per layer, whatever the batch holds.

        Args:
            tokens: int64 `[batch, length]`; `NO_TOKEN` marks holes, which cost no expert rows; batch may be 0.
            cache: what was seen before; extended in place.
            routings: if given, one `Routing` per layer is appended, of the rows that are no holes.

        Returns:
            fp32 `[batch, length, vocab_size]`; meaningless at holes.

        Raises:
            ValueError: the sequence would outgrow the model's context.
        """
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"sequence of {end} tokens outgrows the context of {self.config.context}")
        present = tokens != NO_TOKEN
        mask = attention_mask(present, cache)
        turn = self.get_buffer("_turns")[start:end]
        x = self.embedding(tokens.clamp(min=0))
        for layer, block in enumerate(self.layers):
            x = x + block.attention(block.attention_norm(x), turn, mask, layer, cache)
            x = x + self._mix_experts(layer, block.expert_norm(x), present, routings)
        return functional.linear(self.norm(x), self.embedding.weight)

    @property
    def layers(self) -> list[Block]:
        return [cast("Block", block) for block in self.blocks]

    def set_experts(self, shares: list[Experts]) -> None:
        """Replace what this process holds, one `Experts` per layer (for a rank: only its own)."""
        for block, share in zip(self.layers, shares, strict=True):
            block.experts = share

    def _mix_experts(self, layer: int, x: Tensor, present: Tensor, routings: list[Routing] | None) -> Tensor:
        block = self.layers[layer]
        rows = x[present]
        routing = block.router(rows)
        if routings is not None:
            routings.append(routing)
        mixed = self.backend.forward(layer, rows, routing.topk_weights, routing.topk_ids, block.experts)
        return torch.zeros_like(x).index_put((present,), mixed)

    def _initialise(self) -> None:
        residual_scale = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            fan_in = parameter.shape[1]  # Linear is [out, in]; stacked experts are [expert, in, out]
            scale = residual_scale if name.endswith(("out.weight", "down")) else 1.0
            nn.init.normal_(parameter, std=0.02 if name.startswith("embedding") else scale * fan_in**-0.5)


def attention_mask(present: Tensor, cache: KeyValueCache | None) -> Tensor | None:
    """Who may look at whom, bool `[batch, 1, length, seen]`; None means causal without holes, and no cache.

    `present` is bool `[batch, length]`. The cache's own `present` is extended. Everyone sees at least itself, so
    that no row of the softmax is empty.
    """
    if cache is None:
        return None if bool(present.all()) else _masked(present, 0)
    start = cache.length
    cache.present = present if cache.present is None else torch.cat([cache.present, present], dim=1)
    return _masked(cache.present, start)


def _masked(present: Tensor, start: int) -> Tensor:
    seen = present.shape[1]
    column = torch.arange(seen, device=present.device)
    row = column[start:].unsqueeze(1)
    return (present.unsqueeze(1) & (column <= row) | (column == row)).unsqueeze(1)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn `x` `[..., length, head_size]`, seen as pairs of halves, by `turn` `[length, 2, head_size / 2]`."""
    cos, sin = turn.unbind(dim=1)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)
