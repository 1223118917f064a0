"""A thread that does one thing after the other, and holds nobody up at the interpreter's end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class Worker:
    """Runs calls in the order given, on a daemon thread that starts with the first.

    (The interpreter waits for the threads of a `ThreadPoolExecutor` before it runs exit handlers, so for ever if the
    handler is what would end the call.)
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._newest: Future[Any] | None = None

    @property
    def busy(self) -> bool:
        """Whether something submitted is not done yet."""
        return self._newest is not None and not self._newest.done()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Runs `call` when those before it are done."""
        future: Future[Any] = Future()
        self._newest = future
        self._calls.put((future, call))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        return future

    def close(self, *, wait: bool = True) -> None:
        """Ends the thread once everything submitted is done, and by default waits for that; idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._calls.put(None)
            if wait:
                thread.join()

    def join(self, timeout_s: float) -> None:
        """Waits until everything submitted is done, and no longer than `timeout_s`."""
        if self._newest is not None:
            wait([self._newest], timeout_s)

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as exc:  # noqa: BLE001 - the future's owner gets it
                future.set_exception(exc)
