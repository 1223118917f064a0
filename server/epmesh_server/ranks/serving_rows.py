"""A router's rows for one node, and each local rank's share of them. Pure: checks, then NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from epmesh.errors import InvalidRequest, StaleEpoch
from epmesh.frames import ITEM_BYTES
from epmesh.layout import Ints
from epmesh.v1 import frame_pb2
from epmesh.view import RankMode, View

Bytes = npt.NDArray[np.uint8]

ELSEWHERE = 127  # a target that is not this node's
_MANY = 1024
_ID_DTYPES = ("int32", "int64")


@dataclass(frozen=True)
class BatchKey:
    """What rows must have in common to be computed by one call of the experts."""

    layer: int | None
    hidden: int
    num_topk: int
    hidden_dtype: str
    weights_dtype: str
    ids_dtype: str


@dataclass(frozen=True)
class Rows:
    """Rows for one rank's experts, as bytes of the dtypes in `key`.

    Attributes:
        hidden_states: ``[rows, bytes of a row]``.
        topk_weights: ``[rows, bytes of a row]``.
        topk_ids: ``[rows, num_topk]``, -1 for ids that are not the rank's to compute.
    """

    key: BatchKey
    hidden_states: Bytes
    topk_weights: Bytes
    topk_ids: npt.NDArray[np.signedinteger]

    @property
    def num_rows(self) -> int:
        """How many."""
        return len(self.topk_ids)

    @property
    def num_bytes(self) -> int:
        """Of the three arrays."""
        return self.hidden_states.nbytes + self.topk_weights.nbytes + self.topk_ids.nbytes

    @property
    def row_bytes(self) -> tuple[int, int, int]:
        """Bytes of a row of each array."""
        return self.hidden_states.shape[1], self.topk_weights.shape[1], self.topk_ids[:1].itemsize * self.key.num_topk

    @property
    def arrays(self) -> list[Bytes]:
        """The three arrays as flat bytes."""
        return [self.hidden_states.reshape(-1), self.topk_weights.reshape(-1), self.topk_ids.reshape(-1).view(np.uint8)]

    @property
    def metas(self) -> list[frame_pb2.TensorMeta]:
        """dtype and shape of the three arrays."""
        key, rows = self.key, self.num_rows
        return [
            frame_pb2.TensorMeta(dtype=key.hidden_dtype, shape=(rows, key.hidden)),
            frame_pb2.TensorMeta(dtype=key.weights_dtype, shape=(rows, key.num_topk)),
            frame_pb2.TensorMeta(dtype=key.ids_dtype, shape=(rows, key.num_topk)),
        ]


def parse_rows(layer: int | None, metas: Sequence[frame_pb2.TensorMeta], tensors: Sequence[memoryview | Bytes]) -> Rows:
    """The rows of a request whose first three tensors they are.

    Args:
        tensors: bytes, as long as their metas say.

    Raises:
        InvalidRequest: they do not belong together.
    """
    if len(metas) < 3 or len(metas) != len(tensors):
        raise InvalidRequest(f"{len(metas)} tensors; hidden_states, topk_weights and topk_ids are needed")
    hidden, weights, ids = metas[:3]
    for name, meta in (("hidden_states", hidden), ("topk_weights", weights), ("topk_ids", ids)):
        if len(meta.shape) != 2 or meta.shape[0] != hidden.shape[0]:
            raise InvalidRequest(f"{name} is {_text(meta)}; all must have 2 dimensions, and as many rows")
    if list(weights.shape) != list(ids.shape):
        raise InvalidRequest(f"topk_weights is {list(weights.shape)} and topk_ids {list(ids.shape)}; make them equal")
    if ids.dtype not in _ID_DTYPES:
        raise InvalidRequest(f"topk_ids is {ids.dtype}; it must be int32 or int64")
    key = BatchKey(layer, hidden.shape[1], ids.shape[1], hidden.dtype, weights.dtype, ids.dtype)
    rows = hidden.shape[0]
    return Rows(
        key,
        np.frombuffer(tensors[0], np.uint8).reshape(rows, key.hidden * ITEM_BYTES[hidden.dtype]),
        np.frombuffer(tensors[1], np.uint8).reshape(rows, key.num_topk * ITEM_BYTES[weights.dtype]),
        np.frombuffer(tensors[2], np.dtype(ids.dtype)).reshape(rows, key.num_topk),
    )


def announced(
    layer: int | None, ranks: Sequence[int], metas: Sequence[frame_pb2.TensorMeta]
) -> tuple[BatchKey, int] | None:
    """What a header says of the rows that one of `ranks` will compute: their key, and how many there likely are.

    As many as if ids went to all of `ranks` alike: before the ids are looked at nobody knows. `None` where the header
    is none of rows; whoever looks at them says why.
    """
    if len(metas) < 3 or not ranks or any(len(meta.shape) != 2 for meta in metas[:3]):
        return None
    hidden, weights, ids = metas[:3]
    rows, num_topk = hidden.shape[0], ids.shape[1]
    key = BatchKey(layer, hidden.shape[1], num_topk, hidden.dtype, weights.dtype, ids.dtype)
    return key, math.ceil(rows * (1 - (1 - 1 / len(ranks)) ** min(num_topk, _MANY)))


@dataclass(frozen=True)
class RouterRows:
    """A router's rows with the ranks that each id is for.

    Attributes:
        targets: uint8 ``[rows, num_topk]``, indices into `ranks`; `ELSEWHERE` for ids that are not this node's.
        ranks: global ranks.
    """

    rows: Rows
    targets: Bytes
    ranks: tuple[int, ...]

    @cached_property
    def wanted(self) -> dict[int, int]:
        """The ranks that rows are for, ascending, and their index in `ranks`."""
        present = np.unique(self.targets[self.rows.topk_ids >= 0])
        return dict(sorted((self.ranks[index], int(index)) for index in present if index != ELSEWHERE))

    def index(self, rank: int) -> Ints:
        """Which rows are for `rank`, ascending."""
        return np.flatnonzero(self._mine(rank).any(axis=1))

    def share(self, rank: int, index: Ints, into: Sequence[Bytes] | None = None) -> Rows:
        """The rows of `rank`, whose `index` is given: each once, with -1 for ids that are others' to compute.

        Args:
            into: flat memory for the three arrays, of their sizes; `None`: memory of their own, except that rows which
                are all of them stay where they are.
        """
        rows = self.rows
        ids = np.where(self._mine(rank)[index], rows.topk_ids[index], rows.topk_ids.dtype.type(-1))
        if into is None:
            whole = len(index) == rows.num_rows
            hidden, weights = (each if whole else each[index] for each in (rows.hidden_states, rows.topk_weights))
            return Rows(rows.key, hidden, weights, ids)
        hidden, weights = (
            _taken(source, index, target)
            for source, target in zip((rows.hidden_states, rows.topk_weights), into, strict=False)
        )
        placed = into[2].view(ids.dtype).reshape(ids.shape)
        placed[:] = ids
        return Rows(rows.key, hidden, weights, placed)

    def _mine(self, rank: int) -> npt.NDArray[np.bool_]:
        mine: npt.NDArray[np.bool_] = (self.targets == self.wanted[rank]) & (self.rows.topk_ids >= 0)
        return mine


def parse_router_rows(
    layer: int | None,
    ranks: Sequence[int],
    metas: Sequence[frame_pb2.TensorMeta],
    tensors: Sequence[memoryview | Bytes],
) -> RouterRows:
    """The rows of a router's request, checked for everything that needs no view.

    Raises:
        InvalidRequest: they do not belong together.
    """
    if len(metas) != 4 or len(tensors) != 4:
        raise InvalidRequest(f"{len(metas)} tensors; hidden_states, topk_weights, topk_ids and targets are needed")
    rows = parse_rows(layer, metas[:3], tensors[:3])
    wanted = [rows.num_rows, rows.key.num_topk]
    if metas[3].dtype != "uint8" or list(metas[3].shape) != wanted:
        raise InvalidRequest(f"targets are {_text(metas[3])}; they must be uint8{wanted}")
    if len(set(ranks)) != len(ranks) or len(ranks) > ELSEWHERE:
        raise InvalidRequest(f"{len(ranks)} ranks; they must be distinct, and at most {ELSEWHERE}")
    targets = np.frombuffer(tensors[3], np.uint8).reshape(wanted)
    bad = targets[(targets >= len(ranks)) & (targets != ELSEWHERE)]
    if bad.size:
        raise InvalidRequest(f"a target is {int(bad[0])}; there are {len(ranks)} ranks, and {ELSEWHERE} means none")
    if rows.topk_ids.size and rows.topk_ids.min() < -1:
        raise InvalidRequest(f"topk_ids has {int(rows.topk_ids.min())}; ids are -1 (none) and up")
    return RouterRows(rows, targets, tuple(ranks))


class Holders:
    """Who holds what by the newest view, as tables; and whether rows go where that says."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._held: dict[tuple[int | None, int], npt.NDArray[np.bool_]] = {}

    @property
    def view(self) -> View:
        """The view they are of."""
        return self._view

    def check(self, router_rows: RouterRows, me: int) -> None:
        """Every target must serve on this node, and hold what it is to compute.

        Raises:
            StaleEpoch: it does not, by this view: the router went by another one.
            InvalidRequest: an id is out of range, or the layer has no placement.
        """
        for rank, index in router_rows.wanted.items():
            if rank != me and not serves_beside(self._view, rank, me):
                raise StaleEpoch(self._view.epoch, f"rank {rank} does not serve on the node of rank {me} now")
            ids = router_rows.rows.topk_ids[router_rows.targets == index]
            self.check_share(router_rows.rows.key.layer, ids[ids >= 0], rank)

    def check_share(self, layer: int | None, ids: npt.NDArray[np.signedinteger], rank: int) -> None:
        """`rank` must hold `ids`, which are 0 and up.

        Raises:
            StaleEpoch: it does not, by this view.
            InvalidRequest: an id is out of range, or the layer has no placement.
        """
        held = self._table(layer, rank)
        if ids.size and ids.max() >= len(held):
            raise InvalidRequest(f"topk_ids has {int(ids.max())}; ids are -1 (none) to {len(held) - 1}")
        if not held[ids].all():
            missing = int(ids[~held[ids]][0])
            raise StaleEpoch(self._view.epoch, f"rank {rank} does not hold expert {missing} now")

    def _table(self, layer: int | None, rank: int) -> npt.NDArray[np.bool_]:
        found = self._held.get((layer, rank))
        if found is None:
            placement = self._view.placement(layer)
            if placement is None:
                raise InvalidRequest(f"no placement was declared for layer {layer}; join with num_experts=")
            found = np.zeros(placement.num_experts, np.bool_)
            found[list(placement.experts_of.get(rank, ()))] = True
            self._held[(layer, rank)] = found
        return found


def serves_beside(view: View, rank: int, me: int) -> bool:
    """Whether `rank` takes shares from `me`: it serves, on the same node."""
    info = view.ranks.get(rank)
    if info is None or view.slot_of(rank) != view.slot_of(me):
        return False
    return info.mode is RankMode.SERVE and bool(info.front_endpoint)


def _taken(source: Bytes, index: Ints, target: Bytes) -> Bytes:
    """Rows of `source`, put into `target`."""
    rows = target.reshape(len(index), source.shape[1])
    return source.take(index, axis=0, out=rows, mode="clip")  # any other mode copies once more


def _text(meta: frame_pb2.TensorMeta) -> str:
    return f"{meta.dtype}{list(meta.shape)}"
