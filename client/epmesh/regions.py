"""Regions of one piece of memory, taken and given back. Pure: it knows offsets, not bytes."""

from __future__ import annotations

import bisect
import threading

from epmesh.errors import InvalidRequest

ALIGNMENT = 64


class Regions:
    """Hands out regions of ``[0, size)``, the lowest that fits first, so that little memory is ever touched.

    Usable from any thread.
    """

    def __init__(self, size: int) -> None:
        """All of `size` bytes are free."""
        self._lock = threading.Lock()  # guards what follows
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (offset, bytes), ascending, never adjacent
        self._taken: dict[int, int] = {}

    def take(self, num_bytes: int) -> int | None:
        """The offset of a free region of `num_bytes`, `None` where none is large enough."""
        need = max(ALIGNMENT, -(-num_bytes // ALIGNMENT) * ALIGNMENT)
        with self._lock:
            for index, (offset, size) in enumerate(self._free):
                if size >= need:
                    rest = [(offset + need, size - need)] if size > need else []
                    self._free[index : index + 1] = rest
                    self._taken[offset] = need
                    return offset
        return None

    def give_back(self, offset: int) -> None:
        """Frees a region that was taken.

        Raises:
            InvalidRequest: there is none at `offset`.
        """
        with self._lock:
            size = self._taken.pop(offset, None)
            if size is None:
                raise InvalidRequest(f"no region at offset {offset} is in use")
            index = bisect.bisect(self._free, (offset, size))
            if index < len(self._free) and offset + size == self._free[index][0]:
                size += self._free.pop(index)[1]
            if index and sum(self._free[index - 1]) == offset:
                offset, before = self._free[index - 1]
                self._free[index - 1] = (offset, before + size)
            else:
                self._free.insert(index, (offset, size))

    @property
    def taken(self) -> int:
        """Regions in use."""
        return len(self._taken)
