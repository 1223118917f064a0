"""What is known of a mesh from outside: the newest view, where it comes from, and those who wait for the next."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping

from epmesh.errors import EpmeshError
from epmesh.view import View, is_newer

_log = logging.getLogger(__name__)

Callback = Callable[[View], None]


class MeshState:
    """Holds the newest view; never one with an earlier epoch, unless it is another mesh's. For any thread.

    One thread writes (`answered`, `adopt`, `failed`), any number read and wait. Waiters get the newest view, never a
    backlog.

    Attributes:
        view: the newest view; `None` before the first answer.
        address: of the service in use, or of the last one; empty before the first answer.
        connected: whether a service is being watched now.
        problems: by address, why the last try there failed; none while it works.
        closed: whether there will be no other view.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards everything below
        self._wakers: set[Callable[[], None]] = set()
        self._callbacks: list[Callback] = []
        self.view: View | None = None
        self.address = ""
        self.connected = False
        self.problems: Mapping[str, EpmeshError] = {}  # replaced, never changed: readers take no lock
        self.closed = False

    # The one that writes -----------------------------------------------------------------------------------------

    def answered(self, address: str, view: View) -> None:
        """The service at `address` answered with `view` and is watched from now on."""
        with self._changed:
            self.problems = {known: error for known, error in self.problems.items() if known != address}
            self.address, self.connected = address, not self.closed
        self.adopt(view)

    def adopt(self, view: View) -> None:
        """Makes `view` the newest one, if it is; then tells everybody, callbacks included."""
        with self._changed:
            new = self.view is None or is_newer(view, self.view.epoch, self.view.mesh_id)
            new = new and not self.closed
            if new:
                self._say_if_other_mesh(view)
                self.view = view
            callbacks = list(self._callbacks) if new and view.epoch else []
        self._tell()
        for callback in callbacks:
            try:
                callback(view)
            except Exception:  # noqa: BLE001 - a callback's error is its owner's, and must not end the watch
                _log.exception("epoch=%d on_view.failed: %r", view.epoch, callback)

    def failed(self, address: str | None, error: EpmeshError) -> None:
        """The service at `address` did not answer, or is gone; `None` for one whose problem nobody will ask for."""
        with self._changed:
            if address is not None:
                self.problems = {**self.problems, address: error}
            self.connected = False
        self._tell()

    def close(self) -> None:
        """Ends every wait; idempotent."""
        with self._changed:
            self.closed, self.connected = True, False
            self._callbacks.clear()
        self._tell()

    def _say_if_other_mesh(self, view: View) -> None:
        old = self.view
        if old is not None and old.epoch and old.mesh_id != view.mesh_id:
            _log.warning(
                "epoch=%d mesh.changed: %s is gone, going on with %s in epoch %d",
                *(old.epoch, old.mesh_id, view.mesh_id, view.epoch),
            )

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                wake()

    # Those who read ----------------------------------------------------------------------------------------------

    @property
    def mesh_id(self) -> str:
        """Of the newest view; empty before the first."""
        return self.view.mesh_id if self.view else ""

    def after(self, epoch: int, mesh_id: str) -> View | None:
        """The newest view, if it is committed and comes after that one; else `None`."""
        view = self.view
        return view if view is not None and is_newer(view, epoch, mesh_id) else None

    def wait_for(self, condition: Callable[[], bool], timeout_s: float | None) -> bool:
        """Waits until `condition` holds, which is asked after every change; whether it does.

        It is asked under the lock: keep it short.
        """
        with self._changed:
            return self._changed.wait_for(condition, timeout_s)

    def wait_after(self, epoch: int, mesh_id: str, timeout_s: float | None = None) -> View | None:
        """As `after`, once there is such a view; `None` when time is up, or there will be none."""
        self.wait_for(lambda: self.closed or self.after(epoch, mesh_id) is not None, timeout_s)
        return None if self.closed else self.after(epoch, mesh_id)

    @contextlib.contextmanager
    def woken(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within, `wake` is called after every change, on whichever thread made it."""
        with self._changed:
            self._wakers.add(wake)
        try:
            yield
        finally:
            with self._changed:
                self._wakers.discard(wake)

    def on_view(self, callback: Callback) -> Callable[[], None]:
        """Has `callback` called with every later view; the result takes it back, and is idempotent."""

        def called(view: View) -> None:
            callback(view)

        def unsubscribe() -> None:
            with self._changed, contextlib.suppress(ValueError):
                self._callbacks.remove(called)

        with self._changed:
            self._callbacks.append(called)
        return unsubscribe
