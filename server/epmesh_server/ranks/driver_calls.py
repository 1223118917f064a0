"""What each method of a driver's call does on a communicator."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from epmesh.communicator import Handle
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.frames import num_bytes
from epmesh.v1 import frame_pb2, front_pb2
from epmesh_server.ranks.arguments import Refused
from epmesh_server.ranks.communicator import JoinedCommunicator
from epmesh_server.ranks.point_to_point import Announced
from epmesh_server.ranks.tensors import dtype_from_name

_MAX_OPEN_RECEIVES, _MAX_OPEN_BYTES = 4096, 1 << 32
_MAX_HANDLES = 8  # two are open at most; older ones only say that they are not
_CALL_SLACK_S = 10.0
_POLL_S = 0.05


@dataclass
class Outcome:
    """What a call gave.

    Attributes:
        sequence: number of the exchange.
        completed: of `wait_ready`.
        nothing: the method returned `None`.
        describes: the communicator whose place in its group the answer shows.
    """

    tensors: Sequence[torch.Tensor] = ()
    sequence: int = 0
    completed: int = 0
    nothing: bool = False
    describes: JoinedCommunicator | None = None


@dataclass
class OpenHandles:
    """Handles of a group that the driver was told the numbers of."""

    _handles: dict[int, Handle] = field(default_factory=dict)

    def add(self, handle: Handle) -> int:
        """Remembers a handle; returns its number."""
        while len(self._handles) >= _MAX_HANDLES:
            del self._handles[next(iter(self._handles))]
        self._handles[handle.sequence] = handle
        return handle.sequence

    def get(self, sequence: int) -> Handle:
        """The handle with that number.

        Raises:
            InvalidRequest: there is none.
        """
        handle = self._handles.get(sequence)
        if handle is None:
            raise InvalidRequest(f"exchange {sequence} is not open here; a handle is good for one combine")
        return handle

    def clear(self) -> None:
        """Forgets all."""
        self._handles.clear()


@dataclass(frozen=True)
class _OpenReceive:
    """A receive that the driver opened: the tensor it goes into, and the membership that it ends with."""

    receive: Announced
    tensor: torch.Tensor
    membership_epoch: int


@dataclass
class OpenReceives:
    """Receives of a group that the driver was told the numbers of."""

    _open: dict[int, _OpenReceive] = field(default_factory=dict)
    _last: int = 0

    def open(self, comm: JoinedCommunicator, operations: Sequence[front_pb2.BatchOperation]) -> range:
        """Opens receives; their numbers.

        Raises:
            InvalidRequest: too much would be open at once.
        """
        epoch = comm.view.membership_epoch
        self._open = {number: each for number, each in self._open.items() if each.membership_epoch == epoch}
        count = len(self._open) + len(operations)
        size = sum(num_bytes(operation.tensor) for operation in operations)  # before any of it is allocated
        size += sum(each.tensor.nbytes for each in self._open.values())
        if count > _MAX_OPEN_RECEIVES or size > _MAX_OPEN_BYTES:
            most = f"at most {_MAX_OPEN_RECEIVES} of {_MAX_OPEN_BYTES} bytes"
            raise InvalidRequest(f"{count} receives of {size} bytes would be open, {most} may be; wait for some first")
        tensors = [_expected(operation.tensor) for operation in operations]
        opened = comm._open_receives([(tensor, each.peer) for tensor, each in zip(tensors, operations, strict=True)])
        numbers = range(self._last + 1, self._last + 1 + len(opened))
        for number, receive, tensor in zip(numbers, opened, tensors, strict=True):
            self._open[number] = _OpenReceive(receive, tensor, epoch)
        self._last += len(opened)
        return numbers

    def finish(self, comm: JoinedCommunicator, number: int) -> torch.Tensor:
        """What came; a receive that nothing came for in time stays open.

        Raises:
            InvalidRequest: no such receive is open, or another tensor came.
        """
        found = self._open.pop(number, None)
        if found is None:
            raise InvalidRequest(f"receive {number} is not open here; it may be waited for once")
        try:
            comm._finish_receive(found.receive)
        except DeadlineExceeded:
            self._open[number] = found
            raise
        return found.tensor

    def close(self, comm: JoinedCommunicator, numbers: Iterable[int]) -> None:
        """Nobody waits for these any more."""
        comm._close_receives([self._open.pop(number).receive for number in numbers if number in self._open])

    def clear(self, comm: JoinedCommunicator) -> None:
        """Closes all."""
        self.close(comm, list(self._open))


@dataclass(frozen=True)
class _Call:
    """One call: its communicator, the method's own arguments, its tensors, and what is open."""

    comm: JoinedCommunicator
    arguments: Any
    tensors: list[Any]
    handles: OpenHandles
    receives: OpenReceives

    @property
    def tensor(self) -> Any:
        return self.tensors[0]


