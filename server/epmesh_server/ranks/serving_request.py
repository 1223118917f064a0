"""One router's request while its shares are computed: what came back, and its sum."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from epmesh.errors import (
    EpmeshError,
    InvalidRequest,
    MeshUnavailable,
    NotReady,
    PeerLost,
    from_proto,
)
from epmesh.frames import num_bytes
from epmesh.front import INLINE, FrontReply
from epmesh.layout import Ints
from epmesh.v1 import front_pb2
from epmesh.view import View
from epmesh_server.ranks.front import Incoming
from epmesh_server.ranks.serve_memory import Slab
from epmesh_server.ranks.serving_rows import RouterRows
from epmesh_server.ranks.tensors import accumulator, as_rows, dtype_from_name, dtype_name, from_bytes, meta_of, sum_rows

_MARGIN, _LONGEST_MARGIN_S = 0.1, 0.1  # of the time a router gives: so that it hears in time who was late


@dataclass(eq=False)
class NeighbourShare:
    """Rows that a neighbour computes.

    Attributes:
        index: which of the router's rows, ascending.
        incarnation: of the neighbour.
        slab: where rows and results are; `None` where they travel as frames.
        result_at: where the results start in the slab.
        answer: of the neighbour; `None` before it was asked, and once its answer was looked at.
        answered: whether the neighbour said that it is done, so that it writes no more; an answer that was given up
            may be long in coming.
        released: whether the slab is of no use here any more.
    """

    rank: int
    incarnation: int
    index: Ints
    slab: Slab | None
    result_at: int
    answer: Future[FrontReply] | None = None
    answered: bool = False
    released: bool = False

    def release(self) -> None:
        """Lets the slab be used again as soon as the neighbour writes no more; idempotent."""
        if self.slab is not None and not self.answered and not self.released:
            self.slab.discard()
        self.released = True
        self._give_back()

    def neighbour_is_done(self) -> None:
        """The neighbour answered, whatever it said."""
        self.answered = True
        self._give_back()

    def _give_back(self) -> None:
        if self.slab is not None and self.answered and self.released:
            self.slab.give_back()
            self.slab = None

    def results(self, reply: FrontReply) -> torch.Tensor:
        """What the neighbour computed, ``[rows, width]``, in the slab or a frame.

        Raises:
            InvalidRequest: the answer is none.
        """
        metas, places = reply.response.tensors, reply.response.places
        if len(metas) != 1 or len(metas[0].shape) != 2 or metas[0].shape[0] != len(self.index):
            shapes = [f"{meta.dtype}{list(meta.shape)}" for meta in metas][:4]
            raise InvalidRequest(f"rank {self.rank} answered {shapes} for {len(self.index)} rows")
        dtype, shape = dtype_from_name(metas[0].dtype), tuple(metas[0].shape)
        if not places or places[0] == INLINE:
            return from_bytes(reply.tensors[0], dtype, shape)
        if self.slab is None or self.released or places[0] != self.slab.start + self.result_at:
            raise InvalidRequest(f"rank {self.rank} put its results at {places[0]}, where they have no place")
        room = self.slab.data[self.result_at :]
        if num_bytes(metas[0]) > len(room):
            raise InvalidRequest(f"rank {self.rank} put {num_bytes(metas[0])} bytes of results where {len(room)} fit")
        return from_bytes(room[: num_bytes(metas[0])], dtype, shape)


@dataclass(eq=False)
class RouterRequest:
    """A router's request, until it is answered.

    Attributes:
        deadline: when it is given up here, somewhat before its router does.
        neighbours: shares that neighbours compute.
        waiting: ranks whose results are to come.
        over: whether it was answered or given up.
    """

    incoming: Incoming
    router_rows: RouterRows
    view: View
    deadline: float
    neighbours: list[NeighbourShare] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)
    over: bool = False
    _parts: dict[int, tuple[Ints, torch.Tensor]] = field(default_factory=dict)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for its results."""
        return self.over or self.incoming.cancelled

    def add(self, rank: int, index: Ints, results: torch.Tensor) -> bool:
        """Takes in a rank's results; whether they were the last."""
        self.waiting.discard(rank)
        self._parts[rank] = (index, results)
        return not self.waiting

    def sum(self) -> torch.Tensor:
        """The node's sums, one row a row: in rank order, in fp32 (fp64, integers in themselves), rounded once.

        Raises:
            InvalidRequest: the ranks' results do not have one dtype and width.
        """
        parts = [self._parts[rank] for rank in sorted(self._parts)]
        rows = self.router_rows.rows
        if not parts:
            return torch.zeros(rows.num_rows, rows.key.hidden, dtype=dtype_from_name(rows.key.hidden_dtype))
        kinds = sorted({f"{dtype_name(results.dtype)}[*, {results.shape[1]}]" for _, results in parts})
        if len(kinds) > 1:
            raise InvalidRequest(f"experts of one layer returned {' and '.join(kinds)} on this node; make them equal")
        results = parts[0][1]
        accumulator(results.dtype, "the node's sum")
        if len(parts) == 1 and len(parts[0][0]) == rows.num_rows:
            return results.clone()
        return sum_rows(parts, rows.num_rows, results.shape[1], results.dtype)

    def answer(self, total: torch.Tensor) -> None:
        """Sends the sums to the router."""
        self.over = True
        self.incoming.answer(front_pb2.FrontResponse(tensors=[meta_of(total)]), [as_rows(total).reshape(-1).data])


def give_up_at(now: float, deadline: float) -> float:
    """When a request with this deadline is given up here, so that its router hears who was late."""
    return deadline - min(_MARGIN * max(deadline - now, 0.0), _LONGEST_MARGIN_S)


def blamed(error: EpmeshError, rank: int, epoch: int) -> EpmeshError:
    """What a router is told of a neighbour's error: a rank that is gone, or leaves, is lost to it."""
    if isinstance(error, PeerLost | MeshUnavailable | NotReady):
        return PeerLost([rank], epoch, f"rank {rank} is gone from its node: {error}")
    return error


def is_done(answer: front_pb2.FrontResponse) -> bool:
    """Whether a neighbour that answered this writes no more: one that leaves refuses what it may still be at."""
    return not answer.HasField("error") or not isinstance(from_proto(answer.error), MeshUnavailable)


def result_room(hidden_dtype_bytes: int, rows: int, hidden: int) -> int:
    """Bytes kept for results: as many columns, in fp32 or what is wider."""
    return rows * hidden * max(hidden_dtype_bytes, 4)
