"""The first steps of every child process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1


def run_child(entry: Callable[..., None], survives: bool, pipe: Connection[Any, Any], *args: Any) -> None:
    """Runs `entry` so that it ends with the process that owns it, however that one ends; unless it `survives`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's; it ends its children
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGHUP})
    _release_fork_server()
    gc.freeze()  # torch alone makes hundreds of thousands of objects that stay: looking through them takes 0.2 s
    if not survives:
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
