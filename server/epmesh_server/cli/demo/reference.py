"""The same texts from one process that holds every expert."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from epmesh_server.cli.demo.plan import DemoPlan, import_model
from epmesh_server.cli.demo.verdict import ModelShape, Reference


def generate_reference(root: Path, plan: DemoPlan) -> tuple[Reference, ModelShape]:
    """Continues all prompts as one batch, on one thread, without a mesh."""
    moe_lm = import_model(root)
    model, tokenizer = moe_lm.load(), moe_lm.load_tokenizer()
    prompts = moe_lm.encode_prompts(tokenizer, plan.prompts)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every rank has
    try:
        started = time.monotonic()
        generation = moe_lm.generate(
            model,
            prompts,
            end=tokenizer.end,
            num_steps=plan.num_steps,
            temperature=plan.temperature,
            seeds=plan.seeds(range(len(prompts))),
        )
        elapsed_s = time.monotonic() - started
    finally:
        torch.set_num_threads(threads)
    length = max(map(len, prompts)) + plan.num_steps
    return Reference(generation.tokens, generation.logits, length, elapsed_s), model.config
