"""Collectives of the communicator, held against the plain reference, over every shape of mesh and for subsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tests import reference
from tests.integration import contract
from tests.integration.contract import Call, Shape
from tests.integration.implementations import on
from tests.integration.targets import Target, assert_same, assert_sums

MOVED = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.int32,
    torch.int64,
]
SUMMED = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
]

MIXED = [((8,), torch.bfloat16), ((), torch.int16), ((2, 3), torch.bool), ((5,), torch.float64)]

Expect = Callable[[list[torch.Tensor], Call], Sequence[torch.Tensor | None]]
Compare = Callable[[object, torch.Tensor, str], None]


def check(target: Target, group: str, calls: list[Call], expect: Expect, compare: Compare = assert_same) -> None:
    """Every rank's result of every call is what the reference says."""
    results = target.run(group, contract.collective, calls)
    for number, call in enumerate(calls):
        expected = expect([call.input(position) for position in range(len(results))], call)
        for position, result in enumerate(results):
            what = f"{call} in group {group} on position {position}"
            value, wanted = result[number][0], expected[position]
            if wanted is None:
                assert value is None, what
            else:
                compare(value, wanted, what)


def test_all_reduce_sums_in_place_and_returns_the_input(target: Target) -> None:
    for group in target.groups:
        calls = [Call("all_reduce", ((3, 5),), dtype, whole=True) for dtype in SUMMED]
        calls += [Call("all_reduce", (shape,), whole=True) for shape in ((), (1,), (0,), (4, 0), (2, 3, 4), (70_001,))]
        calls += [Call("all_reduce", ((3, 5),), whole=True, contiguous=False)]
        check(target, group, calls, lambda inputs, _: reference.all_reduce(inputs), assert_sums)
        assert all(same for result in target.run(group, contract.collective, calls) for _, same in result)


def test_all_reduce_gives_the_same_bits_on_all_ranks_and_every_time(target: Target) -> None:
    for group in target.groups:
        sums = target.run(group, contract.late_sums, 4, 5)
        for other in [each for of_rank in sums for each in of_rank]:
            assert_same(other, sums[0][0], group)
        wide = reference.wide_sum([contract.noise(position).double() for position in range(len(sums))])
        torch.testing.assert_close(sums[0][0].double(), wide, rtol=1e-5, atol=1e-5)


def test_all_gather_concatenates_along_any_dim_in_rank_order(target: Target) -> None:
    for group in target.groups:
        calls = [Call("all_gather", ((2, 3),), dtype) for dtype in MOVED]
        calls += [Call("all_gather", ((2, 3, 4),), keywords={"dim": dim}) for dim in (0, 1, 2, -1, -2, -3)]
        calls += [Call("all_gather", (shape,)) for shape in ((5,), (0,), (3, 0), (1, 40_000))]
        calls += [Call("all_gather", ((4, 3),), keywords={"dim": 0}, contiguous=False)]
        check(target, group, calls, lambda inputs, call: reference.all_gather(inputs, call.keywords.get("dim", -1)))


def ragged(world_size: int) -> list[int]:
    return [(3 * position + 2) % 5 for position in range(world_size)]


def test_all_gatherv_takes_ragged_sizes_zeros_among_them(target: Target) -> None:
    for group, members in target.groups.items():
        world_size = len(members.ranks)
        sizes = ragged(world_size)
        zeros = [0] * world_size
        one = [4 if position == world_size - 1 else 0 for position in range(world_size)]
        calls = [
            Call("all_gatherv", tuple((size, 3) for size in each), dtype, {"sizes": each})
            for each in (sizes, zeros, one)
            for dtype in (torch.bfloat16, torch.float8_e5m2, torch.int64)
        ]
        calls += [Call("all_gatherv", tuple((2, s) for s in sizes), keywords={"dim": 1, "sizes": sizes})]
        calls += [Call("all_gatherv", ((2, 3),), keywords={"dim": 0})]
        calls += [Call("all_gatherv", ((2, 3),), keywords={"dim": -1, "sizes": None})]
        calls += [Call("all_gatherv", tuple((size, 3) for size in sizes))]
        check(target, group, calls, lambda inputs, call: reference.all_gatherv(inputs, call.keywords.get("dim", 0)))