def execute(
    comm: JoinedCommunicator,
    call: front_pb2.DriverCall,
    read: Callable[[], list[torch.Tensor]],
    handles: OpenHandles,
    receives: OpenReceives,
) -> Outcome:
    """Makes a call; `read` gives its tensors.

    Raises:
        EpmeshError: what the method raises. Where all members call it, input that was refused by the driver, or cannot
            be read, raises the same on all of them.
    """
    name = call.arguments.WhichOneof("method")
    if name is None:
        raise InvalidRequest("the call names no method, or one of a newer version")
    method = _METHODS[name]
    tensors: list[Any]
    refusal: EpmeshError | None = None
    try:
        tensors = list(read())
        if call.HasField("refusal"):
            refusal = InvalidRequest(call.refusal.message)
        elif not method.takes(len(tensors)):
            refusal = InvalidRequest(f"{name} takes {method.text}; {len(tensors)} came")
    except EpmeshError as exc:
        refusal = exc
    if refusal is not None:
        if method.agreed_as:
            comm.refuse(method.agreed_as, refusal)
        if not method.least:
            raise refusal
        tensors = [Refused(refusal)] * method.least
    return method.run(_Call(comm, getattr(call.arguments, name), tensors, handles, receives))


def encoded_view(comm: JoinedCommunicator) -> torch.Tensor:
    """The communicator's view as bytes ``[n]``: it may be larger than a header."""
    return torch.frombuffer(bytearray(comm.view.to_proto().SerializeToString()), dtype=torch.uint8)


def describe(comm: JoinedCommunicator) -> front_pb2.RankDescription:
    """Where the rank stands in the communicator's group."""
    rank = comm._rank_process
    return front_pb2.RankDescription(
        group=comm.unique_name,
        ranks=comm.ranks,
        rank_in_group=comm.rank,
        global_rank=comm.global_rank,
        global_world_size=comm.global_world_size,
        device=str(comm.device),
        all2all_backend=comm.all2all_backend,
        call_limit_s=2 * rank.exchange_timeout_s + rank.timeout_s + _CALL_SLACK_S,
    )


# Collectives ---------------------------------------------------------------------------------------------------------


def _all_reduce(call: _Call) -> Outcome:
    return Outcome([call.comm.all_reduce(call.tensor)])


def _all_gather(call: _Call) -> Outcome:
    return Outcome([call.comm.all_gather(call.tensor, call.arguments.dim)])


def _all_gatherv(call: _Call) -> Outcome:
    joined = call.comm.all_gatherv(call.tensors, call.arguments.dim, _lengths(call.arguments, "sizes"))
    assert isinstance(joined, list)
    return Outcome(joined)


def _reduce_scatter(call: _Call) -> Outcome:
    if isinstance(call.tensor, Refused):  # which a group of one would give back unseen
        call.comm.refuse("reduce_scatter", call.tensor.error)
    return Outcome([call.comm.reduce_scatter(call.tensor, call.arguments.dim)])


def _reduce_scatterv(call: _Call) -> Outcome:
    sizes = _lengths(call.arguments, "sizes")
    if not call.arguments.HasField("output"):
        return Outcome([call.comm.reduce_scatterv(call.tensor, call.arguments.dim, sizes)])
    output = _output(call)
    return Outcome([call.comm.reduce_scatterv_into_output(call.tensor, output, call.arguments.dim, sizes)])


def _gather(call: _Call) -> Outcome:
    result = call.comm.gather(call.tensor, call.arguments.dst, call.arguments.dim)
    return Outcome(nothing=True) if result is None else Outcome([result])


def _broadcast(call: _Call) -> Outcome:
    return Outcome([call.comm.broadcast(call.tensor, call.arguments.src)])


