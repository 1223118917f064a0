"""Dispatch and combine, held against the plain reference, over every shape of mesh and for subsets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from epmesh import Placement
from tests import reference
from tests.integration import contract
from tests.integration.contract import UNDECLARED, Exchange, Outcome, Shape
from tests.integration.implementations import on
from tests.integration.targets import Target, assert_same, assert_sums, check_exchanges, compare_exchanges

HIDDEN_DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
]
COMBINED_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32]
EXTRAS = (
    (torch.float32, (1,)),
    (torch.uint8, (4,)),
    (torch.bool, ()),
    (torch.int16, (2, 3)),
    (torch.int64, ()),
    (torch.float64, (1, 2, 1)),
    (torch.float8_e4m3fn, (5,)),
)
LAYERS_WITH_ONE_HOLDER = (0, 1, UNDECLARED)


def ragged(world_size: int) -> tuple[int, ...]:
    return tuple((7 * position + 3) % 11 for position in range(world_size))


def case(target: Target, group: str, layer: int = 0, **options: Any) -> Exchange:
    """An exchange with ragged token counts, of experts that the group holds."""
    tokens = ragged(len(target.groups[group].ranks))
    return Exchange(**{"tokens": tokens, "experts": target.experts(group, layer), "layer": layer, **options})


def test_rows_go_to_the_holders_of_their_experts_in_order_of_source(target: Target) -> None:
    for group in target.groups:
        check_exchanges(target, group, [case(target, group, layer) for layer in LAYERS_WITH_ONE_HOLDER])


def test_every_dtype_of_hidden_states_arrives_bit_for_bit(target: Target) -> None:
    for group in target.groups:
        check_exchanges(target, group, [case(target, group, dtype=dtype) for dtype in HIDDEN_DTYPES])


def test_results_are_summed_in_the_combines_dtype_in_a_fixed_order(target: Target) -> None:
    for group in target.groups:
        cases = [
            case(target, group, layer, combine_dtype=dtype, topk=4)
            for dtype in COMBINED_DTYPES
            for layer in (0, UNDECLARED)
        ]
        check_exchanges(target, group, cases)


def test_results_may_be_wider_or_of_another_dtype_than_the_rows(target: Target) -> None:
    """Packed fp4 rows of half the width, fp8 rows: what comes back is bf16."""
    for group in target.groups:
        cases = [
            case(target, group, dtype=torch.uint8, hidden=8, combine_hidden=16),
            case(target, group, dtype=torch.float8_e4m3fn, combine_dtype=torch.float16),
            case(target, group, dtype=torch.float64, combine_dtype=torch.bfloat16, combine_hidden=3),
            case(target, group, dtype=torch.bfloat16, combine_dtype=torch.float64),
        ]
        check_exchanges(target, group, cases)


def test_extra_tensors_travel_row_for_row(target: Target) -> None:
    for group in target.groups:
        cases = [
            case(target, group, extras=EXTRAS),
            case(target, group, extras=()),
            case(target, group, 1, extras=EXTRAS[:1], dtype=torch.float8_e4m3fn),
            case(target, group, UNDECLARED, extras=EXTRAS),
        ]
        check_exchanges(target, group, cases)


def test_ids_may_be_int32_and_weights_of_any_float_dtype(target: Target) -> None:
    for group in target.groups:
        cases = [
            case(target, group, ids_dtype=torch.int32, weights_dtype=dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float64)
        ]
        check_exchanges(target, group, cases)


def test_minus_one_ids_mean_no_expert_wherever_they_stand(target: Target) -> None:
    for group in target.groups:
        cases = [
            case(target, group, layer, ids=ids, topk=3) for layer in LAYERS_WITH_ONE_HOLDER for ids in ("holes", "none")
        ]
        check_exchanges(target, group, cases)


def test_a_row_goes_once_to_a_rank_however_many_of_its_experts_it_wants(target: Target) -> None:
    for group in target.groups:
        wide = len(target.experts(group, 0))
        cases = [
            case(target, group, ids="repeated", topk=3),
            case(target, group, topk=wide),
            case(target, group, topk=1),
            case(target, group, 1, ids="skewed", topk=2),
        ]
        check_exchanges(target, group, cases)


def test_ranks_without_tokens_take_part(target: Target) -> None:
    for group, members in target.groups.items():
        world_size = len(members.ranks)
        nobody = (0,) * world_size
        last_only = (*nobody[1:], 6)
        all_but_first = (0, *(3,) * (world_size - 1))
        cases = [
            case(target, group, layer, tokens=tokens, extras=EXTRAS[:2])
            for tokens in (nobody, last_only, all_but_first)
            for layer in (0, UNDECLARED)
        ]
        check_exchanges(target, group, cases)


def test_odd_widths_and_tensors_with_gaps_are_taken(target: Target) -> None:
    for group in target.groups:
        cases = [
            case(target, group, hidden=1, dtype=torch.uint8, combine_hidden=1),
            case(target, group, hidden=7, dtype=torch.int8, extras=((torch.bool, (3,)),)),
            case(target, group, contiguous=False, extras=EXTRAS),
            case(target, group, UNDECLARED, contiguous=False),
        ]
        check_exchanges(target, group, cases)


def test_many_and_large_rows(target: Target) -> None:
    for group, members in target.groups.items():
        tokens = tuple(64 + 61 * position for position in range(len(members.ranks)))
        check_exchanges(
            target, group, [case(target, group, layer, tokens=tokens, hidden=1024, topk=2) for layer in (0, 1)]
        )


def test_a_skewed_batch_all_goes_to_one_rank(target: Target) -> None:
    for group, members in target.groups.items():
        tokens = (200,) * len(members.ranks)
        check_exchanges(target, group, [case(target, group, tokens=tokens, ids="skewed", topk=1, hidden=256)])


def test_router_logits_send_every_row_to_every_rank(target: Target) -> None:
    for group in target.groups:
        cases = [
            case(target, group, layer, router_logits=True, extras=extras, weights_dtype=dtype)
            for layer in (0, UNDECLARED)
            for extras, dtype in ((None, torch.bfloat16), (EXTRAS, torch.float32))
        ]
        check_exchanges(target, group, cases)


def test_exchanges_follow_each_other_and_need_no_combine(target: Target) -> None:
    for group in target.groups:
        first = case(target, group)
        cases = [
            replace(first, seed=seed, layer=layer, combine_dtype=dtype, experts=target.experts(group, layer))
            for seed, (layer, dtype) in enumerate(
                [(0, torch.float32), (1, None), (0, None), (UNDECLARED, torch.float32), (1, None), (1, torch.bfloat16)]
            )
        ]
        check_exchanges(target, group, cases * 3)


def test_sums_are_the_same_bits_every_time_and_in_every_order_of_arrival(target: Target) -> None:
    for group in target.groups:
        late = case(target, group, UNDECLARED, delay_ms=8, combine_dtype=torch.float32)
        check_exchanges(target, group, contract.repeated(late, 6))


def test_combine_into_output_writes_there_and_reads_buffers_of_its_own(target: Target) -> None:
    for group in target.groups:
        check_exchanges(target, group, [case(target, group, layer, into_output=True) for layer in (0, UNDECLARED)])


def test_a_static_dispatch_gives_every_source_row_a_place_of_its_own(target: Target) -> None:
    for group in target.groups:
        cases = [case(target, group, layer, static=True, ids="holes") for layer in LAYERS_WITH_ONE_HOLDER]
        cases += [
            case(target, group, static=True, extras=EXTRAS, dtype=torch.float8_e4m3fn),
            case(target, group, static=True, router_logits=True),
            case(target, group, static=True, tokens=(0,) * len(target.groups[group].ranks)),
        ]
        check_exchanges(target, group, cases)


def test_two_exchanges_may_be_open_at_once(target: Target) -> None:
    for group in target.groups:
        kinds = [
            (0, torch.bfloat16),
            (1, torch.float32),
            (UNDECLARED, torch.int8),
            (0, torch.uint8),
            (1, torch.float16),
        ]
        cases = [
            case(target, group, layer, seed=seed, dtype=dtype, static=seed == 2)
            for seed, (layer, dtype) in enumerate(kinds)
        ]
        compare_exchanges(target, group, cases, target.run(group, contract.overlapped, cases))


# Replicas: which of the holders is chosen is theirs to decide, within the rules -----------------------------------


def test_every_id_is_computed_by_one_holder_and_the_nearest(target: Target) -> None:
    for group in target.groups:
        for layer in (2, 3):
            placement = target.shape.placement(layer)
            assert placement is not None
            each = case(target, group, layer, ids="holes", combine_dtype=torch.float64)
            outcomes = [of_rank[0] for of_rank in target.run(group, contract.exchange, [each])]
            origins = [locate(each, outcome) for outcome in outcomes]
            compare_replicated(target, group, each, placement, outcomes, origins)
            results = [each.results(o.parts[0], r) for o, r in zip(outcomes, target.groups[group].ranks, strict=True)]
            sums = reference.combine(target.groups[group], list(each.tokens), origins, results)
            for outcome, wanted in zip(outcomes, sums, strict=True):
                assert_sums(outcome.combined, wanted, f"{each} in {group}")


def locate(each: Exchange, outcome: Outcome) -> list[tuple[int, int]]:
    """Where the rows came from, by their bytes; they must stand in order of source and row."""
    every = {
        reference.as_bytes(row).numpy().tobytes(): (position, number)
        for position in range(len(each.tokens))
        for number, row in enumerate(each.rows(position).hidden_states)
    }
    assert len(every) == sum(each.tokens), "rows of this case must differ"
    origins = [every[reference.as_bytes(row).numpy().tobytes()] for row in outcome.parts[0]]
    assert origins == sorted(set(origins))
    return origins


def compare_replicated(
    target: Target,
    group: str,
    each: Exchange,
    placement: Placement,
    outcomes: list[Outcome],
    origins: list[list[tuple[int, int]]],
) -> None:
    members = target.groups[group]
    rows = [each.rows(position) for position in range(len(outcomes))]
    computed: dict[tuple[int, int, int], list[int]] = {}
    for rank, outcome, where in zip(members.ranks, outcomes, origins, strict=True):
        expected = reference.pick(rows, where)
        assert_same(outcome.parts[1], expected.topk_weights, f"weights of {each}")
        for (source, row), ids, original in zip(
            where, outcome.parts[2].tolist(), expected.topk_ids.tolist(), strict=True
        ):
            mine = [expert for expert in ids if expert in placement.experts_of[rank]]
            assert mine, f"row {row} of {source} came to rank {rank} for nothing"
            assert all(got in (-1, was) for got, was in zip(ids, original, strict=True))
            for column, expert in enumerate(ids):
                if expert in mine:
                    computed.setdefault((source, row, column), []).append(rank)
    for source, ids_of_source in enumerate(each.topk_ids for each in rows):
        for row, ids in enumerate(ids_of_source.tolist()):
            for column, expert in enumerate(ids):
                chosen = computed.get((source, row, column), [])
                assert len(chosen) == (expert >= 0), f"expert {expert} of row {row} of {source}: {chosen}"
                if chosen:
                    assert chosen[0] in nearest(members, members.ranks[source], placement.holders[expert])


def nearest(members: reference.Group, source: int, holders: tuple[int, ...]) -> list[int]:
    """The holders that may be chosen: the source itself, else those of its node, else any."""
    alive = [rank for rank in holders if rank in members.ranks]
    local = [rank for rank in alive if members.slot(rank) == members.slot(source)]
    return [source] if source in alive else local or alive


def test_replicas_share_the_rows_evenly(target: Target) -> None:
    """Sources without a replica of their own, on their node or on another, spread their rows over all of them."""
    placement = target.shape.placement(2)
    assert placement is not None
    group, members = "ep", target.groups["ep"]
    tokens = (120,) * len(members.ranks)
    each = case(target, group, 2, tokens=tokens, topk=1, combine_dtype=None)
    outcomes = [of_rank[0] for of_rank in target.run(group, contract.exchange, [each])]
    counts: dict[tuple[int, int], dict[int, int]] = {}
    for rank, outcome in zip(members.ranks, outcomes, strict=True):
        for (source, _), (expert,) in zip(locate(each, outcome), outcome.parts[2].tolist(), strict=True):
            may = nearest(members, source, placement.holders[expert])
            counts.setdefault((source, expert), dict.fromkeys(may, 0))[rank] += 1
    for key, by_rank in counts.items():
        assert max(by_rank.values()) - min(by_rank.values()) <= 1, f"source and expert {key}: {by_rank}"


# The model: what all this is for ----------------------------------------------------------------------------------


def test_dispatch_experts_and_combine_equal_the_dense_model(target: Target) -> None:
    for group in target.groups:
        for layer in (0, 1, 2, 3):
            placement = target.shape.placement(layer)
            assert placement is not None
            experts = target.experts(group, layer)
            tokens = ragged(len(target.groups[group].ranks))
            outputs = target.run(group, contract.mixture, tokens, experts, layer, placement)
            for output, dense in outputs:
                torch.testing.assert_close(output, dense)


@on(Shape(2, 2))
def test_rows_of_different_layers_follow_their_own_placements(target: Target) -> None:
    """Without a layer of its own, a call falls back to the default placement, of which there is none here."""
    cases = [case(target, "ep", layer) for layer in (0, 1)] + [replace(case(target, "ep", UNDECLARED), layer=None)]
    check_exchanges(target, "ep", cases)


def test_quantized_rows_travel_in_fp8_with_a_scale_for_every_128_values(target: Target) -> None:
    for static in (False, True):
        for dtype in (torch.bfloat16, torch.float32):
            each = case(target, "ep", hidden=256, dtype=dtype)
            for plain, narrow in target.run("ep", contract.quantized, each, static):
                values, scales = narrow[0], narrow[-1]
                assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
                assert scales.shape == (len(values), 2)
                for one, other in zip(narrow[1:4], plain[1:4], strict=True):
                    assert_same(one, other, "what travels with quantized rows")
                wide = scales.double().repeat_interleave(128, dim=1)
                wanted = plain[0].double()
                error = (values.double() * wide - wanted).abs()
                assert (error <= torch.maximum(wanted.abs() / 16, wide / 1024) * 1.001).all()
                used = wanted.abs().amax(1) > 0
                assert used.any()
                peaks = values.double().abs().reshape(len(values), 2, 128).amax(2)
                assert (peaks[used] == 448).all()


def test_rows_that_cannot_be_quantized_are_refused_on_all_ranks(target: Target) -> None:
    for columns, quantize, reason in ((100, "fp8", "[2, 100]"), (128, "int4", "'int4'")):
        texts = target.run("ep", contract.quantize_wrongly, columns, quantize)
        assert len(set(texts)) == 1, texts
        assert reason in texts[0]
