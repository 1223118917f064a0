"""Collectives of a group whose members have their tensors on GPUs.

Every call is compared between the members first, on the host and without waiting for the device. Then bytes move on the
caller's current stream, by NCCL, where every member has a GPU of its own on one node; else they go through the host and
Gloo. Sums are formed by torch, in the accumulator's precision, and rounded once, so they are the same either way.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest
from epmesh_server.ranks.calls import Call, describe
from epmesh_server.ranks.collectives import Collectives
from epmesh_server.ranks.cuda_watch import Watch, member_gone
from epmesh_server.ranks.device_choice import Choice, Seat, Way, choose
from epmesh_server.ranks.exchange import Exchange
from epmesh_server.ranks.nccl_group import GroupEndedError, NcclDeviceGroup
from epmesh_server.ranks.open_exchange import BROKEN
from epmesh_server.ranks.store import NodeStore
from epmesh_server.ranks.tensors import accumulator

_log = logging.getLogger(__name__)

_LITTLE_BYTES = 64 << 10  # up to here one launch more costs more than sending everything to everybody
_DRAIN_S = 1.0
_nccl: Any = torch.cuda.nccl  # not typed
_T = TypeVar("_T")


class CudaCollectives(Collectives):
    """Runs the collectives of one group on one rank that has a GPU. Arguments were checked by the communicator."""

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        """Starts without a device group; it is formed by the first call that needs one."""
        super().__init__(exchange)
        self._device = device
        self._choice: Choice | None = None
        self._nccl: NcclDeviceGroup | None = None
        self._nccl_generation = 0
        self._watch: Watch | None = None
        self._failed: EpmeshError | None = None  # what the other members cannot know of, until the next call

    def device_group(self) -> object:
        """The torch process group that device tensors move by; formed when first asked for, by all members."""

        def run(_: Mapping[int, Call]) -> object:
            return self._group_of_nccl().process_group if self._way is Way.NCCL else self.process_group()

        return self._numbered(describe("device_group"), run)

    def surface(self) -> None:
        """Raises what went wrong on the device since a call returned without waiting."""
        self._notice_late()
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def close(self) -> None:
        self._drop(self._member.timeout_s)
        super().close()

    def _give_up(self) -> None:
        """Does not wait for the watch, which may be at it: the error comes first."""
        self._nccl_generation = -1
        super()._give_up()

    # Before a call ---------------------------------------------------------------------------------------------

    def _numbered(self, call: Call, run: Callable[[dict[int, Call]], _T], timeout_s: float | None = None) -> _T:
        """As ever, with this rank's seat, and what its device group met since the last call."""
        self._notice_late()
        if self._failed is not None and not call.HasField("refusal"):
            call.refusal.CopyFrom(self._failed.to_proto())
        elif torch.cuda.is_current_stream_capturing():
            text = "a CUDA graph is being captured, and members compare their calls on the host; capture exchanges only"
            call.refusal.CopyFrom(InvalidRequest(text).to_proto())
        self._failed = None
        call.numbers.extend(self._seat.numbers())

        def run_seated(calls: dict[int, Call]) -> _T:
            try:
                return run(self._seated(calls))
            except BaseException as exc:
                self._note_failure(call.method, exc)
                raise

        return super()._numbered(call, run_seated, timeout_s)

    def _notice_late(self) -> None:
        """Makes known that the device group was given up: its next generation is another one on all members."""
        if self._nccl is not None and self._nccl.late:
            self._drop(0.0)
            self._member.abandoned = max(self._member.abandoned, self._sequence)
            limit = f"{self._member.timeout_s:g} s"
            self._failed = DeadlineExceeded(
                message=f"a collective before was not done {limit} after it began on {self._device}: the device of "
                f"some member did not come to it, so its result is void"
            )

    def _note_failure(self, method: str, error: BaseException) -> None:
        """Others have launched what this rank did not, and have returned: the next call tells them."""
        told = isinstance(error, BROKEN) or self._sequence in self._member.inbox.abandoned
        if self._way is Way.NCCL and not told:
            self._failed = InvalidRequest(f"{method} before failed there, so its result is void: {error}")

    @cached_property
    def _seat(self) -> Seat:
        return _seat_on(self._device)

    @property
    def _way(self) -> Way:
        return Way.HOST if self._choice is None else self._choice.way

    def _seated(self, calls: dict[int, Call]) -> dict[int, Call]:
        """Decides the way by the members' seats; their calls without these."""
        seats = {rank: Seat.read(call.numbers) for rank, call in calls.items()}
        if self._choice is None:
            choice = self._choice = choose(seats, 1 + len(self._topology.remote_slots))
            member = self._member
            _log.info(
                "rank=%d epoch=%d device_group.chosen: collectives of %s by %s: %s",
                *(member.session.rank, member.view.epoch, member.name, choice.way.value, choice.why),
            )
        bare = {}
        for rank, call in calls.items():
            bare[rank] = Call()
            bare[rank].CopyFrom(call)  # calls that are alike are one object
            del bare[rank].numbers[-Seat.count() :]
        return bare

    # The calls -------------------------------------------------------------------------------------------------

    def _all_reduce(self, tensor: torch.Tensor, calls: Mapping[int, Call]) -> torch.Tensor:
        if self._way is Way.HOST:
            return tensor.copy_(super()._all_reduce(tensor.cpu(), calls))
        flat, world_size = tensor.view(-1), self._topology.world_size
        if flat.numel() * flat.element_size() <= _LITTLE_BYTES:
            return tensor.copy_(_sum(self._collect(flat)).view(tensor.shape))
        parts = _parts(flat, world_size)
        mine = _sum(self._scatter(parts))
        self._move([mine] * world_size, parts)
        return tensor

    def _all_gather_blocks(
        self, tensors: Sequence[torch.Tensor], calls: Mapping[int, Call]
    ) -> list[list[torch.Tensor]]:
        if self._way is Way.HOST:
            blocks = super()._all_gather_blocks([tensor.cpu() for tensor in tensors], calls)
            return [[block.to(self._device) for block in of_member] for of_member in blocks]
        gathered = [
            [
                torch.empty(shape, dtype=tensor.dtype, device=self._device)
                for shape, tensor in zip(shapes, tensors, strict=True)
            ]
            for shapes in self._shapes(tensors, calls)
        ]
        for index, tensor in enumerate(tensors):
            incoming = [of_member[index] for of_member in gathered]
            self._move([tensor.contiguous()] * len(incoming), incoming)
        return gathered

    def _reduce_scatter(self, rows: torch.Tensor, sizes: Sequence[int], calls: Mapping[int, Call]) -> torch.Tensor:
        if self._way is Way.HOST:
            return super()._reduce_scatter(rows.cpu(), sizes, calls).to(self._device)
        return _sum(self._scatter(torch.split(rows, list(sizes))))

    def _broadcast(self, tensor: torch.Tensor, src: int, calls: Mapping[int, Call]) -> torch.Tensor:
        if self._way is Way.HOST:
            return tensor.copy_(super()._broadcast(tensor.cpu(), src, calls))
        flat, me, places = tensor.view(-1), self._topology.me, range(self._topology.world_size)
        nothing = flat[:0]
        if flat.numel() * flat.element_size() <= _LITTLE_BYTES:
            leaving = [flat if me == src != place else nothing for place in places]
            self._move(leaving, [flat if place == src != me else nothing for place in places])
            return tensor
        parts = _parts(flat, len(places))  # each member passes one on: nobody sends everything to everybody
        leaving = [parts[place] if me == src != place else nothing for place in places]
        self._move(leaving, [parts[me] if place == src != me else nothing for place in places])
        leaving = [nothing if place in (me, src) else parts[me] for place in places]
        self._move(leaving, [nothing if me in (src, place) else parts[place] for place in places])
        return tensor

    def _gather(self, tensor: torch.Tensor, dst: int, calls: Mapping[int, Call]) -> list[torch.Tensor] | None:
        if self._way is Way.HOST:
            blocks = super()._gather(tensor.cpu(), dst, calls)
            return None if blocks is None else [block.to(self._device) for block in blocks]
        own = tensor.contiguous()
        nothing, places = own.view(-1)[:0], range(self._topology.world_size)
        here = dst == self._topology.me
        gathered = [torch.empty_like(own) if here else nothing for _ in places]
        self._move([own if position == dst else nothing for position in places], gathered)
        return gathered if here else None

    # On the device ---------------------------------------------------------------------------------------------

    def _collect(self, flat: torch.Tensor) -> torch.Tensor:
        """Every member's `flat`, ``[world_size, n]``."""
        gathered = flat.new_empty(self._topology.world_size, flat.numel())
        self._move([flat] * len(gathered), list(gathered))
        return gathered

    def _scatter(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What every member has for this one, ``[world_size, *part]``."""
        mine = parts[self._topology.me]
        arriving = mine.new_empty(len(parts), *mine.shape)
        self._move(parts, list(arriving))
        return arriving

    def _move(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> None:
        """``outgoing[i]`` goes to member i, ``incoming[i]`` comes from it."""
        if self._way is Way.ALONE:
            incoming[0].copy_(outgoing[0])
            return
        if not any(tensor.numel() for tensor in (*outgoing, *incoming)):
            return
        group = self._group_of_nccl()
        try:
            group.move(outgoing, incoming)
        except (RuntimeError, GroupEndedError) as exc:
            self._check()  # a loss is why, as a rule
            self._notice_late()
            raise self._failed or InvalidRequest(f"NCCL failed: {exc}; NCCL_DEBUG=INFO shows why") from exc

    def _group_of_nccl(self) -> NcclDeviceGroup:
        """The group, formed anew after a call that was given up: all members know of it."""
        member, local = self._member, self._topology.local
        if self._nccl is None or self._nccl_generation != member.abandoned:
            self._drop(_DRAIN_S)
            self._nccl_generation = member.abandoned
            prefix = f"{member.membership_epoch}/group/{member.group_id}/nccl/{member.abandoned}/{self._topology.slot}/"

            def store(check: Callable[[], None]) -> NodeStore:
                return NodeStore(member.session.channel, prefix, member.timeout_s, check)

            rank, size = local.index(self._topology.me), len(local)
            group = NcclDeviceGroup(store, rank, size, self._device, member.timeout_s, self._check)
            self._nccl = group
            self._watch = Watch(member, group.abort, lambda: group.overdue() or member_gone(member))
        return self._nccl

    def _drop(self, drain_s: float) -> None:
        """Lets the group go, once what it was launched for is done, or after `drain_s`."""
        group, watch = self._nccl, self._watch
        self._nccl = self._watch = None
        if group is not None and watch is not None:
            if drain_s and not group.drain(drain_s):
                _log.warning("rank=%d nccl.aborted: collectives were not done", self._member.session.rank)
            watch.close()
            group.abort()


def _seat_on(device: torch.device) -> Seat:
    """NCCL tells hosts apart by a variable of its own, where that is set: then one device may have two ranks."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    major, minor, patch = _nccl.version()[:3] if dist.is_nccl_available() else (0, 0, 0)
    return Seat.of(uuid, os.environ.get("NCCL_HOSTID", ""), major * 10000 + minor * 100 + patch)


def _sum(parts: torch.Tensor) -> torch.Tensor:
    """Sums ``[world_size, ...]`` over the members, and rounds once."""
    return parts.sum(0, dtype=accumulator(parts.dtype, "the sum")).to(parts.dtype)


def _parts(flat: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """One part a member, as even as can be."""
    bounds = [flat.numel() * position // world_size for position in range(world_size + 1)]
    return [flat[start:end] for start, end in itertools.pairwise(bounds)]
