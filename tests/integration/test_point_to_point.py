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
    with LocalMesh(3, 1, exchange_timeout_s=2.0) as mesh:
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


def wait_for_nothing(comm: Communicator) -> bool:
    if comm.rank != 0:
        return True
    (work,) = comm.batch_isend_irecv([irecv(1)])
    with pytest.raises(DeadlineExceeded) as caught:
        work.wait()
    return caught.value.rank == 1


def test_a_receive_of_what_nobody_sends_names_who_is_late(mesh: LocalMesh) -> None:
    assert mesh.run(wait_for_nothing) == [True] * 3
