"""A driver's hold on a rank: the stream that keeps it, and what ends when it does.

Where the files of a certificate are replaced, another stream takes the hold over, on a connection that shows the new
one. The session is over once no stream holds the rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, TypeVar

import grpc

from epmesh import errors
from epmesh.addresses import split_address
from epmesh.channels import NodeAddress, RenewedChannel, open_channel
from epmesh.driver_memory import DriverMemory
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, NotReady
from epmesh.local_sockets import why_not_ours
from epmesh.tls import TlsFiles, node_name
from epmesh.tls_refusals import explained
from epmesh.v1 import (
    communicator_service_pb2,
    communicator_service_pb2_grpc,
    discovery_service_pb2,
    discovery_service_pb2_grpc,
    rank_service_pb2,
    rank_service_pb2_grpc,
)
from epmesh.version import VERSION, check_compatible
from epmesh.view import View

_log = logging.getLogger(__name__)

RPC_TIMEOUT_S = 2.0
_RETRY_S = 0.05
_RENEW_S = 1.0  # how often the files of a certificate are looked at
_MAX_DATAGRAM = 65_536
_T = TypeVar("_T")


class DriverSession:
    """A rank's driver. A thread of its own hears of the end, which fails whatever is waited for at once."""

    def __init__(self, node: NodeAddress, rank: int, driver: str, timeout_s: float, tls: TlsFiles | None) -> None:
        """Becomes the rank's driver.

        Args:
            node: the rank's own node service.
            driver: who drives, for people.
            tls: what this process shows itself with.

        Raises:
            InvalidRequest: another driver has the rank, or it cannot be driven.
            NotReady: the rank is not there yet.
            MeshUnavailable: the node service did not answer within `timeout_s`.
        """
        self.rank = rank
        self.node, self.tls = node, tls
        self._lock = threading.Lock()  # guards what follows
        self._error: EpmeshError | None = None
        self._watchers: dict[int, Callable[[], object]] = {}
        self._detached = False
        self._under_way = 0
        self._held = False
        self._streams: dict[Any, threading.Thread] = {}  # that hold the rank, or ask for it, and who reads them
        self._over = threading.Event()
        self._opening = threading.Lock()  # guards _channels
        self._channels = RenewedChannel(node, tls)
        self._held_on = self._channels.get()
        self._renewing: threading.Thread | None = None
        request = communicator_service_pb2.AttachRankRequest(rank=rank, driver=driver, version=VERSION)
        try:
            self.granted = self._hold(self._held_on, request).result(timeout_s)
        except TimeoutError:
            self._hang_up()
            raise MeshUnavailable(f"AttachRank at {node.address}: no answer within {timeout_s:g} s") from None
        except BaseException:
            self._hang_up()
            raise
        if tls is not None:
            self._renewing = threading.Thread(target=self._renew, name="epmesh-driver-certificate", daemon=True)
            self._renewing.start()

    @property
    def channel(self) -> grpc.Channel:
        """For a call that is made now: it shows the certificate of now."""
        with self._opening:
            return self._channels.get(in_use=self._held_on)

    @property
    def error(self) -> EpmeshError | None:
        """Why the session is over, if it is."""
        return self._error

    def wait(self, future: Future[_T], timeout_s: float) -> _T:
        """The future's result.

        Raises:
            EpmeshError: its error, or why the session ended before it was done.
            DeadlineExceeded: it was not done within `timeout_s`.
        """
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        with self.watched(done.set):
            done.wait(timeout_s)
        if not future.done():
            future.cancel()
            self.give_up()
            raise self._error or DeadlineExceeded(
                self.rank, 0, f"rank {self.rank} did not answer within {timeout_s:g} s"
            )
        try:
            return future.result()
        except CancelledError:
            raise MeshUnavailable(f"the call on rank {self.rank} was cancelled") from None

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """A call is under way inside the block; one that is left by anything but an answer is so for good.

        Raises:
            MeshUnavailable: the rank was given back.
        """
        with self._lock:  # the lock of `detach`: it either sees this call, or comes first and the call is never made
            if self._detached:
                raise self._given_back()
            self._under_way += 1
        try:
            yield
        except EpmeshError:
            self._answered()
            raise
        self._answered()

    def give_up(self) -> None:
        """A call was not answered: the rank may be in it still."""
        with self._lock:
            self._under_way += 1

    def _answered(self) -> None:
        with self._lock:
            self._under_way -= 1

    @contextlib.contextmanager
    def watched(self, on_end: Callable[[], object]) -> Iterator[None]:
        """Has `on_end` called should the session end meanwhile; at once if it has."""
        key = id(on_end)
        with self._lock:
            over = self._error is not None
            self._watchers[key] = on_end
        if over:
            on_end()
        try:
            yield
        finally:
            with self._lock:
                self._watchers.pop(key, None)

    def end_within(self, timeout_s: float) -> EpmeshError | None:
        """Why the session is over, if it is before `timeout_s` passed."""
        over = threading.Event()
        with self.watched(over.set):
            over.wait(timeout_s)
        return self._error

    def open_memory(self) -> DriverMemory:
        """The memory shared with the rank.

        Raises:
            MeshUnavailable: the node's descriptor socket is not to be had here: another host, most likely.
        """
        path = self.granted.descriptor_socket
        problem = why_not_ours(path)
        if problem is not None:
            raise MeshUnavailable(f"no memory is shared with the rank: {problem}")
        request = rank_service_pb2.DescriptorRequest(
            token=self.granted.token, driver_buffers=rank_service_pb2.DriverBuffers()
        )
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
            connection.settimeout(RPC_TIMEOUT_S)
            try:
                connection.connect(path)
                connection.send(request.SerializeToString())
                data, fds, _, _ = socket.recv_fds(connection, _MAX_DATAGRAM, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError as exc:
                raise MeshUnavailable(f"the node service's descriptor socket failed: {exc}") from exc
        return _mapped(rank_service_pb2.DescriptorResponse.FromString(data), fds)

    def detach(self) -> None:
        """Gives the rank back; idempotent, and never raises for a service that is gone.

        In good order, unless the rank is in the middle of a call: nobody can take it out of there, so it ends with its
        driver, as if that had died.
        """
        with self._lock:
            if self._detached:
                return
            self._detached = True
            orderly = self._error is None and not self._under_way
        if orderly:
            request = communicator_service_pb2.DetachRankRequest(rank=self.rank, token=self.granted.token)
            stub = communicator_service_pb2_grpc.CommunicatorServiceStub(self.channel)
            try:
                stub.DetachRank(request, timeout=RPC_TIMEOUT_S)
            except grpc.RpcError as exc:
                _log.warning("rank=%d detach.failed: %s", self.rank, errors.from_rpc_error(exc, "DetachRank"))
        self._hang_up()

    def _hang_up(self) -> None:
        with self._lock:
            self._detached = True
            streams = dict(self._streams)
        self._over.set()
        for stream in streams:
            stream.cancel()
        for thread in (*streams.values(), self._renewing):
            if thread is not None:
                thread.join(RPC_TIMEOUT_S)
        self._channels.close()

    def _hold(
        self, channel: grpc.Channel, request: communicator_service_pb2.AttachRankRequest
    ) -> Future[communicator_service_pb2.AttachRankResponse]:
        """Opens a stream that holds the rank; the future has its answer.

        Raises:
            MeshUnavailable: the rank was given back.
        """
        granted: Future[communicator_service_pb2.AttachRankResponse] = Future()
        with self._lock:
            if self._detached:
                raise self._given_back()
            stream = communicator_service_pb2_grpc.CommunicatorServiceStub(channel).AttachRank(request)
            thread = threading.Thread(target=self._read, args=(stream, granted), name="epmesh-driver", daemon=True)
            thread.start()  # still under the lock: whoever hangs up waits for the thread, which must have begun
            self._streams[stream] = thread
        return granted

    def _renew(self) -> None:
        """Has the rank held on the channel of now, whenever that is another one, until the session is over."""
        said = ""
        while not self._over.wait(_RENEW_S):
            channel = self.channel
            if channel is self._held_on:
                continue
            request = communicator_service_pb2.AttachRankRequest(
                rank=self.rank, version=VERSION, token=self.granted.token
            )
            try:
                granted = self._hold(channel, request)
            except MeshUnavailable:  # given back meanwhile
                return
            try:
                # However long it takes: once the service has the request, the rank may hang on this stream alone. Of a
                # service that is gone keepalive tells, and whoever gives the rank back ends the stream.
                granted.result()
                self._held_on, said = channel, ""
            except EpmeshError as exc:
                if str(exc) != said and not self._over.is_set():
                    _log.warning("rank=%d renew.failed: %s; the stream from before goes on", self.rank, exc)
                said = str(exc)

    def _read(self, stream: Any, granted: Future[communicator_service_pb2.AttachRankResponse]) -> None:
        error: EpmeshError = self._given_back()
        try:
            for answer in stream:
                self._held = True
                if not granted.done():
                    granted.set_result(answer)
        except grpc.RpcError as exc:
            error = errors.from_rpc_error(exc, f"AttachRank at {self.node.address}")
        with self._lock:
            del self._streams[stream]
            over = not self._streams
        if over:
            self._end(error)
        if not granted.done():
            granted.set_exception(error)

    def _given_back(self) -> MeshUnavailable:
        return MeshUnavailable(f"rank {self.rank} was given back; attach again")

    def _end(self, error: EpmeshError) -> None:
        with self._lock:
            self._error = error
            watchers = list(self._watchers.values())
        self._over.set()
        if self._held and not self._detached:
            _log.warning("rank=%d driver.ended: %s", self.rank, error)
        for on_end in watchers:
            on_end()


def open_session(address: str, rank: int, driver: str, timeout_s: float, tls: TlsFiles | None = None) -> DriverSession:
    """Becomes the driver of `rank`, through any node service of its mesh; waits until the rank is there.

    Raises:
        InvalidRequest: the address is none, another driver has the rank, or it cannot be driven.
        Unauthenticated: the node service refuses this process's certificate, or its own cannot be believed.
        MeshUnavailable: no such rank could be had within `timeout_s`.
    """
    split_address(address, "the node service's address")
    deadline = time.monotonic() + timeout_s
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            node = find_node(address, rank, min(left, RPC_TIMEOUT_S), tls)
            return DriverSession(node, rank, driver, left, tls)
        except (NotReady, MeshUnavailable) as exc:
            if time.monotonic() + _RETRY_S > deadline:
                raise MeshUnavailable(f"rank {rank} not to be had within {timeout_s:g} s: {exc}") from exc
        threading.Event().wait(_RETRY_S)


def find_node(address: str, rank: int, timeout_s: float, tls: TlsFiles | None = None) -> NodeAddress:
    """The node service that has `rank`, by any of its mesh.

    Raises:
        NotReady: there is no view yet, or no such node in it.
        InvalidRequest: the node service has another major or minor version.
        MeshUnavailable: nobody answered.
    """
    with open_channel(address, tls=tls) as channel:
        try:
            node = rank_service_pb2_grpc.RankServiceStub(channel).DescribeNode(
                rank_service_pb2.DescribeNodeRequest(), timeout=timeout_s
            )
            check_compatible(VERSION, node.version, f"node service at {address}")
            request = discovery_service_pb2.GetViewRequest()
            message = discovery_service_pb2_grpc.DiscoveryServiceStub(channel).GetView(request, timeout=timeout_s).view
        except grpc.RpcError as exc:
            error = errors.from_rpc_error(exc, f"node service at {address}")
            if exc.code() is grpc.StatusCode.UNIMPLEMENTED:
                text = f"{address} is no node service (a coordinator, perhaps); give the address of one"
                raise InvalidRequest(f"{text}: {error}") from exc
            error = explained(error, address, tls)
            if not isinstance(error, MeshUnavailable | DeadlineExceeded):
                raise error from exc
            raise MeshUnavailable(f"{error}; is `epmesh serve` running there?") from exc
    if not node.registered or not message.stride:
        raise NotReady(f"the node service at {address} has no view yet")
    view = View.from_proto(message)
    if view.slot_of(rank) == node.slot:
        return NodeAddress(address)
    for other in view.nodes:
        if other.slot == view.slot_of(rank):
            return NodeAddress(other.address, node_name(other.node_id))
    slots = [other.slot for other in view.nodes]
    raise NotReady(f"rank {rank} belongs to slot {view.slot_of(rank)}, where no node is; there are slots {slots}")


def driver_text() -> str:
    """Who this process is, for people."""
    return f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0] or sys.executable).name})"[:256]


def _mapped(response: rank_service_pb2.DescriptorResponse, fds: list[int]) -> DriverMemory:
    if response.HasField("error"):
        raise MeshUnavailable(f"no shared memory: {errors.from_proto(response.error)}")
    if len(fds) != 1:
        raise InvalidRequest("the node service sent no descriptor; is it of another version?")
    try:
        return DriverMemory(fds[0], response.memfd_bytes, is_driver=True)
    except OSError as exc:
        raise MeshUnavailable(f"cannot map {response.memfd_bytes} bytes: {exc}") from exc
    finally:
        os.close(fds[0])
