"""Symmetric buffers of a group inside one node: every local member can write into every other's section.

``shared_memory.BufferLayout`` says where the regions are; here they are mapped, filled and read. A region is published
by storing its flag last: the membership epoch and the sequence number of the exchange it is for.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from epmesh_server.shared_memory import BufferLayout

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

_ALIGNMENT = 64
_CALL_AT, _OFFSETS_AT = 64, 32_768
MAX_CALL_BYTES = _OFFSETS_AT - _CALL_AT
MAX_WORLD_SIZE = (BufferLayout.HEADER_BYTES - _OFFSETS_AT) // 8 - 1
_ROWS, _CALL_LENGTH = 0, 1


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
    """One header with its payload in somebody's section.

    Attributes:
        start: where the payload starts in the node's memory, bytes.
    """

    def __init__(self, memory: Bytes, start: int, payload: int) -> None:
        self._words: Words = memory[start : start + _CALL_AT].view(np.uint64)
        self._call = memory[start + _CALL_AT : start + _OFFSETS_AT]
        self.offsets: Words = memory[start + _OFFSETS_AT : start + BufferLayout.HEADER_BYTES].view(np.uint64)
        self.start = start + BufferLayout.HEADER_BYTES
        self.payload = memory[self.start : self.start + payload]

    @property
    def num_rows(self) -> int:
        """Rows in the payload."""
        return int(self._words[_ROWS])

    @property
    def call(self) -> bytes:
        """The encoded CallDescriptor of whoever the region is from."""
        return self._call[: int(self._words[_CALL_LENGTH])].tobytes()

    def describe(self, num_rows: int, call: bytes) -> None:
        """Writes the header."""
        self._words[_ROWS] = num_rows
        self._words[_CALL_LENGTH] = len(call)
        self._call[: len(call)] = np.frombuffer(call, np.uint8)

    def arrays(self, num_rows: int, widths: Sequence[int]) -> list[Bytes]:
        """The payload's arrays, ``[num_rows, width]`` bytes each."""
        return [
            self.payload[start : start + size].reshape(num_rows, width)
            for (start, size), width in zip(segments(num_rows, widths), widths, strict=True)
        ]


class GroupBuffers:
    """The mapped sections of a group's local members. The mapping lives as long as somebody refers to its memory.

    Who publishes a flag wakes its reader only if no other flag is missing: the last one wakes. A full barrier between
    storing one's own flag and looking at the others' makes sure that one of two that publish at once sees both.

    Attributes:
        memory: all sections, as bytes.
    """

    def __init__(self, layout: BufferLayout, awaited: Mapping[int, Sequence[int]], me: int, fds: Sequence[int]) -> None:
        """Maps the sections; takes over `fds`.

        Args:
            awaited: for each local member, ascending by position, the sources whose rows reach it through its section.
            me: this rank's position.
            fds: the memfd, then one eventfd for every local member.
        """
        local = list(awaited)
        self.layout = layout
        self.me = me
        self._awaited = {owner: np.array(sources, np.intp) for owner, sources in awaited.items()}
        self._barrier_lock = threading.Lock()
        size = layout.section_bytes
        self.memory: Bytes = np.frombuffer(mmap.mmap(fds[0], len(local) * size), np.uint8)
        os.close(fds[0])
        self._wake = dict(zip(local, fds[1:], strict=True))
        for fd in self._wake.values():
            os.set_blocking(fd, False)
        self._section = {position: index * size for index, position in enumerate(local)}
        words: Words = self.memory.view(np.uint64)
        self._flags = words.reshape(len(local), size // 8)[:, : layout.num_flags]
        self._index = {position: index for index, position in enumerate(local)}
        self._regions: dict[tuple[int, int], Region] = {}

    @property
    def wake_fd(self) -> int:
        """Readable once somebody woke this rank."""
        return self._wake[self.me]

    def recv(self, owner: int, sequence: int, source: int) -> Region:
        """Where `owner` finds the rows of `source` for an exchange."""
        layout = self.layout
        return self._region(owner, sequence % layout.TURNS * layout.world_size + source)

    def out(self, owner: int, slot: int) -> Region:
        """Where `owner` shows its combine input of the open exchange `slot` (0 or 1)."""
        return self._region(owner, self.layout.TURNS * self.layout.world_size + slot)

    def publish_recv(self, owner: int, sequence: int, source: int, flag: int) -> None:
        """Makes a region visible; all of it was written, and made visible by a barrier, before."""
        first = sequence % self.layout.TURNS * self.layout.world_size
        flags = self._flags[self._index[owner], first : first + self.layout.world_size]
        flags[source] = flag
        self._barrier()
        if (flags[self._awaited[owner]] == np.uint64(flag)).all():
            self.wake(owner)

    def publish_out(self, slot: int, flag: int) -> None:
        """Makes this rank's combine input visible; a barrier came before."""
        flags = self.out_flags(slot)
        flags[self._index[self.me]] = flag
        self._barrier()
        if (flags == np.uint64(flag)).all():
            for position in self._wake:
                if position != self.me:
                    self.wake(position)

    def recv_flags(self, sequence: int) -> Words:
        """The flags of this rank's regions for an exchange, by source; they change under the reader."""
        first = sequence % self.layout.TURNS * self.layout.world_size
        return self._flags[self._index[self.me], first : first + self.layout.world_size]

    def out_flags(self, slot: int) -> Words:
        """The flags of all local members' combine inputs, by local index; they change under the reader."""
        return self._flags[:, self.layout.TURNS * self.layout.world_size + slot]

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
        """Closes the eventfds; idempotent. Nothing else of it may be used afterwards."""
        for fd in self._wake.values():
            os.close(fd)
        self._wake = {}
        self._regions = {}
        self.memory = np.empty(0, np.uint8)
        self._flags = np.empty((0, 0), np.uint64)

    def _barrier(self) -> None:
        """Full memory barrier (an atomic read-modify-write on a lock)."""
        with self._barrier_lock:
            pass

    def _region(self, owner: int, number: int) -> Region:
        region = self._regions.get((owner, number))
        if region is None:
            region = self._regions[(owner, number)] = self._map(owner, number)
        return region

    def _map(self, owner: int, number: int) -> Region:
        layout = self.layout
        turn, source = divmod(number, layout.world_size)
        if turn < layout.TURNS:
            start, payload = layout.recv_offset(turn, source), layout.region_bytes
        else:
            start, payload = layout.out_offset(number - layout.TURNS * layout.world_size), layout.out_bytes
        return Region(self.memory, self._section[owner] + start, payload)
