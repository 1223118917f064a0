"""Child processes of a local mesh, as the process that owns it sees them.

All are forked from one fork server that has imported torch, so that a rank starts in tens of milliseconds. Messages go
as pickled bytes over an inherited pipe, which nobody else can reach; no wire of epmesh carries a pickle.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from epmesh_server.testing import pickling
from epmesh_server.testing.entry import run_child

_PRELOAD = (
    "torch",
    "torch.distributed",
    "numpy",
    "zmq",
    "grpc.aio",
    "epmesh_server.coordinator",
    "epmesh_server.node",
    "epmesh_server.ranks.join",
    "epmesh_server.testing.rank_runner",
    "epmesh_server.testing.services",
)
HOST = "127.0.0.1"
_STOPPED_STATES = frozenset("Tt")


@functools.cache
def _fork_server() -> ForkServerContext:
    """The context all children come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context


def start_fork_server() -> bool:
    """Starts the fork server if there is none, without waiting for its imports; it ends with this process.

    Ctrl-C reaches every process of a terminal. It is blocked in this one from its first instruction: what it means is
    its owner's to say.

    Returns:
        Whether there was none.
    """
    _fork_server()
    resource_tracker.ensure_running()  # here, because to start it unblocks the signal
    server: Any = forkserver._forkserver
    before = server._forkserver_pid
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if server._forkserver_pid != before:
        atexit.unregister(stop_fork_server)
        atexit.register(stop_fork_server)  # left to itself it ends, too, but some time after this process
        return True
    return False


def stop_fork_server() -> None:
    """Ends the fork server, and with it whatever child is left; returns when it is gone."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server._forkserver_pid, signal.SIGKILL)  # it holds nothing that wants tidying up
        server._stop()


class Child:
    """One child process and the pipe to it. Any thread may signal it; one thread at a time talks to it."""

    def __init__(self, name: str, entry: Callable[..., None], *args: Any) -> None:
        """Starts ``entry(pipe, *args)`` in a new process; `entry` is module-level."""
        self.name = name
        self.pipe: Connection[Any, Any]
        start_fork_server()
        self.pipe, theirs = _fork_server().Pipe()
        self._process = _fork_server().Process(target=run_child, args=(entry, theirs, *args), name=name, daemon=True)
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


class Port:
    """A TCP port of loopback that stays this mesh's until it is closed, whoever listens on it comes and goes.

    The socket is bound and never listens. With SO_REUSEADDR on both sides, which gRPC sets, another one may bind and
    listen beside it; but the kernel gives the number to nobody who asks for a free one. So a service that is killed
    finds its port free when it comes back.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((HOST, 0))
        self.number: int = self._socket.getsockname()[1]
        self.address = f"{HOST}:{self.number}"

    def close(self) -> None:
        """Gives the port back."""
        self._socket.close()


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
