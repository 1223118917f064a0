"""The process of a hosted rank: joins, does what it is there for, and joins again when its membership ended."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from types import FrameType
from typing import TYPE_CHECKING, Any

from epmesh.errors import EpmeshError, InvalidRequest, Unauthenticated
from epmesh.view import RankMode
from epmesh_server.hosted.duties import Drive, Duty, Serve
from epmesh_server.hosted.factory import load_factory
from epmesh_server.hosted.holdings import entry, held_in_view
from epmesh_server.hosted.messages import Joined
from epmesh_server.hosted.options import HostedRank
from epmesh_server.processes import pickling
from epmesh_server.processes.backoff import Backoff
from epmesh_server.processes.raised import Raised

if TYPE_CHECKING:
    from epmesh_server.ranks.communicator import JoinedCommunicator
    from epmesh_server.ranks.curve_door import CurveDoor

_log = logging.getLogger(__name__)
_JOIN_WITHIN_S = 1e6  # the others may be started whenever it pleases whoever starts them


def rank_main(pipe: Connection[Any, Any], options: HostedRank) -> None:
    """Runs one hosted rank until SIGTERM or the owner's end; reports that it joined, or why it cannot."""
    import torch  # here, not above: the owner needs this module and no torch

    sys.path[:0] = [entry for entry in options.path if entry not in sys.path]
    _show_logs(options, f"local rank {options.local_rank}")
    torch.set_num_threads(options.threads)
    stop = StopSignal()
    process = HostedProcess(options, pipe, stop)
    try:
        process.run()
    except Exception as exc:  # noqa: BLE001 - the owner gets it
        if process.joined:
            _log.exception("failed")
        pipe.send_bytes(pickling.dumps(Raised.of(exc)))
        raise SystemExit(1) from None


class StopSignal:
    """SIGTERM or SIGHUP: the rank shall end. Where it waits for others to join, it ends at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self._at_once = False
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._received)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What runs inside is cut off by the signal."""
        self._at_once = True
        try:
            if self.event.is_set():
                raise SystemExit(0)
            yield
        finally:
            self._at_once = False

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.event.set()
        if self._at_once:
            self._at_once = False  # a second signal must not cut off the tidying up
            raise SystemExit(0)


class HostedProcess:
    """One hosted rank, over all its memberships."""

    def __init__(self, options: HostedRank, pipe: Connection[Any, Any], stop: StopSignal) -> None:
        self._options = options
        self._pipe = pipe
        self._stop = stop
        self.joined = False

    def run(self) -> None:
        """Returns after SIGTERM.

        Raises:
            InvalidRequest, Unauthenticated: it will never be a rank, and why.
            Exception: what is not an `EpmeshError` in a membership.
        """
        with self._stop.at_once():
            duty = self._duty()
        backoff = Backoff()
        while not self._stop.event.is_set():
            started = time.monotonic()
            try:
                self._membership(duty)
                if self._stop.event.is_set():
                    return
                why = "its work ended"
            except EpmeshError as exc:
                if not self.joined and isinstance(exc, InvalidRequest | Unauthenticated):
                    raise
                why = str(exc)
            wait_s = backoff.after(time.monotonic() - started)
            _log.warning("out of the mesh, joins again in %.2f s: %s", wait_s, why)
            self._stop.event.wait(wait_s)

    def _duty(self) -> Duty:
        name = self._options.experts
        return Serve(name, load_factory(name), self._options.drain_s) if name else Drive(self._options.address)

    def _membership(self, duty: Duty) -> None:
        """One membership, from joining to its end."""
        try:
            with self._stop.at_once():
                comm = self._join(duty.open(), duty.door)
            try:
                self._enter(duty, comm)
                duty.run(comm, self._stop.event)
            finally:
                self._remember(comm)
                with contextlib.suppress(EpmeshError):
                    comm.destroy()
        finally:
            duty.close()

    def _join(self, front_endpoint: str, door: CurveDoor | None) -> JoinedCommunicator:
        from epmesh_server.ranks.join import RankOptions, become_rank

        options = self._options
        if options.returning:
            held = held_in_view(options.address, options.local_rank, options.num_experts)
            options = options.again(held) if held is not None else options
        _log.info("joins at %s, in a view of %d ranks or more", options.address, options.world_size)
        rank = RankOptions(
            address=options.address,
            mode=RankMode.SERVE if options.experts else RankMode.EXCHANGE,
            world_size=options.world_size,
            local_rank=options.local_rank,
            device=options.device,
            num_experts=options.num_experts,
            experts=options.held,
            tensor_parallel_size=options.tensor_parallel_size,
            max_tokens_per_rank=options.max_tokens_per_rank,
            exchange_timeout_s=options.exchange_timeout_s,
        )
        return become_rank(rank, front_endpoint, door=door, within_s=_JOIN_WITHIN_S)

    def _enter(self, duty: Duty, comm: JoinedCommunicator) -> None:
        _show_logs(self._options, f"rank {comm.global_rank}")
        with self._stop.at_once():
            duty.prepare(comm)
        self.joined = True
        self._pipe.send_bytes(pickling.dumps(Joined(comm.global_rank, comm.view.epoch)))

    def _remember(self, comm: JoinedCommunicator) -> None:
        """What the rank held, for a mesh that has forgotten it."""
        view = comm._rank_process.session.view or comm.view
        held = entry(view, comm.global_rank, self._options.num_experts)
        self._options = replace(self._options.again(held), returning=True)


def _show_logs(options: HostedRank, who: str) -> None:
    if options.log_level is not None:
        from epmesh_server.cli.logs import LogLevel, configure_logging

        configure_logging(LogLevel(options.log_level), prefix=f"{who} | ")
