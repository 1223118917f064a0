"""Who does a local mesh's work, as its child: a rank that joins, or the driver of a hosted one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import epmesh
from epmesh.errors import InvalidRequest, MeshUnavailable, StaleEpoch
from epmesh.view import View
from epmesh_server.processes import pickling
from epmesh_server.processes.raised import Raised
from epmesh_server.testing.messages import GetReady, Join, NotYet, Ready, Result, Work

_POLL_S = 0.005
_PATIENCE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """What a rank says when it joins; as the arguments of ``epmesh.join``."""

    local_rank: int
    address: str = ""
    device: str = "cpu"
    num_experts: int | None = None
    experts: tuple[int, ...] | None = None
    tensor_parallel_size: int = 1
    max_tokens_per_rank: int | None = None
    exchange_timeout_s: float = 30.0
    timeout_s: float = 30.0

    def enter(self, address: str, world_size: int, timeout_s: float) -> epmesh.Communicator:
        """Joins at `address`, in a view of `world_size` ranks."""
        return epmesh.join(
            address,
            world_size=world_size,
            local_rank=self.local_rank,
            device=self.device,
            num_experts=self.num_experts,
            experts=self.experts,
            tensor_parallel_size=self.tensor_parallel_size,
            max_tokens_per_rank=self.max_tokens_per_rank,
            exchange_timeout_s=self.exchange_timeout_s,
            timeout_s=timeout_s,
        )


@dataclass(frozen=True, kw_only=True)
class DriverSettings:
    """Which hosted rank a driver takes, and how; as the arguments of ``epmesh.attach``."""

    rank: int
    address: str = ""
    transport: str | None = None
    timeout_s: float = 30.0
    tls: epmesh.TlsFiles | None = None

    def enter(self, address: str, world_size: int, timeout_s: float) -> epmesh.Communicator:
        """Attaches at `address`, in a view of `world_size` ranks."""
        return epmesh.attach(
            address,
            rank=self.rank,
            transport=self.transport,
            world_size=world_size,
            timeout_s=timeout_s,
            driver=f"the driver of rank {self.rank} of a LocalMesh",
            tls=self.tls,
        )


def rank_main(pipe: Connection[Any, Any], settings: RankSettings | DriverSettings) -> None:
    """Answers each message of the owner with one of its own, until the owner is gone."""
    import torch  # here, not above: the owner needs this module and no torch

    torch.set_num_threads(1)  # the ranks of one machine share its cores
    runner = RankRunner(settings)
    while True:
        try:
            message = pickling.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        pipe.send_bytes(pickling.dumps(runner.answer(message)))


class RankRunner:
    """Holds the rank's communicator between works."""

    def __init__(self, settings: RankSettings | DriverSettings) -> None:
        self._settings = settings
        self._address = settings.address
        self._comm: epmesh.Communicator | None = None
        self._handlers: dict[type, Callable[[Any], object]] = {
            Join: self._join,
            GetReady: self._get_ready,
            Work: self._work,
        }

    def answer(self, message: object) -> object:
        """Does what `message` says; an exception becomes the answer."""
        try:
            return self._handlers[type(message)](message)
        except BaseException as exc:  # noqa: BLE001 - the owner raises it, SystemExit too
            return Raised.of(exc)

    def _join(self, message: Join) -> Ready:
        self._address = message.address
        return Ready(self._rejoin(message.world_size, self._settings.timeout_s).view.membership_epoch)

    def _rejoin(self, world_size: int, timeout_s: float) -> epmesh.Communicator:
        if self._comm is not None:
            self._comm.destroy()
            self._comm = None
        self._comm = self._settings.enter(self._address, world_size, timeout_s)
        return self._comm

    def _get_ready(self, message: GetReady) -> Ready | NotYet:
        deadline = time.monotonic() + message.timeout_s
        patient_until = min(deadline, time.monotonic() + _PATIENCE_S)
        while True:
            view = self._adopt(message, deadline)
            if set(view.group("ep").ranks) == message.ranks and view.membership_epoch >= message.membership_epoch:
                return Ready(view.membership_epoch)
            if time.monotonic() >= patient_until:
                return NotYet(f"epoch {view.epoch} with ranks {list(view.group('ep').ranks)}")
            time.sleep(_POLL_S)

    def _adopt(self, message: GetReady, deadline: float) -> View:
        """The newest view; joins again where this rank is no member any more."""
        remaining_s = max(_POLL_S, deadline - time.monotonic())
        if self._comm is not None:
            try:
                return self._comm.wait_ready(remaining_s)[0]
            except (InvalidRequest, MeshUnavailable, StaleEpoch):  # the first: work destroyed it
                if time.monotonic() > deadline:
                    raise
        return self._rejoin(len(message.ranks), max(_POLL_S, deadline - time.monotonic())).view

    def _work(self, message: Work) -> Result:
        sys.path.extend(path for path in message.path if path not in sys.path)
        work, args = pickling.loads(message.pickled)
        return Result(pickling.dumps(work(self._comm, *args)))
