"""What a node service and its ranks share: control pages, and how group buffers are laid out.

The node service makes every memfd; ranks get descriptors over its descriptor socket, so nothing here has a name,
nothing can be left behind, and /dev/shm's size does not matter. All words are 64-bit and written whole by one side.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epmesh.errors import InvalidRequest

PAGE_BYTES = 4096
MAX_GROUPS_PER_RANK = 64
MAX_RANKS = 16_384

_MAGIC = 0x6570_6D65_7368_0001
_FENCE, _CUT_EPOCH, _ABORT_EPOCH, _COMMITTED, _CLOSED, _BLOCKED = 1, 2, 3, 4, 5, 6
_ROWS_AT, _ROW_WORDS = 16, 8
_KEY, _BEGUN, _DISPATCHED, _COMPLETED, _CUT = 0, 1, 2, 3, 4
_LOST_AT = _ROWS_AT + MAX_GROUPS_PER_RANK * _ROW_WORDS
CONTROL_PAGE_BYTES = -(-(_LOST_AT + MAX_RANKS // 64) * 8 // PAGE_BYTES) * PAGE_BYTES


def sealed_memfd(name: str, size: int) -> int:
    """A sparse memfd of `size` bytes, for ever: nobody can shrink it under the others' mappings.

    Raises:
        OSError: descriptors or address space are short.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)  # memfds have no name; this is for whoever comes by another process's /proc
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


@dataclass(frozen=True)
class Progress:
    """How far one rank is in one group: highest sequence begun, dispatched (first half done) and completed."""

    group_id: int
    begun: int
    dispatched: int
    completed: int


