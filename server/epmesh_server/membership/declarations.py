"""What nodes say of themselves and their ranks, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from epmesh.errors import InvalidRequest
from epmesh.view import RankInfo
from epmesh_server.membership.settings import DEFAULT_EXCHANGE_TIMEOUT_S, MAX_EXCHANGE_TIMEOUT_S

MAX_NODE_ID_CHARS = 256
MAX_ADDRESS_CHARS = 512

RankKey = tuple[int, int]
"""(global rank, incarnation): one process."""


@dataclass(frozen=True, slots=True)
class Registration:
    """Who a node is. `incarnation` is drawn at its start; `address` is host:port of its node service; `curve` says
    whether its ranks use CURVE."""

    node_id: str
    incarnation: int
    address: str
    version: str
    curve: bool = False

    def __post_init__(self) -> None:
        _check_text("node_id", self.node_id, MAX_NODE_ID_CHARS)
        _check_text("address", self.address, MAX_ADDRESS_CHARS)
        if self.incarnation <= 0:
            raise InvalidRequest(f"node {self.node_id!r} has incarnation 0; draw a random 64-bit number at its start")

    @property
    def identity(self) -> tuple[str, int]:
        """The process: a restart has another."""
        return self.node_id, self.incarnation


@dataclass(frozen=True, slots=True)
class ExpertDeclaration:
    """A rank's experts of one layer (`None`: every layer without its own); `experts` is empty where `linear`."""

    layer: int | None
    num_experts: int
    experts: tuple[int, ...]
    linear: bool


@dataclass(frozen=True, slots=True)
class RankDeclaration:
    """One living rank.

    Attributes:
        info: as the view will show it.
        world_size: ranks the process waits for.
        tensor_parallel_size: 0 or 1 means none.
        experts: what it holds, by layer.
        exchange_timeout_s: how long its calls wait for others.
    """

    info: RankInfo
    world_size: int = 1
    tensor_parallel_size: int = 0
    experts: tuple[ExpertDeclaration, ...] = ()
    exchange_timeout_s: float = DEFAULT_EXCHANGE_TIMEOUT_S

    @property
    def key(self) -> RankKey:
        """The process."""
        return self.info.rank, self.info.incarnation

    @property
    def wait_s(self) -> float:
        """`exchange_timeout_s` within sane bounds; the default where it is none."""
        wanted = self.exchange_timeout_s
        return min(wanted, MAX_EXCHANGE_TIMEOUT_S) if wanted > 0 else DEFAULT_EXCHANGE_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class LinkFailure:
    """Rank `reporter` cannot reach this incarnation of rank `target`."""

    reporter: int
    target: int
    target_incarnation: int


@dataclass(frozen=True, slots=True)
class GroupProgress:
    """How far one node is in one group: highest sequence begun by any, completed by all of its members."""

    group_id: int
    begun: int
    completed: int


def _check_text(name: str, value: str, limit: int) -> None:
    if not value or len(value) > limit or not value.isprintable():
        raise InvalidRequest(f"{name} is {value[:80]!r}; it must be 1 to {limit} printable characters")
