"""A rank's session with its node service: who it is, the newest view, its control page, descriptors.

The stream is read by a thread of its own; what matters while a call waits (fences, losses) stands in the control page,
which needs no thread.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from epmesh import errors
from epmesh.channels import UNIX_PREFIX, open_channel
from epmesh.driver_memory import DriverMemory
from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, Unauthenticated
from epmesh.local_sockets import why_not_ours
from epmesh.tls import TlsFiles
from epmesh.tls_refusals import explained
from epmesh.v1 import membership_service_pb2, rank_service_pb2, rank_service_pb2_grpc
from epmesh.version import VERSION, check_compatible
from epmesh.view import RankMode, View
from epmesh_server.ranks.curve_door import CurveDoor
from epmesh_server.ranks.links import Sender
from epmesh_server.shared_memory import MAX_RANKS, ControlPage

_log = logging.getLogger(__name__)

RPC_TIMEOUT_S = 2.0
_LEAVE_WITHIN_S = 6.0
_MAX_DATAGRAM, _MAX_DESCRIPTORS = 65_536, 253


def describe_node(address: str, timeout_s: float, tls: TlsFiles | None = None) -> rank_service_pb2.DescribeNodeResponse:
    """Asks the node service at `address` who it is, until it is registered with its coordinator.

    Raises:
        Unauthenticated: the node service refuses this process's certificate, or its own cannot be believed; or a unix
            socket is not this user's alone.
        InvalidRequest: the node service has another major or minor version.
        MeshUnavailable: nobody answered, or no coordinator accepted the node, within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    local = address.removeprefix(UNIX_PREFIX) if address.startswith(UNIX_PREFIX) else None
    with open_channel(address, tls=tls) as channel:
        stub = rank_service_pb2_grpc.RankServiceStub(channel)
        problem: str = "no answer"
        while (left := deadline - time.monotonic()) > 0:
            if local is not None and os.path.lexists(local):  # it may come later
                _check_ours(local)
            try:
                node = stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=min(left, RPC_TIMEOUT_S))
            except grpc.RpcError as exc:
                error = explained(errors.from_rpc_error(exc, "DescribeNode"), address, tls)
                if isinstance(error, Unauthenticated):
                    raise error from exc
                problem = str(error)
            else:
                check_compatible(VERSION, node.version, f"node service at {address}")
                if node.registered:
                    return node
                problem = f"its coordinator at {node.coordinator_address} has not accepted it"
            threading.Event().wait(min(0.05, max(left, 0)))
    raise MeshUnavailable(f"node service at {address}: {problem} within {timeout_s:g} s; is `epmesh serve` running?")


def standing_in(view: View | None, fence: int, sender: Sender) -> bool | None:
    """Whether a sender of link frames is a member. Pure.

    Args:
        view: the newest that arrived here.
        fence: the newest epoch that was prepared here: no member has a view of a later one.
        sender: source, incarnation and membership epoch, as a frame has them.

    Returns:
        `None` where that may be the view which is on its way here.
    """
    source, incarnation, epoch = sender
    if view is not None and epoch == view.membership_epoch:
        return source in view.ranks and view.ranks[source].incarnation == incarnation
    is_to_come = (0 if view is None else view.epoch) < epoch <= fence
    return None if is_to_come and source < MAX_RANKS else False


def _check_ours(path: str) -> None:
    problem = why_not_ours(path)
    if problem is not None:
        raise Unauthenticated(problem)


