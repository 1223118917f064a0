"""Wrong calls, one by one, and what their refusal must say. Each runs in every rank of a group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed

from epmesh import Communicator, EpmeshError, InvalidRequest
from tests.integration.contract import Feature

UNHELD_LAYER = 60
_GROUPS = (Feature.GROUPS,)


@dataclass(frozen=True)
class Refused:
    """How one call ended on one rank: the error's class and text, and whether the group still sums afterwards."""

    error: str
    text: str
    works: bool


@dataclass(frozen=True)
class Wrong:
    """A wrong call.

    Attributes:
        call: made on every rank; on some of them, or between them, something is wrong.
        words: what the refusal must name.
        error: its class.
        needs: what the communicator must have for this to be wrong in this way.
    """

    call: Callable[[Communicator], Any]
    words: tuple[str, ...]
    error: str = "InvalidRequest"
    needs: tuple[Feature, ...] = ()


def attempt(comm: Communicator, name: str) -> Refused:
    """Makes a wrong call of `COLLECTIVE`, and a right one after it."""
    error: EpmeshError | None = None
    try:
        COLLECTIVE[name].call(comm)
    except EpmeshError as exc:
        error = exc
    return Refused(type(error).__name__, str(error), works(comm))


def works(comm: Communicator) -> bool:
    """Whether the group sums and exchanges as ever."""
    total = comm.all_reduce(torch.ones(2, dtype=torch.int32)).tolist()
    ids = torch.zeros(1, 1, dtype=torch.int64)
    rows = comm.dispatch(torch.ones(1, 2), torch.ones(1, 1), ids, True, layer=99)[0]
    return total == [comm.world_size] * 2 and comm.combine(rows, True).tolist() == [[float(comm.world_size)] * 2]


def last(comm: Communicator) -> bool:
    """Whether this is the rank that does it wrong."""
    return comm.rank == comm.world_size - 1


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def dispatch(
    comm: Communicator,
    rows: tuple[int, ...] = (3, 4),
    weights: tuple[int, ...] = (3, 2),
    ids: Iterable[int] | tuple[int, ...] = (3, 2),
    *,
    dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
    value: int = 0,
    **options: Any,
) -> tuple[Any, ...]:
    """A dispatch that is right unless an argument makes it wrong."""
    options = {"is_sequence_parallel": True, "layer": 0, **options}
    ids_tensor = torch.full(tuple(ids), value, dtype=ids_dtype)
    return comm.dispatch(torch.ones(rows).to(dtype), ones(*weights), ids_tensor, **options)


def received(comm: Communicator) -> int:
    return len(dispatch(comm, layer=99)[0])


def combine_twice(comm: Communicator) -> None:
    rows = dispatch(comm, layer=99)[0]
    comm.combine(rows, True)
    comm.combine(rows, True)


def skip_combine(comm: Communicator, instead: Callable[[], Any]) -> None:
    """The last rank makes another call where the others combine."""
    rows = dispatch(comm, layer=99)[0]
    if last(comm):
        instead()
    else:
        comm.combine(rows, True)


