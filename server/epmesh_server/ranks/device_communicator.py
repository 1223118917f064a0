"""``epmesh.DeviceCommunicator``: the communicator over process groups that the caller made, a drop-in for engines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from epmesh.communicator import Communicator
from epmesh.errors import InvalidRequest
from epmesh.layout import Topology
from epmesh.placement import Placement
from epmesh.view import GroupInfo, NodeInfo, RankInfo, RankMode, View
from epmesh_server.ranks.all2all import All2AllManager
from epmesh_server.ranks.calls import describe
from epmesh_server.ranks.checked_communicator import CheckedCommunicator, Load
from epmesh_server.ranks.flat_collectives import FlatCollectives
from epmesh_server.ranks.flat_exchange import FlatExchange
from epmesh_server.ranks.flat_member import FlatMember
from epmesh_server.ranks.flat_messages import FlatMessages
from epmesh_server.ranks.mail import Mail


class DeviceCommunicator(CheckedCommunicator):
    """One group over torch process groups as they are; they may span hosts.

    ::

        group = torch.distributed.new_group(backend="gloo")
        comm = epmesh.DeviceCommunicator(group, unique_name="ep")
        comm.set_expert_placement(num_experts=64)

    The constructor is that of vLLM's ``DeviceCommunicatorBase``. Everything travels over `cpu_group`, rows only to the
    ranks that hold their experts; nothing of ``torch.distributed``'s default group is used. There is no mesh behind
    it: the epoch is 0, no other groups can be made, and which ranks share a host is not known, so all members count as
    one node: sums are formed in rank order and rounded once, and of several replicas a row's own rank is preferred,
    then all alike.

    Refusals are collective as everywhere, but there is no promise about faults. Where a member dies or does not come
    within `exchange_timeout_s`, the call raises `MeshUnavailable` or `DeadlineExceeded` on those that wait for it, and
    the process group is of no use afterwards.

    Between a ``dispatch_async`` and its handle's ``wait`` a thread of this object uses `cpu_group`; make no collective
    call of your own on that group meanwhile. Other threads, one for each rank from which a batch receives, make the
    receives of batches.
    """

    _collectives: FlatCollectives
    _point_to_point: FlatMessages

    def __init__(
        self,
        cpu_group: Any,
        device: torch.device | str | None = None,
        device_group: Any = None,
        unique_name: str = "",
        *,
        global_ranks: Sequence[int] | None = None,
        global_world_size: int | None = None,
        use_all2all: bool | None = None,
        tcp_store_group: Any = None,
        tensor_parallel_size: int = 1,
        max_tokens_per_rank: int | None = None,
        exchange_timeout_s: float = 1800.0,
        load: Load | None = None,
    ) -> None:
        """Takes the groups as they are; not collective.

        Args:
            cpu_group: a torch process group that moves CPU tensors, of Gloo for one; made by ``new_group`` or directly.
            device: where tensors live; ``cpu``.
            device_group: kept as an attribute.
            unique_name: the group's name; ``ep``, or ``ep:...``, makes it the one for expert parallelism.
            global_ranks: the members' global ranks, by position; default what torch knows of `cpu_group`, or else
                positions.
            global_world_size: ranks in all; default what torch knows, or else as many as `global_ranks` need.
            use_all2all: whether expert parallelism is on; default where there is more than one member.
            tcp_store_group: vLLM passes it with groups that torch does not know; not used.
            tensor_parallel_size: consecutive global ranks that hold the same tokens, where ``is_sequence_parallel`` is
                False.
            max_tokens_per_rank: most tokens a rank may dispatch in static mode; the same on all ranks.
            exchange_timeout_s: how long a call waits for other ranks; the default is torch's own.
            load: ``load(added, removed)`` is called with expert ids when a placement changes what this rank holds.

        Raises:
            InvalidRequest: an argument is wrong.
        """
        super().__init__(unique_name, _check_device(device))
        _check_numbers(tensor_parallel_size, max_tokens_per_rank, exchange_timeout_s)
        self.cpu_group = cpu_group
        self.device_group = device_group
        self.max_tokens_per_rank = max_tokens_per_rank
        self.load = load
        self.rank = self.rank_in_group = _position(cpu_group)
        self.ranks = _global_ranks(cpu_group, global_ranks)
        self.world_size = len(self.ranks)
        self.global_rank = self.ranks[self.rank]
        self.global_world_size = _global_world_size(cpu_group, self.ranks, global_world_size)
        self.use_all2all = self.is_ep_communicator and (self.world_size > 1 if use_all2all is None else use_all2all)
        self._view = _view(unique_name, self.ranks, str(self.device), tensor_parallel_size)
        self._topology = Topology(tuple(self.ranks), (0,) * self.world_size, self.rank)
        self._member = FlatMember(self._topology, Mail(cpu_group, self.ranks, exchange_timeout_s))
        self._exchange: FlatExchange = FlatExchange(self._member, tensor_parallel_size, self._turn, self._stats)
        self._collectives = FlatCollectives(self._exchange)
        self._point_to_point = FlatMessages(self._member)
        self.all2all_manager = All2AllManager(self, tensor_parallel_size)

    # Membership ------------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The members, and the placements that were declared; its epoch is 0 for ever."""
        return self._view

    def wait_ready(self, timeout_s: float | None = None) -> tuple[View, int]:
        """Returns at once; exchanges that are open are forgotten."""
        with self._turn():
            self._member.mail.check()
            self._exchange.forget_open()
            self._member.forget_open()
            return self._view, self._member.completed

    def check(self) -> None:
        with self._turn():
            self._member.mail.check()

    def group(self, name: str) -> Communicator:
        if name == self.unique_name:
            return self
        raise self._no_groups(f"there is no group {name!r}")

    def create_group(self, name: str, ranks: Iterable[int]) -> Communicator | None:
        raise self._no_groups(f"group {name!r} cannot be made")

    def destroy_group(self, name: str) -> None:
        raise self._no_groups(f"group {name!r} cannot be destroyed")

    def _no_groups(self, what: str) -> InvalidRequest:
        return InvalidRequest(
            f"{what}: a DeviceCommunicator is over process groups that its caller made, and has no others than "
            f"{self.unique_name!r}; make process groups, and a DeviceCommunicator over them"
        )

    def _commit_placement(self, placement: Placement, layer: int | None) -> None:
        self._collectives.agree(describe("set_expert_placement", "loaded"))
        self._view = replace(self._view, placements={**self._view.placements, layer: placement})
        self._routings = {}  # they are kept by epoch, which does not change here

    def destroy(self) -> None:
        """Lets go of the process groups, which stay their maker's; idempotent. Not collective.

        Messages that were sent and not received yet are lost.
        """
        self._destroyed = True
        self._point_to_point.close()
        self._member.close()