class ControlPage:
    """One rank's page of words shared with its node service.

    The node service writes fence, cut, abort, commit and lost words; the rank writes its progress. A rank stores
    `begun` before it reads the fence, the node service stores the fence before it reads `begun`, each with a full
    memory barrier between: either the rank sees the fence or the node service sees the call.
    """

    def __init__(self, fd: int) -> None:
        """Maps the page; `fd` stays the caller's."""
        self._map = mmap.mmap(fd, CONTROL_PAGE_BYTES)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._map, np.uint64)
        self._barrier_lock = threading.Lock()
        if self._words[0] == 0:
            self._words[0] = _MAGIC
        elif int(self._words[0]) != _MAGIC:
            raise InvalidRequest("the control page is of another version of epmesh")

    @staticmethod
    def create() -> int:
        """A new, empty page; returns its memfd."""
        return sealed_memfd("epmesh-control", CONTROL_PAGE_BYTES)

    def close(self) -> None:
        """Unmaps the page; idempotent."""
        self._words = np.empty(0, np.uint64)
        try:
            self._map.close()
        except BufferError:  # a view is still alive somewhere; the mapping goes with it
            pass

    def barrier(self) -> None:
        """Full memory barrier (an atomic read-modify-write on a lock)."""
        with self._barrier_lock:
            pass

    # Written by the node service -------------------------------------------------------------------------------

    @property
    def fence(self) -> int:
        """Epoch being prepared; calls of older epochs must not begin before they know the cut. 0: none yet."""
        return int(self._words[_FENCE])

    def raise_fence(self, epoch: int) -> None:
        """Announces that `epoch` is being prepared. Never falls."""
        self._words[_FENCE] = epoch
        self.barrier()

    @property
    def cut_epoch(self) -> int:
        """The prepared epoch for which `cut` holds."""
        return int(self._words[_CUT_EPOCH])

    def publish_cuts(self, epoch: int, cuts: dict[int, int]) -> None:
        """Writes the cut of every group this rank has begun anything in, then the epoch they are for."""
        for row in self._used_rows():
            self._words[row + _CUT] = cuts.get(int(self._words[row + _KEY]) - 1, 0)
        self._words[_CUT_EPOCH] = epoch

    @property
    def abort_epoch(self) -> int:
        """The prepared epoch for which exchanges up to the cut are given up."""
        return int(self._words[_ABORT_EPOCH])

    def abort_exchanges(self, epoch: int) -> None:
        """Tells the rank to give up what it is waiting for in epochs before `epoch`."""
        self._words[_ABORT_EPOCH] = epoch

    @property
    def committed(self) -> int:
        """Newest committed epoch."""
        return int(self._words[_COMMITTED])

    def commit(self, epoch: int) -> None:
        """Announces a committed epoch."""
        self._words[_COMMITTED] = epoch

    @property
    def closed(self) -> bool:
        """Whether the node service ended this rank's membership (evicted, fenced itself, shutting down)."""
        return bool(self._words[_CLOSED])

    def mark_closed(self) -> None:
        """Ends the rank's membership."""
        self._words[_CLOSED] = 1

    def set_lost(self, ranks: Iterable[int]) -> None:
        """Replaces the set of global ranks known to be dead in the committed view."""
        bits = np.zeros(MAX_RANKS // 64, np.uint64)
        for rank in ranks:
            bits[rank // 64] |= np.uint64(1 << (rank % 64))
        self._words[_LOST_AT : _LOST_AT + bits.size] = bits

    def lost(self) -> frozenset[int]:
        """Global ranks known to be dead."""
        words = self._words[_LOST_AT : _LOST_AT + MAX_RANKS // 64]
        if not words.any():
            return frozenset()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        return frozenset(int(rank) for rank in np.flatnonzero(bits))

    # Written by the rank ---------------------------------------------------------------------------------------

    def open_group(self, group_id: int, sequence: int) -> GroupRow:
        """This rank's row for a group, its counters set to `sequence`.

        Raises:
            InvalidRequest: the rank is in too many groups at once.
        """
        free = None
        for index in range(MAX_GROUPS_PER_RANK):
            row = _ROWS_AT + index * _ROW_WORDS
            key = int(self._words[row + _KEY])
            if key == group_id + 1:
                free = row
                break
            if key == 0 and free is None:
                free = row
        if free is None:
            raise InvalidRequest(f"a rank may be in {MAX_GROUPS_PER_RANK} groups at once; destroy one first")
        self._words[free + _CUT] = 0
        self._words[free + _BEGUN : free + _COMPLETED + 1] = sequence
        self._words[free + _KEY] = group_id + 1
        return GroupRow(self, free)

    @property
    def blocked(self) -> int:
        """The newest fence at which a call of this rank stands still, past the cut: what it has open cannot end before
        that epoch is committed, so nobody need wait for it."""
        return int(self._words[_BLOCKED])

    def mark_blocked(self, epoch: int) -> None:
        """A call waits for the commit of `epoch`."""
        self._words[_BLOCKED] = epoch

    def progress(self) -> list[Progress]:
        """What the rank has begun and completed, by group; read after a barrier."""
        self.barrier()
        return [
            Progress(int(self._words[row + _KEY]) - 1, *map(int, self._words[row + _BEGUN : row + _COMPLETED + 1]))
            for row in self._used_rows()
        ]

    def _used_rows(self) -> list[int]:
        rows = range(_ROWS_AT, _ROWS_AT + MAX_GROUPS_PER_RANK * _ROW_WORDS, _ROW_WORDS)
        return [row for row in rows if self._words[row + _KEY]]


class GroupRow:
    """A rank's counters in one group; only the rank writes them (the cut is the node service's)."""

    def __init__(self, page: ControlPage, row: int) -> None:
        self._page = page
        self._row = row

    @property
    def begun(self) -> int:
        """Highest sequence number begun."""
        return int(self._page._words[self._row + _BEGUN])

    @begun.setter
    def begun(self, sequence: int) -> None:
        self._page._words[self._row + _BEGUN] = sequence

    @property
    def dispatched(self) -> int:
        """Highest sequence number whose dispatch is done."""
        return int(self._page._words[self._row + _DISPATCHED])

    @dispatched.setter
    def dispatched(self, sequence: int) -> None:
        self._page._words[self._row + _DISPATCHED] = sequence

    @property
    def completed(self) -> int:
        """Highest sequence number completed, and all before it."""
        return int(self._page._words[self._row + _COMPLETED])

    @completed.setter
    def completed(self, sequence: int) -> None:
        self._page._words[self._row + _COMPLETED] = sequence

    @property
    def cut(self) -> int:
        """The cut, valid for ``page.cut_epoch``."""
        return int(self._page._words[self._row + _CUT])

    def close(self) -> None:
        """Frees the row."""
        self._page._words[self._row + _KEY] = 0


@dataclass(frozen=True)
class BufferLayout:
    """How the memory is divided that the local members of a group share: one section a member, one after the other.

    ``recv[turn][source]`` (source: position in the group) of a section is where source's rows for this rank are put, by
    the source itself or by the rank that passes them on; ``out[slot]`` is where the rank shows its combine input to its
    neighbours. Each region is a header of `HEADER_BYTES` and a payload. The flags of all regions stand together at the
    section's start: recv by turn and source, then out by slot. Only touched pages cost memory.

    A rank may have posted two dispatches and not yet taken in either when a peer posts the next call, which cannot be
    followed by another before this rank posts it too: so regions take turns by three, and none is overwritten unread.

    Attributes:
        world_size: members of the group, on all nodes.
        region_bytes: most payload bytes one source may have for one rank in one exchange.
    """

    world_size: int
    region_bytes: int

    HEADER_BYTES = 65_536
    TURNS, SLOTS = 3, 2

    def __post_init__(self) -> None:
        if self.region_bytes <= 0 or self.region_bytes % PAGE_BYTES:
            raise InvalidRequest(f"buffer bytes are {self.region_bytes}; use a positive multiple of {PAGE_BYTES}")

    @property
    def num_flags(self) -> int:
        """Flags (64-bit words) of a section."""
        return self.TURNS * self.world_size + self.SLOTS

    @property
    def out_bytes(self) -> int:
        """Most payload bytes of a rank's combine input, which may be wider than what was dispatched."""
        return 2 * self.world_size * self.region_bytes

    def recv_offset(self, turn: int, source: int) -> int:
        """Where in a section the region of `source` for exchanges of `turn` (sequence modulo `TURNS`) starts."""
        flags = -(-self.num_flags * 8 // PAGE_BYTES) * PAGE_BYTES
        return flags + (turn * self.world_size + source) * (self.HEADER_BYTES + self.region_bytes)

    def out_offset(self, slot: int) -> int:
        """Where in a section the combine region of the open exchange `slot` starts."""
        return self.recv_offset(self.TURNS, 0) + slot * (self.HEADER_BYTES + self.out_bytes)

    @property
    def section_bytes(self) -> int:
        """Bytes of one member's section."""
        return self.out_offset(self.SLOTS)
