"""What a local mesh and its children say to each other over their pipes."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from epmesh.errors import EpmeshError
from epmesh_server.testing import pickling


@dataclass(frozen=True)
class Bound:
    """A service listens at `address`."""

    address: str


@dataclass(frozen=True)
class Join:
    """A rank shall join at `address`, in a view of `world_size` ranks."""

    address: str
    world_size: int


@dataclass(frozen=True)
class GetReady:
    """A rank shall adopt a view in whose group ``ep`` are exactly `ranks`, not older than `membership_epoch`."""

    ranks: frozenset[int]
    membership_epoch: int
    timeout_s: float


@dataclass(frozen=True)
class Ready:
    """The rank is in the mesh, in a view of this membership epoch."""

    membership_epoch: int


@dataclass(frozen=True)
class NotYet:
    """The rank is not in such a view so far; `text` says what it sees. The owner asks again: others may have to act."""

    text: str


@dataclass(frozen=True)
class Work:
    """A rank shall call the pickled ``(work, args)``; `path` is where the owner finds modules."""

    pickled: bytes
    path: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What work returned, pickled."""

    pickled: bytes


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
