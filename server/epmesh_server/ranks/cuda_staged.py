"""The exchange of a group that spans nodes and whose ranks have their tensors on GPUs: through the host.

Rows are copied to pinned memory, go the way of ranks on CPU, inside the node as well as between nodes, and come back to
the device. So rows, order and sums are the same as on CPU, whatever the number of ranks a node. Every call waits for
its copies, which is why a CUDA graph cannot capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from epmesh.errors import InvalidRequest
from epmesh.layout import Layout
from epmesh_server.ranks.combine import CombineStage
from epmesh_server.ranks.exchange import Exchange
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.open_exchange import ExchangeStats, OpenExchange, Request, WayBack, WayThere


class StagedExchange(Exchange):
    """Runs the exchanges of one group on one rank."""

    def __init__(
        self,
        member: GroupMember,
        stats: ExchangeStats,
        turn: Callable[[], AbstractContextManager[None]],
        device: torch.device,
    ) -> None:
        """Starts with nothing open; arguments as `OpenExchanges` takes them, and where rows and results are."""
        super().__init__(member, stats, turn)
        self.device = device

    def combine_buffer(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
        """`None`: results are copied anyway."""
        return None

    def _start(self, request: Request) -> OpenExchange:
        def shape(rows: list[torch.Tensor]) -> tuple[object, ...]:
            return request.shape([tensor.to(self.device) for tensor in rows])

        return super()._start(replace(request, shape=shape))

    def _way_there(self, sequence: int, tensors: Sequence[torch.Tensor], layout: Layout | None) -> WayThere:
        return super()._way_there(sequence, () if layout is None else to_host(tensors), layout)

    def _way_back(self, exchange: OpenExchange, hidden_states: torch.Tensor) -> WayBack:
        return _StagedCombine(self.member, exchange, hidden_states, self.device)


class _StagedCombine(CombineStage):
    """One combine: results go to the host once they were accepted, sums come back."""

    def __init__(
        self, member: GroupMember, exchange: OpenExchange, hidden_states: torch.Tensor, device: torch.device
    ) -> None:
        super().__init__(member, exchange, hidden_states)
        self._device = device

    def collect(self) -> torch.Tensor:
        return super().collect().to(self._device)

    def _check(self, is_sequence_parallel: bool, output: torch.Tensor | None) -> None:
        super()._check(is_sequence_parallel, output)
        (self._hidden,) = to_host([self._hidden])


def refuse_capture(group: str, num_nodes: int) -> None:
    """Refuses a call inside the capture of a CUDA graph.

    Raises:
        InvalidRequest: with the mend.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise InvalidRequest(
            f"group {group!r} spans {num_nodes} nodes; its exchanges go through the host, where no CUDA graph "
            f"captures them: call them outside of the graph, or use a group inside one node"
        )


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies on the host of tensors on a device, in pinned memory; those on the host as they are. Waits once."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    staged = [_begin_copy(tensor) if tensor.is_cuda else tensor for tensor in tensors]
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return staged


def _begin_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is whole when what is on the current stream is done."""
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
