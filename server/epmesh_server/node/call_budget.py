"""The bytes that gRPC calls with tensors may hold at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from epmesh.errors import InvalidRequest, Overloaded

_RETRY_AFTER_S = 0.05


class CallBudget:
    """Bytes that calls may hold at once. Used on one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Holds `size` bytes inside the block.

        Raises:
            InvalidRequest: so many never fit.
            Overloaded: they do not fit now.
        """
        if size > self.most:
            raise InvalidRequest(f"tensors of {size} bytes; at most {self.most} fit, send fewer rows at once")
        if self.held + size > self.most:
            raise Overloaded(_RETRY_AFTER_S, f"calls hold {self.held} bytes; {size} more do not fit into {self.most}")
        self.held += size
        try:
            yield
        finally:
            self.held -= size
