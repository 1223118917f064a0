"""Symmetric buffers of groups: memfd and eventfds made here, the same for all local ranks, new in every membership."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from epmesh.errors import InvalidRequest, NotReady, Overloaded, StaleEpoch
from epmesh.view import GroupInfo, View
from epmesh_server.shared_memory import BufferLayout, sealed_memfd

MAX_LOCAL_MEMBERS = 126  # what a dispatch's target codes can tell apart


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


class BufferPool:
    """Buffers by group and membership epoch; made when first asked for, closed here when the membership changes.

    Ranks keep their own descriptors and mappings: what is dropped here is only never handed out again.
    """

    def __init__(self, region_bytes: int) -> None:
        self._region_bytes = region_bytes
        self._buffers: dict[tuple[int, int], GroupBuffers] = {}

    def __len__(self) -> int:
        return len(self._buffers)

    def get(self, view: View, group_id: int, membership_epoch: int, rank: int) -> GroupBuffers:
        """The buffers of a group, for its member `rank`.

        Raises:
            StaleEpoch: the membership is over.
            NotReady: this node does not know that membership yet.
            InvalidRequest: no such group, or `rank` is not in it.
        """
        if membership_epoch < view.membership_epoch:
            raise StaleEpoch(view.epoch, f"membership epoch {membership_epoch} is over; call wait_ready()")
        if membership_epoch > view.membership_epoch:
            raise NotReady(f"membership epoch {membership_epoch} is not known here yet")
        group = _group(view, group_id)
        if rank not in group.ranks:
            raise InvalidRequest(f"rank {rank} is not in group {group.name!r} of epoch {view.epoch}")
        key = (group_id, membership_epoch)
        if key not in self._buffers:
            self._buffers[key] = self._make(view, group, view.slot_of(rank))
        return self._buffers[key]

    def keep_only(self, view: View | None) -> None:
        """Drops the buffers of other memberships and of groups that `view` does not have."""
        groups = {group.group_id for group in view.groups} if view else set()
        membership_epoch = view.membership_epoch if view else -1
        for key in list(self._buffers):
            if key[0] not in groups or key[1] != membership_epoch:
                _close(self._buffers.pop(key).descriptors)

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


def _group(view: View, group_id: int) -> GroupInfo:
    group = next((group for group in view.groups if group.group_id == group_id), None)
    if group is None:
        raise InvalidRequest(f"there is no group with id {group_id} in epoch {view.epoch}")
    return group


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
