"""The memory that the serving ranks of one node share: a section a rank, in which it hands shares to its neighbours.

The section's owner alone decides what is where: it takes a slab for a share, writes the rows, and names the slab to a
neighbour, which writes the results. A slab is used again once the neighbour has answered: one that was late or told to
stop may still write, and answers when it is done. One that died, or whose connection broke, never does; but every
membership has memory of its own, so what such a neighbour writes later goes where nobody looks.
"""

from __future__ import annotations

import bisect
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from epmesh.errors import EpmeshError, InvalidRequest, StaleEpoch
from epmesh_server.ranks.session import RankSession

_log = logging.getLogger(__name__)
Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 256


class Slabs:
    """Which parts of a section are taken. The lowest that fits is given out, so that few pages are ever touched."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]  # (start, size), ascending, never adjacent
        self._taken: dict[int, int] = {}
        self._lock = threading.Lock()  # guards both

    @property
    def taken_bytes(self) -> int:
        """Bytes given out, those included that no answer will come for."""
        return sum(self._taken.values())

    def take(self, size: int) -> int | None:
        """Start of `size` bytes; `None` where there is no room."""
        size = max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT
        with self._lock:
            for index, (start, room) in enumerate(self._free):
                if room >= size:
                    self._free[index : index + 1] = [(start + size, room - size)] if room > size else []
                    self._taken[start] = size
                    return start
        return None

    def give_back(self, start: int) -> None:
        """Frees what `take` gave."""
        with self._lock:
            size = self._taken.pop(start)
            index = bisect.bisect(self._free, (start, 0))
            if index < len(self._free) and self._free[index][0] == start + size:
                size += self._free.pop(index)[1]
            if index and sum(self._free[index - 1]) == start:
                start, size = self._free[index - 1][0], self._free[index - 1][1] + size
                self._free.pop(index - 1)
                index -= 1
            self._free.insert(index, (start, size))


@dataclass(frozen=True)
class Slab:
    """A part of this rank's section.

    Attributes:
        start: offset in the section.
        data: its bytes.
    """

    memory: ServeMemory
    start: int
    data: Bytes

    def give_back(self) -> None:
        """Lets it be used again; not if the neighbour may still write to it."""
        self.memory.slabs.give_back(self.start)

    def discard(self) -> None:
        """Nobody needs what is in it, but the neighbour may still write to it. Its pages need not be kept for that."""
        self.memory.discard(self.start, len(self.data))


class ServeMemory:
    """The mapped memory of one membership; it stays mapped for as long as somebody refers to it."""

    def __init__(self, membership_epoch: int, me: int, ranks: Sequence[int], size: int, memfd: int) -> None:
        """Maps it; takes over `memfd`.

        Args:
            me: this rank.
            ranks: whose section each is, in order.
            size: of the memfd, bytes.
        """
        self.membership_epoch = membership_epoch
        try:
            if me not in ranks or size % len(ranks):
                raise InvalidRequest(f"serve memory of {size} bytes for ranks {list(ranks)}; rank {me} cannot use it")
            self._map = mmap.mmap(memfd, size)
            self._memory: Bytes = np.frombuffer(self._map, np.uint8)
        finally:
            os.close(memfd)
        self._section_bytes = size // len(ranks)
        self._sections = {rank: index * self._section_bytes for index, rank in enumerate(ranks)}
        self._me = me
        self.slabs = Slabs(self._section_bytes)

    def take(self, size: int) -> Slab | None:
        """A slab of this rank's section; `None` where there is no room."""
        start = self.slabs.take(size)
        return None if start is None else Slab(self, start, self.at(self._me, start, size))

    def discard(self, start: int, size: int) -> None:
        """Returns the pages of a part of this rank's section to the system; whoever writes there gets new ones."""
        start += self._sections[self._me]
        first, last = -(-start // mmap.PAGESIZE), (start + size) // mmap.PAGESIZE
        if first < last:
            self._map.madvise(mmap.MADV_REMOVE, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)

    def at(self, rank: int, start: int, size: int) -> Bytes:
        """Bytes of a rank's section.

        Raises:
            InvalidRequest: there is no such section, or it is smaller.
        """
        section = self._sections.get(rank)
        if section is None:
            raise InvalidRequest(f"rank {rank} has no section in the memory of epoch {self.membership_epoch}")
        if start < 0 or size < 0 or start + size > self._section_bytes:
            raise InvalidRequest(f"bytes {start} to {start + size} of a section of {self._section_bytes}")
        return self._memory[section + start : section + start + size]


class ServeMemories:
    """The memory of the newest membership, and how to get it. Used by one thread."""

    def __init__(self, session: RankSession) -> None:
        self._session = session
        self._mapped: dict[int, ServeMemory] = {}  # of the newest membership, and of the one before
        self._missing = -1  # a membership whose memory could not be had

    def newest(self) -> ServeMemory | None:
        """For this rank's own requests; `None` where there is none: then rows travel as frames."""
        view = self._session.view
        if view is None:
            return None
        if self._missing == view.membership_epoch:
            return None
        try:
            return self.of(view.membership_epoch)
        except EpmeshError as exc:
            self._missing = view.membership_epoch
            _log.warning("rank=%d epoch=%d serve memory: %s", self._session.rank, view.epoch, exc)
            return None

    def of(self, membership_epoch: int) -> ServeMemory:
        """That of a membership which is not over.

        Raises:
            StaleEpoch: it is over.
            EpmeshError: the node service does not give it.
        """
        found = self._mapped.get(membership_epoch)
        if found is not None:
            return found
        newest = max(self._mapped, default=0)
        if newest > membership_epoch:
            raise StaleEpoch(newest, f"the memory of epoch {membership_epoch} is not used any more")
        answer, fds = self._session.serve_buffers(membership_epoch)
        made = ServeMemory(membership_epoch, self._session.rank, answer.ranks, answer.memfd_bytes, fds[0])
        # Neighbours may still announce shares in the memory before this one; older ones live in their requests alone.
        self._mapped = {epoch: memory for epoch, memory in self._mapped.items() if epoch == newest}
        self._mapped[membership_epoch] = made
        return made

    def close(self) -> None:
        """Refers to none any more."""
        self._mapped.clear()
