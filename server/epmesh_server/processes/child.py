"""Child processes, as the process that owns them sees them.

All are forked from one fork server. Messages go as pickled bytes over an inherited pipe, which nobody else can reach;
no wire of epmesh carries a pickle.
"""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from epmesh_server.processes import pickling
from epmesh_server.processes.entry import run_child
from epmesh_server.processes.fork_server import fork_server, start_fork_server

_STOPPED_STATES = frozenset("Tt")


class Child:
    """One child process and the pipe to it. Any thread may signal it; one thread at a time talks to it."""

    def __init__(self, name: str, entry: Callable[..., None], *args: Any, survives: bool = False) -> None:
        """Starts ``entry(pipe, *args)`` in a new process; `entry` is module-level.

        Args:
            survives: whether it goes on when this process and the fork server are gone.
        """
        self.name = name
        self.pipe: Connection[Any, Any]
        start_fork_server()
        self.pipe, theirs = fork_server().Pipe()
        steps = (entry, survives, theirs, *args)
        self._process = fork_server().Process(target=run_child, args=steps, name=name, daemon=True)
        self._process.start()
        theirs.close()
        self.paused = False

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process is there, running or stopped."""
        return self._process.is_alive()

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process has ended."""
        return self._process.sentinel

    @property
    def exit_code(self) -> int | None:
        """What it ended with, negative for a signal; `None` while it is there."""
        return self._process.exitcode

    def send(self, message: object) -> None:
        """Sends `message`; to a dead child it goes nowhere, and `receive` tells."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send_bytes(pickling.dumps(message))

    def receive(self) -> Any:
        """The child's next message, however long it takes.

        Raises:
            EOFError: the child is dead.
        """
        try:
            return pickling.loads(self.pipe.recv_bytes())
        except ConnectionResetError as exc:
            raise EOFError(f"{self.name} is dead") from exc

    def kill(self) -> None:
        """Sends SIGKILL, without waiting."""
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Sends SIGTERM, to a stopped process too, without waiting."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def pause(self) -> None:
        """Stops the process (SIGSTOP); returns when it stands still."""
        self.paused = True
        self._signal(signal.SIGSTOP)
        while self.alive and _state(self.pid) not in _STOPPED_STATES:
            time.sleep(0.0005)

    def resume(self) -> None:
        """Lets a stopped process go on (SIGCONT)."""
        self._signal(signal.SIGCONT)
        self.paused = False

    def wait(self, deadline: float | None = None) -> bool:
        """Waits for the process's end until `deadline` (``time.monotonic()``); says whether it ended."""
        self._process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not self.alive

    def close(self) -> None:
        """Ends the process at once if it is still there, and closes everything that was open for it."""
        self.kill()
        self._process.join()
        self._process.close()
        self.pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def ask(children: Mapping[int, Child], message: object) -> dict[int, Any]:
    """Sends `message` to all and waits for one answer of each; `None` stands for one that died instead."""
    for child in children.values():
        child.send(message)
    return answers(children)


def answers(children: Mapping[int, Child]) -> dict[int, Any]:
    """Waits for one message of each child; `None` stands for one that died instead."""
    found: dict[int, Any] = {}
    pending = {child.pipe: key for key, child in children.items()}
    while pending:
        for pipe in multiprocessing.connection.wait(list(pending)):
            assert isinstance(pipe, Connection)
            key = pending.pop(pipe)
            try:
                found[key] = children[key].receive()
            except EOFError:
                found[key] = None
    return found


def end_all(children: Iterable[Child], grace_s: float) -> None:
    """SIGTERM to all, and SIGKILL to those that are still there after `grace_s`; returns when all are gone."""
    everyone = list(children)
    for child in everyone:
        child.terminate()
    deadline = time.monotonic() + grace_s
    for child in everyone:
        child.wait(deadline)
    for child in everyone:
        child.close()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"
