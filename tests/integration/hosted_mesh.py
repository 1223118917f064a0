"""A mesh of hosted ranks without drivers: those are the test's to make, in this process or in others."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import epmesh
from epmesh_server.coordinator import CoordinatorSettings
from epmesh_server.hosted.options import HostedRank
from epmesh_server.hosted.rank_main import rank_main
from epmesh_server.node import NodeSettings
from epmesh_server.processes.child import Child, end_all
from epmesh_server.testing.ports import Port
from epmesh_server.testing.preload import start_mesh_fork_server
from epmesh_server.testing.services import coordinator_main, node_main
from tests.integration.contract import MAX_TOKENS

TIMEOUT_S = 20.0


@dataclass
class HostedMesh:
    """`nodes` of `ranks_per_node` hosted ranks; use it in a with statement."""

    nodes: int
    ranks_per_node: int
    buffer_bytes: int = 1 << 26
    hosted: Sequence[int] | None = None  # those that are; None: all

    def __post_init__(self) -> None:
        self._children: list[Child] = []
        self._services: list[Child] = []
        self._ranks: dict[int, Child] = {}
        self._ports = [Port() for _ in range(self.nodes)]  # kept while a service is not there
        self.addresses = [port.address for port in self._ports]
        self.world_size = self.nodes * self.ranks_per_node

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="epmesh-"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        end_all([*self._ranks.values(), *self._services, *self._children], 1.0)
        for port in self._ports:
            port.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        start_mesh_fork_server()
        settings = CoordinatorSettings(port=0, data_dir=self._folder / "log", stride=self.ranks_per_node)
        coordinator = Child("coordinator", coordinator_main, settings)
        self._children.append(coordinator)
        self.coordinator = _address(coordinator)
        for slot in range(self.nodes):
            self._services.append(self._service(slot))
            assert _address(self._services[-1]) == self.addresses[slot]
        for rank in range(self.world_size) if self.hosted is None else self.hosted:
            self._ranks[rank] = self._rank(rank)

    def _service(self, slot: int) -> Child:
        settings = NodeSettings(
            port=self._ports[slot].number,
            coordinator=self.coordinator,
            node_id=f"n{slot}",
            slot=slot,
            runtime_dir=self._folder / f"{slot}",
            buffer_bytes=self.buffer_bytes,
        )
        return Child(f"node-{slot}", node_main, settings)

    def _rank(self, rank: int, world_size: int | None = None) -> Child:
        slot, local_rank = divmod(rank, self.ranks_per_node)
        options = HostedRank(
            address=self.addresses[slot],
            local_rank=local_rank,
            world_size=world_size or self.world_size,
            max_tokens_per_rank=MAX_TOKENS,
            exchange_timeout_s=20.0,
        )
        return Child(f"hosted-{rank}", rank_main, options)

    def kill_service(self, slot: int) -> None:
        """Kills a node's service; its ranks go on trying to join it."""
        self._services[slot].kill()
        self._services[slot].wait()

    def pause_service(self, slot: int) -> None:
        """Stops a node's service (SIGSTOP)."""
        self._services[slot].pause()

    def start_service(self, slot: int) -> None:
        """Starts it again, at the same address."""
        self._services[slot].close()
        self._services[slot] = self._service(slot)
        _address(self._services[slot])

    def kill_rank(self, rank: int) -> None:
        """Kills the process that hosts a rank."""
        self._ranks[rank].kill()
        self._ranks[rank].wait()

    def end_rank(self, rank: int) -> None:
        """Ends the process that hosts a rank, in good order (SIGTERM)."""
        self._ranks[rank].terminate()
        assert self._ranks[rank].wait(time.monotonic() + TIMEOUT_S)

    def start_rank(self, rank: int) -> None:
        """Starts another process for it, which joins alone."""
        self._ranks[rank].close()
        self._ranks[rank] = self._rank(rank, world_size=1)

    def attach(self, rank: int, transport: str | None = None, **options: Any) -> epmesh.Communicator:
        """Drives a rank."""
        options = {"world_size": self.world_size, "timeout_s": TIMEOUT_S, **options}
        return epmesh.attach(self.addresses[rank // self.ranks_per_node], rank=rank, transport=transport, **options)


def _address(child: Child) -> str:
    assert child.pipe.poll(TIMEOUT_S), f"{child.name} says nothing"
    address: str = child.receive().address
    return address
