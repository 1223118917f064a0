"""`Router` and `AsyncRouter`: rows go to the ranks that hold their experts, and the sums come back."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from epmesh.discovery import connect
from epmesh.router_core import (
    DEFAULT_MAX_INFLIGHT_BYTES,
    DEFAULT_TIMEOUT_S,
    Event,
    RouterCore,
    RouterOptions,
    Run,
    closed_error,
)
from epmesh.router_stats import RouterStats
from epmesh.tls import Tls

_CONNECT_TIMEOUT_S = 10.0
_STEP_BYTES = 1 << 20
_T = TypeVar("_T")


class Router:
    """Sends rows to whoever holds their experts. No rank: it joins nothing, and other routers do not concern it.

    ::

        with epmesh.Router("node-0:7400") as router:
            out = router.forward(hidden_states, topk_weights, topk_ids, layer=3, timeout=0.5)

    Any number of threads may use one router; one is enough for a process. It follows the mesh's views, so nodes and
    ranks may come and go: as long as every expert has a serving rank left, no forward fails for it.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        transport: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_inflight_bytes: int = DEFAULT_MAX_INFLIGHT_BYTES,
        connect_timeout_s: float = _CONNECT_TIMEOUT_S,
        tls: Tls | None = None,
    ) -> None:
        """Connects to a mesh.

        Args:
            address: host:port of a node service or coordinator, or several; the first that answers is used.
            transport: "zmq" to ranks themselves, "grpc" to node services, `None`: the first that gets through.
            timeout_s: deadline of forwards that name none.
            max_inflight_bytes: most bytes under way at once, answers included; who comes then waits for room.
            connect_timeout_s: how long to wait for the first answer.
            tls: what this process shows itself with, where the mesh is secured; see `connect`.

        Raises:
            MeshUnavailable: nobody answers at any address.
            InvalidRequest: an argument is wrong.
        """
        options = RouterOptions(transport=transport, timeout_s=timeout_s, max_inflight_bytes=max_inflight_bytes)
        self._core = open_core(address, options, connect_timeout_s, tls)

    def forward(
        self,
        hidden_states: Any,
        topk_weights: Any,
        topk_ids: Any,
        *,
        layer: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """The weighted sums of each token's experts.

        Args:
            hidden_states: ``[num_tokens, hidden]``; NumPy array or torch tensor on the CPU, contiguous or not, in any
                dtype that may travel. Do not change it meanwhile.
            topk_weights: ``[num_tokens, num_topk]``, floating point; passed on to the experts, which apply them.
            topk_ids: ``[num_tokens, num_topk]``, integers; -1 means no expert, anywhere.
            layer: whose experts; `None` where the model has one placement for all.
            timeout: seconds after which to give up; `None`: the router's `timeout_s`.

        Returns:
            ``[num_tokens, hidden]`` in the library of `hidden_states` and the dtype of the experts' results: the sums
            of the nodes, added in fp32 in slot order and rounded once. Rows without any expert are zeros; where no row
            has one nothing is sent, and the dtype is that of `hidden_states`. bfloat16 comes to NumPy callers as
            float32, unless theirs is ``ml_dtypes.bfloat16``.

        Raises:
            ExpertUnavailable: no serving rank holds an expert that is asked for.
            DeadlineExceeded: `timeout` is over; the ranks were told to stop.
            Overloaded: no room under `max_inflight_bytes` before the deadline, or a rank's queue is full.
            InvalidRequest: the input is wrong, and would be again.
            NotReady: no rank declares experts yet.
            MeshUnavailable: the router was closed.
            EpmeshError: what the experts raised.
        """
        inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        run = self._core.begin(hidden_states, topk_weights, topk_ids, layer, timeout, inbox.put)
        try:
            while not run.advance():
                with contextlib.suppress(queue.Empty):
                    run.take(inbox.get(timeout=run.wait_s()))
            return run.result()
        finally:
            run.end()

    @classmethod
    def _of(cls, core: RouterCore) -> Self:
        """A router over a core that is there already."""
        router = cls.__new__(cls)
        router._core = core
        return router

    @property
    def transport(self) -> str | None:
        """ "zmq" or "grpc"; `None` as long as no rank serves, and neither was asked for."""
        return self._core.transport_name

    @property
    def stats(self) -> RouterStats:
        """What the router did so far."""
        return self._core.snapshot()

    def close(self) -> None:
        """Ends it: forwards under way raise `MeshUnavailable`. Idempotent; no thread or connection is left."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncRouter:
    """`Router` for asyncio: any number of tasks of one event loop.

    ::

        async with epmesh.AsyncRouter("node-0:7400") as router:
            out = await router.forward(hidden_states, topk_weights, topk_ids, layer=3, timeout=0.5)

    It connects at ``async with``, or with the first forward. Cancelling a task that waits in `forward` cancels its rows
    at the ranks.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        transport: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_inflight_bytes: int = DEFAULT_MAX_INFLIGHT_BYTES,
        connect_timeout_s: float = _CONNECT_TIMEOUT_S,
        tls: Tls | None = None,
    ) -> None:
        """As `Router`, but connects later.

        Raises:
            InvalidRequest: an argument is wrong.
        """
        self._options = RouterOptions(transport=transport, timeout_s=timeout_s, max_inflight_bytes=max_inflight_bytes)
        self._address, self._connect_timeout_s, self._tls = address, connect_timeout_s, tls
        self._core: RouterCore | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def forward(
        self,
        hidden_states: Any,
        topk_weights: Any,
        topk_ids: Any,
        *,
        layer: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the deadline is the ranks' as well
    ) -> Any:
        """As `Router.forward`; raises what that raises, and what the constructor of `Router` raises."""
        core = self._core or await self._open()
        if core.transport_name is None:
            await asyncio.to_thread(core.choose_transport)  # it may have to find out what gets through
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Event] = asyncio.Queue()

        def post(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(inbox.put_nowait, event)

        run = core.begin(hidden_states, topk_weights, topk_ids, layer, timeout, post)
        try:
            while not await _step(run, run.advance):
                await _take_next(run, inbox)
            return await _step(run, run.result)
        finally:
            run.end()

    @property
    def transport(self) -> str | None:
        """As `Router.transport`; what was asked for, before it is connected."""
        return self._core.transport_name if self._core else self._options.transport

    @property
    def stats(self) -> RouterStats:
        """What the router did so far."""
        return self._core.snapshot() if self._core else RouterStats()

    async def close(self) -> None:
        """As `Router.close`."""
        self._closed = True
        async with self._opening:
            if self._core is not None:
                await asyncio.shield(asyncio.to_thread(self._core.close))

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @classmethod
    def _of(cls, core: RouterCore) -> Self:
        """A router over a core that is there already."""
        router = cls("127.0.0.1:1")
        router._core = core
        return router

    async def _open(self) -> RouterCore:
        async with self._opening:
            if self._core is None:
                if self._closed:
                    raise closed_error()
                self._core = await asyncio.to_thread(
                    open_core, self._address, self._options, self._connect_timeout_s, self._tls
                )
            return self._core


async def _step(run: Run, step: Callable[[], _T]) -> _T:
    """Does a step on the event loop, or in a thread where it copies or adds so much that others would wait for it."""
    return step() if run.num_bytes < _STEP_BYTES else await asyncio.to_thread(step)


async def _take_next(run: Run, inbox: asyncio.Queue[Event]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(run.wait_s()):
            run.take(await inbox.get())


def open_core(
    address: str | Sequence[str], options: RouterOptions, connect_timeout_s: float, tls: Tls | None = None
) -> RouterCore:
    """Connects, and chooses a transport if some rank serves already."""
    core = RouterCore(connect(address, timeout_s=connect_timeout_s, tls=tls), options)
    try:
        core.choose_transport()
    except BaseException:
        core.close()
        raise
    return core
