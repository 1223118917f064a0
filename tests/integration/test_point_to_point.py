"""send, recv and batches of both, where more is under way than may wait unread."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from epmesh import Communicator, DeadlineExceeded, InvalidRequest
from epmesh.testing import LocalMesh
from epmesh_server.ranks import point_to_point

KIB = 1024


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    with LocalMesh(3, 1, exchange_timeout_s=20.0) as mesh:
        mesh.run(small_budget)
        yield mesh


def small_budget(comm: Communicator) -> None:
    point_to_point.BUDGET_BYTES = 100 * KIB


def isend(value: int, peer: int, kib: int = 60) -> Any:
    return SimpleNamespace(op=dist.isend, tensor=torch.full((kib, KIB), value, dtype=torch.uint8), group_peer=peer)


def irecv(peer: int, kib: int = 60) -> Any:
    return SimpleNamespace(op=dist.irecv, tensor=torch.zeros(kib, KIB, dtype=torch.uint8), group_peer=peer)


def value(op: Any) -> int:
    (only,) = op.tensor.unique().tolist()
    return int(only)


def everyone_with_everyone(comm: Communicator, count: int, backwards: bool) -> list[list[int]]:
    """Every rank sends `count` messages to each, sends first, and receives as many; values by source."""
    others = [rank for rank in range(comm.world_size) if rank != comm.rank]
    sends = [isend(10 * comm.rank + number, peer) for peer in others for number in range(count)]
    receives = [irecv(peer) for peer in others for _ in range(count)]
    works = comm.batch_isend_irecv([*sends, *receives])
    for work in reversed(works) if backwards else works:
        work.wait()
        assert work.is_completed()
    return [[value(op) for op in receives[start : start + count]] for start in range(0, len(receives), count)]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_batch_sends_more_both_ways_than_may_wait_unread(mesh: LocalMesh, backwards: bool) -> None:
    for rank, values in enumerate(mesh.run(everyone_with_everyone, 5, backwards)):
        assert values == [[10 * other + number for number in range(5)] for other in range(3) if other != rank]


def receives_left_open(comm: Communicator, kib: int = 60) -> list[int]:
    """The first rank sends three messages to the last, which waits for them only after a call of all members."""
    first, last = 0, comm.world_size - 1
    receives = [irecv(first, kib) for _ in range(3 if comm.rank == last else 0)]
    works = comm.batch_isend_irecv(receives)
    comm.batch_isend_irecv([isend(number, last, kib) for number in range(3 if comm.rank == first else 0)])
    comm.all_reduce(torch.ones(1))
    for work in works:
        work.wait()
    return [value(op) for op in receives]


def test_open_receives_make_room_while_their_rank_is_in_another_call(mesh: LocalMesh) -> None:
    assert mesh.run(receives_left_open) == [[], [], [0, 1, 2]]


@pytest.fixture(scope="module", params=["shm", "zmq", "grpc"])
def attached(request: pytest.FixtureRequest) -> Iterator[LocalMesh]:
    """Ranks in processes of their own, where the budget is what it is."""
    with LocalMesh(2, 1, hosted=True, transport=request.param, exchange_timeout_s=20.0) as mesh:
        yield mesh


MORE_THAN_HALF = 33 * KIB  # KiB, of the 64 MiB that may wait unread


def across(comm: Communicator) -> list[int]:
    """Sends first, and waits in order."""
    peer = 1 - comm.rank
    receives = [irecv(peer, MORE_THAN_HALF) for _ in range(2)]
    sends = [isend(10 * comm.rank + number, peer, MORE_THAN_HALF) for number in range(2)]
    for work in comm.batch_isend_irecv([*sends, *receives]):
        work.wait()
    return [value(op) for op in receives]


def test_attached_ranks_send_more_both_ways_than_may_wait_unread(attached: LocalMesh) -> None:
    assert attached.run(across) == [[10, 11], [0, 1]]


def test_open_receives_of_attached_ranks_make_room_too(attached: LocalMesh) -> None:
    assert attached.run(receives_left_open, MORE_THAN_HALF) == [[], [0, 1, 2]]


def receive_in_between(comm: Communicator) -> list[int]:
    if comm.rank == 2:
        return []
    peer = 1 - comm.rank
    announced = irecv(peer)
    works = comm.batch_isend_irecv([isend(1, peer), isend(2, peer), announced])
    plain = comm.recv((60, KIB), torch.uint8, peer)
    works[2].wait()
    return [value(announced), int(plain[0, 0])]


def test_what_a_batch_announced_comes_before_what_is_received_later(mesh: LocalMesh) -> None:
    assert mesh.run(receive_in_between) == [[1, 2], [1, 2], []]


def announce_another_shape(comm: Communicator) -> int:
    if comm.rank == 2:
        return 2
    peer = 1 - comm.rank
    wrong, right = irecv(peer, kib=3), irecv(peer)
    works = comm.batch_isend_irecv([wrong, right, isend(1, peer), isend(2, peer)])
    works[1].wait()
    with pytest.raises(InvalidRequest, match=rf"expected uint8\[3, 1024\], but rank {peer} sent uint8\[60, 1024\]"):
        works[0].wait()
    return value(right)


def test_another_shape_than_announced_is_an_error_of_that_receive_alone(mesh: LocalMesh) -> None:
    assert mesh.run(announce_another_shape) == [2, 2, 2]


def patiently(comm: Communicator, src: int) -> int:
    """The next word of `src`, however long it takes."""
    while True:
        try:
            return int(comm.recv(1, torch.int64, src))
        except DeadlineExceeded:
            continue


def wait_in_vain_first(comm: Communicator) -> tuple[int, int]:
    """Rank 1 sends only when rank 0 has waited too long for it."""
    if comm.rank != 0:
        if comm.rank == 1:
            patiently(comm, 0)
            comm.send(isend(7, 0).tensor, 0)
        return 1, 7
    receive = irecv(1)
    (work,) = comm.batch_isend_irecv([receive])
    with pytest.raises(DeadlineExceeded) as caught:
        work.wait()
    assert not work.is_completed()
    comm.send(torch.ones(1, dtype=torch.int64), 1)
    work.wait()
    return caught.value.rank, value(receive)


def test_a_receive_that_nothing_came_for_names_who_is_late_and_may_be_waited_for_again(mesh: LocalMesh) -> None:
    assert mesh.run(wait_in_vain_first) == [(1, 7)] * 3


def give_a_batch_up(comm: Communicator) -> int:
    """Rank 1 takes nothing of what rank 0 sends, so the batch fails; what rank 1 sends then is for what comes later."""
    if comm.rank == 0:
        with pytest.raises(DeadlineExceeded):
            comm.batch_isend_irecv([irecv(1), isend(1, 1), isend(2, 1)])
        comm.send(torch.ones(1, dtype=torch.int64), 2)
        return patiently(comm, 1)
    if comm.rank == 2:
        comm.send(torch.tensor([patiently(comm, 0)]), 1)
    else:
        patiently(comm, 2)
        comm.recv((60, KIB), torch.uint8, 0)
        comm.send(torch.tensor([9]), 0)
    return 9


def test_receives_of_a_batch_that_failed_take_no_later_message(mesh: LocalMesh) -> None:
    assert mesh.run(give_a_batch_up) == [9] * 3


def receive_where_nothing_can_be_written(comm: Communicator) -> int:
    """The message of the second receive comes while the first is waited for."""
    if comm.rank == 0:
        frozen, fine = irecv(1), irecv(2)
        frozen.tensor = torch.zeros(60, KIB, requires_grad=True)
        works = comm.batch_isend_irecv([frozen, fine])
        comm.recv(1, torch.float32, 1)
        works[1].wait()
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="what rank 1 sent could not be written: RuntimeError"):
                works[0].wait()
        return value(fine)
    if comm.rank == 1:
        comm.send(torch.ones(60, KIB), 0)
        comm.send(torch.ones(1), 0)
    else:
        comm.send(isend(5, 0).tensor, 0)
    return 5


def test_a_receive_into_what_cannot_be_written_fails_alone_and_every_time(mesh: LocalMesh) -> None:
    assert mesh.run(receive_where_nothing_can_be_written) == [5] * 3


def to_myself(comm: Communicator) -> list[int]:
    receive = irecv(comm.rank)
    (work,) = comm.batch_isend_irecv([receive])
    with pytest.raises(InvalidRequest, match="to which nothing was sent"):
        work.wait()
    comm.batch_isend_irecv([isend(1, comm.rank), isend(2, comm.rank)])
    plain = comm.recv((60, KIB), torch.uint8, comm.rank)
    work.wait()
    return [value(receive), int(plain[0, 0])]


def test_receives_from_oneself_come_in_order_as_all_others(mesh: LocalMesh) -> None:
    assert mesh.run(to_myself) == [[1, 2]] * 3
