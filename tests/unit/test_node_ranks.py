"""The table of a node's ranks, and the buffers handed to them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

from epmesh.errors import InvalidRequest, MeshUnavailable, NotReady, StaleEpoch
from epmesh.v1 import membership_service_pb2, rank_service_pb2, view_pb2
from epmesh.view import GroupInfo, NodeInfo, RankInfo, RankMode, View
from epmesh_server.node.buffers import MAX_LOCAL_MEMBERS, BufferPool
from epmesh_server.node.ranks import LocalRank, RankTable, check_declaration


def declaration(**rank: Any) -> membership_service_pb2.RankDeclaration:
    fields = {"incarnation": 1, "device": "cpu", "mode": view_pb2.RANK_MODE_EXCHANGE, **rank}
    return membership_service_pb2.RankDeclaration(rank=view_pb2.Rank(**fields), exchange_timeout_s=1.0)


class Ranks:
    """A table whose ranks are released at the end."""

    def __init__(self) -> None:
        self.table = RankTable()
        self.changes = 0
        self.table.on_change = self._changed
        self._opened: list[LocalRank] = []

    def _changed(self) -> None:
        self.changes += 1

    def open(self, local_rank: int | None = None, incarnation: int = 1) -> LocalRank:
        request = rank_service_pb2.OpenRank(
            local_rank=local_rank, pid=42, declaration=declaration(incarnation=incarnation)
        )
        self._opened.append(self.table.open(request, slot=2, stride=3))
        return self._opened[-1]

    def release(self) -> None:
        for entry in self._opened:
            entry.release()


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.release()


def test_ranks_are_numbered_from_the_slot_and_told_apart_by_token(ranks: Ranks) -> None:
    first, second = ranks.open(), ranks.open()
    assert [(entry.local_rank, entry.rank) for entry in (first, second)] == [(0, 6), (1, 7)]
    assert ranks.table.by_token(second.token) is second
    assert ranks.table.by_token(b"") is None
    assert [entry.rank.rank for entry in ranks.table.report().ranks] == [6, 7]
    assert ranks.changes == 2


def test_a_number_is_free_again_once_its_rank_is_gone(ranks: Ranks) -> None:
    first = ranks.open()
    ranks.open()
    assert ranks.table.remove(first, MeshUnavailable("gone"))
    assert not ranks.table.remove(first, MeshUnavailable("gone twice"))
    assert first.page.closed
    assert str(first.error) == "gone"
    assert ranks.table.by_token(first.token) is None
    assert ranks.open().local_rank == 0


def test_removing_an_old_rank_leaves_its_replacement_alone(ranks: Ranks) -> None:
    old = ranks.open()
    ranks.table.remove(old, MeshUnavailable("gone"))
    new = ranks.open()
    assert not ranks.table.remove(old, MeshUnavailable("again"))
    assert ranks.table.all() == [new]
    assert not new.page.closed


def test_ends_wake_the_rank_and_a_full_counter_does_not_block(ranks: Ranks) -> None:
    entry = ranks.open()
    os.eventfd_write(entry.wake_fd, 2**64 - 2)
    entry.wake()
    entry.end(MeshUnavailable("over"))
    assert entry.ended.is_set()
    assert os.eventfd_read(entry.wake_fd) == 2**64 - 2


def update(
    mode: view_pb2.RankMode = view_pb2.RANK_MODE_SERVE, front_endpoint: str = "tcp://h:1"
) -> rank_service_pb2.UpdateRank:
    return rank_service_pb2.UpdateRank(mode=mode, front_endpoint=front_endpoint)


def test_a_changed_rank_is_reported_once(ranks: Ranks) -> None:
    entry = ranks.open()
    for _ in range(2):
        ranks.table.update(entry, update())
    assert ranks.changes == 2  # opened and changed
    (reported,) = ranks.table.report().ranks
    assert (reported.rank.mode, reported.rank.front_endpoint) == (view_pb2.RANK_MODE_SERVE, "tcp://h:1")
    assert (reported.rank.rank, reported.rank.incarnation) == (6, 1)


def test_a_change_that_no_view_could_show_changes_nothing(ranks: Ranks) -> None:
    entry = ranks.open()
    for wrong in (update(mode=view_pb2.RANK_MODE_UNSPECIFIED), update(front_endpoint="h:1")):
        with pytest.raises(InvalidRequest):
            ranks.table.update(entry, wrong)
    assert ranks.changes == 1
    assert ranks.table.report().ranks[0].rank.mode == view_pb2.RANK_MODE_EXCHANGE


def test_a_rank_that_is_gone_changes_no_more(ranks: Ranks) -> None:
    entry = ranks.open()
    ranks.table.remove(entry, MeshUnavailable("gone"))
    ranks.table.update(entry, update())
    assert ranks.changes == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mode": 0}, "mode is 0"),
        ({"incarnation": 0}, "incarnation is 0"),
        ({"device": "d" * 300}, "device has 300"),
        ({"link_endpoint": "ipc:///tmp/x"}, "link endpoint is 'ipc:///tmp/x'; it must be tcp://"),
        ({"front_endpoint": "ipc:///tmp/x"}, "front endpoint is 'ipc:///tmp/x'; it must be tcp://"),
        ({"front_endpoint": "tcp://" + "h" * 300}, "front endpoint has 306"),
    ],
    ids=str,
)
def test_declarations_that_no_view_could_show_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        check_declaration(declaration(**wrong))


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, -1.0])
def test_time_limits_are_numbers(timeout_s: float) -> None:
    wrong = declaration()
    wrong.exchange_timeout_s = timeout_s
    with pytest.raises(InvalidRequest, match="exchange_timeout_s"):
        check_declaration(wrong)


@pytest.mark.parametrize(
    ("num_experts", "experts", "said"),
    [(0, [], "num_experts is 0"), (70_000, [], "num_experts is 70000"), (4, [1, 4], "expert 4")],
)
def test_declared_experts_exist(num_experts: int, experts: list[int], said: str) -> None:
    wrong = declaration()
    wrong.experts.add(num_experts=num_experts, experts=experts)
    with pytest.raises(InvalidRequest, match=said):
        check_declaration(wrong)


# Buffers -------------------------------------------------------------------------------------------------------


def make_view(epoch: int, *ranks: int, stride: int = 4) -> View:
    infos = tuple(RankInfo(rank, 1, "cpu", RankMode.EXCHANGE, "") for rank in ranks)
    node = NodeInfo(0, "n", 1, "", infos)
    return View("mesh", epoch, epoch, stride, (node,), (GroupInfo("ep", 1, ranks, ranks),))


@pytest.fixture
def pool() -> Iterator[BufferPool]:
    made = BufferPool(4096)
    yield made
    made.keep_only(None)


def test_only_local_members_have_buffers(pool: BufferPool) -> None:
    buffers = pool.get(make_view(1, 0, 2, 5), 1, 1, rank=2)
    assert buffers.ranks == (0, 2)
    assert len(buffers.descriptors) == 3
    assert buffers.layout.world_size == 3
    assert os.fstat(buffers.memfd).st_size == buffers.memfd_bytes == 2 * buffers.layout.section_bytes


def test_buffers_live_for_one_membership(pool: BufferPool) -> None:
    view = make_view(1, 0)
    first = pool.get(view, 1, 1, rank=0)
    assert pool.get(view, 1, 1, rank=0) is first
    later = make_view(2, 0)
    pool.keep_only(later)
    assert len(pool) == 0
    with pytest.raises(OSError):
        os.fstat(first.memfd)
    with pytest.raises(StaleEpoch):
        pool.get(later, 1, 1, rank=0)
    with pytest.raises(NotReady):
        pool.get(later, 1, 3, rank=0)


def test_buffers_of_a_destroyed_group_go(pool: BufferPool) -> None:
    view = make_view(1, 0)
    pool.get(view, 1, 1, rank=0)
    pool.keep_only(View("mesh", 2, 1, 4, view.nodes, ()))
    assert len(pool) == 0


def test_more_members_than_target_codes_can_name_are_refused(pool: BufferPool) -> None:
    many = range(MAX_LOCAL_MEMBERS + 1)
    with pytest.raises(InvalidRequest, match="127 ranks here; at most 126"):
        pool.get(make_view(1, *many, stride=1000), 1, 1, rank=0)
    assert len(pool) == 0
