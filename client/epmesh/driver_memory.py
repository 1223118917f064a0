"""The memory that a rank and its driver share: one sparse memfd. Each writes into its own half."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from epmesh.errors import InvalidRequest
from epmesh.regions import Regions

INLINE = -1


class DriverMemory:
    """One side's mapping. Usable from any thread."""

    def __init__(self, fd: int, num_bytes: int, *, is_driver: bool) -> None:
        """Maps it; `fd` stays the caller's.

        Args:
            num_bytes: size of the memfd; the driver writes into its first half, the rank into its second.
            is_driver: whose side this is.
        """
        half = num_bytes // 2
        self._map = mmap.mmap(fd, num_bytes)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._own_at, self._other_at = (0, half) if is_driver else (half, 0)
        self._half = half
        self._regions = Regions(half)

    def write(self, data: npt.NDArray[np.uint8]) -> int:
        """Copies `data` into a region of this side's half; its offset in the memory, or -1 where there is no room."""
        offset = self._regions.take(data.size)
        if offset is None:
            return INLINE
        place = self._own_at + offset
        self._bytes[place : place + data.size] = data
        return place

    def free(self, places: Iterable[int]) -> None:
        """Takes back regions that `write` gave out, which nobody reads any more.

        Raises:
            InvalidRequest: a place is none of them.
        """
        for place in places:
            self._regions.give_back(place - self._own_at)

    def read(self, place: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """What the other side wrote at `place`; valid until it is told that this was read.

        Raises:
            InvalidRequest: it is not in the other side's half.
        """
        if not self._other_at <= place <= self._other_at + self._half - num_bytes:
            raise InvalidRequest(f"{num_bytes} bytes at {place} do not lie in the sender's half of the memory")
        return self._bytes[place : place + num_bytes]

    def close(self) -> None:
        """Unmaps it; idempotent. Where somebody still has what `read` gave, the mapping goes with that."""
        self._bytes = np.empty(0, np.uint8)
        try:
            self._map.close()
        except BufferError:
            pass