def test_all_gatherv_takes_a_list_of_mixed_dtypes_and_widths(target: Target) -> None:
    for group, members in target.groups.items():
        sizes = ragged(len(members.ranks))
        tensors = [
            Call("", tuple((size, *trailing) for size in sizes), dtype, seed=7)
            for trailing, dtype in (
                ((8,), torch.bfloat16),
                ((), torch.int16),
                ((2, 3), torch.bool),
                ((5,), torch.float64),
            )
        ]
        results = target.run(group, contract.gather_list, sizes, tensors)
        for position, result in enumerate(results):
            assert isinstance(result, list)
            for call, value in zip(tensors, result, strict=True):
                expected = reference.all_gatherv([call.input(each) for each in range(len(sizes))])[position]
                assert_same(value, expected, f"{call} in {group}")
        alone = target.run(group, contract.gather_list, sizes, tensors[:1])
        assert [len(each) for each in alone] == [1] * len(sizes)


def test_reduce_scatter_gives_each_rank_its_chunk_along_any_dim(target: Target) -> None:
    for group, members in target.groups.items():
        world_size = len(members.ranks)
        shape = (2 * world_size, 3 * world_size, world_size)
        calls = [Call("reduce_scatter", (shape,), keywords={"dim": d}, whole=True) for d in (0, 1, 2, -1, -2, -3)]
        calls += [Call("reduce_scatter", ((3, 2 * world_size),), dtype, whole=True) for dtype in SUMMED]
        calls += [Call("reduce_scatter", ((0, world_size),), whole=True), Call("reduce_scatter", ((4, 0),), whole=True)]
        calls += [Call("reduce_scatter", ((2, world_size),), whole=True, contiguous=False)]
        check(
            target,
            group,
            calls,
            lambda inputs, call: reference.reduce_scatter(inputs, call.keywords.get("dim", -1)),
            assert_sums,
        )


def test_reduce_scatterv_gives_each_rank_its_ragged_slice(target: Target) -> None:
    for group, members in target.groups.items():
        sizes = ragged(len(members.ranks))
        even = [2] * len(sizes)
        calls = [
            Call("reduce_scatterv", ((sum(sizes), 3),), dtype, {"dim": 0, "sizes": sizes}, whole=True)
            for dtype in SUMMED
        ]
        calls += [Call("reduce_scatterv", ((3, sum(sizes)),), keywords={"dim": -1, "sizes": sizes}, whole=True)]
        calls += [Call("reduce_scatterv", ((0, 3),), keywords={"dim": 0, "sizes": [0] * len(sizes)}, whole=True)]
        calls += [Call("reduce_scatterv", ((3, sum(even)),), whole=True)]
        check(target, group, calls, expect_slices, assert_sums)


def expect_slices(inputs: list[torch.Tensor], call: Call) -> list[torch.Tensor]:
    dim = call.keywords.get("dim", -1)
    even = [inputs[0].shape[dim] // len(inputs)] * len(inputs)
    return reference.reduce_scatterv(inputs, dim, call.keywords.get("sizes", even))


def test_reduce_scatterv_into_output_writes_into_output_and_returns_it(target: Target) -> None:
    for group, members in target.groups.items():
        sizes = ragged(len(members.ranks))
        call = Call("", ((sum(sizes), 3),), torch.bfloat16, whole=True)
        results = target.run(group, contract.scatter_into_output, call, sizes)
        expected = reference.reduce_scatterv([call.input(position) for position in range(len(sizes))], 0, sizes)
        for (output, same), wanted in zip(results, expected, strict=True):
            assert same
            assert_sums(output, wanted, group)


def test_gather_gives_the_whole_to_dst_and_none_to_the_others(target: Target) -> None:
    for group, members in target.groups.items():
        last = len(members.ranks) - 1
        calls = [
            Call("gather", ((2, 3),), dtype, {"dst": dst})
            for dst in {0, last}
            for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int64)
        ]
        calls += [Call("gather", ((2, 3, 4),), keywords={"dim": dim, "dst": last}) for dim in (0, 1, -1)]
        calls += [Call("gather", ((2, 3),)), Call("gather", ((0, 3),))]
        check(
            target,
            group,
            calls,
            lambda inputs, call: reference.gather(inputs, call.keywords.get("dst", 0), call.keywords.get("dim", -1)),
        )


