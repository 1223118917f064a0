"""Has kernels compiled before they are needed: after a death the same ones are, among fewer ranks.

Compiling takes about a second a kernel, and an exchange that has to wait for it is late. So each kernel that a group
first uses is compiled for every smaller number of ranks as well, the larger numbers first, by a thread that begins once
no new kernel was used for a while (until then they are compiled for those who wait for them), and ends when nothing is
left to do.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

_log = logging.getLogger(__name__)

Compile = Callable[[], object]

_CALM_S = 0.25
_POLL_S = 0.1


class Precompiler:
    """Compiles in the background; one a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards what follows
        self._waiting: list[tuple[int, int, Compile]] = []
        self._numbers = itertools.count()
        self._calm_at = 0.0
        self._thread: threading.Thread | None = None

    def add(self, world_size: int, compile_: Compile) -> None:
        """Has `compile_` called some time; what is for more ranks comes first."""
        with self._lock:
            self._calm_at = time.monotonic() + _CALM_S
            heapq.heappush(self._waiting, (-world_size, next(self._numbers), compile_))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="epmesh-precompile")
                self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether all is done, after at most `timeout_s`."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        return thread is None or not thread.is_alive()

    def _run(self) -> None:
        while True:
            if time.monotonic() < self._calm_at and threading.main_thread().is_alive():
                time.sleep(_POLL_S)
                continue
            with self._lock:
                # The thread is no daemon, as one that is inside the compiler must not be cut off at the process's end.
                if not self._waiting or not threading.main_thread().is_alive():
                    self._waiting.clear()
                    self._thread = None
                    return
                _, _, compile_ = heapq.heappop(self._waiting)
            try:
                compile_()
            except Exception:  # noqa: BLE001 - whoever needs this kernel compiles it again, and raises
                _log.exception("kernels.precompile.failed")
