"""What each rank of the demo does, and what it reports."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from epmesh.view import View
from epmesh_server.cli.demo.plan import DemoPlan, import_model
from epmesh_server.cli.demo.progress import ProgressSender
from epmesh_server.ranks.communicator import JoinedCommunicator


@dataclass(frozen=True)
class RankReport:
    """One rank's part of the run.

    Attributes:
        rank, slot: global rank, and the slot of its node.
        prompts: numbers of the prompts it continued.
        held: for every layer the experts whose weights it loaded.
        tokens: int64 ``[len(prompts), num_steps]``, -1 after a text's end.
        logits: fp32 ``[len(prompts), num_steps, vocab_size]``, what each token was chosen from.
        dispatch_s, combine_s: duration of each call, seconds, waiting for the other ranks included.
        bytes_sent, floor_bytes: between nodes, handed to the sockets, and least possible, as the communicator counts
            them (see `ExchangeStats`).
        needed_bytes: the least possible for this rank's rows, there and back, counted here from what the router chose.
        started_at, ended_at: ``time.monotonic()``, which is one clock for all processes of a machine.
    """

    rank: int
    slot: int
    prompts: range
    held: tuple[tuple[int, ...], ...]
    tokens: torch.Tensor
    logits: torch.Tensor
    dispatch_s: tuple[float, ...]
    combine_s: tuple[float, ...]
    bytes_sent: int
    floor_bytes: int
    needed_bytes: int
    started_at: float
    ended_at: float


class NeededBytes:
    """Counts what rows must cost between nodes at least, from the placement alone.

    That is, for each row and each other node that holds one of its experts: the row, its weights and ids once there,
    and one sum back.
    """

    def __init__(self, view: View, home: int | None) -> None:
        """For rows that come from the node in slot `home`; `None`: from none."""
        placement = view.placements[None]
        self._slots = torch.empty(placement.num_experts, dtype=torch.int64)
        for holder, experts in placement.experts_of.items():
            self._slots[list(experts)] = view.slot_of(holder)
        self._others = [node.slot for node in view.nodes if node.slot != home]
        self.num_bytes = 0

    def add(self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """Adds one exchange: ``[num_tokens, hidden]``, and weights and ids ``[num_tokens, num_topk]``."""
        slots = self._slots[topk_ids]
        copies = sum(int((slots == slot).any(dim=1).sum()) for slot in self._others)
        row, weights, ids = (
            tensor.shape[1] * tensor.element_size() for tensor in (hidden_states, topk_weights, topk_ids)
        )
        self.num_bytes += copies * (2 * row + weights + ids)


class CountedExperts:
    """An expert backend whose calls `needed` sees first."""

    def __init__(self, backend: Any, needed: NeededBytes) -> None:
        self._backend, self._needed = backend, needed

    def forward(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Any) -> Any:
        """As the backend's."""
        self._needed.add(x, weights, ids)
        return self._backend.forward(layer, x, weights, ids, experts)


def generate_share(comm: JoinedCommunicator, root: Path, plan: DemoPlan, progress_path: str) -> RankReport:
    """Continues this rank's prompts with the experts spread over all ranks of `comm`.

    Loads only the experts that the view places here; the others' weights are never read.

    Args:
        comm: of the group ``ep``; `num_experts` experts were declared on the way in.
        root: the source tree.
        plan: what to generate; the same on all ranks.
        progress_path: where to send progress.
    """
    moe_lm = import_model(root)
    mine = comm.view.placements[None].experts_of[comm.global_rank]
    needed = NeededBytes(comm.view, comm.view.slot_of(comm.global_rank))
    model = moe_lm.load(expert_ids=mine, backend=CountedExperts(moe_lm.MeshExperts(comm), needed))
    tokenizer, prompts = moe_lm.load_tokenizer(), plan.share(comm.global_rank)
    sender = ProgressSender(progress_path)

    def tell(_: int, tokens: torch.Tensor) -> None:
        sender.send(dict(zip(prompts, tokens.tolist(), strict=True)))

    comm.all_reduce(torch.zeros(1))  # everybody has loaded: what follows is the model and its exchanges
    started_at = time.monotonic()
    generation = moe_lm.generate(
        model,
        moe_lm.encode_prompts(tokenizer, [plan.prompts[index] for index in prompts]),
        end=tokenizer.end,
        num_steps=plan.num_steps,
        temperature=plan.temperature,
        seeds=plan.seeds(prompts),
        on_step=tell,
    )
    ended_at = time.monotonic()
    sender.close()
    return RankReport(
        rank=comm.global_rank,
        slot=comm.view.slot_of(comm.global_rank),
        prompts=prompts,
        held=tuple(block.experts.expert_ids for block in model.layers),
        tokens=generation.tokens,
        logits=generation.logits,
        dispatch_s=tuple(comm.stats.dispatch_s),
        combine_s=tuple(comm.stats.combine_s),
        bytes_sent=comm.stats.bytes_sent,
        floor_bytes=comm.stats.floor_bytes,
        needed_bytes=needed.num_bytes,
        started_at=started_at,
        ended_at=ended_at,
    )
