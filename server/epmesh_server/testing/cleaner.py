"""The process that removes a local mesh's folder, whoever is left to do it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from multiprocessing.connection import Connection
from typing import Any

_OTHERS_END_WITHIN_S = 5.0


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
