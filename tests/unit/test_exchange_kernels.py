"""The exchange's kernels against the plain reference: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from epmesh.placement import Placement, linear_placement
from epmesh_server.kernels.status import Code, Report
from tests import reference
from tests.integration.contract import Exchange
from tests.kernel_ranks import KernelRanks

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; on CPU its interpreter runs these", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT_S = 0.05
EXACT = (
    torch.bfloat16 if DEVICE == "cuda" else torch.float16
)  # Triton's interpreter does not round to bf16 as devices do
HIDDEN_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8]
COMBINED_DTYPES = [EXACT, torch.float32, torch.float64, torch.int8, torch.int32]
EXTRAS = ((torch.float32, (1,)), (torch.uint8, (3,)), (torch.bool, ()), (torch.int64, ()), (torch.float8_e4m3fn, (5,)))


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Triton reads the variable when kernels are defined, which is at the first import."""
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    yield
    os.environ.pop("TRITON_INTERPRET", None)


def group(world_size: int) -> reference.Group:
    return reference.Group(tuple(range(world_size)), world_size)


def ragged(world_size: int) -> tuple[int, ...]:
    return tuple((7 * position + 3) % 11 for position in range(world_size))


def case(world_size: int, **options: Any) -> Exchange:
    experts = tuple(range(2 * world_size + 1))
    return Exchange(
        **{
            "tokens": ragged(world_size),
            "experts": experts,
            "topk": min(4, len(experts)),
            "combine_dtype": EXACT,
            **options,
        }
    )


def linear(world_size: int) -> Placement:
    return linear_placement(2 * world_size + 1, range(world_size))


def assert_rows(found: list[torch.Tensor], wanted: reference.Received) -> None:
    tensors = [wanted.hidden_states, wanted.topk_weights, wanted.topk_ids, *(wanted.extra_tensors or ())]
    for one, other in zip(found, tensors, strict=True):
        assert one.shape == other.shape
        assert torch.equal(reference.as_bytes(one.cpu()), reference.as_bytes(other))


