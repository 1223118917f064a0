"""Which device group the GPU ranks of a group get. Pure: every rank decides by what all ranks said of their devices."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Way(enum.Enum):
    """How collectives of CUDA tensors move."""

    ALONE = "no device group"
    NCCL = "NCCL"
    HOST = "the host and Gloo"


@dataclass(frozen=True)
class Choice:
    """What was decided, and why, for the log."""

    way: Way
    why: str


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: what NCCL goes by when it tells ranks apart.

    Attributes:
        device: 64 bits that name the GPU; ranks with the same ones share it.
        nccl: version of NCCL in this process, such as 22809; 0: there is none.
    """

    device: int
    nccl: int

    @classmethod
    def of(cls, uuid: str, host_id: str, nccl: int) -> Seat:
        """The seat on the GPU with `uuid`, on the host that NCCL takes to be `host_id`."""
        digest = hashlib.blake2b(f"{host_id}/{uuid}".encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "little"), nccl)

    @classmethod
    def read(cls, numbers: Sequence[int]) -> Seat:
        """From the last numbers of a call."""
        device, nccl = numbers[-cls.count() :]
        return cls(device, nccl)

    def numbers(self) -> tuple[int, ...]:
        """As numbers of a call."""
        return (self.device, self.nccl)

    @staticmethod
    def count() -> int:
        """How many numbers a seat is."""
        return 2


def choose(seats: Mapping[int, Seat], nodes: int) -> Choice:
    """The way of a group whose members' seats are `seats`, by global rank, on so many `nodes`.

    NCCL takes no two ranks on one GPU, and never connects two nodes here.
    """
    if len(seats) == 1:
        return Choice(Way.ALONE, "one rank")
    if nodes > 1:
        return Choice(Way.HOST, f"the group spans {nodes} nodes")
    without = sorted(rank for rank, seat in seats.items() if not seat.nccl)
    if without:
        return Choice(Way.HOST, f"torch has no NCCL on rank {without[0]}")
    versions = {seat.nccl: rank for rank, seat in sorted(seats.items())}
    if len(versions) > 1:
        found = ", ".join(f"{version} on rank {rank}" for version, rank in sorted(versions.items()))
        return Choice(Way.HOST, f"ranks have different versions of NCCL: {found}")
    first: dict[int, int] = {}
    for rank, seat in sorted(seats.items()):
        if seat.device in first:
            return Choice(Way.HOST, f"ranks {first[seat.device]} and {rank} share a GPU, which NCCL refuses")
        first[seat.device] = rank
    return Choice(Way.NCCL, f"{len(seats)} ranks, each with a GPU of its own")
