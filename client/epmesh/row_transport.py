"""How a router's rows get to nodes: to a serving rank's front over ZeroMQ, or to the node service over gRPC."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc

from epmesh import errors
from epmesh.arrays import Rows
from epmesh.channels import NodeAddress, RenewedChannel
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, PeerLost
from epmesh.forward import NodeCall, Tokens
from epmesh.frames import Buffer, num_bytes
from epmesh.front import FrontClient, FrontPeer, FrontReply
from epmesh.tls import TlsFiles, node_name
from epmesh.v1 import frame_pb2, front_pb2, router_service_pb2, router_service_pb2_grpc
from epmesh.view import NodeInfo, RankInfo

CHUNK_BYTES = 2 << 20
_GRPC_THREADS = 32
_PROBE_TIMEOUT_S = 1.0

Parts = tuple[list[frame_pb2.TensorMeta], list[Buffer]]


class RowTransport(Protocol):
    """Sends calls and brings answers. Any thread may use it.

    Attributes:
        name: what `Router.transport` says.
    """

    name: str

    def send(self, call: NodeCall, parts: Parts, timeout_s: float) -> Future[Any]:
        """Starts a call and returns at once; cancelling the future cancels it at the rank."""

    def sums(self, call: NodeCall, done: Future[Any]) -> Rows:
        """The sums ``[rows, hidden]`` of a future that is done.

        Raises:
            EpmeshError: the call failed: `PeerLost` where nobody can be reached.
        """

    def close(self) -> None:
        """Fails what is pending; idempotent."""


def call_parts(call: NodeCall, tokens: Tokens) -> Parts:
    """Metas and bytes of a call's four tensors: hidden states, weights, ids, targets."""
    rows, targets = call.part.rows, call.part.targets
    tensors = (tokens.hidden.take(rows), tokens.weights.take(rows), tokens.id_rows.take(rows), Rows.of(targets))
    metas = [frame_pb2.TensorMeta(dtype=t.dtype, shape=(len(t), t.width)) for t in tensors]
    return metas, [t.buffer() for t in tensors]


def front_request(call: NodeCall, metas: list[frame_pb2.TensorMeta]) -> front_pb2.FrontRequest:
    """The header of a call to a front, but for what its sender fills in."""
    ranks = [info.rank for info in call.part.ranks]
    rows = front_pb2.ServeRows(layer=call.layer, epoch=call.view.epoch, ranks=ranks)
    return front_pb2.FrontRequest(serve_rows=rows, tensors=metas)


