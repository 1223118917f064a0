"""Changes that somebody asked for: groups and placements. They wait for a commit; retries join the first call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from epmesh.errors import EpmeshError, InvalidRequest, PeerLost
from epmesh.placement import Placement
from epmesh.view import RankMode, View
from epmesh_server.membership.actions import Done
from epmesh_server.membership.declarations import RankDeclaration
from epmesh_server.membership.events import CreateGroup, DestroyGroup, OperationEvent, SetPlacement
from epmesh_server.membership.groups import UserGroup, is_reserved, user_groups
from epmesh_server.shared_memory import MAX_GROUPS_PER_RANK, MAX_RANKS

MAX_REMEMBERED_REQUESTS = 4096
MAX_GROUP_NAME_CHARS = 64
MAX_REQUEST_ID_CHARS = 256
# world, ep and a tensor-parallel group have rows of their own in a rank's control page.
MAX_USER_GROUPS_PER_RANK = MAX_GROUPS_PER_RANK - 3

RankLookup = Callable[[int], RankDeclaration | None]
Request = tuple[object, ...]


@dataclass(eq=False, slots=True)
class Operation:
    """One change and the calls that wait for it."""

    event: OperationEvent
    calls: list[int] = field(default_factory=list)


class Operations:
    """The queue of changes, and the answers of those that were done."""

    def __init__(self) -> None:
        self._queue: list[Operation] = []
        self._by_id: dict[str, Operation] = {}
        self._done: OrderedDict[str, tuple[Request, Done]] = OrderedDict()

    @property
    def waiting(self) -> tuple[Operation, ...]:
        """Changes that were not answered yet, in order of arrival."""
        return tuple(self._queue)

    def knows(self, request_id: str) -> bool:
        """Whether a call with this id was taken before."""
        return request_id in self._done or request_id in self._by_id

    def submit(self, event: OperationEvent) -> Done | None:
        """Queues a change; returns the answer at once where a call with its `request_id` was answered before.

        Raises:
            InvalidRequest: the `request_id` stands for something else.
        """
        if len(event.request_id) > MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(f"request_id has {len(event.request_id)} characters; at most {MAX_REQUEST_ID_CHARS}")
        request = _request(event)
        if event.request_id in self._done:
            known, answer = self._done[event.request_id]
            _check_same(event, known, request)
            return answer
        operation = self._by_id.get(event.request_id)
        if operation is None:
            operation = Operation(event)
            self._queue.append(operation)
            if event.request_id:
                self._by_id[event.request_id] = operation
        _check_same(event, _request(operation.event), request)
        operation.calls.append(event.call)
        return None

    def finish(self, operation: Operation, answer: Done | EpmeshError) -> list[int]:
        """Takes a change out of the queue and returns the calls to answer. Only successes are remembered."""
        self._queue.remove(operation)
        request_id = operation.event.request_id
        self._by_id.pop(request_id, None)
        if request_id and isinstance(answer, Done):
            self._done[request_id] = (_request(operation.event), answer)
            if len(self._done) > MAX_REMEMBERED_REQUESTS:
                self._done.popitem(last=False)
        return operation.calls


@dataclass(slots=True)
class Wishes:
    """User groups and placements of a view with changes carried out on them, one after the other."""

    groups: dict[str, UserGroup]
    placements: dict[int | None, Placement]
    next_group_id: int

    @classmethod
    def of(cls, view: View, next_group_id: int) -> Wishes:
        """What `view` has."""
        return cls(user_groups(view), dict(view.placements), next_group_id)

    def carry_out(self, event: OperationEvent, lookup: RankLookup, epoch: int) -> None:
        """Applies one change.

        Raises:
            InvalidRequest: it contradicts what is there.
            PeerLost: a member died since it was asked for.
        """
        match event:
            case CreateGroup():
                self._create(event, lookup, epoch)
            case DestroyGroup():
                self.groups.pop(event.name, None)
            case SetPlacement():
                self.placements[event.layer] = _beside_serving(
                    event.placement, self.placements.get(event.layer), lookup
                )

    def _create(self, event: CreateGroup, lookup: RankLookup, epoch: int) -> None:
        known = self.groups.get(event.name)
        if known is not None:
            if known.declared_ranks == event.ranks:
                return
            raise InvalidRequest(
                f"group {event.name!r} exists with ranks {list(known.declared_ranks)}, not {list(event.ranks)}; "
                f"destroy it first, or choose another name"
            )
        lost = [rank for rank in event.ranks if lookup(rank) is None]
        if lost:
            raise PeerLost(lost, epoch)
        self._check_room(event)
        self.groups[event.name] = UserGroup(self.next_group_id, event.name, event.ranks)
        self.next_group_id += 1

    def _check_room(self, event: CreateGroup) -> None:
        for rank in event.ranks:
            count = sum(rank in group.declared_ranks for group in self.groups.values())
            if count >= MAX_USER_GROUPS_PER_RANK:
                raise InvalidRequest(
                    f"group {event.name!r}: rank {rank} is in {count} groups, and no more fit in its control page; "
                    f"destroy one first"
                )


def _beside_serving(wanted: Placement, known: Placement | None, lookup: RankLookup) -> Placement:
    """`wanted`, which the ranks that exchange agreed on, and what ranks that serve hold: they were not asked."""
    if known is None or known.num_experts != wanted.num_experts:
        return wanted
    serving = {rank: held for rank, held in known.experts_of.items() if rank not in wanted.experts_of}
    serving = {rank: held for rank, held in serving.items() if _serves(lookup(rank))}
    return Placement(wanted.num_experts, {**serving, **wanted.experts_of}) if serving else wanted


def _serves(declared: RankDeclaration | None) -> bool:
    return declared is not None and declared.info.mode is RankMode.SERVE


def check_operation(event: OperationEvent, lookup: RankLookup) -> None:
    """Refuses what is wrong in itself, or names ranks that are not there.

    Raises:
        InvalidRequest: naming the value and the mend.
    """
    match event:
        case CreateGroup():
            _check_name(event.name, "made")
            _check_ranks(event.ranks, lookup)
        case DestroyGroup():
            _check_name(event.name, "destroyed")
        case SetPlacement():
            _check_placement(event.placement)


def _check_name(name: str, what: str) -> None:
    if is_reserved(name):
        raise InvalidRequest(f"group {name!r} is epmesh's own and cannot be {what}; choose another name")
    if not name or len(name) > MAX_GROUP_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(f"group name {name[:80]!r} must have 1 to {MAX_GROUP_NAME_CHARS} printable characters")


def _check_ranks(ranks: tuple[int, ...], lookup: RankLookup) -> None:
    if not ranks:
        raise InvalidRequest("a group needs at least one rank")
    if len(set(ranks)) != len(ranks):
        twice = next(rank for rank in ranks if ranks.count(rank) > 1)
        raise InvalidRequest(f"rank {twice} stands twice in the group's ranks; name each rank once")
    for rank in ranks:
        declared = lookup(rank)
        if declared is None:
            raise InvalidRequest(f"rank {rank} is not in the mesh; name living global ranks")
        if declared.info.mode is not RankMode.EXCHANGE:
            raise InvalidRequest(f"rank {rank} serves routers and takes part in no collective call; leave it out")


def _check_placement(placement: Placement) -> None:
    for rank in placement.experts_of:
        if not 0 <= rank < MAX_RANKS:
            raise InvalidRequest(f"the placement names rank {rank}; global ranks are 0 to {MAX_RANKS - 1}")


def _request(event: OperationEvent) -> Request:
    """What must be the same in calls with one `request_id`."""
    match event:
        case CreateGroup():
            return ("create", event.name, event.ranks)
        case DestroyGroup():
            return ("destroy", event.name)
        case SetPlacement():
            return ("place", event.layer, event.placement.num_experts, event.placement.experts_of)


def _check_same(event: OperationEvent, known: Request, request: Request) -> None:
    if known != request:
        raise InvalidRequest(
            f"request_id {event.request_id!r} was used for another request; draw a new one for every request"
        )
