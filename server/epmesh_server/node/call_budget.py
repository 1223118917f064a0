"""The bytes that gRPC calls with tensors may hold at once, in all and for each client."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from epmesh.errors import InvalidRequest, Overloaded
from epmesh_server.fair_budget import FairBudget

_RETRY_AFTER_S = 0.05


class CallBudget:
    """Bytes that calls may hold at once. Used on one event loop.

    Attributes:
        overloaded: calls that did not fit.
    """

    def __init__(self, most: int) -> None:
        self.overloaded = 0
        self._budget = FairBudget(most)

    @property
    def most(self) -> int:
        """Most bytes at once."""
        return self._budget.limit

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._budget.held

    @contextmanager
    def holding(self, size: int, client: Hashable = "") -> Iterator[None]:
        """Holds `size` bytes for `client` inside the block.

        Raises:
            InvalidRequest: so many never fit.
            Overloaded: they do not fit now, or not into the client's part.
        """
        budget = self._budget
        if size > budget.limit:
            raise InvalidRequest(f"tensors of {size} bytes; at most {budget.limit} fit, send fewer rows at once")
        if not budget.fits(client, size):
            self.overloaded += 1
            raise Overloaded(
                _RETRY_AFTER_S,
                f"calls hold {budget.held} bytes, {budget.held_by(client)} of them this client's; {size} more do not "
                f"fit into its part of {budget.limit}",
            )
        budget.hold(client, size)
        try:
            yield
        finally:
            budget.release(client, size)
