"""Who drives this node's ranks: at most one driver a rank, known by its token, and the memory that the two share."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from epmesh.errors import InvalidRequest, MeshUnavailable, NotReady, Overloaded, Unauthenticated
from epmesh.v1 import communicator_service_pb2, view_pb2
from epmesh.version import VERSION, check_compatible
from epmesh_server.driver_tokens import make_token
from epmesh_server.node.ranks import LocalRank, RankTable
from epmesh_server.node.registration import Enrolment
from epmesh_server.node.views import ViewBoard
from epmesh_server.shared_memory import sealed_memfd

_log = logging.getLogger(__name__)
_MAX_DRIVER_CHARS = 256


@dataclass(eq=False)
class Driver:
    """One driver's hold on a rank.

    Attributes:
        entry: the rank.
        text: who it is, for people.
        since: when it began.
        token: what it shows in every call.
        hold: of the stream that holds the rank; set once another one of the same driver took its place.
        detached: set once it gave the rank back.
    """

    entry: LocalRank
    text: str
    since: datetime
    token: bytes
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    detached: asyncio.Event = field(default_factory=asyncio.Event)
    memfd: int = -1

    def __str__(self) -> str:
        return f"{self.text!r}, since {self.since:%Y-%m-%d %H:%M:%S} UTC"


class Drivers:
    """All drivers of the node's ranks. Used on the event loop only."""

    def __init__(
        self,
        table: RankTable,
        board: ViewBoard,
        enrolment: Enrolment,
        died: Callable[[LocalRank, str], None],
        memory_bytes: int,
    ) -> None:
        """Nobody drives yet.

        Args:
            died: ends the membership of a rank whose driver is gone, as if it had died.
            memory_bytes: of the memory that a rank and its driver share.
        """
        self._table = table
        self._board = board
        self._enrolment = enrolment
        self._died = died
        self._memory_bytes = memory_bytes
        self._numbers = itertools.count(1)
        self._by_rank: dict[int, Driver] = {}

    def __len__(self) -> int:
        """Ranks that have a driver."""
        return len(self._by_rank)

    def attach(self, request: communicator_service_pb2.AttachRankRequest) -> Driver:
        """Gives a rank to a driver; to the one that has it where the request has its token.

        Raises:
            InvalidRequest: the rank has a driver, is another node's, or cannot be driven.
            NotReady: the rank is not here yet.
            Unauthenticated: the token is not that of the rank's driver.
            MeshUnavailable: the rank of that driver is gone.
        """
        if request.version:
            check_compatible(VERSION, request.version, "the driver", here="the node service")
        if len(request.driver) > _MAX_DRIVER_CHARS:
            raise InvalidRequest(f"driver has {len(request.driver)} characters; at most {_MAX_DRIVER_CHARS} are taken")
        if request.token:
            return self._held_anew(self.driver_of(request.rank, request.token))
        entry = self._entry(request.rank)
        known = self._by_rank.get(entry.rank)
        if known is not None and known.entry is entry:
            raise InvalidRequest(f"rank {entry.rank} has a driver already: {known}; a rank has one at a time")
        token = make_token(entry.token, next(self._numbers))
        driver = Driver(entry, request.driver or "an unnamed driver", datetime.now(UTC), token)
        self._by_rank[entry.rank] = driver
        _log.info("rank %d, epoch %d: attached by %s", entry.rank, self._board.epoch, driver)
        return driver

    def detach(self, rank: int, token: bytes) -> None:
        """Gives a rank back in good order.

        Raises:
            Unauthenticated: the token is not that of the rank's driver.
        """
        driver = self.driver_of(rank, token)
        self._forget(driver)
        driver.detached.set()
        _log.info("rank %d, epoch %d: detached by %s", rank, self._board.epoch, driver)

    def gone(self, driver: Driver, hold: asyncio.Event) -> None:
        """A stream of the driver ended; if it held the rank, and did not give it back, the rank goes with it."""
        if driver.hold is hold and self._forget(driver) and driver.entry.error is None:
            self._died(driver.entry, f"its driver, {driver}, is gone")

    def driver_of(self, rank: int, token: bytes) -> Driver:
        """The rank's driver, if `token` is its own.

        Raises:
            Unauthenticated: it is not.
            MeshUnavailable: the rank is gone.
        """
        driver = self._by_rank.get(rank)
        if driver is None or not secrets.compare_digest(driver.token, token):
            raise Unauthenticated(f"the token is not that of the driver of rank {rank}; attach to get one")
        if driver.entry.error is not None:
            raise lost(driver)
        return driver

    def by_token(self, token: bytes) -> Driver | None:
        """The driver that was given `token`."""
        return next((each for each in self._by_rank.values() if secrets.compare_digest(each.token, token)), None)

    def memory(self, driver: Driver) -> tuple[int, int]:
        """The memfd that the driver shares with its rank, made when first asked for, and its bytes.

        Raises:
            Overloaded: descriptors or address space are short.
        """
        if driver.memfd < 0:
            try:
                driver.memfd = sealed_memfd(f"epmesh-driver-{driver.entry.rank}", self._memory_bytes)
            except OSError as exc:
                raise Overloaded(1.0, f"cannot make {self._memory_bytes} bytes of memory for a driver: {exc}") from exc
        return driver.memfd, self._memory_bytes

    def _held_anew(self, driver: Driver) -> Driver:
        driver.hold.set()
        driver.hold = asyncio.Event()
        _log.info("rank %d, epoch %d: held by another stream of %s", driver.entry.rank, self._board.epoch, driver)
        return driver

    def _forget(self, driver: Driver) -> bool:
        if driver.memfd >= 0:
            os.close(driver.memfd)
            driver.memfd = -1
        if self._by_rank.get(driver.entry.rank) is not driver:
            return False
        del self._by_rank[driver.entry.rank]
        return True

    def _entry(self, rank: int) -> LocalRank:
        """The rank's record, if it can be driven."""
        registration = self._enrolment.current
        if registration is None:
            raise NotReady("this node is not registered with its coordinator yet")
        slot = rank // registration.stride
        if slot != registration.slot:
            raise InvalidRequest(
                f"rank {rank} is not on this node, which has slot {registration.slot}; {self._at(slot)}"
            )
        entry = next((each for each in self._table.all() if each.rank == rank), None)
        if entry is None:
            here = [each.rank for each in self._table.all()]
            raise NotReady(f"rank {rank} is not here, or not yet; this node has ranks {here}")
        shown = entry.declaration.rank
        if shown.mode != view_pb2.RANK_MODE_EXCHANGE:
            raise InvalidRequest(f"rank {rank} serves routers; only a rank in mode exchange can be driven")
        if not shown.front_endpoint:
            raise InvalidRequest(
                f"rank {rank} is process {entry.pid}, which joined by itself; only a rank that the node service hosts "
                f"can be driven (epmesh serve --ranks N)"
            )
        return entry

    def _at(self, slot: int) -> str:
        nodes = self._board.view.nodes if self._board.view else ()
        node = next((node for node in nodes if node.slot == slot), None)
        return f"attach at {node.address}" if node else f"no node has slot {slot}"


def lost(driver: Driver) -> MeshUnavailable:
    """What a driver is told whose rank is gone."""
    why = str(driver.entry.error or "its front does not answer").removesuffix("; join again")
    return MeshUnavailable(f"rank {driver.entry.rank}, which this process drove, is gone: {why}; attach again")
