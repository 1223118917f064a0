"""Pickles for the inherited pipes between a process and its children, and for nothing else.

Tensors go by their bytes: plain pickle does not know every dtype, and multiprocessing's pickler would pass descriptors
that stay open for as long as the tensor lives.
"""

from __future__ import annotations

import io
import pickle
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dumps(value: object) -> bytes:
    """`value` as bytes."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The value in bytes that a child or the owner sent."""
    return pickle.loads(data)  # noqa: S301 - from an inherited pipe, which is no wire


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(obj) is not torch.Tensor or not _is_plain(obj):
            return NotImplemented
        return _tensor, _parts(obj)


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.requires_grad


def _parts(tensor: torch.Tensor) -> tuple[bytes, torch.dtype, tuple[int, ...]]:
    import torch

    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # a dimension of length 1 may have any stride
    raw = flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return raw, tensor.dtype, tuple(tensor.shape)


def _tensor(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)
