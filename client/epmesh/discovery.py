"""Discovery: who is in a mesh, for a process that is no rank of it. Needs no torch."""

from __future__ import annotations

import asyncio
import math
import os
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from epmesh.addresses import parse_addresses
from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, NotReady, Unauthenticated
from epmesh.front import check_timeout
from epmesh.mesh_state import MeshState
from epmesh.placement import Placement
from epmesh.tls import Tls, TlsFiles, tls_files
from epmesh.view import GroupInfo, NodeInfo, View
from epmesh.view_reader import ViewReader


def connect(address: str | Sequence[str], *, timeout_s: float = 10.0, tls: Tls | None = None) -> Mesh:
    """Connects to a mesh as somebody who only looks on; returns at the first answer.

    The view may still have epoch 0 then: nobody has registered yet. `Mesh.wait_view` waits for what you need. From
    asyncio, call it as ``await asyncio.to_thread(epmesh.connect, address)``.

    Args:
        address: host:port of a node service or coordinator, or several of one mesh. The first that answers is used;
            when it goes away, the next, and then the nodes that the newest view names, so one address may do. Names
            are looked up at every try: they may come late, or change.
        timeout_s: how long the first answer may take. Later the `Mesh` reconnects for as long as it is open.
        tls: what this process shows itself with, where the mesh is secured: `TlsFiles`, or a directory with ``ca.crt``,
            ``tls.crt`` and ``tls.key``. Read anew at every connection.

    Raises:
        MeshUnavailable: none answered in time; the text says of each address why.
        Unauthenticated: the services refuse this process's certificate, or theirs cannot be believed.
        InvalidRequest: an argument is malformed, or the services have another major or minor version, or say none.
    """
    addresses = parse_addresses(address, "address")
    check_timeout(timeout_s, "timeout_s", math.inf)
    mesh = Mesh(addresses, tls_files(tls))
    try:
        mesh._wait_first_answer(timeout_s)
    except BaseException:
        mesh.close()
        raise
    return mesh


