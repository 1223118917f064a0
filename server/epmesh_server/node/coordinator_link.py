"""The node's link to its coordinator: registration, then one control stream, for ever again after every break.

While the coordinator is away the node goes on in the last committed epoch. It fences itself only where its lease ended
and its ranks' links to other nodes are broken too: then it is this node that was cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import grpc

from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, Unauthenticated, from_rpc_error
from epmesh.tls import COORDINATOR_NAME
from epmesh.tls_refusals import explained
from epmesh.v1 import membership_service_pb2 as wire
from epmesh.v1 import membership_service_pb2_grpc
from epmesh_server.node.coordinator_channel import CoordinatorChannel
from epmesh_server.node.registration import Identity, Registration
from epmesh_server.node.rpc import CALL_TIMEOUT_S

_log = logging.getLogger(__name__)
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.05, 0.3
_LOG_EVERY_S = 5.0
_LEASE_CHECK_S = 0.1
_LEASE_MARGIN_S = 0.25


class NodeCommands(Protocol):
    """The node's side of the control stream. Called on the event loop; only `finish` may take long."""

    def registered(self, registration: Registration) -> None:
        """The coordinator accepted the node, for the first time or again."""

    def committed_epoch(self) -> int:
        """The last epoch the node committed; 0 if none."""

    def rank_report(self) -> wire.RankReport:
        """The complete list of living ranks."""

    def link_report(self) -> wire.LinkReport:
        """The complete list of broken links."""

    def prepare(self, command: wire.Prepare) -> wire.Prepared:
        """Raises the fences."""

    async def finish(self, command: wire.Finish) -> wire.Finished:
        """Lets the ranks reach the cut."""

    def commit(self, command: wire.Commit) -> wire.Committed:
        """Adopts the view."""

    def evict(self, command: wire.Evict) -> None:
        """Ends the membership of these ranks; of all where none is named."""

    def lease_ended(self) -> bool:
        """The lease is over; returns whether the node fenced itself."""