def _send(call: _Call) -> Outcome:
    call.comm.send(call.tensor, call.arguments.dst if call.arguments.HasField("dst") else None)
    return Outcome(nothing=True)


def _recv(call: _Call) -> Outcome:
    if call.arguments.HasField("open"):
        return Outcome([call.receives.finish(call.comm, call.arguments.open)])
    expected = call.arguments.expected
    num_bytes(expected)
    shape, dtype = tuple(expected.shape), dtype_from_name(expected.dtype)
    return Outcome([call.comm.recv(shape, dtype, _optional(call.arguments, "src"))])


def _batch(call: _Call) -> Outcome:
    comm, receives, arguments = call.comm, call.receives, call.arguments
    sends = [operation.peer for operation in arguments.operations if operation.is_send]
    if len(sends) != len(call.tensors):
        raise InvalidRequest(f"batch has {len(sends)} sends; {len(call.tensors)} tensors came")
    receives.close(comm, arguments.closed)
    wanted = [operation for operation in arguments.operations if not operation.is_send]
    numbers = receives.open(comm, wanted)
    try:
        for peer, tensor in zip(sends, call.tensors, strict=True):
            comm.send(tensor, peer)
        if arguments.open_receives:
            return Outcome(sequence=numbers.start, nothing=True)
        return Outcome([receives.finish(comm, number) for number in numbers])
    except BaseException:
        receives.close(comm, numbers)
        raise


def _expected(meta: frame_pb2.TensorMeta) -> torch.Tensor:
    """A tensor on the host for what is expected; memory is touched when something comes."""
    return torch.empty(tuple(meta.shape), dtype=dtype_from_name(meta.dtype))


# The exchange --------------------------------------------------------------------------------------------------------


def _dispatch_keywords(arguments: Any, extra_tensors: list[Any]) -> dict[str, Any]:
    return {
        "is_sequence_parallel": arguments.is_sequence_parallel,
        "extra_tensors": extra_tensors if arguments.with_extra_tensors or extra_tensors else None,
        "layer": _optional(arguments, "layer"),
        "static": arguments.static_mode,
    }


def _dispatch(call: _Call) -> Outcome:
    rows, weights, ids, *extra = call.tensors
    received = call.comm.dispatch(rows, weights, ids, **_dispatch_keywords(call.arguments, extra))
    return _received(received, call.comm)


def _dispatch_router_logits(call: _Call) -> Outcome:
    rows, logits, *extra = call.tensors
    received = call.comm.dispatch_router_logits(rows, logits, **_dispatch_keywords(call.arguments, extra))
    return _received(received, call.comm)


def _received(received: tuple[Any, ...], comm: JoinedCommunicator) -> Outcome:
    last = comm.last_exchange
    return Outcome(_flat(received), sequence=last.sequence if last is not None else 0)


def _flat(received: tuple[Any, ...]) -> list[torch.Tensor]:
    *named, last = received
    return [*named, *last] if isinstance(last, list) else [*named, last]


def _start_dispatch(call: _Call) -> Outcome:
    rows, weights, ids, *extra = call.tensors
    handle = call.comm.dispatch_async(rows, weights, ids, **_dispatch_keywords(call.arguments.dispatch, extra))
    return Outcome(sequence=call.handles.add(handle))


def _wait_dispatch(call: _Call) -> Outcome:
    handle = call.handles.get(call.arguments.sequence)
    return Outcome(_flat(handle.wait()), sequence=handle.sequence)


def _combine(call: _Call) -> Outcome:
    comm, handle = call.comm, None
    if call.arguments.HasField("sequence"):
        last = comm.last_exchange
        is_last = last is not None and last.sequence == call.arguments.sequence
        handle = last if is_last else call.handles.get(call.arguments.sequence)
    parallel = call.arguments.is_sequence_parallel
    if not call.arguments.HasField("output"):
        return Outcome([comm.combine(call.tensor, parallel, handle=handle)])
    output = _output(call)
    return Outcome([comm.combine_into_output(call.tensor, output, parallel, handle=handle)])


# Membership ----------------------------------------------------------------------------------------------------------


def _describe_group(call: _Call) -> Outcome:
    return Outcome(describes=call.comm)


