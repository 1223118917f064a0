"""Tensors as bytes and back, on CPU; sums in the precision the contract asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from epmesh.errors import InvalidRequest
from epmesh.frames import ITEM_BYTES, tensor_meta
from epmesh.v1 import frame_pb2

Bytes = npt.NDArray[np.uint8]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype of a name that came over a wire; it must be in the table of dtypes that travel."""
    if name not in ITEM_BYTES:
        raise InvalidRequest(f"dtype {name[:32]!r} is unknown")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def meta_of(tensor: torch.Tensor) -> frame_pb2.TensorMeta:
    """The header's entry for a tensor."""
    return tensor_meta(dtype_name(tensor.dtype), tuple(tensor.shape))


def row_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one row (everything behind the first dimension)."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def as_rows(tensor: torch.Tensor) -> Bytes:
    """The tensor's bytes as ``[rows, row_bytes]``; shares memory where the tensor is contiguous."""
    flat = tensor.detach().contiguous()
    if flat.numel() == 0:
        return np.empty((flat.shape[0], row_bytes(flat)), np.uint8)
    flat_bytes = flat.as_strided((flat.numel(),), (1,))  # a dimension of length 1 may have any stride
    data: Bytes = flat_bytes.view(torch.uint8).numpy()
    return data.reshape(flat.shape[0], row_bytes(flat))


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """The tensor's bytes, flat."""
    return as_rows(tensor.reshape(1, -1))[0] if tensor.numel() else np.empty(0, np.uint8)


def from_bytes(data: Bytes | memoryview, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A tensor over `data`, which it shares."""
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    flat = torch.from_numpy(np.frombuffer(data, np.uint8) if isinstance(data, memoryview) else data.reshape(-1))
    return flat.view(dtype).reshape(tuple(shape))


def accumulator(dtype: torch.dtype, what: str) -> torch.dtype:
    """The dtype sums of `dtype` are formed in: fp32, fp64 for itself, int64 for integers.

    Raises:
        InvalidRequest: fp8, bool and complex are not summed.
    """
    if dtype in _FP8 or dtype == torch.bool or dtype.is_complex:
        raise InvalidRequest(f"{what}: {dtype_name(dtype)} cannot be summed; convert it to bfloat16 or wider first")
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_rows(
    parts: Sequence[tuple[npt.NDArray[np.int64], torch.Tensor]], num_rows: int, hidden: int, dtype: torch.dtype
) -> torch.Tensor:
    """Adds rows in the order of `parts`, in `accumulator` precision, then rounds once.

    Args:
        parts: (indices ``[n]``, distinct and ascending; rows ``[n, hidden]`` of `dtype`).

    Returns:
        ``[num_rows, hidden]`` of `dtype`; zeros where no part has a row.
    """
    wide = accumulator(dtype, "combine")
    total: torch.Tensor | None = None
    for rows, values in parts:
        if len(rows) == num_rows:
            total = values.to(wide, copy=True) if total is None else total.add_(values)
        elif len(rows):
            total = torch.zeros(num_rows, hidden, dtype=wide) if total is None else total
            index = torch.from_numpy(rows)
            total.index_copy_(0, index, total.index_select(0, index).add_(values))
    if total is None:
        total = torch.zeros(num_rows, hidden, dtype=wide)
    return total.to(dtype)
