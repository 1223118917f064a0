"""The object behind ``all2all_manager``: what vLLM asks of the backend that runs dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from epmesh_server.ranks.checked_communicator import CheckedCommunicator


class All2AllManager:
    """The exchange of one group, in vLLM's words (``All2AllManagerBase`` of 0.33.0).

    Attributes:
        rank, world_size: in the group.
        dp_world_size: data-parallel ranks: members over those that hold the same tokens.
        support_fault_tolerance: whether an engine shall ask after every step which ranks are masked. Here losses are
            errors of the calls, so it need not.
        dispatch, dispatch_router_logits, combine: the communicator's.
    """

    support_fault_tolerance = False

    def __init__(self, communicator: CheckedCommunicator, tensor_parallel_size: int) -> None:
        """Speaks for `communicator`."""
        self._communicator = communicator
        self.rank = communicator.rank
        self.world_size = communicator.world_size
        self.dp_world_size = max(1, self.world_size // max(1, tensor_parallel_size))
        self.dispatch: Callable[..., tuple[Any, ...]] = communicator.dispatch
        self.dispatch_router_logits: Callable[..., tuple[Any, ...]] = communicator.dispatch_router_logits
        self.combine: Callable[..., torch.Tensor] = communicator.combine

    def max_sms_used(self) -> int | None:
        """Most multiprocessors that the exchange takes from a GPU; `None`: it takes none."""
        return self._communicator.max_sms_used()

    def set_num_sms(self, num_sms: int) -> None:
        """Bounds what the exchange takes from a GPU, from the next dispatch on; call it alike on all ranks.

        Raises:
            InvalidRequest: it is less than 1.
        """
        self._communicator.set_num_sms(num_sms)

    def query_fault(self) -> torch.Tensor:
        """bool ``[1]``: no rank was masked since the last time."""
        return torch.zeros(1, dtype=torch.bool)

    def query_active_mask(self) -> torch.Tensor:
        """int32 ``[world_size]``: 0 for each rank, none is masked."""
        return torch.zeros(self.world_size, dtype=torch.int32)

    def clean_buffers(self) -> None:
        """Nothing to do: buffers are new in every membership."""

    def stage_ep_size(self, *_: Any, **__: Any) -> None:
        """Nothing to prepare before the group gets another size."""

    def commit_ep_size(self, *_: Any, **__: Any) -> None:
        """Nothing to do once it has."""

    def destroy(self) -> None:
        """Nothing to release: the communicator's ``destroy`` does."""
