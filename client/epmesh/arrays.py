"""Callers' rows as bytes and back, and their sums; `epmesh.tensors` has what holds for tensors of any shape.

What comes back is of the caller's library and of the results' dtype. NumPy has no bfloat16 of its own: a caller whose
rows are ``ml_dtypes.bfloat16`` gets that back, any other NumPy caller gets bfloat16 results as float32, which holds
each of them exactly.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epmesh.errors import InvalidRequest
from epmesh.frames import ITEM_BYTES, Buffer
from epmesh.tensors import dense, is_torch, owned

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
AnyArray = npt.NDArray[Any]

_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_NO_SUMS = frozenset({"float8_e4m3fn", "float8_e5m2", "bool", "complex64"})
_BF16_NAN = np.uint16(0x7FC0)


@dataclass(frozen=True, eq=False)
class Rows:
    """A 2-D array as bytes.

    Attributes:
        dtype: torch's name.
        width: elements of a row.
        data: ``[num_rows, width * item bytes]`` uint8, C order; may share the caller's memory.
    """

    dtype: str
    width: int
    data: Bytes

    def __len__(self) -> int:
        return len(self.data)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * ITEM_BYTES[self.dtype]

    def take(self, rows: Ints) -> Rows:
        """The rows with these indices (distinct, ascending); shares memory where that is all of them."""
        if len(rows) == len(self.data):
            return self
        return Rows(self.dtype, self.width, self.data.take(rows, axis=0))

    def buffer(self) -> memoryview:
        """The bytes, flat."""
        return self.data.reshape(-1).data

    @classmethod
    def of(cls, array: AnyArray) -> Rows:
        """The bytes of a 2-D NumPy array in C order, which they share; its dtype must be one that NumPy has."""
        return _as_bytes(array, _name(array.dtype))

    @classmethod
    def over(cls, dtype: str, shape: Sequence[int], data: Buffer) -> Rows:
        """Rows over bytes that came over a wire, which they share.

        Raises:
            InvalidRequest: not two dimensions, or another number of bytes.
        """
        if dtype not in ITEM_BYTES or len(shape) != 2:
            raise InvalidRequest(f"{dtype[:32]}{list(shape)} came; sums are [rows, hidden] of a dtype that may travel")
        num_rows, width = int(shape[0]), int(shape[1])
        if num_rows * width * ITEM_BYTES[dtype] != len(data):
            raise InvalidRequest(f"{len(data)} bytes came for {dtype}{[num_rows, width]}")
        return cls(dtype, width, np.frombuffer(data, np.uint8).reshape(num_rows, width * ITEM_BYTES[dtype]))


def as_rows(value: Any, name: str) -> Rows:
    """The bytes of a caller's 2-D array, which they share where it lies in C order.

    Args:
        value: NumPy array or torch tensor on CPU, contiguous or not.
        name: of the argument, for errors.

    Raises:
        InvalidRequest: it is neither, on a device, not 2-D, or of a dtype that cannot travel.
    """
    array, dtype = _plain(value, name)
    if array.ndim != 2:
        raise InvalidRequest(f"{name} has shape {list(array.shape)}; it must have two dimensions")
    return _as_bytes(array, dtype)


def as_ids(value: Any, name: str) -> npt.NDArray[np.signedinteger[Any]]:
    """A caller's 2-D integers as int32 or int64, which keep their width; others become int64.

    Raises:
        InvalidRequest: as `as_rows`, or they are no integers.
    """
    array, dtype = _plain(value, name)
    if array.ndim != 2 or "int" not in dtype:
        raise InvalidRequest(f"{name} is {dtype}{list(array.shape)}; it must be integers [num_tokens, num_topk]")
    return array if dtype in {"int32", "int64"} else array.astype(np.int64)


def is_floating(dtype: str) -> bool:
    """Whether weights may have this dtype."""
    return dtype in _FLOATS


def in_kind(rows: Rows, like: Any) -> Any:
    """`rows` as the library of `like` has them; their memory is the caller's from then on.

    Args:
        like: what the caller gave: NumPy array or torch tensor.
    """
    shape = (len(rows), rows.width)
    if is_torch(like):
        return owned(_writable(rows.data).reshape(-1), rows.dtype, shape)
    if _name(like.dtype) == rows.dtype:
        return _writable(rows.data).reshape(-1).view(like.dtype.newbyteorder("=")).reshape(shape)
    if rows.dtype == "bfloat16":
        return _widened(rows)
    return _writable(rows.data).reshape(-1).view(np.dtype(rows.dtype)).reshape(shape)


def zero_rows(num_rows: int, width: int, dtype: str) -> Rows:
    """Rows of zeros."""
    return Rows(dtype, width, np.zeros((num_rows, width * ITEM_BYTES[dtype]), np.uint8))


def sum_rows(parts: Sequence[tuple[Ints, Rows]], num_rows: int) -> Rows:
    """Adds rows in the order of `parts`, in fp32 (fp64 in itself, integers exactly), then rounds once, to even.

    Args:
        parts: at least one (indices ``[n]``, distinct and ascending; rows ``[n, width]``), of one dtype and width.
        num_rows: rows of the sum.

    Returns:
        ``[num_rows, width]`` of the parts' dtype; zeros where no part has a row. Bit for bit what the ranks' own sum
        of the same parts is.

    Raises:
        InvalidRequest: the parts differ in dtype or width, or their dtype cannot be summed.
    """
    dtype, width = _common(parts)
    if len(parts) == 1 and len(parts[0][0]) == num_rows:
        return parts[0][1]
    total: AnyArray | None = None
    for rows, values in parts:
        if len(rows) == num_rows:
            total = _widened(values, copy=True) if total is None else np.add(total, _widened(values), out=total)
        elif len(rows):
            total = np.zeros((num_rows, width), _accumulator(dtype)) if total is None else total
            total[rows] += _widened(values)
    if total is None:
        return zero_rows(num_rows, width, dtype)
    return _rounded(total, dtype)


def check_summable(dtype: str) -> None:
    """Refuses results that cannot be summed.

    Raises:
        InvalidRequest: fp8, bool or complex.
    """
    if dtype in _NO_SUMS or dtype not in ITEM_BYTES:
        raise InvalidRequest(
            f"experts returned {dtype[:32]}, which cannot be summed; have them return bfloat16 or wider"
        )


def _as_bytes(array: AnyArray, dtype: str) -> Rows:
    num_rows, width = array.shape
    data = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
    return Rows(dtype, width, data.reshape(num_rows, width * ITEM_BYTES[dtype]))


def _common(parts: Sequence[tuple[Ints, Rows]]) -> tuple[str, int]:
    found = sorted({(rows.dtype, rows.width) for _, rows in parts})
    if len(found) != 1:
        text = ", ".join(f"{dtype}[rows, {width}]" for dtype, width in found)
        raise InvalidRequest(f"nodes answered with different results: {text}; have all experts return the same")
    check_summable(found[0][0])
    return found[0]


def _plain(value: Any, name: str) -> tuple[AnyArray, str]:
    """The value in C order as a NumPy array (of bytes' worth for dtypes that NumPy lacks), and its dtype's name."""
    if is_torch(value):
        return _plain_tensor(value, name)
    if not isinstance(value, np.ndarray):
        raise InvalidRequest(f"{name} is a {type(value).__name__}; give a NumPy array or a torch tensor")
    dtype = _name(value.dtype)
    _check_dtype(dtype, name)
    return dense(value).reshape(value.shape), dtype


def _plain_tensor(value: Any, name: str) -> tuple[AnyArray, str]:
    torch = sys.modules["torch"]
    dtype = str(value.dtype).removeprefix("torch.")
    _check_dtype(dtype, name)
    if value.device.type != "cpu":
        raise InvalidRequest(f"{name} is on {value.device}; routers take tensors on the CPU: give {name}.cpu()")
    if value.layout != torch.strided:
        raise InvalidRequest(f"{name} has layout {value.layout}; give {name}.to_dense()")
    plain = dense(value)
    if dtype in {"bfloat16", "float8_e4m3fn", "float8_e5m2"}:  # NumPy lacks them: integers of the same width stand in
        plain = plain.view(torch.int16 if dtype == "bfloat16" else torch.uint8)
    return plain.numpy(), dtype


@functools.lru_cache(64)
def _name(dtype: np.dtype[Any]) -> str:
    """``dtype.name``, which NumPy composes anew each time."""
    return dtype.name


def _check_dtype(dtype: str, name: str) -> None:
    if dtype not in ITEM_BYTES:
        raise InvalidRequest(f"{name} has dtype {dtype}, which cannot travel; use one of {', '.join(ITEM_BYTES)}")


def _writable(data: Bytes) -> Bytes:
    return data if data.flags.writeable and data.flags.c_contiguous else data.copy()


def _accumulator(dtype: str) -> npt.DTypeLike:
    if "int" in dtype:
        return np.int64
    return np.float64 if dtype == "float64" else np.float32


def _widened(rows: Rows, copy: bool = False) -> AnyArray:
    """An array of the accumulator's dtype; it may share the rows' memory unless `copy` is set."""
    flat = rows.data.reshape(-1)
    shape = (len(rows), rows.width)
    if rows.dtype == "bfloat16":
        wide = flat.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32).reshape(shape)
    return flat.view(np.dtype(rows.dtype)).astype(_accumulator(rows.dtype), copy=copy).reshape(shape)


def _rounded(total: AnyArray, dtype: str) -> Rows:
    if dtype == "bfloat16":
        narrow: AnyArray = _bfloat16_bits(total)
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = total.astype(np.dtype(dtype), copy=False)
    num_rows, width = total.shape
    return Rows(dtype, width, narrow.reshape(-1).view(np.uint8).reshape(num_rows, width * ITEM_BYTES[dtype]))


def _bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest bfloat16 of each value, ties to even, as its bits."""
    bits = values.view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))
    narrow = (rounded >> 16).astype(np.uint16)
    narrow[np.isnan(values)] = _BF16_NAN
    return narrow
