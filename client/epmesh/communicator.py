"""The communicator: the interface of vLLM's ``DeviceCommunicatorBase``, for ranks however they were got hold of.

`Communicator` is abstract and needs no torch at run time. ``epmesh.join`` gives one whose data plane is this process.
Tensors below are ``torch.Tensor``. ``world_size`` and ranks in arguments are those of the group unless a line says
global. Every method is collective over the group unless it says otherwise: all members call it, in the same order.

Each may raise, besides what its own docstring says: `PeerLost`, `StaleEpoch`, `DeadlineExceeded`, `InvalidRequest` and
`MeshUnavailable`. A refusal is collective: every member raises the same error, and the group stays usable.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from epmesh.errors import InvalidRequest
from epmesh.moe_modules import held_experts, moe_modules
from epmesh.view import View

if TYPE_CHECKING:
    import torch

    LoadExperts = Callable[[tuple[int, ...], tuple[int, ...]], None]
    """``load(added, removed)``: called when a placement changes what this rank holds."""

    Experts = Callable[[int | None, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """``experts(layer, hidden_states, topk_weights, topk_ids) -> hidden_states``: see `Communicator.serve`."""


class Stop(Protocol):
    """Says when to stop; such as a `threading.Event`."""

    def is_set(self) -> bool:
        """Whether to stop."""


class Handle(abc.ABC):
    """One open exchange: what a dispatch leaves for its combine."""

    @property
    @abc.abstractmethod
    def sequence(self) -> int:
        """The exchange's number in its group."""

    @abc.abstractmethod
    def wait(self) -> tuple[Any, ...]:
        """The received rows, as ``dispatch`` returns them; the same again when called twice."""


