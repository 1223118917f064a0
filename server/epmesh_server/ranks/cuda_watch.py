"""Watches for what ends a group's exchanges while kernels wait for it, and nobody on the host does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from epmesh_server.ranks.member import GroupMember

_log = logging.getLogger(__name__)

_POLL_S = 0.02


class Watch:
    """A thread that has kernels give up when a member is lost or the mesh went on."""

    def __init__(self, member: GroupMember, abort: Callable[[], None]) -> None:
        """Starts watching; `abort` is called from the thread, again and again while the cause stands."""
        self._member = member
        self._abort = abort
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="epmesh-cuda-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; idempotent."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        told = False
        while not self._ended.wait(_POLL_S):
            if self._over():
                if not told:
                    _log.warning("rank=%d epoch=%d kernels.aborted", self._member.session.rank, self._member.view.epoch)
                told = True
                self._abort()

    def _over(self) -> bool:
        """Words and references that one side writes whole; no lock is needed to look at them."""
        member, session = self._member, self._member.session
        page, newest = session.page, session.view
        if session.error is not None or page.closed or page.lost() & frozenset(member.topology.ranks):
            return True
        if newest is not None and newest.membership_epoch > member.membership_epoch:
            return True
        return page.abort_epoch > member.view.epoch and page.abort_epoch > page.committed
