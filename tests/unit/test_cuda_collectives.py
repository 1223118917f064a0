"""What collectives of GPU ranks move and sum, with bytes handed over in memory: no device is needed for that."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epmesh.layout import Topology
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.cuda_collectives import CudaCollectives
from epmesh_server.ranks.device_choice import Choice, Seat, Way

WORLDS = [1, 2, 3, 5]
LITTLE, MUCH = 7, 40_003  # elements of 4 bytes: below and above what is sent to everybody at once


class Handed(CudaCollectives):
    """Hands bytes to the other members in memory, as NCCL would on the device; empty tensors are not sent."""

    def __init__(self, me: int, world_size: int, queues: dict[tuple[int, int], queue.Queue[torch.Tensor]]) -> None:
        topology = Topology(tuple(range(world_size)), (0,) * world_size, me)
        exchange: Any = SimpleNamespace(member=SimpleNamespace(topology=topology))
        super().__init__(exchange, torch.device("cpu"))
        self._choice = Choice(Way.NCCL, "a test")
        self._queues = queues
        self.bytes_sent = 0

    def _move(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> None:
        me = self._topology.me
        for position, tensor in enumerate(outgoing):
            if tensor.numel():
                self._queues[me, position].put(tensor.clone())
                self.bytes_sent += tensor.numel() * tensor.element_size() * (position != me)
        for position, tensor in enumerate(incoming):
            if tensor.numel():
                assert tensor.is_contiguous()
                tensor.copy_(self._queues[position, me].get(timeout=10))


def on_all(world_size: int, work: Callable[[Handed, int], Any]) -> list[Any]:
    """What `work` returned on every member; nothing was sent that nobody took."""
    queues = {(a, b): queue.Queue[torch.Tensor]() for a in range(world_size) for b in range(world_size)}
    members = [Handed(me, world_size, queues) for me in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        results = list(pool.map(work, members, range(world_size), timeout=20))
    assert all(each.empty() for each in queues.values())
    return results


def numbers(me: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-4, 5, (numel,), generator=torch.Generator().manual_seed(me)).to(dtype)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("numel", [0, 1, LITTLE, MUCH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_all_reduce_sums_in_place(world_size: int, numel: int, dtype: torch.dtype) -> None:
    def work(member: Handed, me: int) -> torch.Tensor:
        tensor = numbers(me, numel, dtype)
        assert member._all_reduce(tensor, {}) is tensor
        return tensor

    wanted = torch.stack([numbers(me, numel).long() for me in range(world_size)]).sum(0).to(dtype)
    assert all(torch.equal(result, wanted) for result in on_all(world_size, work))


def test_all_reduce_of_bfloat16_rounds_once() -> None:
    values = [256.0, 1.0, 1.0]  # 257 is no bfloat16: adding one by one would stay at 256
    results = on_all(3, lambda member, me: member._all_reduce(torch.full((LITTLE,), values[me]).bfloat16(), {}))
    assert all(float(result[0]) == 258.0 for result in results)


def test_all_reduce_of_much_sends_no_more_than_two_tensors_a_rank() -> None:
    def work(member: Handed, me: int) -> int:
        member._all_reduce(numbers(me, MUCH), {})
        return member.bytes_sent

    assert max(on_all(5, work)) <= 2 * 4 * MUCH


@pytest.mark.parametrize("world_size", WORLDS)
def test_reduce_scatter_gives_ragged_slices(world_size: int) -> None:
    sizes = [(3 * me + 2) % 4 for me in range(world_size)]

    def work(member: Handed, me: int) -> torch.Tensor:
        return member._reduce_scatter(numbers(me, sum(sizes) * 3).reshape(-1, 3), sizes, {})

    total = torch.stack([numbers(me, sum(sizes) * 3) for me in range(world_size)]).sum(0).reshape(-1, 3)
    for result, wanted in zip(on_all(world_size, work), torch.split(total, sizes), strict=True):
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("numel", [0, LITTLE, MUCH])
def test_broadcast_reaches_all_from_any_source(world_size: int, numel: int) -> None:
    for src in range(world_size):

        def work(member: Handed, me: int, src: int = src) -> tuple[torch.Tensor, int]:
            return member._broadcast(numbers(me, numel), src, {}), member.bytes_sent

        for result, sent in on_all(world_size, work):
            assert torch.equal(result, numbers(src, numel))
            assert numel == LITTLE or sent <= 2 * 4 * numel


@pytest.mark.parametrize("world_size", WORLDS)
def test_gather_reaches_its_destination_alone(world_size: int) -> None:
    dst = world_size - 1
    results = on_all(world_size, lambda member, me: member._gather(numbers(me, LITTLE).reshape(7, 1), dst, {}))
    assert results[:dst] == [None] * dst
    wanted = [numbers(me, LITTLE).reshape(7, 1) for me in range(world_size)]
    assert all(torch.equal(got, each) for got, each in zip(results[dst], wanted, strict=True))


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_gather_takes_tensors_whose_lengths_differ(world_size: int) -> None:
    def tensors(me: int) -> list[torch.Tensor]:
        return [numbers(me, 2 * me).reshape(me, 2), numbers(me, me, torch.int64) > 0]

    calls = {me: describe("all_gatherv", "", [me, 2, me]) for me in range(world_size)}
    for result in on_all(world_size, lambda member, me: member._all_gather_blocks(tensors(me), calls)):
        for me, blocks in enumerate(result):
            assert all(torch.equal(got, wanted) for got, wanted in zip(blocks, tensors(me), strict=True))


def test_seats_are_read_from_calls_and_taken_off_them() -> None:
    one, other = Seat.of("a", "", 1), Seat.of("b", "", 1)
    same = Call(method="agree", numbers=[*one.numbers()])
    member: Any = Handed(0, 2, {})
    assert member._seated({0: same, 1: same})[1].numbers == []
    member._choice = None
    member._member.session = SimpleNamespace(rank=0)
    member._member.view, member._member.name = SimpleNamespace(epoch=1), "ep"
    bare = member._seated({0: Call(numbers=[7, *one.numbers()]), 1: Call(numbers=[8, 9, *other.numbers()])})
    assert [list(call.numbers) for call in bare.values()] == [[7], [8, 9]]
    assert member._choice.way is Way.NCCL


def test_a_member_alone_hands_bytes_to_itself() -> None:
    member = Handed(0, 1, {})
    member._choice = Choice(Way.ALONE, "a test")
    arriving = torch.zeros(3)
    CudaCollectives._move(member, [torch.ones(3)], [arriving])
    assert arriving.tolist() == [1.0] * 3
