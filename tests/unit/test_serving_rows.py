"""Routers' rows, and each rank's share of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh import InvalidRequest, NodeInfo, Placement, RankInfo, RankMode, StaleEpoch, View
from epmesh.frames import num_bytes, tensor_meta
from epmesh.layout import Ints
from epmesh_server.ranks.serving_rows import (
    ELSEWHERE,
    BatchKey,
    Holders,
    RouterRows,
    Rows,
    announced,
    parse_router_rows,
    parse_rows,
)

HIDDEN = 4


def router_rows(ids: Any, targets: Any, ranks: list[int], dtype: str = "int64") -> RouterRows:
    """Row i is filled with i."""
    ids, targets = np.array(ids, dtype), np.array(targets, np.uint8)
    rows = len(ids)
    hidden = np.tile(np.arange(rows, dtype=np.float32)[:, None], (1, HIDDEN))
    weights = np.arange(ids.size, dtype=np.float32).reshape(ids.shape)
    tensors = [hidden, weights, ids, targets]
    metas = [tensor_meta(str(t.dtype), t.shape) for t in tensors]
    return parse_router_rows(
        2, ranks, metas, [np.ascontiguousarray(t).reshape(-1).view(np.uint8).data for t in tensors]
    )


def share_of(rows: RouterRows, rank: int, elsewhere: bool = False) -> tuple[Ints, Rows]:
    """With `elsewhere`, put into memory that is given."""
    index = rows.index(rank)
    into = [np.zeros(len(index) * width, np.uint8) for width in rows.rows.row_bytes] if elsewhere else None
    share = rows.share(rank, index, into)
    if into is not None:
        assert [np.shares_memory(a, b) for a, b in zip(share.arrays, into, strict=True)] == [True] * 3
    return index, share


def view_of(*ranks: RankInfo, experts_of: dict[int, tuple[int, ...]] | None = None, stride: int = 4) -> View:
    slots = sorted({info.rank // stride for info in ranks})
    nodes = tuple(
        NodeInfo(slot, f"n{slot}", 1, "h:1", tuple(info for info in ranks if info.rank // stride == slot))
        for slot in slots
    )
    placements: dict[int | None, Placement] = {None: Placement(8, experts_of)} if experts_of else {}
    return View("m", 9, 3, stride, nodes, placements=placements)


def serving(rank: int, mode: RankMode = RankMode.SERVE, front: str = "tcp://h:1") -> RankInfo:
    return RankInfo(rank, 1, "cpu", mode, "tcp://h:2", front)


def test_a_share_has_each_row_once_and_only_its_own_ids() -> None:
    rows = router_rows([[5, 1], [1, 2], [-1, 7], [3, 3]], [[0, 1], [1, 1], [127, 127], [0, 127]], [4, 6])
    assert list(rows.wanted) == [4, 6]
    index, share = share_of(rows, 4)
    assert index.tolist() == [0, 3]
    assert share.topk_ids.tolist() == [[5, -1], [3, -1]]
    assert share.hidden_states.view(np.float32)[:, 0].tolist() == [0.0, 3.0]
    assert share.topk_weights.view(np.float32).tolist() == [[0.0, 1.0], [6.0, 7.0]]
    index, share = share_of(rows, 6)
    assert index.tolist() == [0, 1]
    assert share.topk_ids.tolist() == [[-1, 1], [1, 2]]
    assert share.key.layer == 2


def test_an_id_of_minus_one_is_nobodys_whatever_its_target() -> None:
    rows = router_rows([[-1, 2]], [[0, 1]], [4, 6])
    assert list(rows.wanted) == [6]


@given(st.data())
def test_shares_together_are_the_rows(data: st.DataObject) -> None:
    rows, topk = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 4))
    ranks = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5, unique=True))
    cells = st.lists(st.integers(-1, 7), min_size=topk, max_size=topk)
    ids = np.array(data.draw(st.lists(cells, min_size=rows, max_size=rows)), np.int32).reshape(rows, topk)
    codes = st.lists(st.sampled_from([*range(len(ranks)), ELSEWHERE]), min_size=topk, max_size=topk)
    targets = np.array(data.draw(st.lists(codes, min_size=rows, max_size=rows)), np.uint8).reshape(rows, topk)
    made = router_rows(ids, targets, ranks, "int32")
    assert list(made.wanted) == sorted(made.wanted)
    seen = np.full((rows, topk), -1)
    for rank in made.wanted:
        index, share = share_of(made, rank, data.draw(st.booleans()))
        assert (share.topk_ids >= 0).any(axis=1).all()
        assert share.num_rows == len(set(index.tolist())) > 0
        mine = share.topk_ids >= 0
        assert (targets[index][mine] == ranks.index(rank)).all()
        seen[index] = np.where(mine, share.topk_ids, seen[index])
    assert (seen == np.where(targets == ELSEWHERE, -1, ids)).all()


@pytest.mark.parametrize(
    ("ids", "targets", "ranks", "text"),
    [
        ([[1]], [[2]], [4, 6], "a target is 2"),
        ([[1]], [[0]], [4, 4], "distinct"),
        ([[-2]], [[0]], [4], "topk_ids has -2"),
        ([[1, 2]], [[0]], [4], "uint8"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(ids: Any, targets: Any, ranks: list[int], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        router_rows(ids, targets, ranks)


@pytest.mark.parametrize(
    ("shapes", "dtype", "text"),
    [
        ([(2, 4), (2, 1), (2, 2)], "int64", "make them equal"),
        ([(2, 4), (3, 1), (2, 1)], "int64", "topk_weights"),
        ([(2, 4, 1), (2, 1), (2, 1)], "int64", "hidden_states"),
        ([(2, 4), (2, 1), (2, 1)], "int16", "int32 or int64"),
        ([(2, 4), (2, 1)], "int64", "are needed"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(shapes: list[Any], dtype: str, text: str) -> None:
    dtypes = ["float32", "float32", dtype][: len(shapes)]
    metas = [tensor_meta(name, shape) for name, shape in zip(dtypes, shapes, strict=True)]
    tensors = [
        memoryview(bytes(int(np.prod(shape)) * np.dtype(name).itemsize))
        for name, shape in zip(dtypes, shapes, strict=True)
    ]
    with pytest.raises(InvalidRequest, match=text):
        parse_rows(None, metas, tensors)


HELD = {4: (0, 1, 2), 5: (3, 4), 8: (5, 6, 7)}


def test_rows_for_ranks_that_serve_here_and_hold_their_experts_are_taken() -> None:
    view = view_of(serving(4), serving(5), serving(8), experts_of=HELD)
    Holders(view).check(router_rows([[0, 3]], [[0, 1]], [4, 5]), 4)


@pytest.mark.parametrize(
    "neighbour",
    [None, serving(5, RankMode.EXCHANGE), serving(5, front="")],
    ids=["gone", "exchanging", "leaving"],
)
def test_rows_for_a_neighbour_that_does_not_serve_are_stale(neighbour: RankInfo | None) -> None:
    ranks = [serving(4), serving(8)] + ([neighbour] if neighbour else [])
    with pytest.raises(StaleEpoch) as stale:
        Holders(view_of(*ranks, experts_of=HELD)).check(router_rows([[3]], [[0]], [5]), 4)
    assert stale.value.epoch == 9


def test_rows_for_another_node_or_for_experts_not_held_are_stale() -> None:
    holders = Holders(view_of(serving(4), serving(5), serving(8), experts_of=HELD))
    with pytest.raises(StaleEpoch, match="rank 8"):
        holders.check(router_rows([[5]], [[0]], [8]), 4)
    with pytest.raises(StaleEpoch, match="expert 3"):
        holders.check(router_rows([[0, 3]], [[0, 0]], [4]), 4)


def test_ids_out_of_range_and_layers_without_a_placement_are_wrong() -> None:
    holders = Holders(view_of(serving(4), experts_of=HELD))
    with pytest.raises(InvalidRequest, match="topk_ids has 8"):
        holders.check(router_rows([[8]], [[0]], [4]), 4)
    with pytest.raises(InvalidRequest, match="no placement was declared for layer 2"):
        Holders(view_of(serving(4))).check(router_rows([[1]], [[0]], [4]), 4)


METAS = st.lists(
    st.builds(
        tensor_meta,
        st.sampled_from(["float32", "bfloat16", "int64", "int32", "uint8", "bool"]),
        st.lists(st.one_of(st.integers(0, 4), st.just(1 << 40)), max_size=3),
    ),
    max_size=5,
)


@given(METAS, st.lists(st.integers(0, 200), max_size=4), st.binary(max_size=64))
def test_whatever_comes_is_taken_or_refused_by_type(metas: list[Any], ranks: list[int], noise: bytes) -> None:
    tensors = []
    for meta in metas:
        size = num_bytes_or_none(meta)
        if size is None or size > 1 << 12:
            return  # the front refuses it
        tensors.append(memoryview((noise * size)[:size].ljust(size, b"\xff")))
    try:
        rows = parse_router_rows(None, ranks, metas, tensors)
    except InvalidRequest:
        return
    for rank in rows.wanted:
        share_of(rows, rank)


def num_bytes_or_none(meta: Any) -> int | None:
    try:
        return num_bytes(meta)
    except InvalidRequest:
        return None


HEADER = [tensor_meta("float32", (8, HIDDEN)), tensor_meta("float16", (8, 2)), tensor_meta("int64", (8, 2))]


@pytest.mark.parametrize(("ranks", "rows"), [([3], 8), ([3, 4], 6), ([3, 4, 5, 6], 4)])
def test_a_header_says_how_many_rows_a_rank_will_likely_compute(ranks: list[int], rows: int) -> None:
    assert announced(2, ranks, HEADER) == (BatchKey(2, HIDDEN, 2, "float32", "float16", "int64"), rows)


@pytest.mark.parametrize(
    ("ranks", "metas"),
    [([], HEADER), ([3], HEADER[:2]), ([3], [tensor_meta("uint8", (4,))] * 4), ([3], [])],
    ids=["no ranks", "two tensors", "other shapes", "nothing"],
)
def test_a_header_that_is_none_of_rows_says_nothing_of_them(ranks: list[int], metas: list[Any]) -> None:
    assert announced(None, ranks, metas) is None