def _wait_ready(call: _Call) -> Outcome:
    """Adopts the newest view, and goes on doing so until the group is as large as it is to be."""
    comm, wanted = call.comm, call.arguments.world_size
    timeout_s = _optional(call.arguments, "timeout_s")
    deadline = time.monotonic() + (comm._rank_process.timeout_s if timeout_s is None else timeout_s)
    while True:
        _, completed = comm.wait_ready(max(0.0, deadline - time.monotonic()))
        if comm.world_size >= wanted:
            return Outcome(completed=completed, describes=comm)
        if time.monotonic() > deadline:
            raise MeshUnavailable(
                f"group {comm.unique_name!r} has {comm.world_size} ranks, {comm.ranks}, not {wanted}, in time"
            )
        comm._rank_process.session.wait_change(_POLL_S)


def _check(call: _Call) -> Outcome:
    call.comm.check()
    return Outcome(nothing=True)


def _make_group(call: _Call) -> Outcome:
    made = call.comm.create_group(call.arguments.name, list(call.arguments.ranks))
    assert made is None or isinstance(made, JoinedCommunicator)
    return Outcome(nothing=made is None, describes=made)


def _remove_group(call: _Call) -> Outcome:
    call.comm.destroy_group(call.arguments.name)
    return Outcome(nothing=True)


def _place_experts(call: _Call) -> Outcome:
    arguments = call.arguments
    call.comm.set_expert_placement(
        arguments.num_experts, _lengths(arguments, "experts"), layer=_optional(arguments, "layer")
    )
    return Outcome(nothing=True)


def _destroy(call: _Call) -> Outcome:
    if call.comm.is_ep_communicator:
        raise InvalidRequest("the communicator of ep lives as long as its rank; use DetachRank to give the rank back")
    call.comm.destroy()
    return Outcome(nothing=True)


# The table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Method:
    """How a method is made.

    Attributes:
        least, most: tensors it takes; `most` is `None` for any number.
        agreed_as: of a method without tensors that all members call, its name among them.
    """

    run: Callable[[_Call], Outcome]
    least: int = 0
    most: int | None = 0
    agreed_as: str = ""

    def takes(self, number: int) -> bool:
        return number >= self.least and (self.most is None or number <= self.most)

    @property
    def text(self) -> str:
        return f"{self.least} tensors" if self.least == self.most else f"{self.least} tensors or more"


_METHODS: dict[str, _Method] = {
    "all_reduce": _Method(_all_reduce, 1, 1),
    "all_gather": _Method(_all_gather, 1, 1),
    "all_gatherv": _Method(_all_gatherv, 1, None),
    "reduce_scatter": _Method(_reduce_scatter, 1, 1),
    "reduce_scatterv": _Method(_reduce_scatterv, 1, 1),
    "gather": _Method(_gather, 1, 1),
    "broadcast": _Method(_broadcast, 1, 1),
    "send": _Method(_send, 1, 1),
    "recv": _Method(_recv),
    "batch": _Method(_batch, 0, None),
    "dispatch": _Method(_dispatch, 3, None),
    "dispatch_router_logits": _Method(_dispatch_router_logits, 2, None),
    "start_dispatch": _Method(_start_dispatch, 3, None),
    "wait_dispatch": _Method(_wait_dispatch),
    "combine": _Method(_combine, 1, 1),
    "describe_group": _Method(_describe_group),
    "wait_ready": _Method(_wait_ready),
    "check": _Method(_check),
    "make_group": _Method(_make_group, agreed_as="create_group"),
    "remove_group": _Method(_remove_group, agreed_as="destroy_group"),
    "place_experts": _Method(_place_experts, agreed_as="set_expert_placement"),
    "destroy": _Method(_destroy),
}


def _optional(arguments: Any, field: str) -> Any:
    return getattr(arguments, field) if arguments.HasField(field) else None


def _lengths(arguments: Any, field: str) -> list[int] | None:
    return list(getattr(arguments, field).lengths) if arguments.HasField(field) else None


def _output(call: _Call) -> Any:
    """A tensor as large as the driver's output; refused later if that is not what the call gives."""
    meta = call.arguments.output
    try:
        num_bytes(meta)
        return torch.empty(tuple(meta.shape), dtype=dtype_from_name(meta.dtype), device=call.comm.device)
    except EpmeshError as exc:
        return Refused(exc)
