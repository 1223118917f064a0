"""Decisions about an epoch, without sockets and pages: what is lost, how far ranks are, who is past the cut."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from epmesh.v1 import membership_service_pb2
from epmesh.view import View
from epmesh_server.shared_memory import Progress

Member = tuple[int, int]
"""Global rank and incarnation of a rank with a living session."""


def lost_ranks(view: View | None, slot: int, living: Collection[Member], told: Iterable[int]) -> frozenset[int]:
    """Global ranks of `view` that are dead: this node's without a session, and those the coordinator told of."""
    if view is None:
        return frozenset()
    own = {
        info.rank
        for info in view.ranks.values()
        if view.slot_of(info.rank) == slot and (info.rank, info.incarnation) not in living
    }
    return frozenset(own.union(rank for rank in told if rank in view.ranks))


def evicted_ranks(view: View, admitted: Iterable[Member]) -> list[int]:
    """Global ranks of this node that were in an earlier view with the same incarnation and are not in `view`."""
    return [rank for rank, incarnation in admitted if not is_member(view, rank, incarnation)]


def is_member(view: View, rank: int, incarnation: int) -> bool:
    """Whether this very process is in the view."""
    info = view.ranks.get(rank)
    return info is not None and info.incarnation == incarnation


def node_progress(
    view: View | None, pages: Mapping[int, Sequence[Progress]]
) -> list[membership_service_pb2.GroupProgress]:
    """Progress of every group with a living member here.

    Args:
        view: the committed view.
        pages: what each living rank of this node shows, by global rank. A member that shows nothing for a group is
            where the view's commit left everybody.
    """
    result = []
    for group in view.groups if view else ():
        rows = [_row(pages[rank], group.group_id, group.sequence) for rank in group.ranks if rank in pages]
        if rows:
            begun = max(group.sequence, *(row.begun for row in rows))
            completed = min(row.completed for row in rows)
            result.append(
                membership_service_pb2.GroupProgress(group_id=group.group_id, begun=begun, completed=completed)
            )
    return result


def past_cut(view: View | None, shown: Sequence[Progress], cuts: Mapping[int, int], *, dispatched: bool) -> bool:
    """Whether one rank is where a commit may happen.

    Only groups in which the rank began something in this view count: an idle rank delays nobody.

    Args:
        view: the committed view, which the commit replaces.
        shown: the rank's progress.
        cuts: sequence number to reach, by group id.
        dispatched: it is enough that dispatches up to the cut are done (the set of ranks stays).
    """
    started = {group.group_id: group.sequence for group in view.groups} if view else {}
    for row in shown:
        if row.group_id in started and row.begun > started[row.group_id]:
            reached = row.dispatched if dispatched else row.completed
            if reached < cuts.get(row.group_id, 0):
                return False
    return True


def _row(shown: Sequence[Progress], group_id: int, sequence: int) -> Progress:
    found = (row for row in shown if row.group_id == group_id)
    return next(found, Progress(group_id, sequence, sequence, sequence))
