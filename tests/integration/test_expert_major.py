"""Dispatched rows expert by expert, from the dispatch to the combine, on ranks that are processes of their own."""

from __future__ import annotations

import pytest
import torch

import epmesh
from epmesh.testing import LocalMesh

NUM_EXPERTS, HIDDEN, TOPK, TOKENS = 6, 256, 3, 9


def error_of_a_mixture(comm: epmesh.Communicator, static: bool) -> float:
    """The largest error of a layer whose expert e multiplies by e + 1; weights are applied on the way back."""
    source = torch.Generator().manual_seed(comm.rank)
    rows = torch.randn(TOKENS, HIDDEN, generator=source)
    weights = torch.rand(TOKENS, TOPK, generator=source)
    ids = torch.rand(TOKENS, NUM_EXPERTS, generator=source).argsort(dim=1)[:, :TOPK]
    ids[0, 0] = -1
    held = comm.view.placement(None)
    assert held is not None
    experts = held.experts_of[comm.global_rank]
    received = comm.dispatch(rows, weights, ids, static=static)
    grouped = epmesh.group_by_expert(*received, experts=experts, num_experts=NUM_EXPERTS, expert_alignment=8)
    results = torch.full_like(grouped.hidden_states, float("nan"))
    for group, expert in enumerate(experts):
        first, end = grouped.offsets[group : group + 2].tolist()
        results[first:end] = grouped.hidden_states[first:end] * (expert + 1)
    buffer = comm.allocate_combine_input(received[0].shape, torch.float32, comm.device)
    total = comm.combine(grouped.to_rows(results, output=buffer))
    wanted = rows * torch.where(ids >= 0, weights * (ids + 1), 0.0).sum(1, keepdim=True)
    return float((total - wanted).abs().max())


@pytest.mark.parametrize("static", [False, True])
def test_a_layer_by_groups_gives_what_its_formula_gives(static: bool) -> None:
    with LocalMesh(1, 2, num_experts=NUM_EXPERTS, max_tokens_per_rank=16) as mesh:
        assert max(mesh.run(error_of_a_mixture, static)) < 1e-4
