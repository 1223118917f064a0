"""What is said of hosted ranks: of all those of a node, and of one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from epmesh.errors import InvalidRequest
from epmesh.placement import MAX_EXPERTS
from epmesh_server.hosted.factory import split_name

DEFAULT_DRAIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class HostedRank:
    """One hosted rank, as its process needs it; goes to the process by pickle.

    Attributes:
        address: host:port of its node service.
        experts: ``package.module:factory`` of a rank that serves; empty: it waits for a driver.
        held: experts it declares; `None`: the linear default.
        world_size: ranks to wait for.
        drain_s: how long requests that were taken in may take after SIGTERM.
        threads: of torch.
        path: where modules are looked for besides.
        log_level: lines to show; `None` leaves logging alone.
        returning: whether an earlier process of this service was this rank.
    """

    address: str
    local_rank: int
    experts: str = ""
    num_experts: int | None = None
    held: tuple[int, ...] | None = None
    world_size: int = 1
    tensor_parallel_size: int = 1
    max_tokens_per_rank: int | None = None
    exchange_timeout_s: float = 30.0
    device: str = "cpu"
    drain_s: float = DEFAULT_DRAIN_S
    threads: int = 1
    path: tuple[str, ...] = ()
    log_level: str | None = None
    returning: bool = False

    def again(self, held: tuple[int, ...] | None) -> HostedRank:
        """For a rank that was in the mesh before and held the experts `held`; `None` where nothing says so.

        It declares just these and waits for nobody: others may be away for long, and where the whole mesh begins anew,
        all of them together declare what there was.
        """
        if self.num_experts is not None and held is None:
            return self
        return replace(self, held=held if self.num_experts is not None else None, world_size=1)


@dataclass(frozen=True, kw_only=True)
class HostedRanks:
    """The hosted ranks of one node; checked when made.

    Attributes:
        count: how many.
        hold: the experts of each local rank; `None`: the linear default.
        world_size: ranks of the whole mesh to wait for; `None`: those of this node.
        device: of each; "cuda" gives local rank k the device "cuda:k".

    The others are as in `HostedRank`.

    Raises:
        InvalidRequest: a value is out of range, or makes no sense beside another.
    """

    count: int
    experts: str = ""
    num_experts: int | None = None
    hold: tuple[tuple[int, ...], ...] | None = None
    world_size: int | None = None
    tensor_parallel_size: int = 1
    max_tokens_per_rank: int | None = None
    exchange_timeout_s: float = 30.0
    device: str = "cpu"
    drain_s: float = DEFAULT_DRAIN_S
    threads: int = 1
    path: tuple[str, ...] = ()
    log_level: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("--ranks", self.count), ("--threads", self.threads)):
            if value < 1:
                raise InvalidRequest(f"{name} is {value}; it must be 1 or more")
        if self.world_size is not None and self.world_size < 1:
            raise InvalidRequest(f"--world-size is {self.world_size}; it must be 1 or more")
        if not (math.isfinite(self.drain_s) and self.drain_s >= 0):
            raise InvalidRequest(f"--drain is {self.drain_s:g}; it must be 0 seconds or more")
        if self.num_experts is None and (self.hold is not None or self.experts):
            option = "--experts" if self.experts else "--hold"
            raise InvalidRequest(f"{option} needs --num-experts: the number of logical experts of the model")
        if self.num_experts is not None and not 0 < self.num_experts <= MAX_EXPERTS:
            raise InvalidRequest(f"--num-experts is {self.num_experts}; it must be 1 to {MAX_EXPERTS}")
        if self.experts:
            split_name(self.experts)
        if self.hold is not None:
            self._check_hold(self.hold)

    def _check_hold(self, hold: tuple[tuple[int, ...], ...]) -> None:
        if len(hold) != self.count:
            raise InvalidRequest(f"--hold names the experts of {len(hold)} ranks, and --ranks is {self.count}")
        assert self.num_experts is not None
        for local_rank, held in enumerate(hold):
            bad = next((expert for expert in held if not 0 <= expert < self.num_experts), None)
            if bad is not None:
                raise InvalidRequest(
                    f"--hold gives local rank {local_rank} expert {bad}; ids are 0 to {self.num_experts - 1}"
                )

    def check_fits(self, stride: int) -> None:
        """Refuses more ranks than a node of a mesh may have.

        Raises:
            InvalidRequest: there are more than `stride`.
        """
        if self.count > stride:
            raise InvalidRequest(
                f"--ranks is {self.count}, and a node of this mesh has at most {stride} ranks; run fewer, or start "
                f"a new mesh: a coordinator with --stride {self.count} and an empty --data-dir"
            )

    def rank(self, local_rank: int, address: str) -> HostedRank:
        """What the process of `local_rank` needs, with the node service at `address`."""
        return HostedRank(
            address=address,
            local_rank=local_rank,
            experts=self.experts,
            num_experts=self.num_experts,
            held=None if self.hold is None else self.hold[local_rank],
            world_size=self.world_size or self.count,
            tensor_parallel_size=self.tensor_parallel_size,
            max_tokens_per_rank=self.max_tokens_per_rank,
            exchange_timeout_s=self.exchange_timeout_s,
            device=f"cuda:{local_rank}" if self.device == "cuda" else self.device,
            drain_s=self.drain_s,
            threads=self.threads,
            path=self.path,
            log_level=self.log_level,
        )


def parse_hold(text: str) -> tuple[tuple[int, ...], ...]:
    """The experts of each local rank: ``0-7;8-15``, ``0,3,5-7;1,2``; nothing between two semicolons is none.

    Raises:
        InvalidRequest: it is something else.
    """
    return tuple(tuple(sorted(set(_experts(part, text)))) for part in text.split(";"))


def _experts(part: str, text: str) -> list[int]:
    found: list[int] = []
    for item in filter(None, (item.strip() for item in part.split(","))):
        first, dash, last = (side.strip() for side in item.partition("-"))
        numbers = (first, last) if dash else (first, first)
        if not all(number.isascii() and number.isdigit() and len(number) <= 6 for number in numbers):
            raise InvalidRequest(f"--hold is {text!r}; write the experts of each rank as 0-7;8-15 or 0,3,5-7;1,2")
        low, high = map(int, numbers)
        if low > high or high >= MAX_EXPERTS:
            raise InvalidRequest(f"--hold has {item!r}; ranges ascend, and ids are at most {MAX_EXPERTS - 1}")
        found.extend(range(low, high + 1))
    return found
