"""Exchanges where several ranks hold the same tokens: a rank sends to holders that share its tensor-parallel index."""

from __future__ import annotations

from typing import Any

import torch

from epmesh import Communicator
from tests.integration import contract
from tests.integration.contract import UNDECLARED, Exchange, Feature, Shape
from tests.integration.implementations import on
from tests.integration.targets import Target, assert_same, check_exchanges

pytestmark = on(Shape(1, 4, 2), Shape(2, 2, 2), Shape(2, 4, 2))


def case(target: Target, layer: int, **options: Any) -> Exchange:
    world_size = target.shape.world_size
    tokens = tuple((5 * position + 4) % 9 for position in range(world_size))
    return Exchange(**{"tokens": tokens, "experts": target.experts("ep", layer), "layer": layer, **options})


def shared(target: Target) -> list[int]:
    """Every rank takes the input of the first of its tensor-parallel group."""
    size = target.shape.tensor_parallel_size
    return [position // size * size for position in range(target.shape.world_size)]


def test_ranks_with_the_same_tokens_send_to_holders_of_their_own_index(target: Target) -> None:
    cases = [
        case(target, layer, is_sequence_parallel=False, ids=ids)
        for layer in (0, 1, UNDECLARED)
        for ids in ("random", "holes", "none")
    ]
    check_exchanges(target, "ep", cases, shared(target))


def test_router_logits_go_to_every_rank_of_the_same_index(target: Target) -> None:
    cases = [case(target, UNDECLARED, is_sequence_parallel=False, router_logits=True, extras=((torch.int16, (2,)),))]
    check_exchanges(target, "ep", cases, shared(target))


def test_ranks_with_their_own_tokens_send_to_all_holders(target: Target) -> None:
    cases = [case(target, layer, is_sequence_parallel=True) for layer in (0, 1, UNDECLARED)]
    check_exchanges(target, "ep", [*cases, case(target, 0, router_logits=True)])


def test_both_kinds_take_turns_in_one_group(target: Target) -> None:
    cases = [case(target, layer, is_sequence_parallel=both) for layer in (0, 1) for both in (False, True)]
    check_exchanges(target, "ep", cases * 2, shared(target))


def partial_sums(comm: Communicator, tokens: list[int], experts: tuple[int, ...], layer: int, placement: Any) -> Any:
    output, dense = contract.mixture(comm, tokens, experts, layer, placement, is_sequence_parallel=False)
    block = comm.global_rank // comm.view.tensor_parallel_size
    return comm.group(f"tp:{block}").all_reduce(output), dense


def test_partial_results_sum_up_over_the_tensor_parallel_group_to_the_dense_model(target: Target) -> None:
    target.needs(Feature.GROUPS)
    tokens = [9 - position // 2 for position in range(target.shape.world_size)]
    for layer in (0, 1, 2, 3):
        results = target.run(
            "ep", partial_sums, tokens, target.experts("ep", layer), layer, target.shape.placement(layer)
        )
        for output, dense in results:
            torch.testing.assert_close(output, dense)


def sum_in_block(comm: Communicator) -> tuple[list[int], int, torch.Tensor]:
    block = comm.group(f"tp:{comm.global_rank // comm.view.tensor_parallel_size}")
    return block.ranks, block.rank, block.all_reduce(torch.tensor([comm.global_rank]))


def test_tensor_parallel_groups_are_blocks_of_consecutive_ranks_of_a_node(target: Target) -> None:
    target.needs(Feature.GROUPS)
    size = target.shape.tensor_parallel_size
    for rank, (ranks, position, total) in enumerate(target.run("ep", sum_in_block)):
        block = list(range(rank // size * size, rank // size * size + size))
        assert (ranks, position) == (block, rank % size)
        assert_same(total, torch.tensor([sum(block)]), "sum in block")