class RankSession:
    """The open session. `close` it to leave in good order; a process that just ends is a dead rank."""

    def __init__(
        self,
        node: rank_service_pb2.DescribeNodeResponse,
        open_rank: rank_service_pb2.OpenRank,
        timeout_s: float,
        door: CurveDoor | None = None,
    ) -> None:
        """Opens a session; `door` hears of keys before anybody can use a view that has them.

        Raises:
            InvalidRequest: the node refused, for instance because the local rank is taken.
            MeshUnavailable: the node service is on another host, or did not answer within `timeout_s`.
            Unauthenticated: its sockets are another user's, or others can get at them.
        """
        for path in (node.grpc_socket, node.descriptor_socket):
            if not Path(path).exists():
                raise MeshUnavailable(f"{path} is not on this host; join through the node service of this host")
            _check_ours(path)
        self._descriptor_path = node.descriptor_socket
        self._door = door
        self.channel = open_channel(f"unix:{node.grpc_socket}")
        self._requests: queue.SimpleQueue[rank_service_pb2.RankSessionRequest | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards _view, _error, _opened
        self._view: View | None = None
        self._error: EpmeshError | None = None
        self._opened: rank_service_pb2.RankOpened | None = None
        self._closing = False
        self._requests.put(rank_service_pb2.RankSessionRequest(open=open_rank))
        stub = rank_service_pb2_grpc.RankServiceStub(self.channel)
        self._stream = stub.RankSession(iter(self._requests.get, None))
        self._thread = threading.Thread(target=self._read, name="epmesh-session", daemon=True)
        self._thread.start()
        try:
            self._wait_opened(timeout_s)
            self.page, self.wake_fd = self._open_page()
        except Unauthenticated as exc:
            # The token is void because the rank was refused meanwhile; the session says why.
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None, RPC_TIMEOUT_S)
            self._hang_up()
            raise (self.error or exc) from None
        except BaseException:
            self._hang_up()
            raise

    @property
    def rank(self) -> int:
        """The global rank."""
        assert self._opened is not None
        return self._opened.rank

    @property
    def local_rank(self) -> int:
        """The index on the node."""
        assert self._opened is not None
        return self._opened.local_rank

    @property
    def token(self) -> bytes:
        """The secret that the node service and this rank share."""
        assert self._opened is not None
        return self._opened.token

    @property
    def view(self) -> View | None:
        """The newest view that arrived."""
        return self._view

    def standing(self, sender: Sender) -> bool | None:
        """Whether a sender of link frames is a member, as the newest view and the fence say; see `standing_in`."""
        return standing_in(self._view, self.page.fence, sender)

    @property
    def error(self) -> EpmeshError | None:
        """Why the session is over, if it is."""
        return self._error

    def wait_view(self, accept: Callable[[View], bool], timeout_s: float, what: str) -> View:
        """Waits for a view that `accept` takes.

        Raises:
            MeshUnavailable: there was none within `timeout_s`; `what` was waited for.
            EpmeshError: the session ended.
        """

        def found() -> bool:
            return self._error is not None or (self._view is not None and accept(self._view))

        with self._changed:
            done = self._changed.wait_for(found, timeout_s)
            if self._error is not None:
                raise self._error
            if not done or self._view is None:
                seen = f"epoch {self._view.epoch} has ranks {list(self._view.ranks)}" if self._view else "no view came"
                raise MeshUnavailable(f"{what} not within {timeout_s:g} s; {seen}")
            return self._view

    def wait_change(self, timeout_s: float) -> None:
        """Returns at the next notice, or when time is up."""
        with self._changed:
            self._changed.wait(timeout_s)

    def wait_ended(self, timeout_s: float) -> bool:
        """Waits for the end of the session; says whether it came."""
        with self._changed:
            return self._changed.wait_for(lambda: self._error is not None, timeout_s)

    def report_unreachable(self, peers: frozenset[tuple[int, str]]) -> None:
        """Tells the node service which peers (rank, link endpoint) cannot be reached; all of them, every time."""
        report = rank_service_pb2.UnreachablePeers()
        known = self._view.ranks if self._view else {}
        for rank, endpoint in sorted(peers):
            if rank in known and known[rank].link_endpoint == endpoint:
                report.failures.append(
                    membership_service_pb2.LinkFailure(target=rank, target_incarnation=known[rank].incarnation)
                )
        self._requests.put(rank_service_pb2.RankSessionRequest(unreachable=report))

    def report_stats(self, stats: rank_service_pb2.RankStats) -> None:
        """Tells the node service what this rank counted."""
        self._requests.put(rank_service_pb2.RankSessionRequest(stats=stats))

    def update_rank(self, mode: RankMode, front_endpoint: str) -> None:
        """Has later views show this rank in `mode`, with `front_endpoint`; returns at once.

        A view with another mode is one of another membership: whoever calls this waits for it with `wait_view`.
        """
        update = rank_service_pb2.UpdateRank(mode=mode.value, front_endpoint=front_endpoint)
        self._requests.put(rank_service_pb2.RankSessionRequest(update=update))

    def group_buffers(
        self, group_id: int, membership_epoch: int
    ) -> tuple[rank_service_pb2.DescriptorResponse, list[int]]:
        """Fetches a group's buffers: the answer, then one memfd and one eventfd for every local member."""
        wanted = rank_service_pb2.GroupBuffers(group_id=group_id, membership_epoch=membership_epoch)
        return self._descriptors(rank_service_pb2.DescriptorRequest(group_buffers=wanted))

    def serve_buffers(self, membership_epoch: int) -> tuple[rank_service_pb2.DescriptorResponse, list[int]]:
        """Fetches the memory of the node's ranks that serve: the answer, then one memfd."""
        wanted = rank_service_pb2.ServeBuffers(membership_epoch=membership_epoch)
        return self._descriptors(rank_service_pb2.DescriptorRequest(serve_buffers=wanted))

    def driver_memory(self, driver_token: bytes) -> DriverMemory:
        """The memory that this rank shares with its driver.

        Raises:
            MeshUnavailable: there is none to be had.
        """
        wanted = rank_service_pb2.DriverBuffers(driver_token=driver_token)
        answer, (fd,) = self._descriptors(rank_service_pb2.DescriptorRequest(driver_buffers=wanted))
        try:
            return DriverMemory(fd, answer.memfd_bytes, is_driver=False)
        except OSError as exc:
            raise MeshUnavailable(f"rank {self.rank} cannot map {answer.memfd_bytes} bytes: {exc}") from exc
        finally:
            os.close(fd)

    def give_up(self, error: EpmeshError) -> None:
        """Ends every wait of this rank with `error`, if the session is not over anyway; only `close` is left to do."""
        self._end(error)

    def calm(self) -> bool:
        """Takes back wakes of the control page; whether there were any."""
        try:
            return os.eventfd_read(self.wake_fd) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Leaves in good order; idempotent."""
        if self._closing:
            return
        self._closing = True
        self._requests.put(rank_service_pb2.RankSessionRequest(close=rank_service_pb2.CloseRank()))
        self._requests.put(None)
        self._thread.join(_LEAVE_WITHIN_S)  # the stream ends once no view has this rank
        self._hang_up()
        self.page.close()
        os.close(self.wake_fd)

    def _hang_up(self) -> None:
        self._closing = True
        self._requests.put(None)
        self._stream.cancel()
        self._thread.join(RPC_TIMEOUT_S)
        self.channel.close()

    def _wait_opened(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._opened is not None or self._error is not None, timeout_s)
            if self._error is not None:
                raise self._error
            if self._opened is None:
                raise MeshUnavailable(f"the node service granted no rank within {timeout_s:g} s")

    def _read(self) -> None:
        try:
            for response in self._stream:
                self._handle(response)
            self._end(MeshUnavailable("the node service ended the session"))
        except grpc.RpcError as exc:
            self._end(errors.from_rpc_error(exc, "RankSession"))
        except EpmeshError as exc:
            self._end(exc)

    def _handle(self, response: rank_service_pb2.RankSessionResponse) -> None:
        notice = response.WhichOneof("notice")
        if notice == "error":
            raise errors.from_proto(response.error)
        with self._changed:
            if notice == "opened":
                self._opened = response.opened
            elif notice == "view" and (self._view is None or response.view.epoch > self._view.epoch):
                view = View.from_proto(response.view)
                if self._door is not None:
                    self._door.learn(view)
                self._view = view
            elif notice == "client_keys" and self._door is not None:
                self._door.take_leases(response.client_keys)
            self._changed.notify_all()
        self._wake()

    def _end(self, error: EpmeshError) -> None:
        with self._changed:
            if self._error is None and not self._closing:
                _log.warning("rank=%s session.ended: %s", self._opened.rank if self._opened else "?", error)
            self._error = self._error or error
            self._changed.notify_all()
        self._wake()

    def _wake(self) -> None:
        if not self._closing and hasattr(self, "wake_fd"):
            os.eventfd_write(self.wake_fd, 1)

    def _open_page(self) -> tuple[ControlPage, int]:
        request = rank_service_pb2.DescriptorRequest(control_page=rank_service_pb2.ControlPage())
        _, (page_fd, wake_fd) = self._descriptors(request)
        os.set_blocking(wake_fd, False)
        try:
            return ControlPage(page_fd), wake_fd
        finally:
            os.close(page_fd)

    def _descriptors(
        self, request: rank_service_pb2.DescriptorRequest
    ) -> tuple[rank_service_pb2.DescriptorResponse, list[int]]:
        assert self._opened is not None
        request.token = self._opened.token
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(RPC_TIMEOUT_S)
            try:
                connection.connect(self._descriptor_path)
                connection.send(request.SerializeToString())
                data, fds, _, _ = socket.recv_fds(connection, _MAX_DATAGRAM, _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
            except OSError as exc:
                raise MeshUnavailable(f"the node service's descriptor socket failed: {exc}") from exc
        response = rank_service_pb2.DescriptorResponse.FromString(data)
        if response.HasField("error"):
            raise self._cause(errors.from_proto(response.error))
        if not fds:
            raise InvalidRequest("the node service sent no descriptors; is it of another version?")
        return response, fds

    def _cause(self, error: EpmeshError) -> EpmeshError:
        """A token that is no good any more means that the session is over: why, comes on its stream."""
        if isinstance(error, Unauthenticated):
            with self._changed:
                self._changed.wait_for(lambda: self._error is not None, RPC_TIMEOUT_S)
        return self._error or error
