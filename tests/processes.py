"""What the kernel says about processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

_PATIENCE_S = 60.0


def eventually(happened: Callable[[], bool]) -> bool:
    """Whether something comes true that no event tells of: what another process, or the kernel, does."""
    deadline = time.monotonic() + _PATIENCE_S
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def open_descriptors(pid: int | str = "self") -> int:
    """How many descriptors a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident_bytes(pid: int | str = "self") -> int:
    """Physical memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
