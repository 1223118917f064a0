"""Symmetric buffers of a group inside one node: every local member can write into every other's.

``shared_memory.BufferLayout`` says where the regions are; here they are mapped, filled and read. A region is published
by storing its flag last: the membership epoch and the sequence number of the exchange it is for.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from epmesh_server.shared_memory import BufferLayout

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64
_CALL_AT, _OFFSETS_AT = 128, 32_768
MAX_CALL_BYTES = _OFFSETS_AT - _CALL_AT
MAX_WORLD_SIZE = (BufferLayout.HEADER_BYTES - _OFFSETS_AT) // 8 - 1
_FLAG, _ROWS, _CALL_LENGTH = 0, 1, 2


def stamp(membership_epoch: int, sequence: int) -> int:
    """The flag of an exchange: never 0, never the same twice in one buffer."""
    return (membership_epoch & 0xFFFFFF) << 40 | sequence


def segments(num_rows: int, widths: Sequence[int]) -> list[tuple[int, int]]:
    """(start, bytes) in a payload of arrays with `num_rows` rows of `widths` bytes each, aligned, in order."""
    result: list[tuple[int, int]] = []
    start = 0
    for width in widths:
        result.append((start, num_rows * width))
        start += -(-num_rows * width // _ALIGNMENT) * _ALIGNMENT
    return result


def payload_bytes(num_rows: int, widths: Sequence[int]) -> int:
    """Bytes that arrays with `num_rows` rows of `widths` bytes each take up in a payload."""
    placed = segments(num_rows, widths)
    return placed[-1][0] + placed[-1][1] if placed else 0


class Region:
    """One header with its payload in somebody's buffer."""

    def __init__(self, memory: Bytes, start: int, payload: int) -> None:
        self._words = memory[start : start + 128].view(np.uint64)
        self._call = memory[start + _CALL_AT : start + _OFFSETS_AT]
        self.offsets = memory[start + _OFFSETS_AT : start + BufferLayout.HEADER_BYTES].view(np.uint64)
        body = start + BufferLayout.HEADER_BYTES
        self.payload = memory[body : body + payload]

    @property
    def flag(self) -> int:
        """Which exchange the region holds."""
        return int(self._words[_FLAG])

    @property
    def num_rows(self) -> int:
        """Rows in the payload."""
        return int(self._words[_ROWS])

    @property
    def call(self) -> bytes:
        """The encoded CallDescriptor of whoever the region is from."""
        return self._call[: int(self._words[_CALL_LENGTH])].tobytes()

    def describe(self, num_rows: int, call: bytes) -> None:
        """Writes all of the header but the flag."""
        self._words[_ROWS] = num_rows
        self._words[_CALL_LENGTH] = len(call)
        self._call[: len(call)] = np.frombuffer(call, np.uint8)

    def publish(self, flag: int) -> None:
        """Makes the region visible; everything else was written, and made visible by a barrier, before."""
        self._words[_FLAG] = flag

    def arrays(self, num_rows: int, widths: Sequence[int]) -> list[Bytes]:
        """The payload's arrays, ``[num_rows, width]`` bytes each."""
        return [
            self.payload[start : start + size].reshape(num_rows, width)
            for (start, size), width in zip(segments(num_rows, widths), widths, strict=True)
        ]


class GroupBuffers:
    """The mapped buffers of a group's local members. Mappings live as long as somebody refers to their memory."""

    def __init__(self, layout: BufferLayout, local: Sequence[int], me: int, fds: Sequence[int]) -> None:
        """Maps buffers; takes over `fds`.

        Args:
            local: positions of the local members, ascending.
            me: this rank's position.
            fds: one memfd, then one eventfd for every local member.
        """
        self.layout = layout
        self.me = me
        self._memory: dict[int, Bytes] = {}
        for position, fd in zip(local, fds, strict=False):
            self._memory[position] = np.frombuffer(mmap.mmap(fd, layout.total_bytes), np.uint8)
            os.close(fd)
        self._wake = dict(zip(local, fds[len(local) :], strict=True))
        for fd in self._wake.values():
            os.set_blocking(fd, False)
        self._regions: dict[tuple[int, int, int], Region] = {}

    @property
    def wake_fd(self) -> int:
        """Readable once somebody woke this rank."""
        return self._wake[self.me]

    def recv(self, owner: int, sequence: int, source: int) -> Region:
        """Where `owner` finds the rows of `source` for an exchange."""
        start = self.layout.recv_offset(sequence % self.layout.TURNS, source)
        return self._region(owner, start, self.layout.region_bytes)

    def out(self, owner: int, slot: int) -> Region:
        """Where `owner` shows its combine input of the open exchange `slot` (0 or 1)."""
        return self._region(owner, self.layout.out_offset(slot), self.layout.out_bytes)

    def wake(self, position: int) -> None:
        """Wakes a local member."""
        os.eventfd_write(self._wake[position], 1)

    def calm(self) -> None:
        """Takes back wakes of this rank that were seen."""
        try:
            os.eventfd_read(self._wake[self.me])
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Closes the eventfds; idempotent."""
        for fd in self._wake.values():
            os.close(fd)
        self._wake = {}
        self._regions = {}
        self._memory = {}

    def _region(self, owner: int, start: int, payload: int) -> Region:
        key = (owner, start, payload)
        region = self._regions.get(key)
        if region is None:
            region = self._regions[key] = Region(self._memory[owner], start, payload)
        return region
