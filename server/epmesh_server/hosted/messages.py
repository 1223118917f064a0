"""What a hosted rank says to the process that owns it; an error goes as `Raised`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Joined:
    """The rank is in the mesh, as global rank `rank`, and ready for what it is there for."""

    rank: int
    epoch: int