def _position(group: Any) -> int:
    try:
        return int(group.rank())
    except (AttributeError, TypeError) as exc:
        raise InvalidRequest(f"cpu_group is {group!r:.80}; it must be a torch process group") from exc


def _global_ranks(group: Any, given: Sequence[int] | None) -> list[int]:
    """The members' global ranks, by position: as given, as torch knows them, or their positions."""
    size = int(group.size())
    known = _known_ranks(group)
    ranks = list(given) if given is not None else known if known is not None else list(range(size))
    if len(ranks) != size or len(set(ranks)) != size or min(ranks) < 0:
        raise InvalidRequest(f"global_ranks is {ranks}; it needs one rank of its own for each of {size} members")
    return ranks


def _known_ranks(group: Any) -> list[int] | None:
    """What torch knows of a group, if it does."""
    if group not in distributed_c10d._world.pg_group_ranks:
        return None
    return dist.get_process_group_ranks(group)


def _global_world_size(group: Any, ranks: Sequence[int], given: int | None) -> int:
    least = max(ranks) + 1
    if given is None:
        return dist.get_world_size() if _known_ranks(group) is not None and dist.is_initialized() else least
    if given < least:
        raise InvalidRequest(f"global_world_size is {given}; global ranks go up to {least - 1}")
    return given


def _check_device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.device("cpu" if device is None else device)
    except RuntimeError as exc:
        raise InvalidRequest(f"device {device!r} is none: {exc}") from exc
    if found.type != "cpu":
        raise InvalidRequest(f"device {device}: this version exchanges CPU tensors only; use device='cpu'")
    return found


def _check_numbers(tensor_parallel_size: int, max_tokens_per_rank: int | None, exchange_timeout_s: float) -> None:
    if tensor_parallel_size < 1:
        raise InvalidRequest(f"tensor_parallel_size is {tensor_parallel_size}; it must be 1 or more")
    if max_tokens_per_rank is not None and max_tokens_per_rank < 1:
        raise InvalidRequest(f"max_tokens_per_rank is {max_tokens_per_rank}; it must be 1 or more, or None")
    if exchange_timeout_s <= 0:
        raise InvalidRequest(f"exchange_timeout_s is {exchange_timeout_s}; it must be above 0")


def _view(name: str, ranks: Sequence[int], device: str, tensor_parallel_size: int) -> View:
    """A view of epoch 0 with all members on one node."""
    infos = tuple(RankInfo(rank, 0, device, RankMode.EXCHANGE, "") for rank in sorted(ranks))
    return View(
        mesh_id="",
        epoch=0,
        membership_epoch=0,
        stride=max(ranks) + 1,
        nodes=(NodeInfo(0, "", 0, "", infos),),
        groups=(GroupInfo(name, 0, tuple(ranks), tuple(ranks)),),
        tensor_parallel_size=tensor_parallel_size,
    )