def check_exact(ranks: KernelRanks, each: Exchange, placement: Placement | None, in_place: Sequence[int] = ()) -> None:
    """One exchange of all ranks, held against the reference; those `in_place` write results where peers read them."""
    world = len(each.tokens)
    inputs = [each.rows(position) for position in range(world)]
    wanted = reference.dispatch(group(world), inputs, placement)
    stamp, rows = ranks.next_stamp(), ranks.rows(inputs, placement)
    sent = ranks.dispatch(rows, stamp)
    received = ranks.take(rows, sent, stamp)
    for found, expected in zip(received, wanted, strict=True):
        assert_rows(found, expected)
    results = [each.results(expected.hidden_states, rank) for rank, expected in enumerate(wanted)]
    brought = [
        ranks.in_place(rank, result, stamp % 2) if rank in in_place and len(result) else result.to(ranks.device)
        for rank, result in enumerate(results)
    ]
    sums = ranks.combine(brought, sent, stamp, slot=stamp % 2)
    for lane in ranks.lanes:
        assert lane.report() is None
    expected_sums = reference.combine(group(world), list(each.tokens), [one.origins for one in wanted], results)
    for one, other in zip(sums, expected_sums, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("world_size", [1, 2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_rows_arrive_in_order_and_results_are_summed_in_rank_order(world_size: int) -> None:
    ranks = KernelRanks(world_size, DEVICE)
    for number in range(5 if world_size < 8 or DEVICE == "cuda" else 1):  # more than there are turns
        tokens = tuple((count + number) % 9 for count in ragged(world_size))
        check_exact(ranks, case(world_size, seed=number, tokens=tokens), linear(world_size))


@pytest.mark.parametrize("dtype", HIDDEN_DTYPES)
def test_every_dtype_of_hidden_states_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    check_exact(KernelRanks(2, DEVICE), case(2, dtype=dtype, extras=EXTRAS), linear(2))


@pytest.mark.parametrize("dtype", COMBINED_DTYPES)
def test_sums_are_formed_in_wide_precision_and_rounded_once(dtype: torch.dtype) -> None:
    ranks = KernelRanks(3, DEVICE)
    check_exact(ranks, case(3, combine_dtype=dtype, combine_hidden=24), linear(3))
    check_exact(ranks, case(3, combine_dtype=dtype, combine_hidden=3), linear(3))


@pytest.mark.parametrize("in_place", [(0, 1, 2), (1,)])
def test_results_may_stand_where_the_others_read_them_on_some_ranks_or_all(in_place: tuple[int, ...]) -> None:
    ranks = KernelRanks(3, DEVICE)
    for number, hidden in enumerate((24, 8, 24)):
        check_exact(ranks, case(3, seed=number, combine_hidden=hidden), linear(3), in_place)


def test_of_results_that_do_not_fit_in_place_or_are_oddly_wide_none_stand_there() -> None:
    lane, plan = (ranks := KernelRanks(2, DEVICE)).lanes[0], ranks.plan
    assert lane.room_in_place(0, 5, 24) is None
    assert lane.room_in_place(0, 0, 16) is None
    assert lane.room_in_place(0, plan.in_place_bytes // 16 + 1, 16) is None
    found = [lane.room_in_place(slot, plan.in_place_bytes // 16, 16) for slot in range(2)]
    starts = [plan.out_at + slot * plan.slot_stride + plan.in_place_at for slot in range(2)]
    assert found == starts
    assert starts[1] + plan.in_place_bytes <= plan.total_bytes


def static_inputs() -> list[reference.Rows]:
    """Of two ranks: small whole numbers, each row for one expert."""
    each = case(2, seed=5, hidden=16, dtype=torch.float32, topk=1)
    inputs = [each.rows(position) for position in range(2)]
    for position, rows in enumerate(inputs):
        rows.hidden_states.copy_(torch.arange(rows.hidden_states.numel()).view(rows.hidden_states.shape) + position)
    return inputs


def static_case(ranks: KernelRanks, placement: Placement, in_place: Sequence[int], rows: list[Any] | None) -> list[Any]:
    """A static exchange of two ranks, where every row's result is itself; `rows` from an earlier one or new."""
    inputs = static_inputs()
    rows = rows or ranks.rows(inputs, placement)
    sent, outputs = ranks.dispatch_static(rows, 10)
    brought = [
        ranks.in_place(me, found[0], 1) if me in in_place else found[0].clone() for me, found in enumerate(outputs)
    ]
    sums = ranks.combine(brought, sent, slot=1)
    for given, total in zip(inputs, sums, strict=True):
        assert torch.equal(total.cpu(), given.hidden_states)
    for me, found in enumerate(outputs):
        assert set(found[2].flatten().tolist()) - {-1} <= set(placement.experts_of[me])
    return rows


@pytest.mark.parametrize("in_place", [(0, 1), (0,)])
def test_static_results_may_stand_in_place_whatever_the_device_counts(in_place: tuple[int, ...]) -> None:
    ranks = KernelRanks(2, DEVICE, counted=True)
    for _ in range(3):
        static_case(ranks, linear(2), in_place, None)
    assert [lane.report() for lane in ranks.lanes] == [None, None]


def test_what_goes_by_a_table_goes_by_another_placement_once_the_table_follows_it() -> None:
    from epmesh_server.kernels.lane import Table

    ranks, swapped = KernelRanks(2, DEVICE, counted=True), Placement(5, {0: (3, 4), 1: (0, 1, 2)})
    rows = static_case(ranks, linear(2), (), None)
    followed = [
        each.table.follow(there.table.routing) for each, there in zip(rows, other_rows(ranks, swapped), strict=True)
    ]
    for each, table in zip(rows, followed, strict=True):
        assert isinstance(table, Table)
        assert table.entries.data_ptr() == each.table.entries.data_ptr()
    static_case(ranks, swapped, (), rows)  # with the rows, and the table, of before


def test_a_table_that_cannot_follow_says_so_and_once_retired_is_reported_by_all() -> None:
    ranks = KernelRanks(2, DEVICE, counted=True)
    rows = static_case(ranks, linear(2), (), None)
    wider = Placement(6, {0: (0, 1, 2), 1: (3, 4, 5)})
    assert rows[0].table.follow(other_rows(ranks, wider)[0].table.routing) is None
    for each in rows:
        each.table.retire()
    _, outputs = ranks.dispatch_static(rows, 10)
    reports = [lane.report() for lane in ranks.lanes]
    assert [(each.source, each.code) for each in reports if each is not None] == [(0, Code.OLD_TABLE)] * 2
    assert all((found[2] == -1).all() for found in outputs)


def other_rows(ranks: KernelRanks, placement: Placement) -> list[Any]:
    return ranks.rows(static_inputs(), placement)


def test_without_a_placement_every_row_goes_to_every_rank() -> None:
    check_exact(KernelRanks(3, DEVICE), case(3), None)


def test_ids_may_be_int32_repeated_or_none() -> None:
    ranks = KernelRanks(2, DEVICE)
    for ids in ("holes", "none", "skewed", "repeated"):
        check_exact(ranks, case(2, ids=ids, ids_dtype=torch.int32, weights_dtype=torch.bfloat16), linear(2))


def test_ranks_without_tokens_take_part() -> None:
    ranks = KernelRanks(3, DEVICE)
    for tokens in ((0, 0, 0), (0, 0, 5), (3, 0, 4)):
        check_exact(ranks, case(3, tokens=tokens), linear(3))


def test_odd_widths_are_carried() -> None:
    ranks = KernelRanks(2, DEVICE)
    for hidden in (1, 7, 24):
        check_exact(ranks, case(2, hidden=hidden, dtype=torch.int8, combine_dtype=torch.int8, topk=1), linear(2))


def test_of_replicas_one_computes_each_id_and_the_others_see_minus_one() -> None:
    world = 3
    placement = Placement(world, {0: (0, 1), 1: (1, 2), 2: (0, 2)})
    ranks, each = KernelRanks(world, DEVICE), case(world, experts=(0, 1, 2), topk=2)
    inputs = [each.rows(position) for position in range(world)]
    stamp, rows = ranks.next_stamp(), ranks.rows(inputs, placement)
    received = ranks.take(rows, ranks.dispatch(rows, stamp), stamp)
    for expert in range(world):  # a source that holds the expert keeps its own; the one that does not spreads them
        away = next(rank for rank in range(world) if expert not in placement.experts_of[rank])
        ids = torch.cat([inputs[rank].topk_ids.flatten() for rank in range(world) if rank == away])
        by_rank = [int((received[rank][2] == expert).sum()) for rank in range(world)]
        kept = [int((inputs[rank].topk_ids == expert).sum()) if rank != away else 0 for rank in range(world)]
        spread = [got - own for got, own in zip(by_rank, kept, strict=True) if got]
        assert sum(spread) == int((ids == expert).sum())
        assert max(spread) - min(spread) <= 1
    computed = torch.cat([one[2].flatten() for one in received]).cpu()
    wanted = torch.cat([source.topk_ids.flatten() for source in inputs])
    assert sorted(computed[computed >= 0].tolist()) == sorted(wanted.tolist())
    for rank, one in enumerate(received):
        assert set(one[2].flatten().tolist()) <= {-1, *placement.experts_of[rank]}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_static_mode_returns_a_slot_for_every_row_and_counts_on_the_device(world_size: int) -> None:
    ranks = KernelRanks(world_size, DEVICE, counted=True)
    static_rows = 10
    for number in range(5):
        each = case(world_size, seed=number, ids="holes", extras=EXTRAS[:2], combine_dtype=torch.float32)
        inputs = [each.rows(position) for position in range(world_size)]
        wanted = reference.dispatch(group(world_size), inputs, linear(world_size))
        sent, outputs = ranks.dispatch_static(ranks.rows(inputs, linear(world_size)), static_rows)
        results = []
        for rank, (found, expected) in enumerate(zip(outputs, wanted, strict=True)):
            places = torch.tensor([source * static_rows + row for source, row in expected.origins], dtype=torch.int64)
            host = [tensor.cpu() for tensor in found]
            assert_rows([tensor[places] for tensor in host], expected)
            unused = torch.ones(world_size * static_rows, dtype=torch.bool)
            unused[places] = False
            assert (host[2][unused] == -1).all()
            assert (host[1][unused] == 0).all()
            result = torch.full((world_size * static_rows, 16), float("nan"))
            result[places] = each.results(expected.hidden_states, rank)
            results.append(result)
        sums = ranks.combine([result.to(ranks.device) for result in results], sent)
        origins = [expected.origins for expected in wanted]
        compact = [
            result[torch.tensor([s * static_rows + row for s, row in origin], dtype=torch.int64)]
            for result, origin in zip(results, origins, strict=True)
        ]
        expected_sums = reference.combine(group(world_size), list(each.tokens), origins, compact)
        for one, other in zip(sums, expected_sums, strict=True):
            assert torch.equal(one.cpu(), other)
        assert [lane.report() for lane in ranks.lanes] == [None] * world_size


@pytest.mark.parametrize(("bad", "report"), [(99, Report(1, Code.BAD_ID, 99)), (-2, Report(1, Code.BAD_ID, -2))])
def test_all_ranks_report_the_same_bad_id(bad: int, report: Report) -> None:
    ranks, each = KernelRanks(2, DEVICE), case(2, tokens=(3, 4))
    inputs = [each.rows(position) for position in range(2)]
    inputs[1].topk_ids[2, 1] = bad
    stamp = ranks.next_stamp()
    ranks.dispatch(ranks.rows(inputs, linear(2)), stamp)
    assert [lane.outcome(stamp) for lane in ranks.lanes] == [(True, report)] * 2
    check_exact(ranks, each, linear(2))  # and the ranks go on


def test_all_ranks_report_an_expert_that_nobody_holds() -> None:
    ranks, each = KernelRanks(2, DEVICE), case(2, tokens=(3, 4), experts=(0, 1, 2, 3), topk=4)
    rows = ranks.rows([each.rows(position) for position in range(2)], Placement(4, {0: (0, 1), 1: (3,)}))
    stamp = ranks.next_stamp()
    ranks.dispatch(rows, stamp)
    assert [lane.outcome(stamp) for lane in ranks.lanes] == [(True, Report(0, Code.NO_HOLDER, 2))] * 2


def test_a_mismatch_and_a_refusal_are_seen_by_all() -> None:
    ranks, each = KernelRanks(2, DEVICE), case(2)
    rows = ranks.rows([each.rows(position) for position in range(2)], linear(2))
    stamp = ranks.next_stamp()
    ranks.dispatch(rows, stamp, signatures=[5, 6])
    outcomes = [lane.outcome(stamp)[1] for lane in ranks.lanes]
    assert outcomes == [Report(1, Code.MISMATCH, 0), Report(0, Code.MISMATCH, 0)]
    stamp = ranks.next_stamp()
    ranks.dispatch(rows, stamp, refused=1)
    assert [lane.outcome(stamp)[1] for lane in ranks.lanes] == [Report(1, Code.REFUSED, 0)] * 2


def test_a_rank_that_does_not_come_is_named_when_time_is_up() -> None:
    ranks, each = KernelRanks(2, DEVICE, limit_s=SHORT_S), case(2)
    rows, stamp = ranks.rows([each.rows(position) for position in range(2)], linear(2)), ranks.next_stamp()
    with ranks.on(0):
        ranks.lanes[0].dispatch(rows[0], 1, stamp=stamp)
    ranks.wait()
    assert ranks.lanes[0].outcome(stamp) == (True, Report(1, Code.LATE, 0))
    check_exact(ranks, replace(each, seed=3), linear(2))  # stamps differ, so nothing of the failed one is taken


def test_the_hosts_abort_word_ends_a_wait_long_before_its_limit() -> None:
    ranks, each = KernelRanks(2, DEVICE, limit_s=3600.0), case(2)
    rows, stamp = ranks.rows([each.rows(position) for position in range(2)], linear(2)), ranks.next_stamp()
    ranks.lanes[0].abort(stamp)
    with ranks.on(0):
        ranks.lanes[0].dispatch(rows[0], 1, stamp=stamp)
    ranks.wait()
    assert ranks.lanes[0].outcome(stamp) == (True, Report(1, Code.ABORTED, 0))


def test_a_counting_lane_does_not_wait_again_once_a_rank_was_late() -> None:
    ranks, each = KernelRanks(2, DEVICE, counted=True, limit_s=SHORT_S), case(2)
    rows = ranks.rows([each.rows(position) for position in range(2)], linear(2))
    _, outputs = ranks.lanes[0].dispatch_static(rows[0], 1, 10)
    ranks.wait()
    assert ranks.lanes[0].report() == Report(1, Code.LATE, 0)
    assert (outputs[2][10:] == -1).all()
    ranks.lanes[0].forget_report()
    ranks.lanes[0].dispatch_static(rows[0], 1, 10)
    ranks.wait()
    assert ranks.lanes[0].report() == Report(0, Code.ABORTED, 0)
