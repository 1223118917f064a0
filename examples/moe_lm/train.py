"""Train the model on one CPU thread.

python -m examples.moe_lm.train --output weights.safetensors --minutes 45
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from .config import VOCABULARY, WEIGHTS, MoeConfig
from .corpus import Corpus, read_corpus
from .evaluate import bits_per_byte, token_stream
from .model import MoeLanguageModel, Routing
from .tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from .weights import save

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to learn; training ends at `steps` or after `limit_s`, whichever comes first."""

    steps: int = 3000
    limit_s: float = 2700.0
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup: float = 0.03  # share of the run
    balance: float = 0.01  # weight of the load-balancing loss
    weight_decay: float = 0.1
    seed: int = 0
    save_every_s: float = 240.0

    def rate_at(self, progress: float) -> float:
        """Learning rate at `progress` in 0..1: a linear rise, then half a cosine down to zero."""
        if progress < self.warmup:
            return self.learning_rate * (progress + 1e-3) / (self.warmup + 1e-3)
        done = (progress - self.warmup) / (1 - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def balance_loss(routings: list[Routing], num_experts: int) -> Tensor:
    """Switch Transformer's load-balancing loss, averaged over layers; 1.0 when every expert gets the same share."""
    losses = []
    for routing in routings:
        share = torch.bincount(routing.topk_ids.flatten(), minlength=num_experts) / routing.topk_ids.numel()
        losses.append(num_experts * (share * routing.probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


class Trainer:
    """Owns the model, its optimiser and the stream of training tokens."""

    def __init__(self, model: MoeLanguageModel, stream: Tensor, plan: TrainingPlan) -> None:
        self.model, self.stream, self.plan = model, stream, plan
        self.optimizer = make_optimizer(model, plan)
        self._random = torch.Generator().manual_seed(plan.seed)
        self._starts = torch.empty(0, dtype=torch.int64)

    def step(self, progress: float) -> float:
        """Learn from one batch; return its loss in nats per token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(progress)
        windows, routings = self._next_batch(), list[Routing]()
        logits = self.model(windows[:, :-1], routings=routings)
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        total = loss + self.plan.balance * balance_loss(routings, self.model.config.num_experts)
        self.optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def _next_batch(self) -> Tensor:
        """Windows of the stream, each used once per epoch; int64 `[batch_size, context + 1]`."""
        context = self.model.config.context
        if len(self._starts) < self.plan.batch_size:
            shift = int(torch.randint(context, (), generator=self._random))
            starts = torch.arange(shift, len(self.stream) - context, context)
            self._starts = starts[torch.randperm(len(starts), generator=self._random)]
        starts, self._starts = self._starts[: self.plan.batch_size], self._starts[self.plan.batch_size :]
        return self.stream[starts.unsqueeze(1) + torch.arange(context + 1)]


def make_optimizer(model: MoeLanguageModel, plan: TrainingPlan) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.97), foreach=False, fused=True)


def train(corpus: Corpus, tokenizer: Tokenizer, plan: TrainingPlan, output: Path) -> None:
    """Train until the plan ends, writing the weights to `output` on the way and at the end."""
    torch.manual_seed(plan.seed)
    model = MoeLanguageModel(MoeConfig(vocab_size=tokenizer.vocab_size))
    trainer = Trainer(model, token_stream(tokenizer, corpus.train), plan)
    logger.info(
        "training.started tokens=%d parameters=%d", len(trainer.stream), sum(map(torch.numel, model.parameters()))
    )
    begin = saved = time.monotonic()
    average = math.log(tokenizer.vocab_size)
    for step in range(plan.steps):
        elapsed = time.monotonic() - begin
        if elapsed >= plan.limit_s:
            break
        average += 0.02 * (trainer.step(max(step / plan.steps, elapsed / plan.limit_s)) - average)
        if step % 50 == 0:
            logger.info("training.step step=%d elapsed_s=%.0f nats_per_token=%.3f", step, elapsed, average)
        if time.monotonic() - saved > plan.save_every_s:
            saved = time.monotonic()
            _checkpoint(model, tokenizer, corpus, output)
    _checkpoint(model, tokenizer, corpus, output)
    logger.info("training.complete elapsed_s=%.0f", time.monotonic() - begin)


def _checkpoint(model: MoeLanguageModel, tokenizer: Tokenizer, corpus: Corpus, output: Path) -> None:
    save(model, output)
    bits = bits_per_byte(model, tokenizer, corpus.held_out[::4])
    logger.info("training.saved held_out_bits_per_byte=%.3f", bits)


def main() -> None:
    """Command line: train on the Bible's text; learn the vocabulary first if its file is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--vocabulary", type=Path, default=VOCABULARY)
    parser.add_argument("--corpus", type=Path, help="the Bible's text as a file; default: ask the `bible` command")
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--steps", type=int, default=TrainingPlan.steps)
    parser.add_argument("--batch-size", type=int, default=TrainingPlan.batch_size)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    corpus = read_corpus(args.corpus)
    if not args.vocabulary.exists():
        train_tokenizer(corpus.train, MoeConfig.vocab_size).save(args.vocabulary)
    plan = TrainingPlan(steps=args.steps, limit_s=60 * args.minutes, batch_size=args.batch_size)
    train(corpus, load_tokenizer(args.vocabulary), plan, args.output)


if __name__ == "__main__":
    main()