class CoordinatorLink:
    """Keeps a node registered at the coordinator, whichever of several leads."""

    def __init__(self, channel: CoordinatorChannel, node: NodeCommands) -> None:
        self._channel = channel
        self._node = node
        self._session: _Session | None = None
        self._lease: _Lease | None = None
        self._leaving = asyncio.Event()

    def ranks_changed(self) -> None:
        """Sends a new rank report, if there is a session; a new session starts with one anyway."""
        if self._session:
            self._session.send(wire.NodeSessionRequest(ranks=self._node.rank_report()))

    def links_changed(self) -> None:
        """Sends a new link report, if there is a session."""
        if self._session:
            self._session.send(wire.NodeSessionRequest(links=self._node.link_report()))

    @property
    def connected(self) -> bool:
        """Whether there is a control stream."""
        return self._session is not None

    async def run(self, present: Callable[[], Awaitable[Identity]]) -> None:
        """Registers and serves sessions until cancelled, or until it left.

        Args:
            present: says who the node is, anew for every registration; an `EpmeshError` of it is tried again.

        Raises:
            InvalidRequest, Unauthenticated: the coordinator will never accept this node.
        """
        complaint = _Complaint()
        backoff_s = _FIRST_BACKOFF_S
        watch = asyncio.create_task(self._watch_lease())
        try:
            while not self._leaving.is_set():
                try:
                    identity = await present()
                    registration = await self._register(identity)
                    complaint.over(self._channel.address)
                    backoff_s = _FIRST_BACKOFF_S
                    await self._serve(registration, identity.incarnation)
                except (InvalidRequest, Unauthenticated):
                    raise
                except EpmeshError as exc:
                    if self._leaving.is_set():
                        return
                    complaint.about(exc)
                    await self._channel.turn()
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
        finally:
            watch.cancel()

    async def leave(self, within_s: float) -> None:
        """Says good-bye, if there is a session; `run` must still be running."""
        self._leaving.set()
        if self._session:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._session.leave(), within_s)

    async def _register(self, identity: Identity) -> Registration:
        request = wire.RegisterNodeRequest(
            node_id=identity.node_id,
            incarnation=identity.incarnation,
            address=identity.address,
            version=identity.version,
            slot=identity.slot,
            curve=identity.curve,
            join_token=identity.join_token,
        )
        stub = membership_service_pb2_grpc.MembershipServiceStub(await self._channel.renewed())
        sent = asyncio.get_running_loop().time()
        try:
            answer = await stub.RegisterNode(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            raise await self._refusal(exc) from exc
        granted = Registration(answer.slot, answer.mesh_id, answer.stride, answer.heartbeat_interval_s, answer.lease_s)
        self._lease = _Lease(granted.lease_s, sent)
        self._node.registered(granted)
        _log.info("node %s registered at %s: slot %d", identity.node_id, self._channel.address, granted.slot)
        return granted

    async def _refusal(self, error: grpc.aio.AioRpcError) -> EpmeshError:
        """Why it did not register the node; at first contact TLS is asked too, which says more than gRPC."""
        typed = from_rpc_error(error, f"coordinator at {self._channel.address}")
        if self._lease is not None:
            return typed
        return await asyncio.to_thread(explained, typed, self._channel.address, self._channel.tls, COORDINATOR_NAME)

    async def _serve(self, registration: Registration, incarnation: int) -> None:
        """One control stream, until it breaks.

        Raises:
            MeshUnavailable: always; why it broke.
        """
        assert self._lease is not None
        stub = membership_service_pb2_grpc.MembershipServiceStub(self._channel.current)
        session = self._session = _Session(stub, self._node, registration, self._lease)
        epoch = self._node.committed_epoch()
        hello = wire.Hello(slot=registration.slot, incarnation=incarnation, epoch=epoch)
        session.send(wire.NodeSessionRequest(hello=hello))
        self.ranks_changed()
        self.links_changed()
        try:
            await session.run()
        except grpc.aio.AioRpcError as exc:
            error = from_rpc_error(exc, f"control stream to the coordinator at {self._channel.address}")
            raise MeshUnavailable(str(error)) from exc
        except EpmeshError as exc:  # a command that makes no sense here; only a refused registration is final
            raise MeshUnavailable(f"coordinator at {self._channel.address}: {exc}") from exc
        finally:
            self._session = None
        raise MeshUnavailable(f"coordinator at {self._channel.address}: it ended the control stream")

    async def _watch_lease(self) -> None:
        """Tells the node when its lease is about to end, and as long as it is over."""
        while True:
            left_s = self._lease.left_s() - _LEASE_MARGIN_S if self._lease else 0.0
            if self._lease and left_s <= 0 and self._node.lease_ended():
                _log.error("lease ended and links to other nodes are broken: fenced this node's ranks")
            await asyncio.sleep(max(left_s, _LEASE_CHECK_S))


class _Lease:
    """Until when the coordinator holds the node for alive, counted from when the renewal was sent."""

    def __init__(self, lease_s: float, sent: float) -> None:
        self._lease_s = lease_s
        self._until = sent + lease_s

    def renew(self, sent: float) -> None:
        """A renewal that was sent at loop time `sent` was answered."""
        self._until = max(self._until, sent + self._lease_s)

    def left_s(self) -> float:
        """Seconds left; negative when it is over."""
        return self._until - asyncio.get_running_loop().time()


class _Session:
    """One control stream: a reader, a writer and a heart."""

    def __init__(
        self,
        stub: membership_service_pb2_grpc.MembershipServiceAsyncStub,
        node: NodeCommands,
        registration: Registration,
        lease: _Lease,
    ) -> None:
        self._stub = stub
        self._node = node
        self._registration = registration
        self._lease = lease
        self._outgoing: asyncio.Queue[wire.NodeSessionRequest | None] = asyncio.Queue()
        self._beats: dict[int, float] = {}
        self._finishing: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    def send(self, request: wire.NodeSessionRequest) -> None:
        """Queues one report."""
        self._outgoing.put_nowait(request)

    async def run(self) -> None:
        """Returns or raises when the stream ends."""
        call = self._stub.NodeSession(self._requests())
        heart = asyncio.create_task(self._beat(call))
        try:
            async for command in call:
                self._handle(command)
        except asyncio.CancelledError:
            # The call was cancelled by the heart, or this task was; grpc.aio does not tell which.
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise
        finally:
            self._ended.set()
            heart.cancel()
            self._stop_finishing()
            call.cancel()
            self._outgoing.put_nowait(None)  # or grpc's task that waits for the next report is destroyed as it waits

    async def leave(self) -> None:
        """Ends this side of the stream: the node leaves in good order. Returns when the coordinator heard of it."""
        self._outgoing.put_nowait(None)
        await self._ended.wait()

    async def _requests(self) -> AsyncIterator[wire.NodeSessionRequest]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _beat(self, call: grpc.aio.StreamStreamCall[wire.NodeSessionRequest, wire.NodeSessionResponse]) -> None:
        """Sends heartbeats; ends the call when none was answered for a whole lease."""
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            number += 1
            self._beats[number] = loop.time()
            self.send(wire.NodeSessionRequest(heartbeat=wire.Heartbeat(number=number)))
            await asyncio.sleep(self._registration.heartbeat_interval_s)
            if self._lease.left_s() < 0:
                _log.warning("coordinator: no heartbeat was answered for %.1f s", self._registration.lease_s)
                call.cancel()
                return

    def _handle(self, command: wire.NodeSessionResponse) -> None:
        kind = command.WhichOneof("command")
        if kind == "heartbeat":
            self._answered(command.heartbeat.number)
        elif kind == "prepare":
            self._stop_finishing()
            self.send(wire.NodeSessionRequest(prepared=self._node.prepare(command.prepare)))
        elif kind == "finish":
            self._stop_finishing()
            self._finishing = asyncio.create_task(self._finish(command.finish))
        elif kind == "commit":
            self._stop_finishing()
            self.send(wire.NodeSessionRequest(committed=self._node.commit(command.commit)))
        elif kind == "evict":
            self._node.evict(command.evict)
        else:
            _log.warning("coordinator: a command of a newer version was skipped")

    def _answered(self, number: int) -> None:
        sent = self._beats.get(number)
        if sent is not None:
            self._beats = {later: when for later, when in self._beats.items() if later > number}
            self._lease.renew(sent)

    async def _finish(self, command: wire.Finish) -> None:
        self.send(wire.NodeSessionRequest(finished=await self._node.finish(command)))

    def _stop_finishing(self) -> None:
        if self._finishing is not None:
            self._finishing.cancel()
            self._finishing = None


class _Complaint:
    """Logs the same trouble at once, then every few seconds, and that it is over."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._logged = 0.0

    def about(self, error: EpmeshError) -> None:
        """There is trouble."""
        now = asyncio.get_running_loop().time()
        if self._since is None:
            self._since = now
        elif now - self._logged < _LOG_EVERY_S:
            return
        first, self._logged = self._logged == 0, now
        # At the very first try it may just be starting, as this node is.
        _log.log(logging.INFO if first else logging.WARNING, "coordinator is away, trying again: %s", error)

    def over(self, address: str) -> None:
        """There is none any more."""
        if self._since is not None:
            _log.info("coordinator at %s is there", address)
        self._since = None
