"""An exception on its way from a child to its owner."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from epmesh.errors import EpmeshError
from epmesh_server.processes import pickling


@dataclass(frozen=True)
class Raised:
    """An exception, pickled, and where it came from."""

    pickled: bytes
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        """`error` with its traceback; where it cannot travel, an `EpmeshError` with its text."""
        trace = "".join(traceback.format_exception(error))
        try:
            pickled = pickling.dumps(error)
            pickling.loads(pickled)
        except Exception as exc:  # noqa: BLE001 - a user's exception may do anything when pickled
            substitute = EpmeshError(f"{type(error).__name__}: {error} (which cannot be pickled: {exc})")
            pickled = pickling.dumps(substitute)
        return cls(pickled, trace)

    def error(self, where: str) -> BaseException:
        """The exception, with a note that says where it was raised."""
        error = pickling.loads(self.pickled)
        assert isinstance(error, BaseException)
        error.add_note(f"raised in {where}:\n{self.trace}")
        return error