def test_broadcast_overwrites_in_place_with_the_tensor_of_src(target: Target) -> None:
    for group, members in target.groups.items():
        last = len(members.ranks) - 1
        calls = [Call("broadcast", ((2, 3),), dtype, {"src": last}) for dtype in MOVED]
        calls += [Call("broadcast", (shape,), keywords={"src": 0}) for shape in ((), (0,), (4, 5, 6))]
        calls += [Call("broadcast", ((2, 3),)), Call("broadcast", ((4, 3),), keywords={"src": last}, contiguous=False)]
        check(
            target,
            group,
            calls,
            lambda inputs, call: reference.broadcast(inputs, call.keywords.get("src", 0)),
            assert_same,
        )
        assert all(same for result in target.run(group, contract.collective, calls) for _, same in result)


def test_send_and_recv_default_to_the_next_and_the_previous_rank(target: Target) -> None:
    for group in target.groups:
        calls = [Call("", ((3, 4),), dtype) for dtype in MOVED]
        calls += [Call("", (shape,)) for shape in ((), (0, 4), (9,), (300, 1000))]
        calls += [Call("", ((5, 2),), contiguous=False)]
        results = target.run(group, contract.ring, calls)
        for number, call in enumerate(calls):
            expected = reference.send_to_next([call.input(position) for position in range(len(results))])
            for position, result in enumerate(results):
                assert_same(result[number], expected[position], f"{call} in {group} on {position}")


def test_sends_between_two_ranks_arrive_in_order_and_size_may_be_an_int(target: Target) -> None:
    for group in target.groups:
        results = target.run(group, contract.everyone_to_everyone, 5, 3)
        for position, rounds in enumerate(results):
            others = [each for each in reversed(range(len(results))) if each != position]
            for number, tensors in enumerate(rounds):
                values = [src * 1000 + position * 10 + number for src in others]
                assert [tensor.tolist() for tensor in tensors] == [[value] * 5 for value in values]


def test_batch_isend_irecv_exchanges_with_both_neighbours(target: Target) -> None:
    for group, members in target.groups.items():
        world_size = len(members.ranks)
        if world_size <= 2:
            continue  # both neighbours are one rank: its two messages arrive in the order sent
        results = target.run(group, contract.neighbours)
        for position, (previous, following) in enumerate(results):
            assert previous.tolist() == [(position - 1) % world_size + 1] * 4
            assert following.tolist() == [((position + 1) % world_size + 1) * 100] * 4


def test_calls_of_all_kinds_follow_each_other_in_one_group(target: Target) -> None:
    for group, members in target.groups.items():
        world_size = len(members.ranks)
        for position, values in enumerate(target.run(group, contract.mixed)):
            for number in range(5):
                ones = [torch.full((3,), float(each + number)) for each in range(world_size)]
                expected = [
                    sum(ones, torch.zeros(3)),
                    torch.cat(ones),
                    ones[-1],
                    torch.full((2, 4), float(world_size)),
                    ones[position - 1],
                ]
                for value, wanted in zip(values[5 * number : 5 * number + 5], expected, strict=True):
                    assert_same(value, wanted, f"{group}, round {number}")


@on(Shape(1, 1))
def test_a_rank_alone_gets_its_input_back(target: Target) -> None:
    calls = [
        Call(method, ((2, 3),)) for method in ("reduce_scatter", "all_reduce", "all_gather", "broadcast", "gather")
    ]
    ((*results,),) = target.run("ep", contract.collective, calls)
    for call, (value, _) in zip(calls, results, strict=True):
        assert_same(value, call.input(0), call.method)
    assert results[0][1], "reduce_scatter returns the input itself"