COLLECTIVE: dict[str, Wrong] = {
    # Shapes and dtypes that differ between ranks
    "all_reduce of different shapes": Wrong(
        lambda c: c.all_reduce(ones(4 if last(c) else 3)), ("all_reduce", "4", "3")
    ),
    "all_reduce of different dtypes": Wrong(
        lambda c: c.all_reduce(ones(3, dtype=torch.bfloat16 if last(c) else torch.float32)), ("bfloat16", "float32")
    ),
    "all_reduce of fp8": Wrong(lambda c: c.all_reduce(ones(3).to(torch.float8_e4m3fn)), ("float8_e4m3fn",)),
    "all_reduce of no tensor": Wrong(
        lambda c: c.all_reduce(cast(torch.Tensor, None) if last(c) else ones(3)), ("all_reduce", "None")
    ),
    "all_gather of different shapes": Wrong(lambda c: c.all_gather(ones(2, 4 if last(c) else 3)), ("all_gather", "4")),
    "broadcast of different shapes": Wrong(lambda c: c.broadcast(ones(4 if last(c) else 3)), ("broadcast", "4", "3")),
    "reduce_scatter of different shapes": Wrong(
        lambda c: c.reduce_scatter(ones(2 * c.world_size if last(c) else c.world_size)), ("reduce_scatter",)
    ),
    "gather of different dtypes": Wrong(
        lambda c: c.gather(ones(3, dtype=torch.int8 if last(c) else torch.int16)), ("int8", "int16")
    ),
    "an unsupported dtype": Wrong(lambda c: c.all_gather(torch.ones(3, dtype=torch.complex128)), ("complex128",)),
    # Dims
    "all_gather along a dim that is not there": Wrong(lambda c: c.all_gather(ones(2, 3), dim=5), ("5", "[2, 3]")),
    "all_gather along different dims": Wrong(lambda c: c.all_gather(ones(3, 3), dim=int(last(c))), ("dim",)),
    "reduce_scatter along a dim that is not there": Wrong(
        lambda c: c.reduce_scatter(ones(2, 3), dim=-3), ("Invalid dim (-3) for input tensor with shape",)
    ),
    "reduce_scatter of a length that does not divide": Wrong(
        lambda c: c.reduce_scatter(ones(2, c.world_size + 1)), ("reduce_scatter",)
    ),
    # Sizes
    "all_gatherv with too few sizes": Wrong(lambda c: c.all_gatherv(ones(2, 3), sizes=[2]), ("sizes",)),
    "all_gatherv of another length than its size": Wrong(
        lambda c: c.all_gatherv(ones(5 if last(c) else 2, 3), sizes=[2] * c.world_size), ("5", "2")
    ),
    "all_gatherv with a negative size": Wrong(
        lambda c: c.all_gatherv(ones(2, 3), sizes=[-7] * c.world_size), ("-7", "sizes")
    ),
    "all_gatherv with different sizes": Wrong(
        lambda c: c.all_gatherv(ones(2, 3), sizes=[2] * (c.world_size - 1) + [2 if last(c) else 3]), ("sizes",)
    ),
    "all_gatherv of different widths": Wrong(
        lambda c: c.all_gatherv(ones(2, 4 if last(c) else 3), sizes=[2] * c.world_size), ("4", "3")
    ),
    "all_gatherv of lists of different lengths": Wrong(
        lambda c: c.all_gatherv([ones(2)] * (3 if last(c) else 2), sizes=[2] * c.world_size), ("all_gatherv",)
    ),
    "reduce_scatterv with sizes of another sum": Wrong(
        lambda c: c.reduce_scatterv(ones(2 * c.world_size + 1, 3), dim=0, sizes=[2] * c.world_size), ("sizes",)
    ),
    "reduce_scatterv with too many sizes": Wrong(
        lambda c: c.reduce_scatterv(ones(c.world_size + 1, 3), dim=0, sizes=[1] * (c.world_size + 1)), ("sizes",)
    ),
    "reduce_scatterv into an output of another shape": Wrong(
        lambda c: c.reduce_scatterv_into_output(
            ones(2 * c.world_size, 3), ones(9 if last(c) else 2, 3), dim=0, sizes=[2] * c.world_size
        ),
        ("output", "9"),
    ),
    # Ranks
    "gather to a rank that is not there": Wrong(lambda c: c.gather(ones(3), dst=17), ("gather", "17")),
    "gather to different ranks": Wrong(lambda c: c.gather(ones(3), dst=int(last(c))), ("gather", "dst")),
    "broadcast from a rank that is not there": Wrong(lambda c: c.broadcast(ones(3), src=-2), ("broadcast", "-2")),
    # Different calls at one point
    "different methods": Wrong(
        lambda c: c.all_gather(ones(3)) if last(c) else c.all_reduce(ones(3)), ("all_gather", "all_reduce")
    ),
    "a dispatch and a broadcast": Wrong(
        lambda c: c.broadcast(ones(3)) if last(c) else dispatch(c), ("dispatch", "broadcast")
    ),
    "dispatches of both kinds": Wrong(
        lambda c: c.dispatch_router_logits(ones(3, 4), ones(3, 8), True) if last(c) else dispatch(c),
        ("dispatch", "dispatch_router_logits"),
    ),
    "a dispatch in the place of a combine": Wrong(
        lambda c: skip_combine(c, lambda: dispatch(c)), ("dispatch", "combine", "rank")
    ),
    "a sum in the place of a combine": Wrong(
        lambda c: skip_combine(c, lambda: c.all_reduce(ones(3))), ("all_reduce", "combine", "rank")
    ),
    # Dispatch
    "weights of another shape than the ids": Wrong(
        lambda c: dispatch(c, weights=(3, 5) if last(c) else (3, 2)), ("topk_weights", "[3, 5]")
    ),
    "other rows than ids": Wrong(lambda c: dispatch(c, rows=(7, 4) if last(c) else (3, 4)), ("hidden_states", "7")),
    "rows of one dimension": Wrong(lambda c: dispatch(c, rows=(3,)), ("hidden_states", "[3]")),
    "float ids": Wrong(lambda c: dispatch(c, ids_dtype=torch.float32), ("topk_ids", "float32")),
    "an id out of range": Wrong(lambda c: dispatch(c, value=1234 if last(c) else 0), ("1234", "topk_ids")),
    "an id below -1": Wrong(lambda c: dispatch(c, value=-5), ("-5", "topk_ids")),
    "rows of different widths": Wrong(lambda c: dispatch(c, rows=(3, 8 if last(c) else 4)), ("8", "4")),
    "rows of different dtypes": Wrong(
        lambda c: dispatch(c, dtype=torch.float16 if last(c) else torch.float32), ("float16", "float32")
    ),
    "another number of ids per row": Wrong(
        lambda c: dispatch(c, weights=(3, 4), ids=(3, 4)) if last(c) else dispatch(c), ("4", "2")
    ),
    "rows of complex numbers": Wrong(lambda c: dispatch(c, dtype=torch.complex128), ("complex128",)),
    "different layers": Wrong(lambda c: dispatch(c, layer=int(last(c))), ("layer",)),
    "no ids at all": Wrong(lambda c: c.dispatch(ones(3, 4), ones(3, 2), cast(Any, None), True), ("None",)),
    "a negative layer": Wrong(lambda c: dispatch(c, layer=-3), ("layer", "-3")),
    "both sequence parallel and not": Wrong(
        lambda c: dispatch(c, is_sequence_parallel=last(c)), ("is_sequence_parallel",)
    ),
    "an extra tensor of other rows": Wrong(
        lambda c: dispatch(c, extra_tensors=[ones(9 if last(c) else 3)]), ("extra_tensors", "9")
    ),
    "different numbers of extra tensors": Wrong(
        lambda c: dispatch(c, extra_tensors=[ones(3)] * (2 if last(c) else 1)), ("dispatch", "float32[*]")
    ),
    "extra tensors of different dtypes": Wrong(
        lambda c: dispatch(c, extra_tensors=[ones(3, dtype=torch.int8 if last(c) else torch.int16)]), ("int8", "int16")
    ),
    "extra tensors that are no list": Wrong(
        lambda c: dispatch(c, extra_tensors=cast(Any, 5)) if last(c) else dispatch(c, extra_tensors=[ones(3)]),
        ("extra_tensors=5", "no list"),
    ),
    "a tensor in place of the list of extra ones": Wrong(
        lambda c: c.dispatch_router_logits(ones(3, 4), ones(3, 8), True, cast(Any, ones(3))),
        ("extra_tensors=", "no list"),
    ),
    "logits of other rows": Wrong(
        lambda c: c.dispatch_router_logits(ones(3, 4), ones(6 if last(c) else 3, 8), True), ("router_logits", "6")
    ),
    "an expert that no rank holds": Wrong(
        lambda c: dispatch(c, layer=UNHELD_LAYER, value=5 if last(c) else 0), ("5",), "ExpertUnavailable"
    ),
    # Combine
    "a combine of other rows than were received": Wrong(
        lambda c: c.combine(ones(received(c) + (2 if last(c) else 0), 4), True), ("combine", "rows")
    ),
    "a combine of fp8": Wrong(lambda c: c.combine(ones(received(c), 4).to(torch.float8_e5m2), True), ("float8_e5m2",)),
    "a combine of different dtypes": Wrong(
        lambda c: c.combine(ones(received(c), 4, dtype=torch.float16 if last(c) else torch.bfloat16), True),
        ("float16", "bfloat16"),
    ),
    "a combine of different widths": Wrong(
        lambda c: c.combine(ones(received(c), 6 if last(c) else 4), True), ("6", "4")
    ),
    "a combine of one dimension": Wrong(lambda c: c.combine(ones(received(c)), True), ("combine",)),
    "a second combine of one dispatch": Wrong(combine_twice, ("combine",)),
    "a combine into an output of another shape": Wrong(
        lambda c: c.combine_into_output(ones(received(c), 4), ones(11 if last(c) else 3, 4), True), ("output", "11")
    ),
    # Groups
    "a group of a rank that is not there": Wrong(lambda c: c.create_group("wrong", [0, 77]), ("77",), needs=_GROUPS),
    "a group of one rank twice": Wrong(lambda c: c.create_group("wrong", [0, 0]), ("0",), needs=_GROUPS),
    "a group of nobody": Wrong(lambda c: c.create_group("wrong", []), ("ranks []",), needs=_GROUPS),
    "a group with a name that is taken": Wrong(lambda c: c.create_group("world", c.ranks), ("world",), needs=_GROUPS),
    "a group with a name that is another kind's": Wrong(
        lambda c: c.create_group("tp:9", c.ranks), ("tp:9",), needs=_GROUPS
    ),
    "a group without a name": Wrong(lambda c: c.create_group("", c.ranks), ("name",), needs=_GROUPS),
    "groups of different ranks": Wrong(
        lambda c: c.create_group("wrong", c.ranks[: 1 + last(c)]), ("ranks",), needs=_GROUPS
    ),
    "an end to the world": Wrong(lambda c: c.destroy_group("world"), ("world",), needs=_GROUPS),
    # Placement
    "a placement of no experts": Wrong(lambda c: c.set_expert_placement(0), ("num_experts", "0")),
    "a placement of an expert out of range": Wrong(
        lambda c: c.set_expert_placement(8, [3, 8] if last(c) else [0]), ("8",)
    ),
    "placements of different numbers of experts": Wrong(
        lambda c: c.set_expert_placement(9 if last(c) else 8, [0]), ("num_experts", "9", "8")
    ),
    "a placement that only some declare": Wrong(
        lambda c: c.set_expert_placement(8, None if last(c) else [0]), ("experts",)
    ),
    "a placement of a negative layer": Wrong(lambda c: c.set_expert_placement(8, [0], layer=-1), ("layer", "-1")),
    "a placement of no list": Wrong(lambda c: c.set_expert_placement(8, cast(Any, 3)), ("int",)),
    "placements of different layers": Wrong(lambda c: c.set_expert_placement(8, [0], layer=int(last(c))), ("layer",)),
}


