"""Which device group GPU ranks get, by what they say of their devices."""

from __future__ import annotations

import pytest

from epmesh_server.ranks.device_choice import Seat, Way, choose

NCCL = 22809


def seats(*uuids: str, host_ids: tuple[str, ...] = (), versions: tuple[int, ...] = ()) -> dict[int, Seat]:
    hosts = host_ids or ("",) * len(uuids)
    found = versions or (NCCL,) * len(uuids)
    return {4 + at: Seat.of(uuid, hosts[at], found[at]) for at, uuid in enumerate(uuids)}


def test_ranks_with_a_gpu_each_use_nccl() -> None:
    choice = choose(seats("a", "b", "c"), nodes=1)
    assert (choice.way, choice.why) == (Way.NCCL, "3 ranks, each with a GPU of its own")


def test_a_rank_alone_needs_no_group() -> None:
    assert choose(seats("a", versions=(0,)), nodes=1).way is Way.ALONE


@pytest.mark.parametrize(
    ("members", "nodes", "why"),
    [
        (seats("a", "b", "a"), 1, "ranks 4 and 6 share a GPU, which NCCL refuses"),
        (seats("a", "b"), 2, "the group spans 2 nodes"),
        (seats("a", "b", versions=(NCCL, 0)), 1, "torch has no NCCL on rank 5"),
        (seats("a", "b", versions=(NCCL, 22703)), 1, "22703 on rank 5, 22809 on rank 4"),
    ],
)
def test_everything_else_goes_through_the_host_and_says_why(members: dict[int, Seat], nodes: int, why: str) -> None:
    choice = choose(members, nodes)
    assert choice.way is Way.HOST
    assert choice.why.endswith(why)


def test_hosts_that_nccl_tells_apart_may_share_a_gpu() -> None:
    assert choose(seats("a", "a", host_ids=("one", "two")), nodes=1).way is Way.NCCL


def test_a_seat_travels_behind_a_calls_own_numbers() -> None:
    seat = Seat.of("GPU-1", "", NCCL)
    assert Seat.read([3, 5, *seat.numbers()]) == seat
    assert len(seat.numbers()) == Seat.count()
    assert all(0 <= number < 1 << 64 for number in seat.numbers())
