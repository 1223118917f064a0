"""The first steps of every child process of a local mesh."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1
_OTHERS_END_WITHIN_S = 5.0


def run_child(entry: Callable[..., None], pipe: Connection[Any, Any], *args: Any) -> None:
    """Runs `entry` so that it ends with the process that owns the mesh, however that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's; it ends its children
    _release_fork_server()
    if entry is not remove_when_owner_ends:
        die_with_parent()
    with contextlib.suppress(BrokenPipeError):  # the owner is gone: nobody to tell
        entry(pipe, *args)


def die_with_parent() -> None:
    """Has the kernel kill this process once its parent, the fork server, is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _release_fork_server() -> None:
    """Closes this child's hold on the fork server.

    The server ends when the last holder of a pipe ends. Every child inherits that pipe; kept open, a stopped rank would
    keep the server, and with it itself, alive after the owner was killed.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


def remove_when_owner_ends(pipe: Connection[Any, Any], folder: str) -> None:
    """Removes `folder` when the owner says that all others have ended, or when it died and they had time to."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # meant for the owner's whole process group: its end is what counts
    fork_server = os.getppid()
    with contextlib.suppress(EOFError, ConnectionResetError):
        pipe.recv_bytes()
        shutil.rmtree(folder, ignore_errors=True)
        return
    deadline = time.monotonic() + _OTHERS_END_WITHIN_S
    while os.getppid() == fork_server and time.monotonic() < deadline:
        time.sleep(0.02)  # it ends, and its other children with it
    shutil.rmtree(folder, ignore_errors=True)
