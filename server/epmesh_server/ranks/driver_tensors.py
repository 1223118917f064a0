"""Tensors of a driver's calls: bytes in frames or in shared memory, and torch tensors over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from epmesh.driver_memory import INLINE, DriverMemory
from epmesh.errors import InvalidRequest
from epmesh.frames import num_bytes
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.front import Incoming
from epmesh_server.ranks.tensors import Bytes, as_bytes, dtype_from_name, from_bytes, meta_of


def read_tensors(incoming: Incoming, memory: DriverMemory | None, device: torch.device) -> list[torch.Tensor]:
    """The tensors of a request, on `device`. On CPU they share its memory, so they are good until it is answered.

    Raises:
        InvalidRequest: a place is not in the driver's half of the memory, or there is no memory.
    """
    request, frames = incoming.request, iter(incoming.tensors)
    tensors = []
    for index, meta in enumerate(request.tensors):
        place = request.places[index] if request.places else INLINE
        if place == INLINE:
            data = np.frombuffer(next(frames), np.uint8)
        elif memory is None:
            raise InvalidRequest(f"tensor {index} is in shared memory, but the call does not say that there is some")
        else:
            data = memory.read(place, num_bytes(meta))
        tensors.append(_tensor(data, meta).to(device))
    return tensors


def write_tensors(
    tensors: Sequence[torch.Tensor], memory: DriverMemory | None
) -> tuple[list[frame_pb2.TensorMeta], list[int], list[memoryview]]:
    """What an answer with `tensors` consists of: their metas, their places, and the frames."""
    metas = [meta_of(tensor) for tensor in tensors]
    data = [as_bytes(tensor.cpu()) for tensor in tensors]
    if memory is None:
        return metas, [], [one.data for one in data]
    places = [memory.write(one) for one in data]
    return metas, places, [one.data for one, place in zip(data, places, strict=True) if place == INLINE]


def _tensor(data: Bytes, meta: frame_pb2.TensorMeta) -> torch.Tensor:
    """A tensor over `data`, or over a copy where calls could not write into it or it lies askew."""
    dtype = dtype_from_name(meta.dtype)
    usable = data.flags.writeable and data.ctypes.data % dtype.itemsize == 0
    return from_bytes(data if usable else data.copy(), dtype, tuple(meta.shape))
