"""Watches for what ends a group's exchanges while kernels wait for it, and nobody on the host does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from epmesh_server.kernels.driver import allow_others_to_capture
from epmesh_server.ranks.member import GroupMember

_log = logging.getLogger(__name__)

_POLL_S = 0.02


class Watch:
    """A thread that has kernels give up when a member is lost or the mesh went on, or whatever else `over` says."""

    def __init__(self, member: GroupMember, abort: Callable[[], None], over: Callable[[], bool] | None = None) -> None:
        """Starts watching; `over` and `abort` are called from the thread, the latter again while the cause stands."""
        self._member = member
        self._abort = abort
        self._over = over or (lambda: mesh_went_on(member))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="epmesh-cuda-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; idempotent."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        told = False
        allow_others_to_capture()
        while not self._ended.wait(_POLL_S):
            if self._over():
                if not told:
                    _log.warning("rank=%d epoch=%d kernels.aborted", self._member.session.rank, self._member.view.epoch)
                told = True
                self._abort()


def mesh_went_on(member: GroupMember) -> bool:
    """Whether a member is lost, or the set of ranks is another one."""
    newest = member.session.view
    return _lost(member) or (newest is not None and newest.membership_epoch > member.membership_epoch)


def member_gone(member: GroupMember) -> bool:
    """Whether a member is lost or not in the newest view; others that came change nothing for what is in flight."""
    newest = member.session.view
    if newest is None or newest.membership_epoch <= member.membership_epoch:
        return _lost(member)
    ranks = member.topology.ranks
    return _lost(member) or any(
        rank not in newest.ranks or newest.ranks[rank].incarnation != member.view.ranks[rank].incarnation
        for rank in ranks
    )


def _lost(member: GroupMember) -> bool:
    """Words and references that one side writes whole; no lock is needed to look at them."""
    session, page = member.session, member.session.page
    if session.error is not None or page.closed or page.lost() & frozenset(member.topology.ranks):
        return True
    return page.abort_epoch > member.view.epoch and page.abort_epoch > page.committed
