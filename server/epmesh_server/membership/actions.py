"""What the membership machine wants done.

The shell carries actions out in order, and nothing after an `Append` before its records are on disk: whoever hears of
a decision can rely on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from epmesh.errors import EpmeshError
from epmesh.view import View
from epmesh_server.membership.declarations import RankKey
from epmesh_server.membership.records import Record


@dataclass(frozen=True, slots=True)
class HeartbeatAck:
    """Answers a heartbeat."""

    number: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """Raise the fences."""

    epoch: int
    lost_ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Get to the cut; `cuts` is (group id, sequence)."""

    epoch: int
    cuts: tuple[tuple[int, int], ...]
    abort: bool
    members_unchanged: bool
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Commit:
    """Adopt the view."""

    view: View


@dataclass(frozen=True, slots=True)
class Evict:
    """These processes are no members; no ranks: the whole node."""

    error: EpmeshError
    ranks: tuple[RankKey, ...] = ()


Command = HeartbeatAck | Prepare | Finish | Commit | Evict


@dataclass(frozen=True, slots=True)
class NodeGranted:
    """Answers RegisterNode."""

    slot: int


@dataclass(frozen=True, slots=True)
class Done:
    """Answers an operation: it holds from this epoch on."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Append:
    """Write to the log, durably."""

    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a unary call."""

    call: int
    result: NodeGranted | Done | EpmeshError


@dataclass(frozen=True, slots=True)
class Send:
    """Tell one node."""

    session: int
    command: Command


@dataclass(frozen=True, slots=True)
class EndSession:
    """Close a control stream, after what was sent before; its end is not reported back."""

    session: int
    error: EpmeshError


@dataclass(frozen=True, slots=True)
class Publish:
    """Tell everyone who watches."""

    view: View


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the operator's log.

    `cause` says in one of few words why somebody is out, for counting: ``left``, ``stream`` (broke), ``lease`` (ended),
    ``unanswered`` (a commit's question), ``links`` (broken), ``refused``; empty where nobody is.
    """

    text: str
    warning: bool = False
    cause: str = ""


Action = Append | Reply | Send | EndSession | Publish | Note