class Mesh:
    """A mesh as seen from outside, always its newest committed view; made by `connect`.

    ::

        with epmesh.connect(["node-0:7400", "node-1:7400"]) as mesh:
            view = mesh.wait_view(lambda view: len(view.ranks) == 4, timeout_s=30)
            for view in mesh.watch(after_epoch=view.epoch):
                print(view.epoch, list(view.ranks))

    Epochs never fall, whichever service is in use: one that lags behind adds nothing until it has caught up. The one
    exception is another mesh (another ``mesh_id``, where a coordinator began anew with an empty log): its epochs count
    from 1 again, and its views replace those of the mesh that is gone.

    All methods may be called from any thread, none across a fork. Connecting again goes on in the background, for ever;
    meanwhile the last view stays. One thread and one connection belong to it until `close`, the end of the ``with``
    statement (``async with`` works too), or the end of the interpreter.
    """

    def __init__(self, addresses: Sequence[str], tls: TlsFiles | None = None) -> None:
        """Begins to connect. Call `connect`, which checks the addresses and waits for an answer."""
        self._addresses = tuple(addresses)
        self._state = MeshState()
        self._tls = tls
        reader = ViewReader(self._addresses, self._state, tls)
        self._close = weakref.finalize(self, _end, self._state, reader, os.getpid())

    def __repr__(self) -> str:
        how = "closed" if self._state.closed else "connected" if self.connected else "reconnecting"
        return f"<epmesh.Mesh {self.address or self._addresses} {how}, epoch {self.view.epoch}>"

    # What there is -----------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The newest committed view; epoch 0 before the first. Never waits; after `close` the last one."""
        return self._state.view or View("", 0, 0, 0)

    @property
    def groups(self) -> Mapping[str, GroupInfo]:
        """The groups of the newest view, by name."""
        return {group.name: group for group in self.view.groups}

    def placement(self, layer: int | None = None) -> Placement | None:
        """The newest placement for `layer`, or the one for all layers, or `None` where nothing was declared."""
        return self.view.placement(layer)

    def node_of(self, rank: int) -> NodeInfo:
        """The node that a global rank belongs to.

        Raises:
            InvalidRequest: no such rank is in the newest view.
        """
        return self.view.node_of(rank)

    @property
    def tls(self) -> TlsFiles | None:
        """What this process shows itself with; `None` without TLS."""
        return self._tls

    @property
    def address(self) -> str:
        """host:port of the service in use; while reconnecting, of the last one."""
        return self._state.address

    @property
    def connected(self) -> bool:
        """Whether a service is being watched now. One that vanished without a word shows after about 2 s."""
        return self._state.connected

    @property
    def problems(self) -> Mapping[str, EpmeshError]:
        """By address given to `connect`: why the last try there failed; none where it works or was not tried."""
        return dict(self._state.problems)

    # What comes --------------------------------------------------------------------------------------------------

    def wait_view(self, accept: Callable[[View], bool] | None = None, timeout_s: float = 10.0) -> View:
        """Waits for a committed view that `accept` takes; `None` takes any.

        `accept` is asked for the newest view, then for later ones; those that a newer one overtook are skipped.

        Raises:
            NotReady: no such view came within `timeout_s`; the text says what is there.
            MeshUnavailable: the same, and no service can be reached; or the `Mesh` is closed.
            InvalidRequest: `timeout_s` is no positive number.
        """
        check_timeout(timeout_s, "timeout_s", math.inf)
        deadline = time.monotonic() + timeout_s
        epoch, mesh_id = 0, ""
        while (view := self._state.wait_after(epoch, mesh_id, max(0.0, deadline - time.monotonic()))) is not None:
            if accept is None or accept(view):
                return view
            epoch, mesh_id = view.epoch, view.mesh_id
        raise self._why_no_view(timeout_s)

    def watch(self, after_epoch: int = 0) -> Iterator[View]:
        """The newest view, then every later one; blocks in between and ends when the `Mesh` is closed.

        Who reads slowly skips views and always gets the newest. Views of epoch 0 are not among them.

        Args:
            after_epoch: only later views, of the mesh that is connected now.

        Raises:
            InvalidRequest: `after_epoch` is no epoch.
        """
        _check_epoch(after_epoch)
        return self._watch(after_epoch, self._state.mesh_id)

    def _watch(self, epoch: int, mesh_id: str) -> Iterator[View]:
        while (view := self._state.wait_after(epoch, mesh_id)) is not None:
            epoch, mesh_id = view.epoch, view.mesh_id
            yield view

    def watch_async(self, after_epoch: int = 0) -> AsyncIterator[View]:
        """As `watch`, for asyncio; iterate it in one event loop."""
        _check_epoch(after_epoch)
        return self._watch_async(after_epoch, self._state.mesh_id)

    async def _watch_async(self, epoch: int, mesh_id: str) -> AsyncIterator[View]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._state.woken(wake):
            while not self._state.closed:
                changed.clear()
                view = self._state.after(epoch, mesh_id)
                if view is None:
                    await changed.wait()
                    continue
                epoch, mesh_id = view.epoch, view.mesh_id
                yield view

    def on_view(self, callback: Callable[[View], None]) -> Callable[[], None]:
        """Has `callback` called with every later view, on the thread that reads them; returns what takes it back.

        Register first, then look at `view`, and no view is missed. The callback must not block: the next view waits for
        it. What it raises is logged. A call under way while it is taken back is not waited for.
        """
        return self._state.on_view(callback)

    # Life --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends every wait and iterator, the connection and the thread; idempotent."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.close))

    # Parts -------------------------------------------------------------------------------------------------------

    def _wait_first_answer(self, timeout_s: float) -> None:
        """Raises where none came, at once where no later try can change that."""
        state = self._state

        def hopeless() -> bool:
            fatal = [e for e in state.problems.values() if isinstance(e, InvalidRequest | Unauthenticated)]
            return len(fatal) == len(self._addresses)

        state.wait_for(lambda: state.view is not None or hopeless(), timeout_s)
        if state.view is not None:
            return
        if hopeless():
            raise state.problems[self._addresses[0]]
        raise MeshUnavailable(
            f"nobody answered within {timeout_s:g} s: {self._problem_text()}; is `epmesh serve` running there?"
        )

    def _problem_text(self) -> str:
        problems = self.problems
        return ", ".join(f"{address} ({problems.get(address, 'no answer yet')})" for address in self._addresses)

    def _why_no_view(self, timeout_s: float) -> EpmeshError:
        view = self.view
        if self._state.closed:
            return MeshUnavailable("this Mesh is closed")
        seen = f"epoch {view.epoch} has ranks {list(view.ranks)}" if view.epoch else "no view was committed"
        if not self.connected:
            return MeshUnavailable(f"no such view within {timeout_s:g} s; {seen}; unreachable: {self._problem_text()}")
        return NotReady(f"no such view within {timeout_s:g} s; {seen}, says {self.address}")


def _end(state: MeshState, reader: ViewReader, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has neither the thread nor a right to the connection
        state.close()
        reader.close()


def _check_epoch(epoch: object) -> None:
    if not isinstance(epoch, int) or epoch < 0:
        raise InvalidRequest(f"after_epoch is {epoch!r}; it must be a whole number from 0 on")
