"""What tests of `LocalMesh` run in its ranks."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import torch

from epmesh import Communicator, Placement


def place(comm: Communicator, *args: Any) -> tuple[Any, ...]:
    return comm.global_rank, *args


def total(comm: Communicator) -> int:
    """The sum of the global ranks of the group."""
    return int(comm.all_reduce(torch.tensor([comm.global_rank])))


def identity(comm: Communicator) -> tuple[int, int, int]:
    return os.getpid(), id(comm), comm.epoch


def placement(comm: Communicator) -> Placement | None:
    return comm.view.placement(None)


def set_linear(comm: Communicator, num_experts: int) -> None:
    comm.set_expert_placement(num_experts)


class Peculiar(Exception):
    """An exception of the user's, with a field."""

    def __init__(self, value: int) -> None:
        self.value = value
        super().__init__(value)


def fail_on(comm: Communicator, ranks: list[int]) -> None:
    if comm.global_rank in ranks:
        raise Peculiar(comm.global_rank * 11)


class Stubborn(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("not me")


def fail_stubbornly(comm: Communicator) -> None:
    raise Stubborn(f"rank {comm.global_rank} will not travel")


def leave_process(comm: Communicator) -> None:
    raise SystemExit(3)


def give_lambda(comm: Communicator) -> Any:
    return lambda: comm


def give_tensors(comm: Communicator, count: int) -> list[torch.Tensor]:
    return [torch.full((3,), float(comm.rank), dtype=torch.bfloat16) for _ in range(count)]


def tell_and_wait(comm: Communicator, inbox: Path) -> None:
    """Says where it is, then does nothing for ever."""
    tell(inbox, comm.global_rank)
    while True:
        time.sleep(60)


def tell_and_wait_for_file(comm: Communicator, inbox: Path, go: Path) -> int:
    tell(inbox, comm.global_rank)
    while not go.exists():
        time.sleep(0.005)
    return comm.global_rank


def hold_the_interpreter(comm: Communicator, inbox: Path) -> None:
    """As busy as can be: no Python signal handler, no other thread gets a turn."""
    tell(inbox, comm.global_rank)
    while True:
        sum(range(10**8))


def tell(inbox: Path, *words: object) -> None:
    """Sends one line to an `Inbox`, in the middle of a work."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(" ".join(map(str, words)).encode(), str(inbox))


class Inbox:
    """Hears what ranks `tell` while they work."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "inbox"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))

    def lines(self, count: int, timeout_s: float = 20.0) -> list[str]:
        """The next `count` lines, sorted."""
        self._socket.settimeout(timeout_s)
        return sorted(self._socket.recv(4096).decode() for _ in range(count))

    def close(self) -> None:
        self._socket.close()
