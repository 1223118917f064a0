"""Every error epmesh raises, and how it crosses a wire.

::

    EpmeshError
    |-- PeerLost           a member of the group died                      .rank .ranks .epoch
    |-- StaleEpoch         the mesh went on to another epoch               .epoch
    |-- ExpertUnavailable  an expert has no living holder                  .experts
    |-- DeadlineExceeded   somebody is late, not dead                      .rank .sequence
    |-- Overloaded         a byte budget is full, retry later              .retry_after_s
    |-- InvalidRequest     wrong, and wrong again if repeated (ValueError)
    |-- Unauthenticated    the caller did not prove who it is
    |-- NotReady           not formed yet
    `-- MeshUnavailable    coordinator or node service out of reach

An error crosses gRPC as status code plus the trailing metadata ``epmesh-error-bin``, and ZeroMQ as the frame header's
``error``; both carry the message :class:`epmesh.v1.error_pb2.Error`. ``_WIRE`` below is the one table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import grpc

from epmesh.v1 import error_pb2

METADATA_KEY = "epmesh-error-bin"
MAX_MESSAGE_CHARS = 4096


class EpmeshError(Exception):
    """Base of all errors of this package."""

    def to_proto(self) -> error_pb2.Error:
        """The error as it crosses a wire."""
        wire = _WIRE_BY_CLASS.get(type(self))
        error = error_pb2.Error(
            code=wire.code if wire else error_pb2.ERROR_CODE_UNSPECIFIED, message=str(self)[:MAX_MESSAGE_CHARS]
        )
        self._fill(error)
        return error

    def _fill(self, error: error_pb2.Error) -> None:
        """Writes the class's own fields into `error`."""

    def __reduce__(self) -> tuple[Callable[[bytes], EpmeshError], tuple[bytes]]:
        return _unpickle, (self.to_proto().SerializeToString(),)


class PeerLost(EpmeshError):
    """A member of the group died; call ``wait_ready`` and go on without it.

    Attributes:
        rank: lowest lost global rank.
        ranks: all lost global ranks, ascending.
        epoch: the epoch in which they were lost.
    """

    def __init__(self, ranks: Iterable[int], epoch: int, message: str = "") -> None:
        self.ranks = tuple(sorted(ranks))
        self.rank = self.ranks[0] if self.ranks else -1
        self.epoch = epoch
        super().__init__(message or f"lost {_ranks_text(self.ranks)} in epoch {epoch}; call wait_ready() and go on")

    def _fill(self, error: error_pb2.Error) -> None:
        error.ranks.extend(self.ranks)
        error.epoch = self.epoch


class StaleEpoch(EpmeshError):
    """The caller's epoch is over; call ``wait_ready`` and repeat from ``completed``.

    Attributes:
        epoch: the newest epoch known where the error was raised.
    """

    def __init__(self, epoch: int, message: str = "") -> None:
        self.epoch = epoch
        super().__init__(message or f"the mesh is in epoch {epoch}; call wait_ready()")

    def _fill(self, error: error_pb2.Error) -> None:
        error.epoch = self.epoch


class ExpertUnavailable(EpmeshError):
    """Rows were routed to experts that no living rank holds.

    Attributes:
        experts: their logical ids, ascending.
    """

    def __init__(self, experts: Iterable[int], message: str = "") -> None:
        self.experts = tuple(sorted(experts))
        super().__init__(message or f"no living rank holds expert {', '.join(map(str, self.experts[:16]))}")

    def _fill(self, error: error_pb2.Error) -> None:
        error.experts.extend(self.experts)


class DeadlineExceeded(EpmeshError):
    """Somebody did not arrive in time. Late is not dead: the group goes on with the next sequence number.

    Attributes:
        rank: lowest late global rank; -1 where no rank is to blame.
        sequence: number of the exchange in its group; 0 where there is none.
    """

    def __init__(self, rank: int = -1, sequence: int = 0, message: str = "") -> None:
        self.rank = rank
        self.sequence = sequence
        super().__init__(message or f"rank {rank} did not arrive at sequence {sequence} in time")

    def _fill(self, error: error_pb2.Error) -> None:
        if self.rank >= 0:
            error.ranks.append(self.rank)
        error.sequence = self.sequence


class Overloaded(EpmeshError):
    """A byte budget or a queue is full.

    Attributes:
        retry_after_s: seconds after which a retry may succeed.
    """

    def __init__(self, retry_after_s: float, message: str = "") -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message or f"overloaded; retry after {retry_after_s:.3f} s")

    def _fill(self, error: error_pb2.Error) -> None:
        error.retry_after_s = self.retry_after_s


class InvalidRequest(EpmeshError, ValueError):
    """The request is wrong and would be wrong again; the text names the value and the mend."""


class Unauthenticated(EpmeshError):
    """The caller did not prove who it is."""


