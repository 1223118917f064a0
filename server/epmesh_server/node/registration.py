"""Who the node says it is, and what the coordinator granted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Identity:
    """Who the node says it is.

    Attributes:
        incarnation: drawn at random at the start of the node service.
        address: host:port for other nodes and clients.
        slot: claims the slot of a dead node; `None` claims none.
        curve: whether its ranks use CURVE.
        join_token: what the coordinator may want to see of a new node; never shows in a text.
    """

    node_id: str
    incarnation: int
    address: str
    version: str
    slot: int | None = None
    curve: bool = False
    join_token: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Registration:
    """What the coordinator granted; durations in seconds."""

    slot: int
    mesh_id: str
    stride: int
    heartbeat_interval_s: float
    lease_s: float


class Enrolment:
    """The newest registration, and those who wait for the first.

    Attributes:
        on_first: called with the first one; what it raises ends the node service.
    """

    def __init__(self) -> None:
        self.current: Registration | None = None
        self.on_first: Callable[[Registration], None] = lambda _: None
        self._granted = asyncio.Event()

    def grant(self, registration: Registration) -> None:
        """The coordinator accepted the node."""
        if self.current is None:
            self.on_first(registration)
        self.current = registration
        self._granted.set()

    async def granted(self) -> Registration:
        """Waits for the first registration; returns the newest."""
        await self._granted.wait()
        assert self.current is not None
        return self.current
