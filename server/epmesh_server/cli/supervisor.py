"""Keeps a child process alive for as long as this one lives, and never longer."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
from types import TracebackType
from typing import Self

from epmesh.errors import MeshUnavailable
from epmesh_server.processes.backoff import Backoff

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
_STOP_WITHIN_S = 1.0


def die_with_parent(parent: int) -> None:
    """Has the kernel end this process (SIGTERM) when its parent, process `parent`, is gone; ends it now if it is."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(0)


class Supervisor:
    """Runs a command, and runs it again, with back-off, when it ends by itself. An async context manager.

    A child that fails at its very first start with exit code 1 has said why and would fail again: `failed` raises then.
    """

    def __init__(self, command: list[str], name: str) -> None:
        self._command = command
        self._name = name
        self._task: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await self._start()
        self._task = asyncio.create_task(self._keep_alive(self._process))
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.shield(self._end())

    async def failed(self) -> None:
        """Waits until the child has failed for good.

        Raises:
            MeshUnavailable: always.
        """
        assert self._task is not None
        await asyncio.shield(self._task)

    async def _keep_alive(self, process: asyncio.subprocess.Process) -> None:
        loop = asyncio.get_running_loop()
        started, backoff, first = loop.time(), Backoff(), True
        while True:
            code = await process.wait()
            if first and code == 1:
                raise MeshUnavailable(
                    f"the {self._name} beside this node did not start; its reason stands above "
                    "(where one runs already, say --coordinator HOST:PORT)"
                )
            backoff_s = backoff.after(loop.time() - started)
            _log.warning("%s %d ended with code %d; again in %.2f s", self._name, process.pid, code, backoff_s)
            await asyncio.sleep(backoff_s)
            first = False
            started = loop.time()
            process = self._process = await self._start()

    async def _start(self) -> asyncio.subprocess.Process:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the child in its turn.
        return await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _STOP_WITHIN_S)
        except TimeoutError:
            _log.warning("%s %d did not end within %.1f s; killed", self._name, process.pid, _STOP_WITHIN_S)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
