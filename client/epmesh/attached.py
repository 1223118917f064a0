"""The communicator of an attached rank: the same calls as a joined one's, made on a rank in another process.

Whatever is wrong with a tensor or an argument and cannot travel is refused here, and the refusal is what travels: the
rank makes it known to its group, so that every member raises the same error, as if the rank lived in this process.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from epmesh.attached_arguments import (
    Arguments,
    Fill,
    fill_scatter,
    plan_operation,
    put_dispatch,
    put_lengths,
    refusals,
    shaped,
)
from epmesh.communicator import Communicator, Handle
from epmesh.driver_session import DriverSession
from epmesh.driver_transports import DriverTransport, Reply
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.front import MAX_TIMEOUT_S
from epmesh.quantization import quantized
from epmesh.tensors import (
    Kind,
    bytes_of,
    check_tensor,
    check_writable,
    copy_into,
    kind_of,
    kind_of_dtype,
    meta_of,
    row_tensors,
)
from epmesh.v1 import frame_pb2, front_pb2, view_pb2
from epmesh.view import View
from epmesh.work import Work

_GRACE_S = 5.0
_LONGEST_CALL_S = MAX_TIMEOUT_S - 10.0  # a transport may add some seconds

Tensor = Any
"""A NumPy array or a torch tensor on CPU, contiguous or not."""


@dataclass(frozen=True)
class Standing:
    """Where a rank stands in a group.

    Attributes:
        completed: after `wait_ready`, the last exchange that every survivor completed.
    """

    description: front_pb2.RankDescription
    view: View
    completed: int

    @classmethod
    def of(cls, reply: Reply) -> Standing:
        """What an answer says; releases it."""
        try:
            view = View.from_proto(view_pb2.View.FromString(bytes(reply.tensors[0])))
        finally:
            reply.close()
        return cls(reply.result.description, view, reply.result.completed)


class AttachedRank:
    """What all communicators of one attached rank share."""

    def __init__(self, session: DriverSession, transport: DriverTransport, timeout_s: float) -> None:
        """Takes over `session` and `transport`."""
        self.session = session
        self.transport = transport
        self.timeout_s = timeout_s
        self.call_limit_s = timeout_s
        self._lock = threading.Lock()  # guards _communicators
        self._communicators: dict[str, AttachedCommunicator] = {}

    def call(
        self,
        group: str,
        arguments: Arguments,
        tensors: Sequence[Any] = (),
        refusal: EpmeshError | None = None,
        limit_s: float | None = None,
    ) -> Reply:
        """Makes one call on the rank's communicator of `group`; tensors were checked."""
        if self.session.error is not None:
            raise self.session.error
        call = front_pb2.DriverCall(group=group, arguments=arguments)
        if refusal is not None:
            call.refusal.CopyFrom(refusal.to_proto())
        metas, data = [meta_of(tensor) for tensor in tensors], [bytes_of(tensor) for tensor in tensors]
        with self.session.calling():
            return self.transport.call(call, metas, data, min(limit_s or self.call_limit_s, _LONGEST_CALL_S))

    def describe(self, group: str) -> Standing:
        """Where the rank stands in `group`."""
        arguments = Arguments()
        arguments.describe_group.SetInParent()
        return Standing.of(self.call(group, arguments))

    def wait_ready(self, group: str, timeout_s: float | None, world_size: int = 0) -> Standing:
        """Has the rank adopt the newest view, once it has `world_size` ranks."""
        arguments = Arguments()
        arguments.wait_ready.world_size = world_size
        arguments.wait_ready.timeout_s = self.timeout_s if timeout_s is None else float(timeout_s)
        standing = Standing.of(self.call(group, arguments, limit_s=arguments.wait_ready.timeout_s + _GRACE_S))
        self.call_limit_s = standing.description.call_limit_s
        return standing

    def communicator(self, name: str, standing: Standing | None = None) -> AttachedCommunicator:
        """The communicator of a group; the same object every time."""
        with self._lock:
            found = self._communicators.get(name)
        if found is None:
            made = AttachedCommunicator(self, standing or self.describe(name))
            with self._lock:
                found = self._communicators.setdefault(name, made)
        return found

    def forget(self, name: str) -> AttachedCommunicator | None:
        """A group, or its communicator, is gone."""
        with self._lock:
            return self._communicators.pop(name, None)

    def detach(self) -> None:
        """Gives the rank back."""
        with self._lock:
            everyone = list(self._communicators.values())
            self._communicators.clear()
        for communicator in everyone:
            communicator._destroyed = True
        self.session.detach()
        self.transport.close()


