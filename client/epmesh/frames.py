"""Frames between ranks: a small protobuf header, then one frame a tensor. Pure; every size is checked before use.

No object is ever unpickled: a frame is bytes, and its shape and dtype come from the header, whose product must be the
frame's length exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from epmesh.errors import InvalidRequest
from epmesh.v1 import frame_pb2

MAX_HEADER_BYTES = 1 << 18
MAX_TENSORS = 64
MAX_DIMS = 8
MAX_TENSOR_BYTES = 1 << 34

ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
}
"""Bytes of one element, by torch's name of the dtype: every dtype that may travel."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Message:
    """One decoded message: its header, and the raw bytes of each tensor (C order)."""

    header: frame_pb2.FrameHeader
    tensors: tuple[memoryview, ...]


def tensor_meta(dtype: str, shape: Sequence[int]) -> frame_pb2.TensorMeta:
    """The header's entry for a tensor.

    Raises:
        InvalidRequest: no such dtype may travel, or there are too many dimensions.
    """
    if dtype not in ITEM_BYTES:
        raise InvalidRequest(f"dtype {dtype} cannot travel; use one of {', '.join(ITEM_BYTES)}")
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(f"a tensor of {len(shape)} dimensions cannot travel; at most {MAX_DIMS} can")
    return frame_pb2.TensorMeta(dtype=dtype, shape=shape)


def num_bytes(meta: frame_pb2.TensorMeta) -> int:
    """Bytes of the tensor that `meta` describes.

    Raises:
        InvalidRequest: the dtype is unknown, or a limit is passed.
    """
    item = ITEM_BYTES.get(meta.dtype)
    if item is None:
        raise InvalidRequest(f"dtype {meta.dtype[:32]!r} is unknown")
    if len(meta.shape) > MAX_DIMS:
        raise InvalidRequest(f"{len(meta.shape)} dimensions; at most {MAX_DIMS} are allowed")
    total = math.prod(meta.shape) * item
    if total > MAX_TENSOR_BYTES:
        raise InvalidRequest(f"a tensor of {total} bytes; at most {MAX_TENSOR_BYTES} are allowed")
    return total


def encode(header: frame_pb2.FrameHeader, tensors: Sequence[Buffer]) -> list[Buffer]:
    """The frames of a message; `tensors` are the bytes that ``header.tensors`` describes, in order."""
    return [header.SerializeToString(), *tensors]


def decode(frames: Sequence[Buffer]) -> Message:
    """The message that `frames` are.

    Raises:
        InvalidRequest: they are not one: too large, too many, not a header, or of other lengths than it says.
    """
    if not 1 <= len(frames) <= MAX_TENSORS + 1:
        raise InvalidRequest(f"a message of {len(frames)} frames; it has 1 to {MAX_TENSORS + 1}")
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise InvalidRequest(f"a header of {len(frames[0])} bytes; at most {MAX_HEADER_BYTES} are allowed")
    try:
        header = frame_pb2.FrameHeader.FromString(bytes(frames[0]))
    except DecodeError as exc:
        raise InvalidRequest("the header is no FrameHeader") from exc
    if header.kind == frame_pb2.FRAME_KIND_UNSPECIFIED:
        raise InvalidRequest("the header names no kind")
    if len(header.tensors) != len(frames) - 1:
        raise InvalidRequest(f"the header describes {len(header.tensors)} tensors; {len(frames) - 1} came")
    views = tuple(memoryview(frame).cast("B") for frame in frames[1:])
    for index, (meta, view) in enumerate(zip(header.tensors, views, strict=True)):
        if num_bytes(meta) != len(view):
            raise InvalidRequest(
                f"tensor {index} is {meta.dtype}{list(meta.shape)}, {num_bytes(meta)} bytes; {len(view)} came"
            )
    return Message(header, views)
