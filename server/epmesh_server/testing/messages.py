"""What a local mesh and its children say to each other over their pipes."""

from __future__ import annotations

from dataclasses import dataclass


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