def hold_some(comm: Communicator) -> None:
    """Declares a layer of 8 experts of which the last four have no holder."""
    comm.set_expert_placement(8, [comm.rank % 4], layer=UNHELD_LAYER)


# Calls that are not collective: only the caller is refused ---------------------------------------------------------

ALONE: dict[str, Wrong] = {
    "send to a rank that is not there": Wrong(lambda c: c.send(ones(3), dst=9), ("9", "dst")),
    "recv from a rank that is not there": Wrong(lambda c: c.recv((3,), torch.float32, src=-4), ("-4", "src")),
    "recv of a negative size": Wrong(lambda c: c.recv((-3,), torch.float32), ("-3",)),
    "another op than isend and irecv": Wrong(
        lambda c: c.batch_isend_irecv([SimpleNamespace(op=torch.add, tensor=ones(1), group_peer=0)]), ("op",)
    ),
    "a group that is not there": Wrong(lambda c: c.group("nowhere"), ("nowhere", "ep"), needs=_GROUPS),
    "somebody else's group": Wrong(lambda c: c.group("elsewhere"), ("elsewhere",), needs=_GROUPS),
}


def attempt_alone(comm: Communicator, name: str) -> Refused:
    """Makes a wrong call of `ALONE` on the last rank, and a right one on all."""
    error: EpmeshError | None = None
    if last(comm):
        try:
            ALONE[name].call(comm)
        except EpmeshError as exc:
            error = exc
    return Refused(type(error).__name__, str(error), works(comm))


