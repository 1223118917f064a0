"""Checks of a communicator's arguments. Pure: each returns what was meant, or raises with the value and the mend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.frames import MAX_TENSORS, tensor_meta
from epmesh_server.ranks.tensors import accumulator, dtype_name

MAX_NAME_CHARS = 64
MAX_LAYER = 1_000_000

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Refused:
    """Stands for a tensor that was refused before it came here; every check of it raises why."""

    error: EpmeshError


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Makes whatever goes wrong in a check, with arguments of any kind, a refusal."""
    try:
        yield
    except EpmeshError:
        raise
    except Exception as exc:
        raise InvalidRequest(f"{type(exc).__name__}: {exc}") from exc


def shape_text(tensor: torch.Tensor) -> str:
    """dtype and shape, for descriptions of calls."""
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def rows_text(tensors: Sequence[torch.Tensor]) -> str:
    """dtype and shape of rows, whatever their number; of things that are no tensors, their type."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return " ".join(type(tensor).__name__ for tensor in tensors)
    parts = [f"{dtype_name(t.dtype)}[{', '.join(['*', *map(str, t.shape[1:])])}]" for t in tensors]
    return " ".join(parts)


def check_tensor(tensor: torch.Tensor, device: torch.device = _CPU) -> None:
    """A tensor must be one, on `device`, and of a dtype that travels."""
    if isinstance(tensor, Refused):
        raise tensor.error
    if not isinstance(tensor, torch.Tensor):
        raise InvalidRequest(f"a tensor was expected, not {tensor!r:.80} ({type(tensor).__name__})")
    if tensor.device != device:
        raise InvalidRequest(f"a tensor on {tensor.device}; this rank joined with device {device}")
    if tensor.layout != torch.strided:
        raise InvalidRequest(f"a tensor of layout {tensor.layout}; make it dense")
    tensor_meta(dtype_name(tensor.dtype), tuple(tensor.shape))


def check_summable(tensor: torch.Tensor, device: torch.device = _CPU) -> None:
    """A tensor whose dtype can be summed."""
    check_tensor(tensor, device)
    accumulator(tensor.dtype, "the sum")


def check_dim(tensor: torch.Tensor, dim: int, device: torch.device = _CPU) -> int:
    """A valid `dim`, made non-negative."""
    check_tensor(tensor, device)
    if not -tensor.dim() <= dim < tensor.dim():
        raise InvalidRequest(f"Invalid dim ({dim}) for input tensor with shape {tensor.size()}")
    return dim % tensor.dim()


def check_gatherv(
    tensors: Sequence[torch.Tensor],
    dim: int,
    sizes: list[int] | None,
    rank: int,
    world: int,
    device: torch.device = _CPU,
) -> str:
    """Ragged tensors; returns what must be the same on all ranks."""
    if not 1 <= len(tensors) <= MAX_TENSORS:
        raise InvalidRequest(f"all_gatherv of {len(tensors)} tensors; 1 to {MAX_TENSORS} are possible")
    texts = []
    for tensor in tensors:
        axis = check_dim(tensor, dim, device)
        if sizes is not None:
            check_sizes(sizes, world)
            if tensor.shape[axis] != sizes[rank]:
                raise InvalidRequest(
                    f"dim {dim} has length {tensor.shape[axis]}, but sizes[{rank}] is {sizes[rank]} in {sizes}"
                )
        shape = ["*" if index == axis else str(length) for index, length in enumerate(tensor.shape)]
        texts.append(f"{dtype_name(tensor.dtype)}[{', '.join(shape)}]")
    return f"dim={dim} sizes={sizes} {' '.join(texts)}"


def check_sizes(sizes: Sequence[int], world: int) -> None:
    """One non-negative length a rank."""
    if len(sizes) != world or any(size < 0 for size in sizes):
        raise InvalidRequest(f"sizes is {list(sizes)}; it needs one length of 0 or more for each of {world} ranks")


def check_scatter(
    tensor: torch.Tensor, dim: int, sizes: list[int] | None, world: int, device: torch.device = _CPU
) -> tuple[int, list[int]]:
    """dim and the length of every rank's slice."""
    axis = check_dim(tensor, dim, device)
    accumulator(tensor.dtype, "the sum")
    length = tensor.shape[axis]
    if sizes is None:
        if length % world:
            raise InvalidRequest(f"dim {dim} has length {length}, which {world} ranks do not divide; pass sizes")
        return axis, [length // world] * world
    check_sizes(sizes, world)
    if sum(sizes) != length:
        raise InvalidRequest(f"sizes {list(sizes)} add up to {sum(sizes)}, but dim {dim} has length {length}")
    return axis, list(sizes)


def check_scatter_output(
    tensor: torch.Tensor,
    output: torch.Tensor,
    dim: int,
    sizes: list[int] | None,
    rank: int,
    world: int,
    device: torch.device = _CPU,
) -> None:
    """`output` must have this rank's slice's shape and dtype."""
    axis, lengths = check_scatter(tensor, dim, sizes, world, device)
    check_tensor(output, device)
    wanted = [*tensor.shape[:axis], lengths[rank], *tensor.shape[axis + 1 :]]
    if list(output.shape) != wanted or output.dtype != tensor.dtype:
        raise InvalidRequest(f"output is {shape_text(output)}; it must be {dtype_name(tensor.dtype)}{wanted}")


def check_gather(tensor: torch.Tensor, dst: int, dim: int, world: int, device: torch.device = _CPU) -> int:
    """A valid destination; returns `dim`, made non-negative."""
    check_peer("dst", dst, world)
    return check_dim(tensor, dim, device)


def check_broadcast(tensor: torch.Tensor, src: int, world: int, device: torch.device = _CPU) -> None:
    """A valid source."""
    check_peer("src", src, world)
    check_tensor(tensor, device)


def check_peer(name: str, rank: int, world: int) -> int:
    """A rank of the group."""
    if not 0 <= rank < world:
        raise InvalidRequest(f"{name} is {rank!r}; ranks of this group are 0 to {world - 1}")
    return rank


def check_size(size: Sequence[int] | int) -> tuple[int, ...]:
    """A shape."""
    shape = (size,) if isinstance(size, int) else tuple(size)
    if any(length < 0 for length in shape):
        raise InvalidRequest(f"size is {list(shape)}; no length may be negative")
    return shape


def check_layer(layer: int | None) -> None:
    """A layer's number, or none."""
    if layer is not None and not 0 <= layer <= MAX_LAYER:
        raise InvalidRequest(f"layer is {layer!r}; it must be 0 to {MAX_LAYER}, or None")


def check_p2p_op(op: Any, ranks: Sequence[int], device: torch.device = _CPU) -> tuple[bool, torch.Tensor, int]:
    """(is a send, tensor, rank in the group) of one element of `batch_isend_irecv`."""
    if op.op not in (dist.isend, dist.irecv):
        raise InvalidRequest(f"op is {op.op!r}; it must be torch.distributed.isend or irecv")
    peer = getattr(op, "group_peer", None)
    if peer is None:
        if op.peer not in ranks:
            raise InvalidRequest(f"peer is global rank {op.peer}; the group has {list(ranks)}")
        peer = list(ranks).index(op.peer)
    check_tensor(op.tensor, device)
    return op.op is dist.isend, op.tensor, check_peer("group_peer", peer, len(ranks))


def check_rows(tensors: Sequence[torch.Tensor], names: Sequence[str], device: torch.device = _CPU) -> None:
    """Tensors that travel row for row: the first ones, by name, are matrices."""
    most = MAX_TENSORS - 2  # row numbers and target codes may go with them
    if len(tensors) > most:
        raise InvalidRequest(f"{len(tensors)} tensors; at most {most} can travel together")
    for index, tensor in enumerate(tensors):
        name = names[index] if index < len(names) else f"extra_tensors[{index - len(names)}]"
        check_tensor(tensor, device)
        if tensor.dim() != 2 if index < len(names) else tensor.dim() < 1:
            wanted = "[num_tokens, ...] with 2 dimensions" if index < len(names) else "[num_tokens, ...]"
            raise InvalidRequest(f"{name} is {shape_text(tensor)}; it must be {wanted}")
        if tensor.shape[0] != tensors[0].shape[0]:
            raise InvalidRequest(f"{name} has {tensor.shape[0]} rows; hidden_states has {tensors[0].shape[0]}")


def check_dispatch(tensors: Sequence[torch.Tensor], device: torch.device = _CPU) -> None:
    """hidden_states, topk_weights, topk_ids and extra tensors that belong together."""
    check_rows(tensors, ("hidden_states", "topk_weights", "topk_ids"), device)
    weights, ids = tensors[1], tensors[2]
    if ids.dtype not in (torch.int32, torch.int64):
        raise InvalidRequest(f"topk_ids is {dtype_name(ids.dtype)}; it must be int32 or int64")
    if weights.shape != ids.shape:
        raise InvalidRequest(f"topk_weights is {list(weights.shape)} and topk_ids {list(ids.shape)}; make them equal")


def check_static(static: bool, num_tokens: int, max_tokens: int | None) -> None:
    """Static mode has room for a fixed number of tokens a rank."""
    if static and max_tokens is None:
        raise InvalidRequest("static=True needs max_tokens_per_rank=; pass it to join")
    if static and max_tokens is not None and num_tokens > max_tokens:
        raise InvalidRequest(f"{num_tokens} tokens in static mode; max_tokens_per_rank is {max_tokens}")


def check_group_name(name: str) -> None:
    """A name a user may give."""
    if not 1 <= len(name) <= MAX_NAME_CHARS or name in ("world", "ep") or name.startswith("tp:"):
        raise InvalidRequest(f"group name {name[:80]!r}; use 1 to {MAX_NAME_CHARS} characters, not world, ep or tp:...")


def check_new_group(name: str, ranks: Sequence[int], members: Sequence[int]) -> None:
    """A new group's name and its global ranks, all members of the group it is made from."""
    check_group_name(name)
    outside = sorted(set(ranks) - set(members))
    if not ranks or outside or len(set(ranks)) != len(ranks):
        what = f"{outside} are not in this group" if outside else "they must be distinct, and at least one"
        raise InvalidRequest(f"ranks {list(ranks)}: {what}; it has {list(members)}")
