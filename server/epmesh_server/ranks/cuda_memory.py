"""Device memory that other processes of the host can map: CUDA's driver API, by ctypes.

Handles work between processes on one device, and between devices with peer access, which opening a handle turns on.
Memory that a peer has mapped stays until it is unmapped, also when its owner is dead.
"""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass

import torch

from epmesh.errors import InvalidRequest
from epmesh_server.kernels.driver import call

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_MESSAGE = struct.Struct(f"<qQ{_HANDLE_BYTES}s")  # process, address, handle


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_byte * _HANDLE_BYTES),)


@dataclass(frozen=True)
class Shared:
    """How another process finds a piece of device memory; travels as bytes of fixed size."""

    process: int
    address: int
    handle: bytes

    def encode(self) -> bytes:
        """As bytes."""
        return _MESSAGE.pack(self.process, self.address, self.handle)

    @classmethod
    def decode(cls, data: bytes) -> Shared:
        """From bytes.

        Raises:
            InvalidRequest: they are none.
        """
        if len(data) != _MESSAGE.size:
            raise InvalidRequest(f"{len(data)} bytes describe no device memory; {_MESSAGE.size} would")
        return cls(*_MESSAGE.unpack(data))


class _Allocation:
    """Freed when nobody has it any more."""

    def __init__(self, address: int, device: torch.device) -> None:
        self.address, self._device = address, device

    def __del__(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            call("cuMemFree_v2", ctypes.c_uint64(self.address))


class _Lent:
    """A part of an allocation, which it keeps, as torch takes memory of others."""

    def __init__(self, allocation: _Allocation, at: int, size: int) -> None:
        self._allocation = allocation
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (allocation.address + at, False),
            "version": 2,
        }


class OwnMemory:
    """Zeroed device memory of this process.

    Attributes:
        address: where it starts, on the device.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Allocates `size` bytes on `device`.

        Raises:
            InvalidRequest: there is not as much, or it cannot be shared.
        """
        self._device = device
        address = ctypes.c_uint64()
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes the device's context current in this thread
            free, _ = torch.cuda.mem_get_info()
            if size > free:
                raise InvalidRequest(f"{size} bytes to share on {device}, {free} are free; send fewer rows at once")
            call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
            self.address = address.value or 0
            self._allocation: _Allocation | None = _Allocation(self.address, device)
            call("cuMemsetD8_v2", ctypes.c_uint64(self.address), ctypes.c_ubyte(0), ctypes.c_size_t(size))
            torch.cuda.synchronize()

    def share(self) -> Shared:
        """For other processes."""
        handle = _Handle()
        with torch.cuda.device(self._device):
            call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.address))
        return Shared(os.getpid(), self.address, bytes(handle))

    def lend(self, at: int, size: int) -> torch.Tensor:
        """``[size]`` uint8, from byte `at` on. The memory stays until `close`, and as long as the tensor does."""
        assert self._allocation is not None
        return torch.as_tensor(_Lent(self._allocation, at, size), device=self._device)

    def close(self) -> None:
        """Frees it, once this device is done and nothing is lent any more; idempotent."""
        self._allocation = None
        self.address = 0


class PeerMemory:
    """Another process's device memory, as this one maps it.

    Attributes:
        address: where it starts, for kernels on this process's device.
    """

    def __init__(self, shared: Shared, device: torch.device) -> None:
        """Maps it for kernels on `device`.

        Raises:
            InvalidRequest: the devices cannot reach each other, or the owner is gone.
        """
        self._device = device
        self._mapped = shared.process != os.getpid()
        self.address = shared.address
        if self._mapped:
            address = ctypes.c_uint64()
            with torch.cuda.device(device):
                torch.cuda.synchronize()
                handle = _Handle.from_buffer_copy(shared.handle)
                call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
            self.address = address.value or 0

    def close(self) -> None:
        """Unmaps it, once this device is done; idempotent."""
        if self._mapped:
            self._mapped = False
            with torch.cuda.device(self._device):
                torch.cuda.synchronize()
                call("cuIpcCloseMemHandle", ctypes.c_uint64(self.address))
