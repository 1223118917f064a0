"""Batched text generation whose every step makes the same number of exchanges, whatever the batch holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import NO_TOKEN
from .model import KeyValueCache, MoeLanguageModel
from .tokenizer import Tokenizer

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Generation:
    """What was generated after the prompts.

    `tokens` is int64 `[batch, num_steps]`, `NO_TOKEN` after a sequence's end mark; `logits` is fp32
    `[batch, num_steps, vocab_size]`, what each of them was chosen from, zero where there is no token.
    """

    tokens: Tensor
    logits: Tensor

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        return [tokenizer.decode(row) for row in self.tokens.tolist()]


class Sampler:
    """Chooses tokens; each sequence draws from a generator of its own, so splitting a batch changes no text.

    `temperature` 0 takes the likeliest token. `seeds` holds one seed per sequence.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits: Tensor) -> Tensor:
        """Choose from fp32 `[batch, vocab_size]`; returns int64 `[batch]`. Every call draws once per sequence.

        The token whose logit is largest after Gumbel noise is one drawn from the softmax. Rounding changes the choice
        only where the two largest all but tie.
        """
        if self._temperature == 0 or not self._generators:
            return logits.argmax(dim=-1)
        size = logits.shape[-1]
        draws = [torch.rand(size, dtype=torch.float64, generator=generator) for generator in self._generators]
        noise = -(-torch.stack(draws).log()).log()
        return (logits.double() / self._temperature + noise.to(logits.device)).argmax(dim=-1)


class Decoder:
    """A batch of sequences that grow by one token per step. A step that raises changes nothing: call it again.

    In a mesh every rank steps its own batch equally often; a rank whose batch is empty, or whose sequences have all
    ended, still makes its part of every exchange.
    """

    def __init__(self, model: MoeLanguageModel, prompts: Sequence[Sequence[int]], sampler: Sampler, end: int) -> None:
        """Start from `prompts`, each at least one token long; an `end` token ends a sequence."""
        self._model, self._sampler, self._end = model, sampler, end
        self._cache = KeyValueCache()
        self._input = pad_left(prompts).to(model.embedding.weight.device)
        self._ended = torch.zeros(len(prompts), dtype=torch.bool, device=self._input.device)

    def step(self) -> tuple[Tensor, Tensor]:
        """Make one pass of the model; returns the new tokens, int64 `[batch]`, and their logits."""
        cache = self._cache.copy()
        with torch.inference_mode():
            logits = self._model(self._input, cache)[:, -1].masked_fill(self._ended.unsqueeze(1), 0.0)
            tokens = self._sampler.choose(logits).masked_fill(self._ended, NO_TOKEN)
        self._cache, self._input = cache, tokens.masked_fill(tokens == self._end, NO_TOKEN).unsqueeze(1)
        self._ended = self._ended | (tokens == self._end)
        return tokens, logits


def generate(
    model: MoeLanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    num_steps: int = 64,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    on_step: OnStep | None = None,
) -> Generation:
    """Continue every prompt by up to `num_steps` tokens.

    Calls the model's backend exactly `num_steps * num_layers` times. In a mesh all ranks pass the same `num_steps`;
    `prompts`, `seeds` and the rest may differ, and `prompts` may be empty.

    Args:
        model: what predicts.
        prompts: token ids, each sequence beginning with the end mark (see `encode_prompts`).
        end: the token that ends a sequence.
        num_steps: passes to make, no fewer and no more.
        temperature: 0 is greedy; above, tokens are sampled.
        seeds: one per prompt; None counts from 0.
        on_step: called after each step with its number and all tokens so far, `[batch, step + 1]`.

    Raises:
        ValueError: the longest prompt and `num_steps` do not fit into the model's context.
    """
    longest = max(map(len, prompts), default=1)
    if longest + num_steps - 1 > model.config.context:
        raise ValueError(f"{longest} prompt tokens and {num_steps} steps outgrow context {model.config.context}")
    sampler = Sampler(temperature, range(len(prompts)) if seeds is None else seeds)
    decoder = Decoder(model, prompts, sampler, end)
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    for step in range(num_steps):
        new_tokens, new_logits = decoder.step()
        tokens.append(new_tokens)
        logits.append(new_logits)
        if on_step is not None:
            on_step(step, torch.stack(tokens, dim=1))
    return Generation(torch.stack(tokens, dim=1), torch.stack(logits, dim=1))


def pad_left(prompts: Sequence[Sequence[int]]) -> Tensor:
    """Stack prompts of different lengths into int64 `[batch, longest]`, `NO_TOKEN` before the shorter ones."""
    longest = max(map(len, prompts), default=1)
    padded = torch.full((len(prompts), longest), NO_TOKEN)
    for row, prompt in zip(padded, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt)
    return padded
