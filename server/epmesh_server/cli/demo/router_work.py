"""What each router of the demo's second act does, and what it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epmesh import Router, View
from epmesh_server.cli.demo.plan import DemoPlan, import_model
from epmesh_server.cli.demo.rank_work import CountedExperts, NeededBytes

Tell = Callable[[dict[int, list[int]]], None]


@dataclass(frozen=True)
class RouterReport:
    """One router's part of the run.

    Attributes:
        router: its number.
        prompts: numbers of the prompts it continued.
        held: for every layer the experts whose weights it loaded: none.
        tokens: int64 ``[len(prompts), num_steps]``, -1 after a text's end.
        logits: fp32 ``[len(prompts), num_steps, vocab_size]``, what each token was chosen from.
        forward_s: duration of each forward, seconds: to the nodes, through the experts and back.
        bytes_moved: bytes of the tensors it sent to nodes and got from them, as the router counts them.
        floor_bytes: the least possible, as the router counts it.
        needed_bytes: the least possible, counted here from what the model's routers chose.
        started_at, ended_at: ``time.monotonic()``.
    """

    router: int
    prompts: range
    held: tuple[tuple[int, ...], ...]
    tokens: torch.Tensor
    logits: torch.Tensor
    forward_s: tuple[float, ...]
    bytes_moved: int
    floor_bytes: int
    needed_bytes: int
    started_at: float
    ended_at: float


class _Timed:
    """An expert backend that notes how long each of its calls takes."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.durations_s: list[float] = []

    def forward(self, *args: Any) -> Any:
        """As the backend's."""
        started = time.perf_counter()
        result = self._backend.forward(*args)
        self.durations_s.append(time.perf_counter() - started)
        return result


def generate_routed(router: Router, view: View, number: int, root: Path, plan: DemoPlan, tell: Tell) -> RouterReport:
    """Continues the prompts of router `number`: attention in this process, experts wherever they are served.

    Args:
        router: of a mesh whose ranks serve the model's experts.
        view: of that mesh; says where they are.
        root: the source tree.
        plan: what to generate.
        tell: takes progress: token ids by number of the prompt.
    """
    moe_lm = import_model(root)
    needed, timed = NeededBytes(view, None), _Timed(moe_lm.RoutedExperts(router))
    model = moe_lm.load(expert_ids=(), backend=CountedExperts(timed, needed))
    tokenizer, prompts = moe_lm.load_tokenizer(), plan.router_share(number)
    started_at = time.monotonic()
    generation = moe_lm.generate(
        model,
        moe_lm.encode_prompts(tokenizer, [plan.prompts[index] for index in prompts]),
        end=tokenizer.end,
        num_steps=plan.num_steps,
        temperature=plan.temperature,
        seeds=plan.seeds(prompts),
        on_step=lambda _, tokens: tell(dict(zip(prompts, tokens.tolist(), strict=True))),
    )
    ended_at = time.monotonic()
    stats = router.stats
    return RouterReport(
        router=number,
        prompts=prompts,
        held=tuple(block.experts.expert_ids for block in model.layers),
        tokens=generation.tokens,
        logits=generation.logits,
        forward_s=tuple(timed.durations_s),
        bytes_moved=stats.bytes_sent + stats.bytes_received,
        floor_bytes=stats.floor_bytes,
        needed_bytes=needed.num_bytes,
        started_at=started_at,
        ended_at=ended_at,
    )
