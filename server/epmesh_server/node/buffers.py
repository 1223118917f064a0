"""Memory that local ranks share, new in every membership: symmetric buffers of groups, and that of ranks that serve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from epmesh.errors import InvalidRequest, NotReady, Overloaded, StaleEpoch
from epmesh.view import GroupInfo, View
from epmesh_server.shared_memory import BufferLayout, sealed_memfd

MAX_LOCAL_MEMBERS = 126  # what a dispatch's target codes can tell apart
SERVE_SECTION_REGIONS = 4  # requests of several routers, each with room for its rows and for wider results


@dataclass(frozen=True)
class GroupBuffers:
    """Descriptors of one group's buffers on this node.

    Attributes:
        ranks: global ranks of the local members, in group order.
        memfd: a section a member, in the same order.
        eventfds: one a member, in the same order.
        layout: how a section is divided.
    """

    ranks: tuple[int, ...]
    memfd: int
    eventfds: tuple[int, ...]
    layout: BufferLayout

    @property
    def memfd_bytes(self) -> int:
        """Size of the memfd."""
        return len(self.ranks) * self.layout.section_bytes

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them, in the order in which they are handed out."""
        return (self.memfd, *self.eventfds)


@dataclass(frozen=True)
class ServeBuffers:
    """Descriptor of the memory that ranks in mode `serve` hand each other rows in.

    Attributes:
        ranks: global ranks of this node; any of them may come to serve.
        memfd: a section a rank, in the same order.
        section_bytes: size of a section.
    """

    ranks: tuple[int, ...]
    memfd: int
    section_bytes: int

    @property
    def memfd_bytes(self) -> int:
        """Size of the memfd."""
        return len(self.ranks) * self.section_bytes


class BufferPool:
    """Buffers by group and membership epoch; made when first asked for, closed here when the membership changes.

    Ranks keep their own descriptors and mappings: what is dropped here is only never handed out again.
    """

    def __init__(self, region_bytes: int) -> None:
        self._region_bytes = region_bytes
        self._buffers: dict[tuple[int, int], GroupBuffers] = {}
        self._serving: dict[int, ServeBuffers] = {}  # by membership epoch

    def __len__(self) -> int:
        return len(self._buffers) + len(self._serving)

    def get(self, view: View, group_id: int, membership_epoch: int, rank: int) -> GroupBuffers:
        """The buffers of a group, for its member `rank`.

        Raises:
            StaleEpoch: the membership is over.
            NotReady: this node does not know that membership yet.
            InvalidRequest: no such group, or `rank` is not in it.
        """
        _check_membership(view, membership_epoch)
        group = _group(view, group_id)
        if rank not in group.ranks:
            raise InvalidRequest(f"rank {rank} is not in group {group.name!r} of epoch {view.epoch}")
        key = (group_id, membership_epoch)
        if key not in self._buffers:
            self._buffers[key] = self._make(view, group, view.slot_of(rank))
        return self._buffers[key]

    def get_serving(self, view: View, membership_epoch: int, rank: int) -> ServeBuffers:
        """The memory of this node's ranks that serve, for one of them.

        Raises:
            StaleEpoch, NotReady: as `get`.
            InvalidRequest: `rank` is in no view.
        """
        _check_membership(view, membership_epoch)
        if rank not in view.ranks:
            raise InvalidRequest(f"rank {rank} is not in epoch {view.epoch}")
        if membership_epoch not in self._serving:
            ranks = tuple(each for each in view.ranks if view.slot_of(each) == view.slot_of(rank))
            section_bytes = SERVE_SECTION_REGIONS * self._region_bytes
            try:
                memfd = sealed_memfd("epmesh-serve", len(ranks) * section_bytes)
            except OSError as exc:
                raise Overloaded(1.0, f"cannot make serve memory of {section_bytes} bytes a rank: {exc}") from exc
            self._serving[membership_epoch] = ServeBuffers(ranks, memfd, section_bytes)
        return self._serving[membership_epoch]

    def keep_only(self, view: View | None) -> None:
        """Drops the buffers of other memberships and of groups that `view` does not have."""
        groups = {group.group_id for group in view.groups} if view else set()
        membership_epoch = view.membership_epoch if view else -1
        for key in list(self._buffers):
            if key[0] not in groups or key[1] != membership_epoch:
                _close(self._buffers.pop(key).descriptors)
        for epoch in [epoch for epoch in self._serving if epoch != membership_epoch]:
            os.close(self._serving.pop(epoch).memfd)

    def _make(self, view: View, group: GroupInfo, slot: int) -> GroupBuffers:
        ranks = tuple(rank for rank in group.ranks if view.slot_of(rank) == slot)
        if len(ranks) > MAX_LOCAL_MEMBERS:
            raise InvalidRequest(f"group {group.name!r} has {len(ranks)} ranks here; at most {MAX_LOCAL_MEMBERS} work")
        layout = BufferLayout(len(group.ranks), self._region_bytes)
        made: list[int] = []
        try:
            made.append(sealed_memfd(f"epmesh-{group.name}", len(ranks) * layout.section_bytes))
            made.extend(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in ranks)
        except OSError as exc:
            _close(made)
            raise Overloaded(1.0, f"cannot make buffers of {layout.section_bytes} bytes a rank: {exc}") from exc
        return GroupBuffers(ranks, made[0], tuple(made[1:]), layout)


def _check_membership(view: View, membership_epoch: int) -> None:
    if membership_epoch < view.membership_epoch:
        raise StaleEpoch(view.epoch, f"membership epoch {membership_epoch} is over; call wait_ready()")
    if membership_epoch > view.membership_epoch:
        raise NotReady(f"membership epoch {membership_epoch} is not known here yet")


def _group(view: View, group_id: int) -> GroupInfo:
    group = next((group for group in view.groups if group.group_id == group_id), None)
    if group is None:
        raise InvalidRequest(f"there is no group with id {group_id} in epoch {view.epoch}")
    return group


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
