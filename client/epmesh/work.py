"""What `batch_isend_irecv` returns for each of its operations."""

from __future__ import annotations

from collections.abc import Callable


class Work:
    """One operation of a batch: a send is done, a receive ends in `wait`."""

    def __init__(self, finish: Callable[[], object] | None = None) -> None:
        """Is done already without `finish`, which waits for the operation."""
        self._finish = finish

    def wait(self) -> None:
        """Returns when the operation is done, at once where it was.

        Raises:
            DeadlineExceeded: nothing came in time. The receive stays open, and may be waited for again.
            EpmeshError: it failed, in every call.
        """
        if self._finish is not None:
            self._finish()
            self._finish = None

    def is_completed(self) -> bool:
        """Whether `wait` has nothing left to do."""
        return self._finish is None
