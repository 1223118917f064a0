"""How a driver's calls reach its rank: ZeroMQ with tensors in shared memory or as frames, or gRPC.

The rank does the same whichever way a call came. `DriverTransport.call` is the whole interface.
"""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from epmesh import errors
from epmesh.communicator_methods import CHUNK_BYTES, METHODS, Assembly, Method, messages
from epmesh.driver_memory import INLINE, DriverMemory
from epmesh.driver_session import DriverSession
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, NotReady, PeerLost
from epmesh.frames import MAX_TENSOR_BYTES, num_bytes
from epmesh.front import FrontClient, FrontPeer, FrontReply
from epmesh.tensors import Bytes
from epmesh.v1 import communicator_service_pb2, frame_pb2, front_pb2

ORDER = ("shm", "zmq", "grpc")
_PROBE_S, _RETRY_S = 1.5, 0.02
_SETTLE_S = 1.0
_MAX_REPLY_BYTES = 4 * MAX_TENSOR_BYTES


@dataclass
class Reply:
    """What a call gave.

    Attributes:
        result: besides tensors.
        metas, tensors: what came, in order; valid until `close`.
    """

    result: front_pb2.DriverResult
    metas: Sequence[frame_pb2.TensorMeta]
    tensors: Sequence[memoryview]
    close: Callable[[], None] = field(default=lambda: None)


class DriverTransport(abc.ABC):
    """Carries calls to one rank. Any thread may call."""

    name: str

    @abc.abstractmethod
    def call(
        self,
        call: front_pb2.DriverCall,
        metas: Sequence[frame_pb2.TensorMeta],
        tensors: Sequence[Bytes],
        timeout_s: float,
    ) -> Reply:
        """Makes a call and waits for what it gives.

        Args:
            call: token is filled in here.
            metas, tensors: the tensors that go along.

        Raises:
            EpmeshError: the call's own error; `MeshUnavailable` where the rank or its node service is gone.
        """

    def close(self) -> None:
        """Releases what is open; idempotent."""


class FrontTransport(DriverTransport):
    """ZeroMQ to the rank's front; with `memory`, tensors lie there as long as it has room.

    Attributes:
        settle_s: how long after a connection broke the session may take to say why.
    """

    def __init__(self, session: DriverSession, memory: DriverMemory | None) -> None:
        granted = session.granted
        self.name = "zmq" if memory is None else "shm"
        self._session = session
        self._memory = memory
        self._client = FrontClient(granted.mesh_id, tls=session.tls)
        self._peer = FrontPeer(
            session.rank, granted.incarnation, granted.front_endpoint, granted.curve_key, session.node
        )
        self.settle_s = 0.0
        self._lock = threading.Lock()  # guards _read
        self._read: list[int] = []  # places in the rank's half that were read, and not given back yet

    def call(
        self,
        call: front_pb2.DriverCall,
        metas: Sequence[frame_pb2.TensorMeta],
        tensors: Sequence[Bytes],
        timeout_s: float,
    ) -> Reply:
        call.token = self._session.granted.token
        request = front_pb2.FrontRequest(driver_call=call, tensors=metas)
        frames = [tensor.data for tensor in tensors]
        if self._memory is not None:
            request.driver_call.shared_memory = True
            request.places.extend(self._memory.write(tensor) for tensor in tensors)
            frames = [frame for frame, place in zip(frames, request.places, strict=True) if place == INLINE]
            with self._lock:
                request.released.extend(self._read)
                self._read.clear()
        # The session's clock is the one that decides; the client's own is there to forget the request.
        future = self._client.call(self._peer, request, frames, timeout_s=timeout_s + _SETTLE_S)
        try:
            reply = self._session.wait(future, timeout_s)
        except PeerLost as exc:
            raise self._gone(exc) from exc
        finally:
            if self._memory is not None and future.done() and not future.cancelled():  # the rank reads no more
                self._memory.free(place for place in request.places if place != INLINE)
        return self._taken_in(reply)

    def close(self) -> None:
        self._client.close()
        if self._memory is not None:
            self._memory.close()

    def _gone(self, error: PeerLost) -> EpmeshError:
        """What `error` means to a driver: its own rank is out of reach, or a member of its group is lost."""
        if self._session.rank not in error.ranks:
            return error
        return self._session.end_within(self.settle_s) or MeshUnavailable(f"{error}; attach again")

    def _taken_in(self, reply: FrontReply) -> Reply:
        response, frames = reply.response, iter(reply.tensors)
        tensors, places = [], []
        for index, meta in enumerate(response.tensors):
            place = response.places[index] if response.places else INLINE
            if place == INLINE:
                tensors.append(next(frames))
            elif self._memory is None:
                raise InvalidRequest("the rank answered by shared memory that this driver does not have")
            else:
                tensors.append(self._memory.read(place, num_bytes(meta)).data)
                places.append(place)
        return Reply(response.driver_result, response.tensors, tensors, lambda: self._release(places))

    def _release(self, places: list[int]) -> None:
        with self._lock:
            self._read.extend(places)


