"""Calls on a GPU that were prepared: what a dispatch and its combine do once for each shape.

A call that differs from an earlier one in nothing but addresses needs none of its checks again: it writes the addresses
where the kernel finds them, and launches. What is kept is found by shapes and dtypes; whatever else could have changed
(the view, the memory, the stream, a report) is looked at, and where it did the call goes the long way.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from epmesh.layout import Layout
from epmesh.view import View
from epmesh_server.kernels.lane import Lane, Rows, Sent
from epmesh_server.kernels.launcher import Launch
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.cuda_ways import CudaWayThere
from epmesh_server.ranks.open_exchange import MAX_OPEN, OpenExchange, Request

if TYPE_CHECKING:
    from epmesh_server.ranks.cuda_exchange import CudaExchange

_ALIGNED = 15  # bits of an address that are 0 where 16 bytes move at once

Tensors = Sequence[torch.Tensor]


def _empty(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="cuda")


# What torch's own generated code allocates with: on the current device, in a third of the time.
_empty_strided: Any = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", _empty)


@dataclass(frozen=True, eq=False)
class PreparedDispatch:
    """A dispatch of one shape.

    Attributes:
        view: of the placement that it goes by.
        rows: as the first one's, but without its tensors.
        launches: by slot; the first values are the addresses of rows, in static mode those of outputs come next.
        take: exact mode: copies rows out.
        outputs: shape, stride and dtype of each; exact mode: of one row.
        sent: by slot, what it leaves for its combine; reused.
        combines: by width and dtype of the results, and whether sequence parallel.
    """

    lane: Lane
    view: View
    request: Request
    layout: Layout
    rows: Rows
    launches: tuple[Launch, ...]
    take: Launch | None
    outputs: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    sent: tuple[Sent, ...]
    combines: dict[Hashable, tuple[Launch, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, exchange: OpenExchange, lane: Lane, rows: Rows, digest: int, view: View) -> PreparedDispatch:
        """What `exchange` did with `rows`, to be done again."""
        request, received = exchange._request, _flat(exchange._received)
        static_rows = request.static_rows
        numbers = lane.row_numbers(rows) if static_rows is None else static_rows
        sent = tuple(lane.keep(slot, numbers, rows.num_tokens, static_rows is not None) for slot in range(MAX_OPEN))
        into = () if static_rows is None else received
        return cls(
            lane,
            view,
            replace(request, tensors=(), make_layout=_unmade),
            replace(exchange.layout, rows=None),  # type: ignore[call-arg]  # it is a DeviceLayout
            replace(rows, tensors=()),
            tuple(lane.prepare_dispatch(rows, into, each, digest) for each in sent),
            lane.prepare_take(rows, sent[0]) if static_rows is None else None,
            tuple(_form(tensor, whole=static_rows is not None) for tensor in received),
            sent,
        )

    def again(self, tensors: Tensors) -> Rows:
        """What a dispatch of `tensors` sends."""
        return replace(self.rows, tensors=tuple(tensors))

    def launch(self, tensors: Tensors, slot: int, stream: int, stamp: int) -> None:
        """Exact mode: sends `tensors`."""
        launch = self.launches[slot]
        _set_addresses(launch, 0, tensors)
        launch.values[launch.places["stamp"]] = stamp
        launch(stream)

    def launch_static(self, tensors: Tensors, slot: int, stream: int) -> list[torch.Tensor]:
        """Static mode: sends `tensors`; returns what is received."""
        launch = self.launches[slot]
        _set_addresses(launch, 0, tensors)
        received = [_empty_strided(*each) for each in self.outputs]
        _set_addresses(launch, len(received), received)
        launch(stream)
        return received

    def launch_take(self, slot: int, num_rows: int, stream: int, stamp: int) -> list[torch.Tensor]:
        """Exact mode: the received rows."""
        received = [_empty_strided((num_rows, *shape), stride, dtype) for shape, stride, dtype in self.outputs]
        launch, origins = self.take, self.sent[slot].origins
        assert launch is not None
        assert origins is not None
        if num_rows:
            places, values = launch.places, launch.values
            _set_addresses(launch, 0, received)
            values[places["origins"]] = origins.data_ptr()
            values[places["num_rows"]] = num_rows
            values[places["stamp"]] = stamp
            launch.run_programs(self.lane.programs_for(num_rows))
            launch(stream)
        return received

    def remember_combine(
        self, hidden_states: torch.Tensor, result: torch.Tensor, is_sequence_parallel: bool, digest: int
    ) -> None:
        """Prepares for another combine like this one."""
        key = (hidden_states.shape[1], hidden_states.dtype, is_sequence_parallel)
        if key not in self.combines and movable(hidden_states, hidden_states.get_device()):
            self.combines[key] = tuple(
                self.lane.prepare_combine(hidden_states, result, each, digest, slot)
                for slot, each in enumerate(self.sent)
            )

    def launch_combine(
        self,
        launch: Launch,
        hidden_states: torch.Tensor,
        slot: int,
        output: torch.Tensor | None,
        stream: int,
        stamp: int | None,
    ) -> torch.Tensor:
        """Shows `hidden_states` and sums; `stamp` in exact mode."""
        num_tokens, hidden = self.layout.num_tokens, hidden_states.shape[1]
        if output is None:
            output = _empty_strided((num_tokens, hidden), (hidden, 1), hidden_states.dtype)
        launch.values[0] = hidden_states.data_ptr()
        launch.values[1] = output.data_ptr()
        launch.values[launch.places["in_place"]] = self.lane.in_place(hidden_states, slot)
        if stamp is not None:
            launch.values[launch.places["stamp"]] = stamp
        launch(stream)
        return output


class StaticExchange(OpenExchange):
    """An exchange in static mode, between its dispatch and its combine; the host does not know its number (0).

    Attributes:
        lane: that it runs in.
        prepared: what it is one of, where it was prepared.
    """

    def __init__(
        self,
        owner: CudaExchange,
        request: Request,
        layout: Layout,
        slot: int,
        lane: Lane,
        received: tuple[Any, ...],
        prepared: PreparedDispatch | None = None,
    ) -> None:
        self._owner = owner
        self._request = request
        self._layout = layout
        self._sequence = 0
        self._stage = self._error = self._slots = None
        self._received = received
        self.lane = lane
        self.slot = slot
        self.prepared = prepared
        self.is_sequence_parallel = request.is_sequence_parallel
        self.counts = [0] * lane.plan.world_size
        self.relayed = {}


class PreparedExchange(OpenExchange):
    """An exchange in exact mode that was prepared."""

    prepared: PreparedDispatch


class PreparedWayThere(CudaWayThere):
    """An exact dispatch that was prepared."""

    def __init__(
        self, owner: CudaExchange, sequence: int, prepared: PreparedDispatch, tensors: Tensors, slot: int, stream: int
    ) -> None:
        """Launches."""
        super().__init__(owner, sequence, prepared.again(tensors))
        self._prepared, self._slot, self._stream = prepared, slot, stream
        self._lane, self._sent = prepared.lane, prepared.sent[slot]
        prepared.launch(tensors, slot, stream, self._stamp)

    @cached_property
    def _call(self) -> Call:  # type: ignore[override]  # made where somebody asks for it
        request = self._prepared.request
        return describe(request.method, request.arguments)

    def assemble(self) -> list[torch.Tensor]:
        prepared = self._prepared
        if self._passed:  # through the host's door, where memory was made anew
            return super().assemble()
        self.counts = prepared.lane.counts(self._stamp)
        self._owner.settled(self, prepared.sent[self._slot])
        return prepared.launch_take(self._slot, sum(self.counts), self._stream, self._stamp)


def movable(tensor: torch.Tensor, device: int) -> bool:
    """Whether a kernel on `device` may move the tensor as it is, 16 bytes at a time."""
    return tensor.get_device() == device and tensor.is_contiguous() and not tensor.data_ptr() & _ALIGNED


def _set_addresses(launch: Launch, at: int, tensors: Tensors) -> None:
    """Of tensors without elements there is none, and none is read."""
    values = launch.values
    for tensor in tensors:
        values[at] = tensor.data_ptr()
        at += 1


def _flat(received: tuple[Any, ...]) -> list[torch.Tensor]:
    """What a dispatch returned, with the extra tensors behind the others."""
    *named, last = received
    return [*named, *last] if isinstance(last, list) else [*named, last]


def _form(tensor: torch.Tensor, *, whole: bool) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    shape = tuple(tensor.shape)
    stride = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    return shape if whole else shape[1:], stride, tensor.dtype


def _unmade() -> NoReturn:
    raise AssertionError("a prepared dispatch has its layout")
