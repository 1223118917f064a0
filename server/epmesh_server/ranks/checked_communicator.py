"""A communicator as far as it does not matter how rows travel.

Arguments are checked, refusals made collective, and requests made here; collectives, exchanges and point-to-point
messages are done by what a subclass provides.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from epmesh.communicator import Communicator, Handle
from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.layout import Layout, Reach, Routing, Topology, broadcast_layout, make_reach, make_routing, routed_layout
from epmesh.placement import Placement, linear_placement
from epmesh.quantization import quantized
from epmesh.tensors import row_tensors
from epmesh.work import Work
from epmesh_server.ranks import arguments as args
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.open_exchange import ExchangeStats, OpenExchanges, Request
from epmesh_server.ranks.point_to_point import Announced

Load = Callable[[tuple[int, ...], tuple[int, ...]], None]

_T = TypeVar("_T")


class GroupCollectives(Protocol):
    """Runs the collectives of a group; arguments were checked, shapes are compared between the members."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums contiguous `tensor` in place."""

    def all_gather_blocks(
        self, method: str, tensors: Sequence[torch.Tensor], arguments: str
    ) -> list[list[torch.Tensor]]:
        """Every member's tensors, by member; the same dtypes and dimensions, but lengths may differ."""

    def reduce_scatter(self, method: str, rows: torch.Tensor, sizes: Sequence[int], arguments: str) -> torch.Tensor:
        """This member's slice ``[sizes[me], ...]`` of the sum of ``rows`` ``[sum(sizes), ...]``."""

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Overwrites contiguous `tensor` with that of position `src`."""

    def gather(self, tensor: torch.Tensor, dst: int, arguments: str) -> list[torch.Tensor] | None:
        """Every member's tensor on position `dst`; `None` elsewhere."""

    def agree(self, call: Call, timeout_s: float | None = None) -> tuple[int, dict[int, Call]]:
        """Only learns every member's call: the number, and the calls by global rank."""


