"""``epmesh.attach``: this process drives a rank that a node service hosts."""

from __future__ import annotations

import logging
import time

from epmesh.attached import AttachedCommunicator, AttachedRank
from epmesh.driver_session import DriverSession, driver_text, open_session
from epmesh.driver_transports import choose_transport
from epmesh.errors import InvalidRequest
from epmesh.front import check_timeout
from epmesh.tls import Tls, tls_files

_log = logging.getLogger(__name__)
_MAX_RANK = (1 << 31) - 1


def attach(
    address: str,
    *,
    rank: int,
    transport: str | None = None,
    world_size: int = 1,
    timeout_s: float = 60.0,
    driver: str | None = None,
    tls: Tls | None = None,
) -> AttachedCommunicator:
    """Drives a hosted rank; returns in the first view with `world_size` ranks. Needs no torch.

    A rank has one driver. It keeps the rank until ``destroy()`` (or the end of a ``with`` statement) gives it back; a
    driver that dies takes the rank's membership along, as if the rank had died, and the rank comes back by itself.

    Args:
        address: host:port of any node service of the mesh.
        rank: global rank of one that a node service hosts (``epmesh serve --ranks N``), in mode exchange.
        transport: how tensors travel: ``shm`` (on the rank's host), ``zmq`` or ``grpc``; `None`: the first of these
            that works from here.
        world_size: ranks to wait for.
        timeout_s: how long attaching and `wait_ready` may take.
        driver: who this is, for the error that a second driver gets; by default process and host.
        tls: what this process shows itself with, where the mesh is secured; see `connect`.

    Returns:
        The communicator of the group ``ep``. It takes NumPy arrays or torch tensors on CPU, and answers in kind.

    Raises:
        Unauthenticated: the node service refuses this process's certificate, or its own cannot be believed.
        MeshUnavailable: no node service answered, or the rank or other ranks did not come, in time.
        InvalidRequest: an argument is wrong, another driver has the rank, or the rank cannot be driven.
    """
    _check(rank, world_size, timeout_s)
    deadline = time.monotonic() + timeout_s
    session = open_session(address, rank, (driver or driver_text())[:256], timeout_s, tls_files(tls))
    try:
        return _enter(session, transport, world_size, deadline, timeout_s)
    except BaseException:
        session.detach()
        raise


def _enter(
    session: DriverSession, transport: str | None, world_size: int, deadline: float, timeout_s: float
) -> AttachedCommunicator:
    chosen = choose_transport(session, transport, max(0.1, deadline - time.monotonic()))
    attached = AttachedRank(session, chosen, timeout_s)
    try:
        standing = attached.wait_ready("ep", max(0.1, deadline - time.monotonic()), world_size)
    except BaseException:
        chosen.close()
        raise
    communicator = attached.communicator("ep", standing)
    _log.info("rank=%d epoch=%d attach.complete: by %s", session.rank, communicator.epoch, chosen.name)
    return communicator


def _check(rank: int, world_size: int, timeout_s: float) -> None:
    if not _is_whole(rank) or not 0 <= rank <= _MAX_RANK:
        raise InvalidRequest(f"rank is {rank!r}; it must be a global rank, 0 or more")
    if not _is_whole(world_size) or not 1 <= world_size <= _MAX_RANK:
        raise InvalidRequest(f"world_size is {world_size!r}; it must be 1 or more")
    check_timeout(timeout_s, "timeout_s")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
