"""Callers' tensors, NumPy or torch, as bytes and back. torch is used where the caller brought it, never imported.

A dtype goes by torch's name for it, which is NumPy's too where NumPy has the dtype, itself or by ``ml_dtypes``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from epmesh.errors import InvalidRequest
from epmesh.frames import tensor_meta
from epmesh.v1 import frame_pb2

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """What results are to be: torch tensors, or NumPy arrays that may be of a dtype of the caller's.

    Attributes:
        is_torch: whether they are torch tensors.
        dtype: NumPy's dtype of what the caller gave; `None` for torch.
    """

    is_torch: bool
    dtype: Any = None

    def make(self, meta: frame_pb2.TensorMeta, data: memoryview) -> Any:
        """A tensor of its own memory with the bytes of `data`.

        Raises:
            InvalidRequest: NumPy has no such dtype.
        """
        own = np.empty(len(data), np.uint8)
        own[:] = data
        shape = tuple(meta.shape)
        if self.is_torch:
            return owned(own, meta.dtype, shape)
        return own.view(self._numpy_dtype(meta.dtype)).reshape(shape)

    def _numpy_dtype(self, name: str) -> Any:
        if self.dtype is not None and self.dtype.name == name:
            return self.dtype.newbyteorder("=")
        try:
            return np.dtype(name)
        except TypeError:
            raise InvalidRequest(f"NumPy has no dtype {name}; use torch tensors, or ml_dtypes") from None


class NoList:
    """Stands for `extra_tensors` that are no list of tensors, and is refused as one that is no tensor."""

    def __init__(self, value: object) -> None:
        self._text = f"extra_tensors={value!r:.40}"

    def __repr__(self) -> str:
        return f"{self._text}, which is no list"


def row_tensors(named: Sequence[Any], extra_tensors: Any) -> list[Any]:
    """All tensors that travel row for row; whatever `extra_tensors` is, so that a wrong one is refused on all ranks."""
    if extra_tensors is None:
        return [*named]
    listed = isinstance(extra_tensors, Sequence) and not isinstance(extra_tensors, str | bytes)
    return [*named, *(extra_tensors if listed else [NoList(extra_tensors)])]


def kind_of(tensor: Any) -> Kind:
    """What a result that answers to `tensor` is to be."""
    return Kind(True) if is_torch(tensor) else Kind(False, getattr(tensor, "dtype", None))


def kind_of_dtype(dtype: Any) -> tuple[Kind, str]:
    """What a tensor of `dtype` is to be, and the dtype's name: torch's own for torch, whatever NumPy takes otherwise.

    Raises:
        InvalidRequest: it is no dtype.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return Kind(True), str(dtype).removeprefix("torch.")
    try:
        numpy_dtype = np.dtype(dtype)
    except TypeError:
        raise InvalidRequest(f"dtype is {dtype!r:.80}; give one of torch or of NumPy") from None
    return Kind(False, numpy_dtype), numpy_dtype.name


def check_tensor(tensor: Any) -> None:
    """A tensor must be one, on CPU, dense, and of a dtype that travels.

    Raises:
        InvalidRequest: it is not; the same text as where a rank lives in this process.
    """
    meta_of(tensor)


def check_writable(tensor: Any) -> None:
    """A NumPy array that a result goes into may not be read-only."""
    if isinstance(tensor, np.ndarray) and not tensor.flags.writeable:
        raise InvalidRequest("a read-only array cannot take the result; give one that can be written")


def meta_of(tensor: Any) -> frame_pb2.TensorMeta:
    """dtype and shape of a caller's tensor.

    Raises:
        InvalidRequest: as `check_tensor`.
    """
    if is_torch(tensor):
        if tensor.device.type != "cpu":
            raise InvalidRequest(f"a tensor on {tensor.device}; this rank joined with device cpu")
        if tensor.layout != sys.modules["torch"].strided:
            raise InvalidRequest(f"a tensor of layout {tensor.layout}; make it dense")
        return tensor_meta(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if not isinstance(tensor, np.ndarray):
        raise InvalidRequest(f"a tensor was expected, not {tensor!r:.80} ({type(tensor).__name__})")
    return tensor_meta(tensor.dtype.name, tensor.shape)


def bytes_of(tensor: Any) -> Bytes:
    """The bytes of a tensor that was checked, flat and in C order; they share its memory where that lies so."""
    data: Bytes
    if is_torch(tensor):
        if not tensor.numel():
            return np.empty(0, np.uint8)
        plain = dense(tensor)
        flat = plain.as_strided((plain.numel(),), (1,))  # a dimension of length 1 may have any stride
        data = flat.view(sys.modules["torch"].uint8).numpy()
        return data
    data = dense(tensor).reshape(-1).view(np.uint8)
    return data


def copy_into(tensor: Any, meta: frame_pb2.TensorMeta, data: memoryview) -> None:
    """Overwrites a caller's tensor, contiguous or not, with a result of its dtype and shape."""
    result = kind_of(tensor).make(meta, data)
    if is_torch(tensor):
        with sys.modules["torch"].no_grad():
            tensor.copy_(result)
    else:
        tensor[...] = result


def is_torch(tensor: Any) -> bool:
    """Whether it is a tensor of torch, which only a caller that imported torch can have."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def dense(tensor: Any) -> Any:
    """A tensor or array in C order and this machine's byte order; the same memory where it lies so already.

    Shapes stay, but that of a NumPy array without dimensions, which becomes ``[1]``.
    """
    if is_torch(tensor):
        return tensor.detach().resolve_conj().contiguous()
    native = tensor if tensor.dtype.isnative else tensor.astype(tensor.dtype.newbyteorder("="))
    return np.ascontiguousarray(native)


def owned(data: Bytes, dtype: str, shape: Sequence[int]) -> Any:
    """A torch tensor over bytes that are its alone from then on; of memory of its own where there are none."""
    torch = sys.modules["torch"]
    wanted = getattr(torch, dtype)
    return torch.from_numpy(data).view(wanted).reshape(shape) if len(data) else torch.empty(shape, dtype=wanted)