def mismatched_recv(comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype) -> Refused:
    """The last rank expects another tensor of the first than that sends; the next ones agree again."""
    error: EpmeshError | None = None
    if comm.rank == 0:
        comm.send(ones(3), comm.world_size - 1)
        comm.send(ones(5), comm.world_size - 1)
    if last(comm):
        try:
            comm.recv(shape, dtype, 0)
        except EpmeshError as exc:
            error = exc
        assert comm.recv(5, torch.float32, 0).tolist() == [1.0] * 5
    return Refused(type(error).__name__, str(error), works(comm))


def two_threads(comm: Communicator, fifos: list[Path]) -> tuple[list[str], bool]:
    """The first rank enters a call twice at once; the others follow when one of the two was refused.

    Args:
        fifos: one for each rank but the first; opening it waits for the other end.
    """
    refused: list[str] = []

    def enter() -> None:
        try:
            comm.all_reduce(ones(1))
        except InvalidRequest as exc:
            refused.append(str(exc))
            for fifo in fifos:
                fifo.open("w").close()

    if comm.rank == 0:
        threads = [threading.Thread(target=enter) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        fifos[comm.rank - 1].open().close()
        comm.all_reduce(ones(1))
    return refused, works(comm)


def elsewhere(comm: Communicator) -> None:
    """A group without the last rank."""
    comm.create_group("elsewhere", comm.ranks[:-1])


def destroyed_group(comm: Communicator) -> list[str]:
    """What the communicator of a group says after the group was destroyed."""
    group = comm.create_group("ended", comm.ranks)
    assert group is not None
    comm.destroy_group("ended")
    try:
        group.all_reduce(ones(1))
    except EpmeshError as exc:
        return [type(exc).__name__, str(exc)]
    return []
