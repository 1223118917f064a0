"""How long a call may keep a node waiting for its caller: meanwhile it holds memory that all calls share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc

from epmesh.communicator_methods import Assembly
from epmesh.errors import DeadlineExceeded, Unauthenticated
from epmesh_server.node.drivers import Driver, lost
from epmesh_server.node.rpc import seconds_left

DEFAULT_IDLE_S = 60.0
_LEAST_BYTES_PER_S = 1 << 20
_T = TypeVar("_T")


class CallWaits:
    """The waits of one call for its caller. Each ends after `idle_s`; so that nobody sends or reads drop by drop, those
    of one direction together end after `idle_s` and what its bytes take at 1 MiB/s.
    """

    def __init__(self, name: str, context: grpc.aio.ServicerContext[Any, Any], idle_s: float) -> None:
        """Nothing was sent yet; `name` is that of the call, for people."""
        self._name = name
        self._context = context
        self._idle_s = idle_s
        self._driver: Driver | None = None
        self._over: tuple[asyncio.Future[Any], ...] = ()
        self.begin(0)

    @contextmanager
    def driven_by(self, driver: Driver) -> Iterator[None]:
        """Ends waits inside the block as soon as `driver` has lost its rank, or has given it back, too."""
        self._driver = driver
        self._name += f" on rank {driver.entry.rank}"
        self._over = tuple(asyncio.ensure_future(event.wait()) for event in (driver.entry.ended, driver.detached))
        try:
            yield
        finally:
            for wait in self._over:
                wait.cancel()

    def begin(self, num_bytes: int) -> None:
        """From here on so many bytes are to come, or to be read."""
        self._total_s = self._idle_s + num_bytes / _LEAST_BYTES_PER_S
        self._until = time.monotonic() + self._total_s

    async def until(self, step: Awaitable[_T], missing: Callable[[], str]) -> _T:
        """What `step` gives; `missing` says what did not happen otherwise.

        Raises:
            DeadlineExceeded: the caller took too long.
            MeshUnavailable: the driver's rank is gone.
            Unauthenticated: the driver gave its rank back.
        """
        task = asyncio.ensure_future(step)
        try:
            await asyncio.wait((task, *self._over), timeout=self._left_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        self._check_driver(missing)
        raise DeadlineExceeded(
            message=f"{self._name}: {missing()} in time; the caller may take {self._idle_s:g} s for one message and "
            f"{self._total_s:.3g} s for all"
        )

    @property
    def _left_s(self) -> float:
        return max(0.0, seconds_left(self._context, min(self._idle_s, self._until - time.monotonic())))

    def _check_driver(self, missing: Callable[[], str]) -> None:
        driver = self._driver
        if driver is not None and driver.entry.ended.is_set():
            raise lost(driver)
        if driver is not None and driver.detached.is_set():
            raise Unauthenticated(f"{self._name}: {missing()} before its driver gave the rank back; attach again")


async def gather(assembly: Assembly, requests: AsyncIterator[Any], waits: CallWaits) -> None:
    """Takes in the messages after the first."""

    def missing() -> str:
        rest = assembly.num_missing
        return f"{rest} of {assembly.num_bytes} bytes of tensors did not come" if rest else "its requests did not end"

    waits.begin(assembly.num_bytes)
    while (message := await waits.until(anext(requests, None), missing)) is not None:
        assembly.add(message.data)