class GroupMessages(Protocol):
    """Sends and receives between two members; peers are positions."""

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Sends, buffered up to a byte budget."""

    def recv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> torch.Tensor:
        """The next message of `src`, which must have this shape and dtype."""

    def announce(self, tensor: torch.Tensor, src: int) -> Announced:
        """Says that the next message of `src` goes into `tensor`, ahead of those that later receives get; it comes in
        while this rank is in any call of the group."""

    def withdraw(self, receives: Collection[Announced]) -> None:
        """Nobody will wait for these."""


class CheckedCommunicator(Communicator):
    """One group on one rank. One thread at a time may be inside it.

    Attributes:
        max_tokens_per_rank: T of static mode, or `None`.
        load: told which experts come and go, or `None`.
    """

    max_tokens_per_rank: int | None
    load: Load | None
    _topology: Topology
    _exchange: OpenExchanges[Any]
    _collectives: GroupCollectives
    _point_to_point: GroupMessages

    def __init__(self, name: str, device: torch.device) -> None:
        """Says what never changes; a subclass sets the rest."""
        self._busy = threading.Lock()
        self._stats = ExchangeStats()
        self._destroyed = False
        self._routings: dict[tuple[int, int | None, bool], Routing | None] = {}
        self.unique_name = name
        self.device = device
        self.is_ep_communicator = name.split(":", maxsplit=1)[0] == "ep"
        self.all2all_backend = "epmesh"

    @abc.abstractmethod
    def _commit_placement(self, placement: Placement, layer: int | None) -> None:
        """Makes `placement`, the same on all ranks, part of the view."""

    def set_num_sms(self, num_sms: int) -> None:
        """Bounds the multiprocessors that exchanges take from a GPU, where they take any."""
        if num_sms < 1:
            raise InvalidRequest(f"num_sms is {num_sms}; an exchange needs at least 1 multiprocessor")

    def max_sms_used(self) -> int | None:
        """Most multiprocessors that exchanges take from a GPU; `None`: they take none."""
        return None

    def _check_mode(self) -> None:
        """Raises `InvalidRequest` while this rank takes part in no collective call."""

    @property
    def stats(self) -> ExchangeStats:
        """What this rank's exchanges cost so far."""
        return self._stats

    # Collectives -----------------------------------------------------------------------------------------------

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        with self._turn():
            self._checked("all_reduce", lambda: args.check_summable(input_, self.device))
            result = self._collectives.all_reduce(input_.contiguous())
            return input_ if result is input_ else input_.copy_(result)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        with self._turn():
            axis = self._checked("all_gather", lambda: args.check_dim(input_, dim, self.device))
            what = f"dim={axis} {args.shape_text(input_)}"
            return _joined(self._collectives.all_gather_blocks("all_gather", [input_], what), axis)[0]

    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        with self._turn():
            tensors = input_ if isinstance(input_, list) else [input_]
            what = self._checked(
                "all_gatherv",
                lambda: args.check_gatherv(tensors, dim, sizes, self.rank, self.world_size, self.device),
            )
            joined = _joined(self._collectives.all_gather_blocks("all_gatherv", tensors, what), dim)
            return joined if isinstance(input_, list) else joined[0]

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        with self._turn():
            return input_ if self.world_size == 1 else self._reduce_scatter("reduce_scatter", input_, dim, None)

    def reduce_scatterv(self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
        with self._turn():
            return self._reduce_scatter("reduce_scatterv", input_, dim, sizes)

    def reduce_scatterv_into_output(
        self, input_: torch.Tensor, output: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        with self._turn():
            method = "reduce_scatterv_into_output"
            self._checked(
                method,
                lambda: args.check_scatter_output(input_, output, dim, sizes, self.rank, self.world_size, self.device),
            )
            return output.copy_(self._reduce_scatter(method, input_, dim, sizes))

    def _reduce_scatter(self, method: str, input_: torch.Tensor, dim: int, sizes: list[int] | None) -> torch.Tensor:
        axis, lengths = self._checked(
            method, lambda: args.check_scatter(input_, dim, sizes, self.world_size, self.device)
        )
        rows = input_.movedim(axis, 0).contiguous()
        what = f"dim={axis} sizes={lengths} {args.shape_text(input_)}"
        return self._collectives.reduce_scatter(method, rows, lengths, what).movedim(0, axis).contiguous()

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        with self._turn():
            axis = self._checked("gather", lambda: args.check_gather(input_, dst, dim, self.world_size, self.device))
            what = f"dst={dst} dim={axis} {args.shape_text(input_)}"
            blocks = self._collectives.gather(input_, dst, what)
            return None if blocks is None else torch.cat(blocks, dim=axis)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        with self._turn():
            self._checked("broadcast", lambda: args.check_broadcast(tensor, src, self.world_size, self.device))
            result = self._collectives.broadcast(tensor.contiguous(), src)
            return tensor if result is tensor else tensor.copy_(result)

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        with self._turn():
            peer = args.check_peer("dst", (self.rank + 1) % self.world_size if dst is None else dst, self.world_size)
            args.check_tensor(tensor)
            self._point_to_point.send(tensor, peer)

    def recv(self, size: torch.Size | Sequence[int] | int, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        with self._turn():
            peer = args.check_peer("src", (self.rank - 1) % self.world_size if src is None else src, self.world_size)
            return self._point_to_point.recv(args.check_size(size), dtype, peer)

    def batch_isend_irecv(self, p2p_ops: list[Any]) -> list[Any]:
        planned = [args.check_p2p_op(op, self.ranks) for op in p2p_ops]
        # Receives are opened first: where both sides have more to send than may wait unread, they make room.
        receives = self._open_receives([(tensor, peer) for is_send, tensor, peer in planned if not is_send])
        try:
            for is_send, tensor, peer in planned:
                if is_send:
                    self.send(tensor, peer)
        except BaseException:
            self._close_receives(receives)
            raise
        opened = iter(receives)
        return [
            Work() if is_send else Work(functools.partial(self._finish_receive, next(opened)))
            for is_send, _, _ in planned
        ]

    def _open_receives(self, wanted: Sequence[tuple[torch.Tensor, int]]) -> list[Announced]:
        """Opens receives, each into a tensor on the host from a rank in the group.

        They take what comes while this rank is in any call of the group, and come before later receives.
        """
        with self._turn():
            for _, peer in wanted:
                args.check_peer("group_peer", peer, self.world_size)
            return [self._point_to_point.announce(tensor, peer) for tensor, peer in wanted]

    def _finish_receive(self, receive: Announced) -> None:
        """Waits for an open receive."""
        with self._turn():
            receive.finish()

    def _close_receives(self, receives: Collection[Announced]) -> None:
        """Nobody will wait for these; messages that have not come go to later receives."""
        with self._turn(collective=False):
            self._point_to_point.withdraw(receives)

    # The exchange ----------------------------------------------------------------------------------------------

    def dispatch(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
        *,
        layer: int | None = None,
        static: bool = False,
        quantize: str | None = None,
    ) -> tuple[Any, ...]:
        hidden_states, extra_tensors = quantized(hidden_states, extra_tensors, quantize)
        tensors = [hidden_states, topk_weights, topk_ids]
        request = self._routed(tensors, extra_tensors, is_sequence_parallel, layer, static)
        with self._turn():
            return self._exchange.dispatch(request)

    def dispatch_async(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
        *,
        layer: int | None = None,
        static: bool = False,
        quantize: str | None = None,
    ) -> Handle:
        hidden_states, extra_tensors = quantized(hidden_states, extra_tensors, quantize)
        tensors = [hidden_states, topk_weights, topk_ids]
        request = self._routed(tensors, extra_tensors, is_sequence_parallel, layer, static)
        with self._turn():
            return self._exchange.start(request)

    def dispatch_router_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        is_sequence_parallel: bool = False,
        extra_tensors: list[torch.Tensor] | None = None,
        *,
        layer: int | None = None,
        static: bool = False,
    ) -> tuple[Any, ...]:
        tensors = row_tensors([hidden_states, router_logits], extra_tensors)

        def layout() -> Layout:
            args.check_rows(tensors, ("hidden_states", "router_logits"), self.device)
            args.check_layer(layer)
            args.check_static(static, len(hidden_states), self.max_tokens_per_rank)
            return self._broadcast(tensors, is_sequence_parallel, has_ids=False)

        what = f"layer={layer} is_sequence_parallel={is_sequence_parallel}"
        request = self._request("dispatch_router_logits", tensors, 2, extra_tensors is not None, layout, what, static)
        with self._turn():
            return self._exchange.dispatch(replace(request, is_sequence_parallel=is_sequence_parallel))

    def _routed(
        self,
        tensors: list[torch.Tensor],
        extra_tensors: list[torch.Tensor] | None,
        is_sequence_parallel: bool,
        layer: int | None,
        static: bool,
    ) -> Request:
        """A dispatch by ids; its arguments are checked when it begins, so that a refusal takes its number."""
        tensors = row_tensors(tensors, extra_tensors)

        def layout() -> Layout:
            args.check_dispatch(tensors, self.device)
            args.check_layer(layer)
            args.check_static(static, len(tensors[0]), self.max_tokens_per_rank)
            routing = self._routing(layer, is_sequence_parallel)
            if routing is None:
                return self._broadcast(tensors, is_sequence_parallel, has_ids=True)
            return self._routed_rows(tensors, routing, is_sequence_parallel)

        what = f"layer={layer} is_sequence_parallel={is_sequence_parallel}"
        request = self._request("dispatch", tensors, 3, extra_tensors is not None, layout, what, static)
        return replace(request, is_sequence_parallel=is_sequence_parallel)

    def _request(
        self,
        method: str,
        tensors: list[torch.Tensor],
        num_named: int,
        with_extra: bool,
        layout: Callable[[], Layout],
        what: str,
        static: bool,
    ) -> Request:
        rows = self.max_tokens_per_rank if static else None
        arguments = f"{args.rows_text(tensors)} {what} static={rows if static else False}"
        numbers = self._row_numbers(tensors) if static else []

        def shape(received: list[torch.Tensor]) -> tuple[Any, ...]:
            return (*received[:num_named], received[num_named:]) if with_extra else tuple(received)

        return Request(method, [*tensors, *numbers], layout, shape, arguments, False, rows)

    def _broadcast(self, tensors: list[torch.Tensor], is_sequence_parallel: bool, *, has_ids: bool) -> Layout:
        """Every row to every rank that this one may send to; with `has_ids` the third tensor has ids."""
        reach = self._reach(is_sequence_parallel)
        return broadcast_layout(len(tensors[0]), self._topology, reach.eligible)

    def _routed_rows(self, tensors: list[torch.Tensor], routing: Routing, is_sequence_parallel: bool) -> Layout:
        """Rows to the holders of their experts; the third tensor has the ids."""
        return routed_layout(tensors[2].contiguous().numpy(), routing, self._topology)

    def _row_numbers(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What travels in static mode besides, so that receivers know which rows they got."""
        if getattr(tensors[0], "ndim", 0) == 0:
            return []  # it is no tensor, or no rows, and will be refused
        return [torch.arange(len(tensors[0]), dtype=torch.int32).unsqueeze(1)]

    def combine(
        self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False, *, handle: Handle | None = None
    ) -> torch.Tensor:
        with self._turn():
            return self._exchange.combine(hidden_states, handle, is_sequence_parallel)

    def combine_into_output(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor,
        is_sequence_parallel: bool = False,
        *,
        handle: Handle | None = None,
    ) -> torch.Tensor:
        with self._turn():
            return self._exchange.combine(hidden_states, handle, is_sequence_parallel, output)

    def allocate_combine_input(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, is_sequence_parallel: bool = False
    ) -> torch.Tensor | None:
        wanted = torch.device(device)
        if wanted.type != self.device.type or wanted.index not in (None, self.device.index) or len(shape) != 2:
            return None
        with self._turn():
            return self._exchange.combine_buffer(shape[0], shape[1], dtype)

    def get_symmetric_memory_buffer(
        self, role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor | None:
        return self.allocate_combine_input(shape, dtype, device) if role == "combine_input" else None

    def _routing(self, layer: int | None, is_sequence_parallel: bool) -> Routing | None:
        """How this rank routes for `layer`; `None` where no placement was declared."""
        view = self.view
        key = (view.epoch, layer, is_sequence_parallel)
        if key not in self._routings:
            placement = view.placement(layer)
            reach = self._reach(is_sequence_parallel)
            self._routings = {old: routing for old, routing in self._routings.items() if old[0] == view.epoch}
            self._routings[key] = make_routing(placement, self._topology, reach) if placement else None
        return self._routings[key]

    def _reach(self, is_sequence_parallel: bool) -> Reach:
        """Whom this rank's rows may go to: all, or those that share its tensor-parallel index."""
        view = self.view
        return make_reach(self._topology, view.stride, 1 if is_sequence_parallel else view.tensor_parallel_size)

    # Placement -------------------------------------------------------------------------------------------------------

    def set_expert_placement(
        self, num_experts: int, experts: Iterable[int] | None = None, layer: int | None = None
    ) -> None:
        def check() -> tuple[int, ...] | None:
            args.check_layer(layer)
            own = None if experts is None else tuple(sorted(set(experts)))
            Placement(num_experts, {self.global_rank: own or ()})
            return own

        with self._turn():
            own = self._checked("set_expert_placement", check)
            what = f"num_experts={num_experts} layer={layer} linear={own is None}"
            _, calls = self._collectives.agree(describe("set_expert_placement", what, own or ()))
            if own is None:
                placement = linear_placement(num_experts, self.ranks)
            else:
                placement = Placement(num_experts, {rank: tuple(call.numbers) for rank, call in calls.items()})
            removed = self._checked("set_expert_placement", lambda: self._load_added(placement, layer))
            self._commit_placement(placement, layer)
            if removed and self.load is not None:
                self.load((), removed)

    def _load_added(self, placement: Placement, layer: int | None) -> tuple[int, ...]:
        """Loads what this rank will hold besides; returns what it will hold no longer."""
        old = self.view.placement(layer)
        before = set(old.experts_of.get(self.global_rank, ())) if old else set()
        after = set(placement.experts_of.get(self.global_rank, ()))
        if self.load is not None and after - before:
            self.load(tuple(sorted(after - before)), ())
        return tuple(sorted(before - after))

    # For a driver ----------------------------------------------------------------------------------------------------

    @property
    def last_exchange(self) -> Handle | None:
        """The exchange that a plain combine is for, if one is open."""
        return self._exchange.last

    def refuse(self, method: str, error: EpmeshError) -> NoReturn:
        """Makes known to all members that this rank's input to a collective `method` was refused elsewhere.

        Raises:
            EpmeshError: what all members raise.
        """
        with self._turn():
            self._collectives.agree(describe(method, refusal=error))
        raise error

    # Shared ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _turn(self, *, collective: bool = True) -> Iterator[None]:
        """Keeps second threads out, calls after the end, and collective calls of a rank that takes no part in any."""
        if self._destroyed:
            raise InvalidRequest(f"the communicator of group {self.unique_name!r} was destroyed")
        if collective:
            self._check_mode()
        if not self._busy.acquire(blocking=False):
            raise InvalidRequest(f"another thread is inside group {self.unique_name!r}; one at a time may be")
        try:
            yield
        except EpmeshError as exc:
            self._stats.raised(exc)
            raise
        finally:
            self._busy.release()

    def _checked(self, method: str, check: Callable[[], _T]) -> _T:
        """Runs a check of this rank's arguments; a refusal is published, so that all ranks raise it."""
        try:
            with args.refusals():
                return check()
        except InvalidRequest as exc:
            self._collectives.agree(describe(method, refusal=exc))
            raise


def _joined(blocks: Sequence[Sequence[torch.Tensor]], dim: int) -> list[torch.Tensor]:
    """Concatenates every tensor over the ranks."""
    return [torch.cat(list(pieces), dim=dim) for pieces in zip(*blocks, strict=True)]
