"""What is on its way to one node or watcher. Bounded: what is new replaces what it makes pointless."""

from __future__ import annotations

import asyncio

from epmesh.errors import EpmeshError, Overloaded
from epmesh_server.membership.actions import Command, Commit, Finish, HeartbeatAck, Prepare

MAX_COMMANDS = 256


class Outbox:
    """Commands to one node, in order.

    A node that reads slowly holds nobody up and gets only what still matters: of heartbeats the last, of a commit the
    newest step, of views the newest.
    """

    def __init__(self) -> None:
        self._commands: list[Command] = []
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()
        self._error: EpmeshError | None = None

    def put(self, command: Command) -> None:
        """Queues a command; never waits."""
        if self._commands:
            self._commands = [waiting for waiting in self._commands if not _replaces(command, waiting)]
        self._commands.append(command)
        if len(self._commands) > MAX_COMMANDS:
            self._commands.clear()
            self.end(Overloaded(1.0, f"the node left more than {MAX_COMMANDS} commands unread; connect again"))
        self._changed.set()

    def end(self, error: EpmeshError) -> None:
        """Nothing comes after what is queued; the stream ends with `error`."""
        self._error = self._error or error
        self._changed.set()
        self._ended.set()

    async def ended(self) -> EpmeshError:
        """Waits until nothing more will be queued; returns the error the stream ends with."""
        await self._ended.wait()
        assert self._error is not None
        return self._error

    async def get(self) -> Command | EpmeshError:
        """The next command, or the error the stream ends with."""
        while not self._commands:
            if self._error is not None:
                return self._error
            await self._changed.wait()
            self._changed.clear()
        return self._commands.pop(0)


def _replaces(new: Command, waiting: Command) -> bool:
    """Whether a node that gets `new` need not get `waiting`."""
    if isinstance(new, HeartbeatAck):
        return isinstance(waiting, HeartbeatAck)
    if isinstance(new, Commit):
        return _epoch(waiting) <= new.view.epoch
    if isinstance(new, Prepare | Finish):
        return isinstance(waiting, Prepare | Finish)
    return new == waiting


def _epoch(command: Command) -> float:
    if isinstance(command, Commit):
        return command.view.epoch
    return command.epoch if isinstance(command, Prepare | Finish) else float("inf")
