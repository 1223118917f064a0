"""The fork server: one process that has imported torch, from which all children of this one are forked.

Importing torch is most of what starting a rank costs; a child that is forked from here starts in tens of milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import signal
from collections.abc import Collection
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any

_PRELOAD = ("torch", "torch.distributed", "numpy", "zmq", "grpc.aio", "epmesh_server.ranks.join")
_blocked = {signal.SIGINT}


@functools.cache
def fork_server() -> ForkServerContext:
    """The context all children come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context


def start_fork_server(preload: Collection[str] = (), blocked: Collection[signal.Signals] = (signal.SIGINT,)) -> bool:
    """Starts the fork server if there is none, without waiting for its imports; it ends with this process.

    Ctrl-C reaches every process of a terminal, and other signals a whole process group. Those of `blocked` are blocked
    and SIGINT are blocked in this one from its first instruction: what they mean is its owner's to say. Both arguments
    are remembered for one that has to be started later.

    Args:
        preload: modules to import there besides those that every rank needs.

    Returns:
        Whether there was none.
    """
    _blocked.update(blocked)
    if preload:
        fork_server().set_forkserver_preload([*_PRELOAD, *preload])
    resource_tracker.ensure_running()  # here, because to start it unblocks the signal
    server: Any = forkserver._forkserver
    before = server._forkserver_pid
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _blocked)
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
