"""Membership's plain values as protos and back. Whatever comes in is checked here or by the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from epmesh.errors import InvalidRequest
from epmesh.v1 import log_pb2, view_pb2
from epmesh.v1 import membership_service_pb2 as pb
from epmesh.view import View, rank_from_proto
from epmesh_server.membership import (
    EpochUsed,
    ExpertDeclaration,
    GroupProgress,
    LinkFailure,
    MeshCreated,
    NodeRegistered,
    RankDeclaration,
    RankKey,
    RanksLost,
    Record,
    Registration,
    ViewCommitted,
)
from epmesh_server.membership.actions import Command, Commit, Evict, Finish, HeartbeatAck, Prepare
from epmesh_server.membership.events import (
    Committed,
    Finished,
    Heartbeat,
    Prepared,
    ReportEvent,
    ReportLinks,
    ReportRanks,
)
from epmesh_server.shared_memory import MAX_RANKS

# Beyond these a report is garbage; a message's size is limited before.
MAX_REPORTED_RANKS = MAX_RANKS
MAX_REPORTED_LINKS = 1 << 17
MAX_DECLARED_LAYERS = 1024

Report = Heartbeat | ReportEvent


def registration_from_proto(request: pb.RegisterNodeRequest) -> Registration:
    """Who registers.

    Raises:
        InvalidRequest: a name is empty or odd.
    """
    return Registration(request.node_id, request.incarnation, request.address, request.version, request.curve)


def report_from_proto(session: int, request: pb.NodeSessionRequest) -> Report | None:
    """One report of a control stream; `None` for one of a newer version.

    Raises:
        InvalidRequest: it is garbage, or a second hello.
    """
    kind = request.WhichOneof("report")
    if kind == "hello":
        raise InvalidRequest("a control stream has one hello, its first message")
    return _REPORTS[kind](session, request) if kind in _REPORTS else None


def _heartbeat(session: int, request: pb.NodeSessionRequest) -> Report:
    return Heartbeat(session, request.heartbeat.number)


def _ranks(session: int, request: pb.NodeSessionRequest) -> Report:
    if len(request.ranks.ranks) > MAX_REPORTED_RANKS:
        raise InvalidRequest(f"a node reports {len(request.ranks.ranks)} ranks; at most {MAX_REPORTED_RANKS} exist")
    left = frozenset((key.rank, key.incarnation) for key in request.ranks.left[:MAX_REPORTED_RANKS])
    return ReportRanks(session, tuple(map(_declaration, request.ranks.ranks)), left)


def _links(session: int, request: pb.NodeSessionRequest) -> Report:
    if len(request.links.failures) > MAX_REPORTED_LINKS:
        raise InvalidRequest(f"a node reports {len(request.links.failures)} links; at most {MAX_REPORTED_LINKS}")
    failures = (LinkFailure(f.reporter, f.target, f.target_incarnation) for f in request.links.failures)
    return ReportLinks(session, tuple(failures))


def _prepared(session: int, request: pb.NodeSessionRequest) -> Report:
    return Prepared(session, request.prepared.epoch, _progress(request.prepared.progress))


def _finished(session: int, request: pb.NodeSessionRequest) -> Report:
    return Finished(session, request.finished.epoch, _progress(request.finished.progress))


def _committed(session: int, request: pb.NodeSessionRequest) -> Report:
    return Committed(session, request.committed.epoch)


_REPORTS: dict[str | None, Callable[[int, pb.NodeSessionRequest], Report]] = {
    "heartbeat": _heartbeat,
    "ranks": _ranks,
    "links": _links,
    "prepared": _prepared,
    "finished": _finished,
    "committed": _committed,
}


def _progress(entries: Iterable[pb.GroupProgress]) -> tuple[GroupProgress, ...]:
    return tuple(GroupProgress(entry.group_id, entry.begun, entry.completed) for entry in entries)


def _declaration(message: pb.RankDeclaration) -> RankDeclaration:
    if len(message.experts) > MAX_DECLARED_LAYERS:
        raise InvalidRequest(
            f"rank {message.rank.rank} declares {len(message.experts)} layers; use one without a layer"
        )
    return RankDeclaration(
        rank_from_proto(message.rank),
        message.world_size,
        message.tensor_parallel_size,
        tuple(map(_experts, message.experts)),
        message.exchange_timeout_s,
    )


def _experts(message: pb.ExpertDeclaration) -> ExpertDeclaration:
    layer = message.layer if message.HasField("layer") else None
    experts = () if message.linear else tuple(sorted(set(message.experts)))
    return ExpertDeclaration(layer, message.num_experts, experts, message.linear)


class _LastView:
    """The newest view as proto: log, nodes and watchers get the same one, and making it takes a while."""

    def __init__(self) -> None:
        self._last: tuple[View | None, view_pb2.View] = (None, view_pb2.View())

    def __call__(self, view: View) -> view_pb2.View:
        """The view as proto; not to be changed."""
        last, message = self._last
        if view is not last:
            message = view.to_proto()
            self._last = view, message
        return message


view_to_proto = _LastView()


def command_to_proto(command: Command) -> pb.NodeSessionResponse:
    """One command of a control stream."""
    match command:
        case HeartbeatAck():
            return pb.NodeSessionResponse(heartbeat=pb.Heartbeat(number=command.number))
        case Prepare():
            return pb.NodeSessionResponse(prepare=pb.Prepare(epoch=command.epoch, lost_ranks=command.lost_ranks))
        case Finish():
            return pb.NodeSessionResponse(finish=_finish(command))
        case Commit():
            return pb.NodeSessionResponse(commit=pb.Commit(view=view_to_proto(command.view)))
        case Evict():
            return pb.NodeSessionResponse(
                evict=pb.Evict(error=command.error.to_proto(), ranks=map(_key_to_proto, command.ranks))
            )


def _finish(command: Finish) -> pb.Finish:
    return pb.Finish(
        epoch=command.epoch,
        cuts=[pb.GroupCut(group_id=group_id, sequence=sequence) for group_id, sequence in command.cuts],
        abort=command.abort,
        members_unchanged=command.members_unchanged,
        timeout_s=command.timeout_s,
    )


def _key_to_proto(key: RankKey) -> pb.RankIncarnation:
    return pb.RankIncarnation(rank=key[0], incarnation=key[1])


def record_to_proto(record: Record) -> log_pb2.LogRecord:
    """One record as it lies in the log."""
    match record:
        case MeshCreated():
            created = log_pb2.MeshCreated(mesh_id=record.mesh_id, stride=record.stride)
            return log_pb2.LogRecord(mesh_created=created)
        case NodeRegistered():
            return log_pb2.LogRecord(node_registered=_registered(record))
        case EpochUsed():
            used = log_pb2.EpochUsed(epoch=record.epoch, next_group_id=record.next_group_id)
            return log_pb2.LogRecord(epoch_used=used)
        case RanksLost():
            return log_pb2.LogRecord(ranks_lost=log_pb2.RanksLost(ranks=map(_key_to_proto, record.ranks)))
        case ViewCommitted():
            return log_pb2.LogRecord(view_committed=view_to_proto(record.view))


def _registered(record: NodeRegistered) -> log_pb2.NodeRegistered:
    known = record.registration
    request = pb.RegisterNodeRequest(
        node_id=known.node_id,
        incarnation=known.incarnation,
        address=known.address,
        version=known.version,
        curve=known.curve,
    )
    return log_pb2.NodeRegistered(request=request, slot=record.slot)


def record_from_proto(message: log_pb2.LogRecord) -> Record:
    """One record of the log.

    Raises:
        InvalidRequest: it is of a newer version, or contradicts itself.
    """
    kind = message.WhichOneof("record")
    if kind not in _RECORDS:
        raise InvalidRequest("a record is of a newer version of epmesh")
    return _RECORDS[kind](message)


def _mesh_created(message: log_pb2.LogRecord) -> Record:
    return MeshCreated(message.mesh_created.mesh_id, message.mesh_created.stride)


def _node_registered(message: log_pb2.LogRecord) -> Record:
    registered = message.node_registered
    return NodeRegistered(registration_from_proto(registered.request), registered.slot)


def _view_committed(message: log_pb2.LogRecord) -> Record:
    return ViewCommitted(View.from_proto(message.view_committed))


def _epoch_used(message: log_pb2.LogRecord) -> Record:
    return EpochUsed(message.epoch_used.epoch, message.epoch_used.next_group_id)


def _ranks_lost(message: log_pb2.LogRecord) -> Record:
    return RanksLost(tuple((key.rank, key.incarnation) for key in message.ranks_lost.ranks))


_RECORDS: dict[str | None, Callable[[log_pb2.LogRecord], Record]] = {
    "mesh_created": _mesh_created,
    "node_registered": _node_registered,
    "view_committed": _view_committed,
    "epoch_used": _epoch_used,
    "ranks_lost": _ranks_lost,
}


def groups_to_proto(view: View) -> list[view_pb2.Group]:
    """The groups of a view."""
    return list(view_to_proto(view).groups)