class NotReady(EpmeshError):
    """What was asked for is not formed yet."""


class MeshUnavailable(EpmeshError):
    """The mesh, its coordinator or a node service cannot be reached, or this process is no member any more."""


class _Wire:
    """One row of the table: class, code on the wire, gRPC status, constructor from the message."""

    def __init__(
        self,
        cls: type[EpmeshError],
        code: error_pb2.ErrorCode,
        status: grpc.StatusCode,
        build: Callable[[error_pb2.Error], EpmeshError],
    ) -> None:
        self.cls, self.code, self.status, self.build = cls, code, status, build


_WIRE = (
    _Wire(
        PeerLost,
        error_pb2.ERROR_CODE_PEER_LOST,
        grpc.StatusCode.ABORTED,
        lambda e: PeerLost(e.ranks, e.epoch, e.message),
    ),
    _Wire(
        StaleEpoch,
        error_pb2.ERROR_CODE_STALE_EPOCH,
        grpc.StatusCode.FAILED_PRECONDITION,
        lambda e: StaleEpoch(e.epoch, e.message),
    ),
    _Wire(
        ExpertUnavailable,
        error_pb2.ERROR_CODE_EXPERT_UNAVAILABLE,
        grpc.StatusCode.UNAVAILABLE,
        lambda e: ExpertUnavailable(e.experts, e.message),
    ),
    _Wire(
        DeadlineExceeded,
        error_pb2.ERROR_CODE_DEADLINE_EXCEEDED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        lambda e: DeadlineExceeded(e.ranks[0] if e.ranks else -1, e.sequence, e.message),
    ),
    _Wire(
        Overloaded,
        error_pb2.ERROR_CODE_OVERLOADED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        lambda e: Overloaded(e.retry_after_s, e.message),
    ),
    _Wire(
        InvalidRequest,
        error_pb2.ERROR_CODE_INVALID_REQUEST,
        grpc.StatusCode.INVALID_ARGUMENT,
        lambda e: InvalidRequest(e.message),
    ),
    _Wire(
        Unauthenticated,
        error_pb2.ERROR_CODE_UNAUTHENTICATED,
        grpc.StatusCode.UNAUTHENTICATED,
        lambda e: Unauthenticated(e.message),
    ),
    _Wire(
        NotReady,
        error_pb2.ERROR_CODE_NOT_READY,
        grpc.StatusCode.UNAVAILABLE,
        lambda e: NotReady(e.message),
    ),
    _Wire(
        MeshUnavailable,
        error_pb2.ERROR_CODE_MESH_UNAVAILABLE,
        grpc.StatusCode.UNAVAILABLE,
        lambda e: MeshUnavailable(e.message),
    ),
)
_WIRE_BY_CLASS = {wire.cls: wire for wire in _WIRE}
_WIRE_BY_CODE = {wire.code: wire for wire in _WIRE}
_FALLBACK: dict[grpc.StatusCode, Callable[[str], EpmeshError]] = {
    grpc.StatusCode.DEADLINE_EXCEEDED: lambda text: DeadlineExceeded(message=text),
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: lambda text: Overloaded(1.0, text),
    grpc.StatusCode.UNIMPLEMENTED: lambda text: InvalidRequest(f"{text} (client and service of different versions?)"),
}


def from_proto(error: error_pb2.Error) -> EpmeshError:
    """The typed error for a message; a code this version does not know becomes a plain `EpmeshError`."""
    wire = _WIRE_BY_CODE.get(error.code)
    return wire.build(error) if wire else EpmeshError(error.message)


def status_code(error: EpmeshError) -> grpc.StatusCode:
    """The gRPC status that goes with `error`."""
    wire = _WIRE_BY_CLASS.get(type(error))
    return wire.status if wire else grpc.StatusCode.UNKNOWN


def from_rpc_error(error: grpc.RpcError, what: str) -> EpmeshError:
    """The typed error for a failed call; `what` says what was called, for the text.

    Raise it from the call's error: ``raise from_rpc_error(exc, "RegisterNode at 10.0.0.1:7401") from exc``.
    """
    trailing: Iterable[tuple[str, bytes]] = getattr(error, "trailing_metadata", tuple)() or ()
    for key, value in trailing:
        if key == METADATA_KEY:
            return from_proto(error_pb2.Error.FromString(value))
    status = error.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = error.details() if hasattr(error, "details") else str(error)
    build = _FALLBACK.get(status, MeshUnavailable)
    return build(f"{what}: {details} ({status.name})")


def _unpickle(data: bytes) -> EpmeshError:
    return from_proto(error_pb2.Error.FromString(data))


def _ranks_text(ranks: tuple[int, ...]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + ", ".join(map(str, ranks[:16])) + (", ..." if len(ranks) > 16 else "")
