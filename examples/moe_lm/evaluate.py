"""Print what the model has learned: held-out bits per byte beside two unigram baselines, and the experts' load.

python -m examples.moe_lm.evaluate
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from .config import VOCABULARY, WEIGHTS
from .corpus import read_corpus
from .model import MoeLanguageModel, Routing
from .tokenizer import Tokenizer, load_tokenizer
from .weights import load

EVAL_BATCH = 16


def token_stream(tokenizer: Tokenizer, texts: Iterable[str]) -> Tensor:
    """All texts as one int64 `[num_tokens]`, an end mark before each and after the last."""
    stream = [tokenizer.end]
    for text in texts:
        stream += [*tokenizer.encode(text), tokenizer.end]
    return torch.tensor(stream)


def bits_per_byte(
    model: MoeLanguageModel, tokenizer: Tokenizer, texts: Sequence[str], routings: list[Routing] | None = None
) -> float:
    """Bits that the model needs per UTF-8 byte of `texts`, end marks' bits included.

    The text is read in windows of the model's context that share one token, so every token is predicted once.
    """
    stream = token_stream(tokenizer, texts)
    with torch.inference_mode():
        nats = sum(_nats(model, windows, routings) for windows in _windows(stream, model.config.context))
    return nats / math.log(2) / _num_bytes(texts)


def unigram_bits_per_byte(train: Iterable[int], held_out: Sequence[int], num_symbols: int, num_bytes: int) -> float:
    """Bits per byte of `held_out` where every symbol is drawn by its frequency in `train` (add-one smoothed)."""
    counts = Counter(train)
    total = counts.total() + num_symbols
    return sum(math.log2(total / (counts[symbol] + 1)) for symbol in held_out) / num_bytes


def baselines(tokenizer: Tokenizer, train: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    """Bits per byte of `held_out` from byte frequencies alone, and from token frequencies alone."""
    num_bytes = _num_bytes(held_out)
    train_bytes, held_out_bytes = "".join(train).encode(), "".join(held_out).encode()
    train_tokens, held_out_tokens = (token_stream(tokenizer, texts)[1:].tolist() for texts in (train, held_out))
    return {
        "byte unigram": unigram_bits_per_byte(train_bytes, held_out_bytes, 256, num_bytes),
        "token unigram": unigram_bits_per_byte(train_tokens, held_out_tokens, tokenizer.vocab_size, num_bytes),
    }


def expert_load(routings: Iterable[Routing], num_layers: int, num_experts: int) -> Tensor:
    """Share of routed rows per expert, fp32 `[num_layers, num_experts]`, each layer summing to one."""
    load = torch.zeros(num_layers, num_experts)
    for index, routing in enumerate(routings):
        load[index % num_layers] += torch.bincount(routing.topk_ids.flatten(), minlength=num_experts)
    return load / load.sum(dim=1, keepdim=True)


def _windows(stream: Tensor, context: int) -> Iterator[Tensor]:
    whole = (len(stream) - 1) // context
    if whole:
        yield from stream[: whole * context + 1].unfold(0, context + 1, context).split(EVAL_BATCH)  # type: ignore[no-untyped-call]
    if len(rest := stream[whole * context :]) > 1:
        yield rest.unsqueeze(0)


def _nats(model: MoeLanguageModel, windows: Tensor, routings: list[Routing] | None) -> float:
    logits = model(windows[:, :-1], routings=routings)
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").item()


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def main() -> None:
    """Command line: evaluate the committed weights, or others, on the held-out chapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--vocabulary", type=Path, default=VOCABULARY)
    parser.add_argument("--corpus", type=Path, help="the Bible's text as a file; default: ask the `bible` command")
    args = parser.parse_args()
    model, tokenizer, corpus = load(args.weights), load_tokenizer(args.vocabulary), read_corpus(args.corpus)
    routings: list[Routing] = []
    print(f"held-out text      {_num_bytes(corpus.held_out):,} bytes in {len(corpus.held_out)} chapters")
    for name, bits in baselines(tokenizer, corpus.train, corpus.held_out).items():
        print(f"{name:18} {bits:.3f} bits/byte")
    print(f"{'this model':18} {bits_per_byte(model, tokenizer, corpus.held_out, routings):.3f} bits/byte")
    print("expert load, % of routed rows (even: 6.2), one line a layer")
    for row in expert_load(routings, model.config.num_layers, model.config.num_experts):
        print("  " + " ".join(f"{100 * share:4.1f}" for share in row.tolist()))


if __name__ == "__main__":
    main()
