"""Keeps a node's hosted ranks alive for as long as its service lives, and never longer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from epmesh.errors import EpmeshError, MeshUnavailable
from epmesh_server.hosted.messages import Joined
from epmesh_server.hosted.options import HostedRank, HostedRanks
from epmesh_server.hosted.rank_main import rank_main
from epmesh_server.processes.backoff import Backoff
from epmesh_server.processes.child import Child
from epmesh_server.processes.fork_server import start_fork_server, stop_fork_server
from epmesh_server.processes.raised import Raised

_log = logging.getLogger(__name__)
_PRELOAD = ("epmesh_server.cli.app", "epmesh_server.hosted.rank_main")
_TIDY_UP_S = 2.0  # what leaving the mesh may take besides draining
_GIVE_UP_S = 0.5  # what ranks may take that are in no mesh yet


def prepare_hosting() -> None:
    """Starts the fork server, before there is a thread or a socket. Signals of the process group are its owner's."""
    start_fork_server(_PRELOAD, blocked=(signal.SIGTERM, signal.SIGHUP))


class HostedSupervisor:
    """The hosted ranks of one node: each is started, and started again with back-off when it ends by itself.

    One that fails with a reason before it was ever in the mesh would fail again: `failed` raises that reason then.
    """

    def __init__(self, ranks: HostedRanks) -> None:
        self._ranks = ranks
        self._tasks: list[asyncio.Task[None]] = []
        self._children: dict[int, Child] = {}
        self._in_mesh: set[int] = set()
        self._failure: asyncio.Future[None] | None = None
        self._stopping = asyncio.Event()

    def start(self, address: str, stride: int) -> None:
        """Starts all of them beside the node service at `address`, without waiting.

        Raises:
            InvalidRequest: a node of this mesh has at most `stride` ranks; none was started.
        """
        self._ranks.check_fits(stride)
        for local_rank in range(self._ranks.count):
            rank = self._ranks.rank(local_rank, address)
            self._tasks.append(asyncio.create_task(self._keep_alive(rank)))

    async def failed(self) -> None:
        """Waits until a rank has failed for good.

        Raises:
            EpmeshError: always; why.
        """
        await self._failed

    async def stop(self, hurry: asyncio.Event) -> None:
        """Ends all of them; those in the mesh first answer what they took in, unless `hurry` is set. Idempotent."""
        self._stopping.set()
        for child in self._children.values():
            child.terminate()
        if self._in_mesh:
            _log.info("hosted ranks drain for %g s at most", self._ranks.drain_s)
        await self._ended(_TIDY_UP_S + self._ranks.drain_s if self._in_mesh else _GIVE_UP_S, hurry)
        await self.kill()

    async def kill(self) -> None:
        """Ends all of them at once; idempotent."""
        self._stopping.set()
        if not all(task.done() for task in self._tasks):
            for child in self._children.values():
                _log.warning("%s (process %d) is killed", child.name, child.pid)
            stop_fork_server()  # and whatever was forked from it, or is about to be
        await self._all_ended()

    @property
    def _failed(self) -> asyncio.Future[None]:
        if self._failure is None:
            self._failure = asyncio.get_running_loop().create_future()
        return self._failure

    async def _ended(self, limit_s: float, hurry: asyncio.Event) -> None:
        waits = [asyncio.create_task(self._all_ended()), asyncio.create_task(hurry.wait())]
        try:
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _all_ended(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _keep_alive(self, rank: HostedRank) -> None:
        try:
            backoff, was_in = Backoff(), False
            while not self._stopping.is_set():
                life = await self._live(replace(rank, returning=was_in))
                if self._stopping.is_set():
                    return
                was_in |= life.joined
                if life.error is not None and not was_in:
                    raise life.error
                wait_s = backoff.after(life.lasted_s)
                why = f": {life.error}" if life.error else ""
                _log.warning("hosted %s; again in %.2f s%s", life.ending, wait_s, why)
                await _wait(self._stopping, wait_s)
        except Exception as exc:  # noqa: BLE001 - whoever waits in `failed` gets it
            if not self._stopping.is_set():
                self._fail(exc)

    async def _live(self, rank: HostedRank) -> _Life:
        """One process, from its start to its end."""
        started = asyncio.get_running_loop().time()
        child = await asyncio.to_thread(Child, f"rank-{rank.local_rank}", rank_main, rank)
        life, self._children[rank.local_rank] = _Life(), child
        if self._stopping.is_set():
            child.terminate()  # it was not there yet when all others were told
        try:
            async for message in _messages(child):
                life.hear(message, child)
                if life.joined:
                    self._in_mesh.add(rank.local_rank)
        finally:
            self._in_mesh.discard(rank.local_rank)
            del self._children[rank.local_rank]
            life.ending = f"local rank {rank.local_rank} (process {child.pid}) ended with {_code(child)}"
            child.close()
        life.lasted_s = asyncio.get_running_loop().time() - started
        return life

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, EpmeshError):
            error = MeshUnavailable(f"a hosted rank cannot start: {type(error).__name__}: {error}")
        if not self._failed.done():
            self._failed.set_exception(error)


class _Life:
    """What a child said from its start to its end, and how that came."""

    def __init__(self) -> None:
        self.joined = False
        self.error: Exception | None = None
        self.ending = ""
        self.lasted_s = 0.0

    def hear(self, message: object, child: Child) -> None:
        """Takes one message in."""
        if isinstance(message, Joined):
            self.joined = True
            _log.info("rank %d, epoch %d: hosted by process %d", message.rank, message.epoch, child.pid)
        elif isinstance(message, Raised):
            error = message.error(child.name)
            self.error = error if isinstance(error, Exception) else MeshUnavailable(f"{type(error).__name__}: {error}")


async def _messages(child: Child) -> AsyncIterator[object]:
    """What a child says, until it has ended."""
    while await _readable(child.pipe.fileno(), child.sentinel) or child.pipe.poll():
        try:
            yield child.receive()
        except EOFError:
            await _readable(child.sentinel)
            return


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), timeout_s)


async def _readable(first: int, *others: int) -> bool:
    """Waits until there is something to read from one of them; returns whether it is the first."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    found: set[int] = set()

    def note(fd: int) -> Callable[[], None]:
        def readable() -> None:
            found.add(fd)
            if not ready.done():
                ready.set_result(None)

        return readable

    fds = (first, *others)
    for fd in fds:
        loop.add_reader(fd, note(fd))
    try:
        await ready
    finally:
        for fd in fds:
            loop.remove_reader(fd)
    return first in found


def _code(child: Child) -> str:
    code = child.exit_code
    return signal.Signals(-code).name if code is not None and code < 0 else f"code {code}"
