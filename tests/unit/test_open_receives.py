"""Receives that a driver opened: how much of them, before any memory is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from epmesh.errors import InvalidRequest
from epmesh.frames import MAX_TENSOR_BYTES
from epmesh.v1 import frame_pb2, front_pb2
from epmesh_server.ranks import driver_calls
from epmesh_server.ranks.driver_calls import OpenReceives


class Comm:
    """A communicator that opens receives, and notes which."""

    def __init__(self) -> None:
        self.view = SimpleNamespace(membership_epoch=1)
        self.opened: list[tuple[torch.Tensor, int]] = []

    def _open_receives(self, wanted: list[tuple[torch.Tensor, int]]) -> list[Any]:
        self.opened += wanted
        return list(wanted)


def receives(count: int, size: int) -> list[front_pb2.BatchOperation]:
    meta = frame_pb2.TensorMeta(dtype="uint8", shape=[size])
    return [front_pb2.BatchOperation(peer=0, tensor=meta) for _ in range(count)]


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, MAX_TENSOR_BYTES), (10_000, MAX_TENSOR_BYTES), (driver_calls._MAX_OPEN_RECEIVES + 1, 1), (1, 1 << 62)],
)
def test_more_than_may_be_open_is_refused_before_any_of_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    comm: Any = Comm()
    monkeypatch.setattr(driver_calls, "_expected", lambda meta: pytest.fail("allocated"))
    with pytest.raises(InvalidRequest):
        OpenReceives().open(comm, receives(count, size))
    assert not comm.opened


def test_what_is_open_counts_until_the_membership_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_calls, "_MAX_OPEN_BYTES", 100)
    comm: Any = Comm()
    opened = OpenReceives()
    assert list(opened.open(comm, receives(2, 40))) == [1, 2]
    with pytest.raises(InvalidRequest, match="3 receives of 120 bytes would be open"):
        opened.open(comm, receives(1, 40))
    comm.view.membership_epoch = 2
    assert list(opened.open(comm, receives(2, 50))) == [3, 4]
    assert [tuple(tensor.shape) for tensor, _ in comm.opened] == [(40,), (40,), (50,), (50,)]