class AttachedHandle(Handle):
    """An exchange between its dispatch and its combine, on the rank."""

    def __init__(self, owner: AttachedCommunicator, sequence: int, kinds: Sequence[Kind], with_extra: bool) -> None:
        self._owner = owner
        self._sequence = sequence
        self._kinds, self._with_extra = kinds, with_extra
        self._received: tuple[Any, ...] | None = None
        self._error: EpmeshError | None = None

    @property
    def sequence(self) -> int:
        return self._sequence

    def wait(self) -> tuple[Any, ...]:
        if self._error is not None:
            raise self._error
        if self._received is None:
            try:
                self._received = self._owner._wait_dispatch(self._sequence, self._kinds, self._with_extra)
            except EpmeshError as exc:
                self._error = exc
                raise
        return self._received


class AttachedCommunicator(Communicator):
    """One group of a rank that this process drives. One thread at a time may be inside a group.

    Attributes:
        transport: how tensors travel: ``shm``, ``zmq`` or ``grpc``.
    """

    def __init__(self, rank: AttachedRank, standing: Standing) -> None:
        """Takes the place that the rank says it has."""
        self._rank = rank
        self._busy = threading.Lock()
        self._destroyed = False
        self.transport = rank.transport.name
        self.unique_name = standing.description.group
        self.is_ep_communicator = self.unique_name.split(":", maxsplit=1)[0] == "ep"
        self.cpu_group = self.device_group = None
        self.all2all_manager = self
        self._take_place(standing)

    def _take_place(self, standing: Standing) -> None:
        description = standing.description
        self._view = standing.view
        self._epoch = self._view.epoch
        self._device = description.device
        self.rank = self.rank_in_group = description.rank_in_group
        self.ranks = list(description.ranks)
        self.world_size = len(self.ranks)
        self.global_rank = description.global_rank
        self.global_world_size = description.global_world_size
        self.use_all2all = self.is_ep_communicator and self.world_size > 1
        self.all2all_backend = description.all2all_backend

    @property
    def device(self) -> Any:  # type: ignore[override]
        """Where the rank's tensors live: a ``torch.device`` where torch is loaded, its name elsewhere."""
        torch = sys.modules.get("torch")
        return self._device if torch is None else torch.device(self._device)

    # Collectives -----------------------------------------------------------------------------------------------

    def all_reduce(self, input_: Tensor) -> Tensor:
        def fill(arguments: Arguments) -> Sequence[Any]:
            arguments.all_reduce.SetInParent()
            check_writable(input_)
            return [input_]

        return self._in_place(fill, "all_reduce", input_)

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        def fill(arguments: Arguments) -> Sequence[Any]:
            check_tensor(input_)
            arguments.all_gather.dim = dim
            return [input_]

        return self._one(fill, "all_gather", input_)

    def all_gatherv(
        self, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> Tensor | list[Tensor]:
        tensors = input_ if isinstance(input_, list) else [input_]

        def fill(arguments: Arguments) -> Sequence[Any]:
            for tensor in tensors:
                check_tensor(tensor)
            arguments.all_gatherv.dim = dim
            arguments.all_gatherv.as_list = isinstance(input_, list)
            put_lengths(arguments.all_gatherv, "sizes", sizes)
            return tensors

        joined = self._many(fill, "all_gatherv", [kind_of(tensor) for tensor in tensors])
        return joined if isinstance(input_, list) else joined[0]

    def reduce_scatter(self, input_: Tensor, dim: int = -1) -> Tensor:
        if self.world_size == 1:
            with self._turn():
                return input_

        def fill(arguments: Arguments) -> Sequence[Any]:
            check_tensor(input_)
            arguments.reduce_scatter.dim = dim
            return [input_]

        return self._one(fill, "reduce_scatter", input_)

    def reduce_scatterv(self, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
        return self._one(fill_scatter(input_, dim, sizes), "reduce_scatterv", input_)

    def reduce_scatterv_into_output(
        self, input_: Tensor, output: Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> Tensor:
        def fill(arguments: Arguments) -> Sequence[Any]:
            arguments.reduce_scatterv.output.SetInParent()
            tensors = fill_scatter(input_, dim, sizes)(arguments)
            arguments.reduce_scatterv.output.CopyFrom(meta_of(output))
            check_writable(output)
            return tensors

        return self._in_place(fill, "reduce_scatterv", output)

    def gather(self, input_: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        def fill(arguments: Arguments) -> Sequence[Any]:
            arguments.gather.dst = dst
            check_tensor(input_)
            arguments.gather.dim = dim
            return [input_]

        found = self._many(fill, "gather", [kind_of(input_)])
        return found[0] if found else None

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        def fill(arguments: Arguments) -> Sequence[Any]:
            arguments.broadcast.src = src
            check_writable(tensor)
            return [tensor]

        return self._in_place(fill, "broadcast", tensor)

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        arguments = Arguments()
        with refusals():
            arguments.send.SetInParent()
            if dst is not None:
                arguments.send.dst = dst
            check_tensor(tensor)
        with self._turn():
            self._call(arguments, [tensor]).close()

    def recv(self, size: Sequence[int] | int, dtype: Any, src: int | None = None) -> Tensor:
        arguments = Arguments()
        with refusals():
            kind, name = kind_of_dtype(dtype)
            shape = (size,) if isinstance(size, int) else tuple(size)
            if any(length < 0 for length in shape):
                raise InvalidRequest(f"size is {list(shape)}; no length may be negative")
            arguments.recv.expected.CopyFrom(frame_pb2.TensorMeta(dtype=name, shape=shape))
            if src is not None:
                arguments.recv.src = src
        with self._turn():
            return self._results(self._call(arguments), [kind])[0]

    def batch_isend_irecv(self, p2p_ops: list[Any]) -> list[Any]:
        with refusals():
            planned = [plan_operation(op, self.ranks) for op in p2p_ops]
        # Receives are opened first: where both sides have more to send than may wait unread, they make room.
        receives = [(tensor, peer) for is_send, tensor, peer in planned if not is_send]
        first = self._open_receives(receives) if receives else 0
        numbers = iter(range(first, first + len(receives)))
        try:
            for is_send, tensor, peer in planned:
                if is_send:
                    self.send(tensor, peer)
        except BaseException:
            with contextlib.suppress(EpmeshError):  # the one that is under way says more
                self._close_receives(numbers)
            raise
        return [
            Work() if is_send else Work(functools.partial(self._finish_receive, tensor, next(numbers)))
            for is_send, tensor, _ in planned
        ]

    def _open_receives(self, receives: Sequence[tuple[Any, int]]) -> int:
        """Has the rank take in what comes; the number of the first."""
        arguments = Arguments()
        arguments.batch.open_receives = True
        for tensor, peer in receives:
            arguments.batch.operations.add(peer=peer, tensor=meta_of(tensor))
        with self._turn():
            reply = self._call(arguments)
        reply.close()
        return reply.result.sequence

    def _close_receives(self, numbers: Iterable[int]) -> None:
        arguments = Arguments()
        arguments.batch.open_receives = True
        arguments.batch.closed.extend(numbers)
        with self._turn():
            self._call(arguments).close()

    def _finish_receive(self, tensor: Any, number: int) -> None:
        arguments = Arguments()
        arguments.recv.open = number
        with self._turn():
            reply = self._call(arguments)
            copy_into(tensor, reply.metas[0], reply.tensors[0])
            reply.close()

    # The exchange ----------------------------------------------------------------------------------------------

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
        *,
        layer: int | None = None,
        static: bool = False,
        quantize: str | None = None,
    ) -> tuple[Any, ...]:
        hidden_states, extra_tensors = quantized(hidden_states, extra_tensors, quantize)
        tensors = row_tensors([hidden_states, topk_weights, topk_ids], extra_tensors)

        def fill(arguments: Arguments) -> Sequence[Any]:
            put_dispatch(arguments.dispatch, tensors, is_sequence_parallel, extra_tensors, layer, static)
            return tensors

        kinds = [kind_of(tensor) for tensor in tensors]
        return shaped(self._many(fill, "dispatch", kinds), 3, extra_tensors is not None)

    def dispatch_async(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
        *,
        layer: int | None = None,
        static: bool = False,
        quantize: str | None = None,
    ) -> Handle:
        hidden_states, extra_tensors = quantized(hidden_states, extra_tensors, quantize)
        tensors = row_tensors([hidden_states, topk_weights, topk_ids], extra_tensors)

        def fill(arguments: Arguments) -> Sequence[Any]:
            inner = arguments.start_dispatch.dispatch
            put_dispatch(inner, tensors, is_sequence_parallel, extra_tensors, layer, static)
            return tensors

        with self._turn():
            reply = self._collective(fill, "start_dispatch")
            reply.close()
        kinds = [kind_of(tensor) for tensor in tensors]
        return AttachedHandle(self, reply.result.sequence, kinds, extra_tensors is not None)

    def _wait_dispatch(self, sequence: int, kinds: Sequence[Kind], with_extra: bool) -> tuple[Any, ...]:
        arguments = Arguments()
        arguments.wait_dispatch.sequence = sequence
        with self._turn():
            return shaped(self._results(self._call(arguments), kinds), 3, with_extra)

    def dispatch_router_logits(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[Tensor] | None = None,
        *,
        layer: int | None = None,
        static: bool = False,
    ) -> tuple[Any, ...]:
        tensors = row_tensors([hidden_states, router_logits], extra_tensors)

        def fill(arguments: Arguments) -> Sequence[Any]:
            inner = arguments.dispatch_router_logits
            put_dispatch(inner, tensors, is_sequence_parallel, extra_tensors, layer, static)
            return tensors

        kinds = [kind_of(tensor) for tensor in tensors]
        return shaped(self._many(fill, "dispatch_router_logits", kinds), 2, extra_tensors is not None)

    def combine(
        self, hidden_states: Tensor, is_sequence_parallel: bool = False, *, handle: Handle | None = None
    ) -> Tensor:
        return self._one(self._combine(hidden_states, is_sequence_parallel, handle), "combine", hidden_states)

    def combine_into_output(
        self,
        hidden_states: Tensor,
        output: Tensor,
        is_sequence_parallel: bool = False,
        *,
        handle: Handle | None = None,
    ) -> Tensor:
        def fill(arguments: Arguments) -> Sequence[Any]:
            tensors = self._combine(hidden_states, is_sequence_parallel, handle)(arguments)
            arguments.combine.output.CopyFrom(meta_of(output))
            check_writable(output)
            return tensors

        return self._in_place(fill, "combine", output)

    def _combine(self, hidden_states: Any, is_sequence_parallel: bool, handle: Handle | None) -> Fill:
        if handle is not None and not (isinstance(handle, AttachedHandle) and handle._owner is self):
            raise InvalidRequest(f"exchange {handle.sequence} is not open here; a handle is good for one combine")

        def fill(arguments: Arguments) -> Sequence[Any]:
            arguments.combine.is_sequence_parallel = bool(is_sequence_parallel)
            if handle is not None:
                arguments.combine.sequence = handle.sequence
            check_tensor(hidden_states)
            return [hidden_states]

        return fill

    def allocate_combine_input(
        self, shape: Sequence[int], dtype: Any, device: Any, is_sequence_parallel: bool = False
    ) -> Tensor | None:
        return None

    def get_symmetric_memory_buffer(self, role: str, shape: Sequence[int], dtype: Any, device: Any) -> Tensor | None:
        return None

    # Membership ------------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        if self._view.epoch != self._epoch:  # the rank went on to one that changes no rank
            self._view = self._rank.describe(self.unique_name).view
            self._epoch = self._view.epoch
        return self._view

    @property
    def epoch(self) -> int:
        return self._epoch

    def wait_ready(self, timeout_s: float | None = None) -> tuple[View, int]:
        with self._turn():
            standing = self._rank.wait_ready(self.unique_name, timeout_s)
            self._take_place(standing)
            return standing.view, standing.completed

    def check(self) -> None:
        arguments = Arguments()
        arguments.check.SetInParent()
        with self._turn():
            self._call(arguments)

    def group(self, name: str) -> Communicator:
        if name == self.unique_name:
            return self
        return self._rank.communicator(name)

    def create_group(self, name: str, ranks: Iterable[int]) -> Communicator | None:
        def fill(arguments: Arguments) -> Sequence[Any]:
            arguments.make_group.name = name
            arguments.make_group.ranks.extend(ranks)
            return []

        with self._turn():
            reply = self._collective(fill, "make_group")
        return None if reply.result.nothing else self._rank.communicator(name, Standing.of(reply))

    def destroy_group(self, name: str) -> None:
        def fill(arguments: Arguments) -> Sequence[Any]:
            arguments.remove_group.name = name
            return []

        with self._turn():
            self._collective(fill, "remove_group")
        found = self._rank.forget(name)
        if found is not None:
            found._destroyed = True

    def set_expert_placement(
        self, num_experts: int, experts: Iterable[int] | None = None, layer: int | None = None
    ) -> None:
        def fill(arguments: Arguments) -> Sequence[Any]:
            placement = arguments.place_experts
            placement.num_experts = num_experts
            if layer is not None:
                placement.layer = layer
            put_lengths(placement, "experts", None if experts is None else sorted(set(experts)))
            return []

        with self._turn():
            self._collective(fill, "place_experts")

    def destroy(self) -> None:
        """Gives up the communicator; that of ``ep`` gives the rank back, which stays in the mesh."""
        if self._destroyed:
            return
        self._destroyed = True
        if self.is_ep_communicator:
            self._rank.detach()
            return
        self._rank.forget(self.unique_name)
        arguments = Arguments()
        arguments.destroy.SetInParent()
        with contextlib.suppress(EpmeshError):
            self._rank.call(self.unique_name, arguments)

    # Shared ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Keeps second threads out, and calls after the end."""
        if self._destroyed:
            raise InvalidRequest(f"the communicator of group {self.unique_name!r} was destroyed")
        if not self._busy.acquire(blocking=False):
            raise InvalidRequest(f"another thread is inside group {self.unique_name!r}; one at a time may be")
        try:
            yield
        finally:
            self._busy.release()

    def _collective(self, fill: Fill, method: str) -> Reply:
        """Makes a call of all members; what cannot travel is refused on all of them."""
        arguments, refusal = Arguments(), None
        tensors: Sequence[Any] = ()
        try:
            with refusals():
                getattr(arguments, method).SetInParent()
                tensors = fill(arguments)
                for tensor in tensors:
                    check_tensor(tensor)
        except EpmeshError as exc:
            refusal, tensors = exc, ()
        return self._call(arguments, tensors, refusal)

    def _call(self, arguments: Arguments, tensors: Sequence[Any] = (), refusal: EpmeshError | None = None) -> Reply:
        reply = self._rank.call(self.unique_name, arguments, tensors, refusal)
        self._epoch = reply.result.epoch or self._epoch
        return reply

    def _results(self, reply: Reply, kinds: Sequence[Kind]) -> list[Any]:
        """Copies of what came, each of the kind of the input it answers to."""
        try:
            return [kind.make(meta, data) for kind, meta, data in zip(kinds, reply.metas, reply.tensors, strict=False)]
        finally:
            reply.close()

    def _many(self, fill: Fill, method: str, kinds: Sequence[Kind]) -> list[Any]:
        with self._turn():
            return self._results(self._collective(fill, method), kinds)

    def _one(self, fill: Fill, method: str, like: Tensor) -> Tensor:
        return self._many(fill, method, [kind_of(like)])[0]

    def _in_place(self, fill: Fill, method: str, target: Tensor) -> Tensor:
        with self._turn():
            reply = self._collective(fill, method)
            try:
                copy_into(target, reply.metas[0], reply.tensors[0])
            finally:
                reply.close()
        return target
