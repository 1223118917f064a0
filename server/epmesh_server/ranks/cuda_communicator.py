"""The communicator of a joined rank whose tensors live on a GPU.

Exchanges run on the device, in groups inside one node, and so do collectives where every rank has a GPU of its own.
What groups that span nodes do, and point-to-point messages, goes through the host, as it does for ranks on CPU: a send
is buffered there until it is received.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from epmesh.communicator import Handle
from epmesh.errors import InvalidRequest
from epmesh.layout import Layout, Routing
from epmesh.placement import Placement
from epmesh.quantization import quantized
from epmesh.tensors import row_tensors
from epmesh.view import View
from epmesh_server.kernels.lane import Lane, Rows
from epmesh_server.kernels.plan import MAX_WORLD_SIZE
from epmesh_server.kernels.quantizer import Quantizer
from epmesh_server.ranks import arguments as args
from epmesh_server.ranks.communicator import JoinedCommunicator
from epmesh_server.ranks.cuda_arenas import Arenas
from epmesh_server.ranks.cuda_collectives import CudaCollectives
from epmesh_server.ranks.cuda_exchange import CudaExchange, layout_of
from epmesh_server.ranks.cuda_staged import StagedExchange, refuse_capture
from epmesh_server.ranks.cuda_tables import Key, RoutingTables
from epmesh_server.ranks.exchange import Exchange

if TYPE_CHECKING:
    from epmesh_server.ranks.rank import RankProcess


class CudaCommunicator(JoinedCommunicator):
    """One group of a rank that lives in this process and has a GPU. One thread at a time may be inside a group."""

    _kernels: CudaExchange | None  # what runs this group's exchanges; `None` where it spans nodes
    _collectives: CudaCollectives

    def __init__(self, rank: RankProcess, name: str, view: View) -> None:
        """Takes the rank's place in the group `name` of `view`."""
        self._kept: dict[Lane, Arenas] = {}  # of older epochs; CUDA graphs captured then must find memory if replayed
        self._num_sms: int | None = None
        self._quantizer = Quantizer(rank.device)
        super().__init__(rank, name, view)

    def _new_exchange(self) -> Exchange:
        self._tables = RoutingTables(self.device)
        if self._member.topology.remote_slots:
            self._kernels = None
            return StagedExchange(self._member, self._stats, self._turn, self.device)
        limit, kept = self.max_tokens_per_rank, self._kept.keys()
        self._kernels = CudaExchange(self._member, self._stats, self._turn, self.device, limit, kept, self._num_sms)
        return self._kernels

    def _new_collectives(self, exchange: Exchange) -> CudaCollectives:
        return CudaCollectives(exchange, self.device)

    @property
    def device_group(self) -> Any:
        """NCCL's group of this node's members where there is one, else `cpu_group`; formed by all members together."""
        with self._turn():
            return self._collectives.device_group()

    def set_num_sms(self, num_sms: int) -> None:
        super().set_num_sms(num_sms)
        with self._turn(collective=False):
            self._num_sms = num_sms
            if self._kernels is not None:
                self._kernels.bound(num_sms)

    def max_sms_used(self) -> int | None:
        return None if self._kernels is None else self._kernels.most_programs

    def _let_go(self) -> None:
        if self._kernels is not None:
            self._kept.update(self._kernels.close())
        super()._let_go()

    def destroy(self) -> None:
        """Leaves; graphs that were captured with this communicator must not be replayed afterwards."""
        super().destroy()
        for arenas in self._kept.values():
            arenas.close()
        self._kept.clear()

    def check(self) -> None:
        super().check()
        with self._turn(collective=False):
            self._follow_placement()
            if self._kernels is not None:
                self._kernels.surface()
            self._collectives.surface()

    # The exchange ------------------------------------------------------------------------------------------------

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
        hidden_states, extra_tensors = self._quantized(hidden_states, extra_tensors, quantize)
        tensors = (hidden_states, topk_weights, topk_ids)
        given = _plain(tensors if extra_tensors is None else (*tensors, *row_tensors([], extra_tensors)))
        kernels = self._kernels
        if kernels is None or given is None or self._destroyed or not (layer is None or type(layer) is int):
            return super().dispatch(*tensors, is_sequence_parallel, extra_tensors, layer=layer, static=static)
        key = (
            *[each.shape for each in given],
            *[each.dtype for each in given],
            *(extra_tensors is None, layer, bool(is_sequence_parallel), bool(static)),
        )
        received = None
        self._check_mode()
        if self._busy.acquire(blocking=False):  # else the long way says who is inside
            try:
                received = kernels.again(
                    key, given, lambda: self._routed(list(tensors), extra_tensors, is_sequence_parallel, layer, static)
                )
            finally:
                self._busy.release()
        if received is None:
            received = super().dispatch(*tensors, is_sequence_parallel, extra_tensors, layer=layer, static=static)
            kernels.prepare(key, given)
        return received

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
        hidden_states, extra_tensors = self._quantized(hidden_states, extra_tensors, quantize)
        return super().dispatch_async(
            hidden_states, topk_weights, topk_ids, is_sequence_parallel, extra_tensors, layer=layer, static=static
        )

    def _quantized(self, hidden_states: Any, extra_tensors: Any, quantize: str | None) -> tuple[Any, Any]:
        """As `epmesh.quantization.quantized`, by one kernel where it takes the rows."""
        extra = [] if extra_tensors is None else extra_tensors
        if quantize != "fp8" or not isinstance(extra, list) or not self._quantizer.takes(hidden_states):
            return quantized(hidden_states, extra_tensors, quantize)
        switch = torch.cuda.current_device() != self.device.index
        with torch.cuda.device(self.device) if switch else contextlib.nullcontext():
            rows, scales = self._quantizer(hidden_states)
        return rows, [*extra, scales]

    def combine(
        self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False, *, handle: Handle | None = None
    ) -> torch.Tensor:
        sums = self._combine_again(hidden_states, None, is_sequence_parallel, handle)
        return super().combine(hidden_states, is_sequence_parallel, handle=handle) if sums is None else sums

    def _combine_again(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor | None,
        is_sequence_parallel: bool,
        handle: Handle | None,
    ) -> torch.Tensor | None:
        kernels = self._kernels
        if kernels is None or self._destroyed or type(hidden_states) is not torch.Tensor:
            return None
        if (output is not None and type(output) is not torch.Tensor) or not self._busy.acquire(blocking=False):
            return None
        try:
            return kernels.combine_again(hidden_states, handle, bool(is_sequence_parallel), output)
        finally:
            self._busy.release()

    def combine_into_output(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor,
        is_sequence_parallel: bool = False,
        *,
        handle: Handle | None = None,
    ) -> torch.Tensor:
        sums = self._combine_again(hidden_states, output, is_sequence_parallel, handle)
        if sums is not None:
            return sums
        return super().combine_into_output(hidden_states, output, is_sequence_parallel, handle=handle)

    def _broadcast(self, tensors: list[torch.Tensor], is_sequence_parallel: bool, *, has_ids: bool) -> Layout:
        if self._kernels is None:
            refuse_capture(self.unique_name, len(self._topology.members))
            return super()._broadcast(tensors, is_sequence_parallel, has_ids=has_ids)
        return self._layout(tensors, None, is_sequence_parallel, has_ids)

    def _routed_rows(self, tensors: list[torch.Tensor], routing: Routing, is_sequence_parallel: bool) -> Layout:
        if self._kernels is None:
            refuse_capture(self.unique_name, len(self._topology.members))
            return super()._routed_rows([*tensors[:2], tensors[2].cpu()], routing, is_sequence_parallel)
        return self._layout(tensors, routing, is_sequence_parallel, True)

    def _row_numbers(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return super()._row_numbers(tensors) if self._kernels is None else []  # with kernels a row stands at its number

    def _layout(
        self, tensors: list[torch.Tensor], routing: Routing | None, is_sequence_parallel: bool, has_ids: bool
    ) -> Layout:
        if self.world_size > MAX_WORLD_SIZE:
            raise InvalidRequest(
                f"a group of {self.world_size} GPUs on one node; at most {MAX_WORLD_SIZE} can exchange"
            )
        reach = self._reach(is_sequence_parallel)
        eligible = sum(1 << position for position in reach.eligible)
        table = None if routing is None else self._tables.table(self._key_of(routing), routing)
        return layout_of(Rows(tuple(tensor.contiguous() for tensor in tensors), table, eligible, has_ids))

    def _key_of(self, routing: Routing) -> Key:
        """The layer of a routing, and whether it is sequence parallel."""
        return next((layer, parallel) for (_, layer, parallel), each in self._routings.items() if each is routing)

    def _routing(self, layer: int | None, is_sequence_parallel: bool) -> Routing | None:
        self._follow_placement()
        return super()._routing(layer, bool(is_sequence_parallel))

    def _follow_placement(self) -> None:
        """Has routing tables on the device, and graphs that go by them, follow the newest placement."""
        self._tables.follow(self.view.epoch, super()._routing)

    def _commit_placement(self, placement: Placement, layer: int | None) -> None:
        super()._commit_placement(placement, layer)
        self._follow_placement()

    def wait_ready(self, timeout_s: float | None = None) -> tuple[View, int]:
        found = super().wait_ready(timeout_s)
        with self._turn(collective=False):
            self._follow_placement()
        return found

    # Collectives, which take tensors on other devices too --------------------------------------------------------

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        return _back(super().all_reduce(self._there(input_)), input_)

    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return super().all_gather(self._there(input_), dim)

    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        staged = [self._there(each) for each in input_] if isinstance(input_, list) else self._there(input_)
        return super().all_gatherv(staged, dim, sizes)

    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return super().reduce_scatter(input_ if self.world_size == 1 else self._there(input_), dim)

    def reduce_scatterv(self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
        return super().reduce_scatterv(self._there(input_), dim, sizes)

    def reduce_scatterv_into_output(
        self, input_: torch.Tensor, output: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        scattered = super().reduce_scatterv_into_output(self._there(input_), self._there(output), dim, sizes)
        return _back(scattered, output)

    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        return super().gather(self._there(input_), dst, dim)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        return _back(super().broadcast(self._there(tensor), src), tensor)

    def _there(self, tensor: Any) -> Any:
        """A tensor on this rank's device; what is none as it is, to be refused with the others."""
        return tensor.to(self.device) if isinstance(tensor, torch.Tensor) else tensor

    # Through the host --------------------------------------------------------------------------------------------

    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        super().send(_host(tensor), dst)

    def recv(self, size: torch.Size | Sequence[int] | int, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        return super().recv(size, dtype, src).to(self.device)

    def batch_isend_irecv(self, p2p_ops: list[Any]) -> list[Any]:
        planned = [args.check_p2p_op(op, self.ranks, self.device) for op in p2p_ops]
        staged = [
            SimpleNamespace(op=op.op, tensor=tensor.cpu(), group_peer=peer)
            for op, (_, tensor, peer) in zip(p2p_ops, planned, strict=True)
        ]
        works = super().batch_isend_irecv(staged)
        return [
            work if is_send else _Received(work, there.tensor, tensor)
            for work, there, (is_send, tensor, _) in zip(works, staged, planned, strict=True)
        ]


class _Received:
    """A receive through the host."""

    def __init__(self, work: Any, here: torch.Tensor, into: torch.Tensor) -> None:
        self._work, self._here, self._into = work, here, into

    def wait(self) -> None:
        """Returns when the tensor on the device is written."""
        self._work.wait()
        self._into.copy_(self._here)

    def is_completed(self) -> bool:
        """Whether `wait` has nothing left to do."""
        return bool(self._work.is_completed())


def _plain(tensors: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
    """The tensors, where all are torch's own and nothing else."""
    for each in tensors:
        if type(each) is not torch.Tensor:
            return None
    return tensors


def _host(tensor: Any) -> Any:
    """A copy on the host of what is a tensor on a GPU; anything else as it is, to be refused with the others."""
    return tensor.cpu() if isinstance(tensor, torch.Tensor) and tensor.is_cuda else tensor


def _back(result: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """`into`, with the result that its copy on another device got."""
    return into if result is into else into.copy_(result)