class FrontRows:
    """Over ZeroMQ, to the front of a serving rank."""

    name = "zmq"

    def __init__(self, tls: TlsFiles | None = None) -> None:
        """Connects to nobody yet; `tls` is what this process shows itself with where it leases its key."""
        self._tls = tls
        self._lock = threading.Lock()  # guards what follows
        self._client: FrontClient | None = None
        self._mesh_id = ""
        self._closed = False

    def send(self, call: NodeCall, parts: Parts, timeout_s: float) -> Future[FrontReply]:
        """As `RowTransport`."""
        metas, buffers = parts
        request = front_request(call, metas)
        peer = FrontPeer(
            call.entry.rank,
            call.entry.incarnation,
            call.entry.front_endpoint,
            call.entry.curve_key,
            NodeAddress(call.part.node.address, node_name(call.part.node.node_id)),
        )
        return self._client_for(call.view.mesh_id).call(peer, request, buffers, timeout_s=timeout_s)

    def sums(self, call: NodeCall, done: Future[Any]) -> Rows:
        """As `RowTransport`."""
        reply: FrontReply = done.result()
        metas = reply.response.tensors
        if len(metas) != 1 or len(reply.tensors) != 1:
            raise EpmeshError(f"rank {call.entry.rank} answered {len(metas)} tensors; it should be the sums alone")
        return Rows.over(metas[0].dtype, metas[0].shape, reply.tensors[0])

    def close(self) -> None:
        """As `RowTransport`."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _client_for(self, mesh_id: str) -> FrontClient:
        with self._lock:
            if self._closed:
                raise MeshUnavailable("this router was closed; make another one")
            if self._client is not None and self._mesh_id == mesh_id:
                return self._client
            old, self._client, self._mesh_id = self._client, FrontClient(mesh_id, tls=self._tls), mesh_id
            client = self._client
        if old is not None:
            old.close()
        return client


class GrpcRows:
    """Over gRPC, to the node service, which hands rows to a serving rank of its own."""

    name = "grpc"

    def __init__(self, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._lock = threading.Lock()  # guards what follows
        self._channels: dict[NodeAddress, RenewedChannel] = {}
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(_GRPC_THREADS, "epmesh-router-grpc")

    def send(self, call: NodeCall, parts: Parts, timeout_s: float) -> Future[Rows]:
        """As `RowTransport`."""
        future = _RpcFuture()
        with self._lock:
            if self._pool is None:
                raise MeshUnavailable("this router was closed; make another one")
            rpc = self._stub(call.part.node).ForwardRows(_messages(call, parts), timeout=timeout_s)
            future.rpc = rpc
            self._pool.submit(_receive, call, rpc, future)
        return future

    def sums(self, call: NodeCall, done: Future[Any]) -> Rows:
        """As `RowTransport`."""
        rows: Rows = done.result()
        return rows

    def close(self) -> None:
        """As `RowTransport`."""
        with self._lock:
            pool, self._pool = self._pool, None
            channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            channel.close()
        if pool is not None:
            pool.shutdown(wait=True)

    def _stub(self, node: NodeInfo) -> router_service_pb2_grpc.RouterServiceStub:
        where = NodeAddress(node.address, node_name(node.node_id))
        channel = self._channels.get(where)
        if channel is None:
            channel = self._channels[where] = RenewedChannel(where, self._tls)
        return router_service_pb2_grpc.RouterServiceStub(channel.get())


class _RpcFuture(Future[Rows]):
    """Of one stream; cancelling it cancels the call."""

    rpc: Any = None

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled and self.rpc is not None:
            self.rpc.cancel()
        return cancelled


def _messages(call: NodeCall, parts: Parts) -> Iterator[router_service_pb2.ForwardRowsRequest]:
    metas, buffers = parts
    yield router_service_pb2.ForwardRowsRequest(
        mesh_id=call.view.mesh_id,
        layer=call.layer,
        epoch=call.view.epoch,
        ranks=[info.rank for info in call.part.ranks],
        tensors=metas,
    )
    for buffer in buffers:
        view = memoryview(buffer)
        for start in range(0, len(view), CHUNK_BYTES):
            yield router_service_pb2.ForwardRowsRequest(data=bytes(view[start : start + CHUNK_BYTES]))


def _receive(call: NodeCall, rpc: Any, future: Future[Rows]) -> None:
    """Reads a stream of answers into `future`."""
    try:
        result: Rows | EpmeshError = _read_sums(call, rpc)
    except grpc.RpcError as exc:
        result = _rpc_failure(call, exc)
    except EpmeshError as exc:
        rpc.cancel()
        result = exc
    with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
        future.set_exception(result) if isinstance(result, EpmeshError) else future.set_result(result)


def _read_sums(call: NodeCall, rpc: Iterator[router_service_pb2.ForwardRowsResponse]) -> Rows:
    first = next(rpc, None)
    if first is None or len(first.tensors) != 1:
        raise EpmeshError(f"node {call.part.node.slot} answered without sums; see its log")
    meta = first.tensors[0]
    if len(meta.shape) != 2 or meta.shape[0] != len(call.part.rows):
        raise EpmeshError(f"node {call.part.node.slot} answered {list(meta.shape)} for {len(call.part.rows)} rows")
    data = bytearray(first.data)
    size = num_bytes(meta)
    for message in rpc:
        data += message.data
        if len(data) > size:
            raise EpmeshError(f"node {call.part.node.slot} answered more than the {size} bytes it announced")
    return Rows.over(meta.dtype, meta.shape, data)


def _rpc_failure(call: NodeCall, error: Any) -> EpmeshError:
    """Typed; a node that cannot be reached has lost its ranks, as far as this router can tell."""
    typed = errors.from_rpc_error(error, f"ForwardRows at {call.part.node.address}")
    described = any(key == errors.METADATA_KEY for key, _ in error.trailing_metadata() or ())
    if isinstance(typed, MeshUnavailable) and not described:
        return PeerLost([info.rank for info in call.part.ranks], 0, str(typed))
    if isinstance(typed, DeadlineExceeded) and typed.rank < 0:
        return DeadlineExceeded(call.entry.rank, 0, f"node {call.part.node.slot} did not answer in time")
    return typed


def fronts_reachable(ranks: Sequence[RankInfo], timeout_s: float = _PROBE_TIMEOUT_S) -> bool:
    """Whether a connection to the front of one of these ranks comes about in time; all are tried at once."""
    selector, deadline = selectors.DefaultSelector(), time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        stack.callback(selector.close)
        for info in ranks:
            with contextlib.suppress(OSError, ValueError):  # an endpoint that is no address cannot be reached
                selector.register(stack.enter_context(_begin_connect(info)), selectors.EVENT_WRITE)
        left_s = timeout_s
        while selector.get_map() and left_s > 0:
            left_s = max(0.0, deadline - time.monotonic())  # and a last look, where this thread came late to it
            for key, _ in selector.select(left_s):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    return True
                selector.unregister(sock)
    return False


def _begin_connect(info: RankInfo) -> socket.socket:
    """A socket that is being connected to a front.

    Raises:
        OSError: the endpoint cannot be connected to.
        ValueError: it is no address.
    """
    url = urlsplit(info.front_endpoint)
    if url.hostname is None or url.port is None:
        raise ValueError(f"{info.front_endpoint!r} has no host and port")
    family, kind, protocol, _, address = socket.getaddrinfo(url.hostname, url.port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    sock.setblocking(False)
    sock.connect_ex(address)
    return sock


def check_transport(name: str | None) -> None:
    """Refuses a name that is none.

    Raises:
        InvalidRequest: it is not None, "zmq" or "grpc".
    """
    if name not in (None, "zmq", "grpc"):
        raise InvalidRequest(f"transport is {name!r}; it must be 'zmq', 'grpc' or None, which tries both in this order")