class Communicator(abc.ABC):
    """A rank's membership in one group.

    Attributes:
        cpu_group, device_group: the torch process groups of this rank's node (`None` where there are none).
        device: where tensors live.
        unique_name: the group's name.
        rank, rank_in_group: this rank's position in the group.
        world_size: members of the group.
        ranks: the members as global ranks.
        global_rank, global_world_size: in the mesh.
        is_ep_communicator: the part of `unique_name` before ":" is ``ep``.
        use_all2all: `is_ep_communicator`, and there is more than one member.
        all2all_backend: name of the exchange backend.
        all2all_manager: the object that runs dispatch and combine.
    """

    cpu_group: Any
    device_group: Any
    device: torch.device
    unique_name: str
    rank: int
    rank_in_group: int
    world_size: int
    ranks: list[int]
    global_rank: int
    global_world_size: int
    is_ep_communicator: bool
    use_all2all: bool
    all2all_backend: str
    all2all_manager: Any

    # Collectives -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        """Sums `input_` (any shape, the same on all ranks) over the group, in place; returns it."""

    @abc.abstractmethod
    def all_gather(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenates the ranks' equally shaped tensors along `dim`, in rank order."""

    @abc.abstractmethod
    def all_gatherv(
        self, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Concatenates tensors whose `dim` has length ``sizes[rank]``, zero allowed; a list in gives a list out."""

    @abc.abstractmethod
    def reduce_scatter(self, input_: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Sums over the group and returns this rank's equal chunk along `dim`, whose length the world divides."""

    @abc.abstractmethod
    def reduce_scatterv(self, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
        """Sums over the group and returns this rank's slice of length ``sizes[rank]`` along `dim`."""

    @abc.abstractmethod
    def reduce_scatterv_into_output(
        self, input_: torch.Tensor, output: torch.Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> torch.Tensor:
        """As `reduce_scatterv`, into `output`, which is returned."""

    @abc.abstractmethod
    def gather(self, input_: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor | None:
        """Concatenates the ranks' tensors along `dim` on rank `dst`; `None` on the others."""

    @abc.abstractmethod
    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrites `tensor` with rank `src`'s; returns it."""

    @abc.abstractmethod
    def send(self, tensor: torch.Tensor, dst: int | None = None) -> None:
        """Sends to rank `dst` (default: the next). Not collective; buffered up to a byte budget."""

    @abc.abstractmethod
    def recv(self, size: torch.Size | Sequence[int] | int, dtype: torch.dtype, src: int | None = None) -> torch.Tensor:
        """Receives from rank `src` (default: the previous) a tensor of shape `size`, on `device`. Not collective."""

    @abc.abstractmethod
    def batch_isend_irecv(self, p2p_ops: list[Any]) -> list[Any]:
        """Starts the sends and receives of `p2p_ops`; returns one work object each, with ``wait()``.

        It returns when the sends are under way; receives take in what comes whenever this rank is in a call of the
        group, so two ranks may have more for each other than may wait unread. A receive for which nothing came in
        time raises `DeadlineExceeded`, stays open, and may be waited for again; not so over process groups of the
        caller's own (`DeviceCommunicator`), which are of no use once one was late.

        Each element has ``op`` (``torch.distributed.isend`` or ``irecv``), ``tensor`` and ``group_peer`` (rank in the
        group; ``peer``, a global rank, where that is missing).
        """

    # The exchange ----------------------------------------------------------------------------------------------

    @abc.abstractmethod
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
        """Sends each row to the ranks that hold its experts, once a rank.

        Args:
            hidden_states: ``[num_tokens, hidden]``, any dtype of the contract; `num_tokens` may differ by rank, 0 too.
            topk_weights: ``[num_tokens, num_topk]``.
            topk_ids: ``[num_tokens, num_topk]``, int32 or int64; -1 means no expert.
            is_sequence_parallel: every rank holds its own tokens (True), or the ranks of one tensor-parallel group
                hold the same ones (False).
            extra_tensors: ``[num_tokens, ...]`` each; they travel with the rows.
            layer: whose placement decides.
            static: the output has ``world_size x T`` rows (T: join's ``max_tokens_per_rank``), slot = source rank x T +
                source row; unused ones have id -1 and weight 0.
            quantize: "fp8": rows in bfloat16, float16 or float32 travel in float8_e4m3fn, with one scale in float32 for
                every 128 values, ``[num_tokens, hidden / 128]``, which is the last of the extra tensors.

        Returns:
            ``(hidden_states, topk_weights, topk_ids)`` of the received rows, ordered by source rank, then source row;
            with a fourth element, the list of extra tensors, where `extra_tensors` is not None or rows are quantized.
            Ids are unchanged, except that an id which another replica was chosen for is -1.

        Raises:
            ExpertUnavailable: a row wants an expert without a living holder.
        """

    @abc.abstractmethod
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
        """As `dispatch`, but returns once the rows are sent; ``handle.wait()`` gives what `dispatch` returns.

        Two exchanges may be open at once; a third is `InvalidRequest`. Pass the handle to `combine`.
        """

    @abc.abstractmethod
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
        """Sends every row ``[num_tokens, hidden]`` and its logits ``[num_tokens, num_experts]`` to every rank."""

    @abc.abstractmethod
    def combine(
        self, hidden_states: torch.Tensor, is_sequence_parallel: bool = False, *, handle: Handle | None = None
    ) -> torch.Tensor:
        """Sends results back and sums them.

        Args:
            hidden_states: ``[num_received, hidden]``, one row for each row the dispatch returned, weights applied.
            is_sequence_parallel: as given to the dispatch.
            handle: which exchange; default the last one.

        Returns:
            ``[num_tokens, hidden]`` in the dtype of `hidden_states`: for each of this rank's own tokens the sum of the
            rows that came back for it, accumulated in fp32 in a fixed order.
        """

    @abc.abstractmethod
    def combine_into_output(
        self,
        hidden_states: torch.Tensor,
        output: torch.Tensor,
        is_sequence_parallel: bool = False,
        *,
        handle: Handle | None = None,
    ) -> torch.Tensor:
        """As `combine`, into `output`, which is returned."""

    @abc.abstractmethod
    def allocate_combine_input(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, is_sequence_parallel: bool = False
    ) -> torch.Tensor | None:
        """A tensor that `combine` can read in place, or `None` where it would copy it. Not collective.

        It is for the exchange of the last plain dispatch: write to it between that and its combine only.
        """

    @abc.abstractmethod
    def get_symmetric_memory_buffer(
        self, role: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor | None:
        """A tensor in memory that the group's ranks share, or `None`. Not collective."""

    def prepare_communication_buffer_for_model(self, model: Any) -> None:
        """Lets the model's mixture-of-experts modules set up, and declares what they say of their experts.

        Calls ``maybe_init_modular_kernel()`` of every module whose class is called ``FusedMoE`` or ``SharedFusedMoE``.
        Where these have a map of their experts (``global_num_experts`` and ``expert_map``, as vLLM's), the placement is
        declared by it, once for all layers if they agree. Does nothing unless `is_ep_communicator`. Buffers need no
        sizes: their pages cost memory once they are used.

        Args:
            model: has ``modules()``; every rank passes the same model with its own share of experts.
        """
        if not self.is_ep_communicator:
            return
        modules = moe_modules(model)
        for module in modules:
            module.maybe_init_modular_kernel()
        for layer, held in held_experts(modules).items():
            self.set_expert_placement(held.num_experts, held.experts, layer=layer)

    # Membership ------------------------------------------------------------------------------------------------

    @property
    @abc.abstractmethod
    def view(self) -> View:
        """The view this communicator works in."""

    @property
    def epoch(self) -> int:
        """The number of that view."""
        return self.view.epoch

    @abc.abstractmethod
    def wait_ready(self, timeout_s: float | None = None) -> tuple[View, int]:
        """Adopts the newest committed view, and passes over calls that others gave up waiting for. Not collective.

        Returns:
            The view, and the last exchange of this group that every survivor completed: repeat from there.

        Raises:
            MeshUnavailable: there was none within `timeout_s`, or this rank is no member any more.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Raises an error that an earlier call on a device left behind. Not collective."""

    @abc.abstractmethod
    def group(self, name: str) -> Communicator:
        """The communicator of another group this rank is in. Not collective.

        Raises:
            InvalidRequest: there is no such group, or this rank is not in it.
            NotReady: the group is a tensor-parallel one with members missing.
        """

    @abc.abstractmethod
    def create_group(self, name: str, ranks: Iterable[int]) -> Communicator | None:
        """Makes a group of global `ranks` that are members of this one; `None` on ranks outside of it."""

    @abc.abstractmethod
    def destroy_group(self, name: str) -> None:
        """Removes a group that `create_group` made."""

    @abc.abstractmethod
    def set_expert_placement(
        self, num_experts: int, experts: Iterable[int] | None = None, layer: int | None = None
    ) -> None:
        """Declares which experts this rank holds; returns when the view that carries it is committed.

        Args:
            num_experts: logical experts, the same on all ranks.
            experts: this rank's; `None` on all ranks: the linear default over the group.
            layer: for one layer; `None` for all that have no placement of their own.
        """

    def serve(
        self,
        experts: Experts,
        *,
        stop: Stop | None = None,
        max_batch_rows: int = 4096,
        max_wait_s: float = 0.0005,
        max_queued_bytes: int = 1 << 30,
        drain_s: float = 5.0,
    ) -> None:
        """Answers routers' rows until `stop` is set; changes to mode ``serve`` first, and back at the end.

        Not collective, and collective calls meanwhile are `InvalidRequest`. Rows of several routers are computed
        together. An exception in `experts` is what the routers of those rows hear, and the rank goes on.

        Args:
            experts: ``experts(layer, hidden_states, topk_weights, topk_ids)`` gets ``[n, hidden]`` and twice
                ``[n, num_topk]``, on `device`, and returns ``[n, any width]``: for each row the weighted sum over this
                rank's experts. An id of -1 is not this rank's to compute. `layer` is None where routers name none. It
                is called by the thread that called `serve`.
            stop: such as a `threading.Event`; None: until the membership ends.
            max_batch_rows: most rows of one call of `experts`, unless a single request has more.
            max_wait_s: how long rows wait for others to join them while nothing is computed.
            max_queued_bytes: most bytes of rows that wait; beyond, routers get `Overloaded`.
            drain_s: how long after `stop` routers that have not heard of it are answered at most.

        Raises:
            InvalidRequest: an argument is wrong, this rank serves already, or it cannot.
            MeshUnavailable, StaleEpoch: the membership ended.
        """
        raise InvalidRequest(f"{type(self).__name__} cannot serve; epmesh.join gives a communicator that can")

    @abc.abstractmethod
    def destroy(self) -> None:
        """Releases everything; idempotent. Not collective. The rank of a joined mesh leaves it."""

    def suspend(self) -> None:
        """Nothing to do by default. Not collective."""

    def resume(self) -> None:
        """Nothing to do by default. Not collective."""

    def checkpoint_prepare(self) -> None:
        """Nothing to do by default. Not collective."""

    def checkpoint_restore(self) -> None:
        """Nothing to do by default. Not collective."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()
