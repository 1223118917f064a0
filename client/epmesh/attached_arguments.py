"""Arguments of an attached communicator's calls: as messages, and what is wrong with them before they travel."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.tensors import check_tensor, check_writable
from epmesh.v1 import front_pb2

Arguments = front_pb2.MethodArguments
Fill = Callable[[Arguments], Sequence[Any]]
"""Writes a call's arguments into a message and returns its tensors; raises where they cannot travel."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Makes whatever goes wrong with arguments of any kind a refusal."""
    try:
        yield
    except EpmeshError:
        raise
    except Exception as exc:
        raise InvalidRequest(f"{type(exc).__name__}: {exc}") from exc


def fill_scatter(input_: Any, dim: int, sizes: Sequence[int] | None) -> Fill:
    """Of reduce_scatterv."""

    def fill(arguments: Arguments) -> Sequence[Any]:
        check_tensor(input_)
        arguments.reduce_scatterv.dim = dim
        put_lengths(arguments.reduce_scatterv, "sizes", sizes)
        return [input_]

    return fill


def put_lengths(message: Any, field: str, lengths: Iterable[int] | None) -> None:
    """Lengths, or none, into a field of type `Sizes`."""
    if lengths is not None:
        sizes = getattr(message, field)
        sizes.SetInParent()
        sizes.lengths.extend(lengths)


def put_dispatch(
    message: Any,
    tensors: Sequence[Any],
    is_sequence_parallel: bool,
    extra_tensors: Sequence[Any] | None,
    layer: int | None,
    static: bool,
) -> None:
    """What all dispatches have."""
    message.is_sequence_parallel = bool(is_sequence_parallel)
    message.with_extra_tensors = extra_tensors is not None
    message.static_mode = bool(static)
    for tensor in tensors:
        check_tensor(tensor)
    if layer is not None:
        message.layer = layer


def shaped(received: list[Any], num_named: int, with_extra: bool) -> tuple[Any, ...]:
    """The tensors that a dispatch gives, with the list of extra ones last where there was one."""
    return (*received[:num_named], received[num_named:]) if with_extra else tuple(received)


def plan_operation(op: Any, ranks: Sequence[int]) -> tuple[bool, Any, int]:
    """(is a send, tensor, rank in the group) of one element of `batch_isend_irecv`.

    ``op`` is ``torch.distributed.isend`` or ``irecv``, or their name.
    """
    dist = sys.modules.get("torch.distributed")
    known = {name: getattr(dist, name, name) for name in ("isend", "irecv")}
    kind = next((name for name, function in known.items() if op.op is function or op.op == name), None)
    if kind is None:
        raise InvalidRequest(f"op is {op.op!r}; it must be torch.distributed.isend or irecv")
    peer = getattr(op, "group_peer", None)
    if peer is None:
        if op.peer not in ranks:
            raise InvalidRequest(f"peer is global rank {op.peer}; the group has {list(ranks)}")
        peer = list(ranks).index(op.peer)
    check_tensor(op.tensor)
    if not 0 <= peer < len(ranks):
        raise InvalidRequest(f"group_peer is {peer!r}; ranks of this group are 0 to {len(ranks) - 1}")
    if kind == "irecv":
        check_writable(op.tensor)
    return kind == "isend", op.tensor, peer