class GrpcTransport(DriverTransport):
    """CommunicatorService of the rank's node service."""

    name = "grpc"

    def __init__(self, session: DriverSession) -> None:
        self._session = session
        self._calls = _Calls(session.channel)

    def call(
        self,
        call: front_pb2.DriverCall,
        metas: Sequence[frame_pb2.TensorMeta],
        tensors: Sequence[Bytes],
        timeout_s: float,
    ) -> Reply:
        method = METHODS[call.arguments.WhichOneof("method") or ""]
        header = communicator_service_pb2.CallHeader(
            rank=self._session.rank, token=self._session.granted.token, group=call.group, tensors=metas
        )
        if call.HasField("refusal"):
            header.refusal.CopyFrom(call.refusal)
        first = {"call": header, "arguments": getattr(call.arguments, method.field)}
        requests = messages(method.request, first, (tensor.data for tensor in tensors))
        if sum(tensor.size for tensor in tensors) <= CHUNK_BYTES:
            stream = self._current().short[method.field](next(requests), timeout=timeout_s)
        else:
            stream = self._current().long[method.field](requests, timeout=timeout_s)
        try:
            with self._session.watched(stream.cancel):
                return _assembled(stream)
        except grpc.RpcError as exc:
            raise self._meaning(exc, method) from exc
        except BaseException:
            stream.cancel()
            raise

    def _current(self) -> _Calls:
        channel = self._session.channel
        if self._calls.channel is not channel:
            self._calls = _Calls(channel)
        return self._calls

    def _meaning(self, exc: grpc.RpcError, method: Method) -> EpmeshError:
        error = errors.from_rpc_error(exc, method.name)
        if isinstance(error, DeadlineExceeded) and error.sequence == 0 and error.rank < 0:  # gRPC's own
            self._session.give_up()
        if isinstance(error, MeshUnavailable) or self._session.error is not None:
            return self._session.end_within(_SETTLE_S) or error
        return error


class _Calls:
    """The calls of one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.long = {field: _multicallable(channel.stream_stream, each) for field, each in METHODS.items()}
        # The same on the wire; but gRPC starts a thread for every request that is a stream.
        self.short = {field: _multicallable(channel.unary_stream, each) for field, each in METHODS.items()}


def _multicallable(make: Callable[..., Any], method: Method) -> Any:
    return make(
        method.path,
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )


def _assembled(stream: Any) -> Reply:
    result, assembly = None, None
    for response in stream:
        if assembly is None:
            result = response.result
            assembly = Assembly(result.tensors, _MAX_REPLY_BYTES)
        assembly.add(response.data)
    if result is None or assembly is None:
        raise MeshUnavailable("the node service answered with nothing")
    return Reply(result.result, assembly.metas, assembly.tensors())


def choose_transport(session: DriverSession, wanted: str | None, timeout_s: float) -> DriverTransport:
    """The transport called `wanted`, or the first of `ORDER` that works from here.

    Args:
        timeout_s: how long a rank may take that has a front and is not ready yet.

    Raises:
        InvalidRequest: there is none of that name.
        MeshUnavailable: it does not work from here.
    """
    if wanted is not None and wanted not in ORDER:
        raise InvalidRequest(f"transport is {wanted!r}; use one of {', '.join(ORDER)}, or None for the best")
    problems = []
    for name in ORDER if wanted is None else (wanted,):
        try:
            return _opened(session, name, time.monotonic() + timeout_s)
        except (MeshUnavailable, DeadlineExceeded, InvalidRequest) as exc:
            if session.error is not None:
                raise session.error from exc
            problems.append(f"{name}: {exc}")
    raise MeshUnavailable(f"rank {session.rank} cannot be driven from here: {'; '.join(problems)}")


def _opened(session: DriverSession, name: str, deadline: float) -> DriverTransport:
    if name == "grpc":
        transport: DriverTransport = GrpcTransport(session)
    else:
        transport = FrontTransport(session, session.open_memory() if name == "shm" else None)
    try:
        while not _answers(transport):
            if time.monotonic() > deadline:
                raise MeshUnavailable(f"rank {session.rank} was not ready in time")
            threading.Event().wait(_RETRY_S)
    except BaseException:
        transport.close()
        raise
    if isinstance(transport, FrontTransport):
        transport.settle_s = _SETTLE_S
    return transport


def _answers(transport: DriverTransport) -> bool:
    """Whether the rank takes calls; False while it is in the middle of joining.

    Raises:
        MeshUnavailable, DeadlineExceeded: it cannot be reached.
    """
    probe = front_pb2.DriverCall(group="ep")
    probe.arguments.check.SetInParent()
    try:
        transport.call(probe, (), (), _PROBE_S)
    except NotReady:
        return False
    except (MeshUnavailable, DeadlineExceeded):
        raise
    except EpmeshError:
        pass  # an answer, whatever it says
    return True
