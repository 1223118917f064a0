"""A mesh whose ranks are processes of their own that wait for drivers, and drivers of all of them in this process."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import epmesh
from epmesh.errors import EpmeshError
from epmesh_server.coordinator import CoordinatorSettings
from epmesh_server.node import NodeSettings
from epmesh_server.processes.child import Child, end_all
from epmesh_server.testing.preload import start_mesh_fork_server
from epmesh_server.testing.services import coordinator_main, node_main
from tests.integration.contract import MAX_TOKENS

TIMEOUT_S = 20.0


def hosted_main(pipe: Connection[Any, Any], options: dict[str, Any]) -> None:
    """A rank that takes drivers, and joins again whenever its membership ended."""
    import torch

    from epmesh_server.ranks.driven import drive
    from epmesh_server.ranks.front import Front
    from epmesh_server.ranks.join import RankOptions, become_rank

    torch.set_num_threads(1)
    while True:
        front = Front("127.0.0.1")
        try:
            comm = become_rank(RankOptions(**options), front.endpoint)
        except EpmeshError:
            front.close(0.0)
            time.sleep(0.05)  # its node service is being started again
            continue
        rank = comm._rank_process
        front.identify(comm.view.mesh_id, rank.session.rank, rank.incarnation)
        drive(comm, front)
        front.close(0.0)
        with contextlib.suppress(EpmeshError):
            comm.destroy()


@dataclass
class HostedMesh:
    """`nodes` of `ranks_per_node` hosted ranks; use it in a with statement."""

    nodes: int
    ranks_per_node: int
    options: dict[str, Any] = field(default_factory=dict)
    buffer_bytes: int = 1 << 26
    hosted: Sequence[int] | None = None  # those that are; None: all

    def __post_init__(self) -> None:
        self._children: list[Child] = []
        self._services: list[Child] = []
        self._ranks: dict[int, Child] = {}
        self.addresses: list[str] = []
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
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        start_mesh_fork_server()
        settings = CoordinatorSettings(port=0, data_dir=self._folder / "log", stride=self.ranks_per_node)
        coordinator = Child("coordinator", coordinator_main, settings)
        self._children.append(coordinator)
        self.coordinator = _address(coordinator)
        for slot in range(self.nodes):
            self._services.append(self._service(slot, 0))
            self.addresses.append(_address(self._services[-1]))
        for rank in range(self.world_size) if self.hosted is None else self.hosted:
            self._ranks[rank] = self._rank(rank)

    def _service(self, slot: int, port: int) -> Child:
        settings = NodeSettings(
            port=port,
            coordinator=self.coordinator,
            node_id=f"n{slot}",
            slot=slot,
            runtime_dir=self._folder / f"{slot}",
            buffer_bytes=self.buffer_bytes,
        )
        return Child(f"node-{slot}", node_main, settings)

    def _rank(self, rank: int, world_size: int | None = None) -> Child:
        slot, local_rank = divmod(rank, self.ranks_per_node)
        options = {"exchange_timeout_s": 20.0, "max_tokens_per_rank": MAX_TOKENS, "timeout_s": 10.0, **self.options}
        options |= {
            "address": self.addresses[slot],
            "local_rank": local_rank,
            "world_size": world_size or self.world_size,
        }
        return Child(f"hosted-{rank}", hosted_main, options)

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
        self._services[slot] = self._service(slot, int(self.addresses[slot].rpartition(":")[2]))
        _address(self._services[slot])

    def kill_rank(self, rank: int) -> None:
        """Kills the process that hosts a rank."""
        self._ranks[rank].kill()
        self._ranks[rank].wait()

    def start_rank(self, rank: int) -> None:
        """Starts another process for it, which joins alone."""
        self._ranks[rank].close()
        self._ranks[rank] = self._rank(rank, world_size=1)

    def attach(self, rank: int, transport: str | None = None, **options: Any) -> epmesh.Communicator:
        """Drives a rank."""
        options = {"world_size": self.world_size, "timeout_s": TIMEOUT_S, **options}
        return epmesh.attach(self.addresses[rank // self.ranks_per_node], rank=rank, transport=transport, **options)

    @contextlib.contextmanager
    def drivers(self, transport: str | None = None) -> Iterator[Drivers]:
        """Drives all ranks."""
        with Drivers(self, transport) as drivers:
            yield drivers


class Drivers:
    """A driver for each rank of a mesh, in this process; calling it runs a work on all of them, as `LocalMesh.run`."""

    def __init__(self, mesh: HostedMesh, transport: str | None) -> None:
        self._pool = ThreadPoolExecutor(mesh.world_size)
        try:
            self.comms = list(self._pool.map(lambda rank: mesh.attach(rank, transport), range(mesh.world_size)))
        except BaseException:
            self._pool.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for comm in self.comms:
            comm.destroy()
        self._pool.shutdown()

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``work(comm, *args)`` for every rank at once; the results by rank, or the lowest rank's error."""
        ready = threading.Barrier(len(self.comms))

        def run(comm: epmesh.Communicator) -> Any:
            comm.wait_ready(TIMEOUT_S)
            ready.wait(TIMEOUT_S)
            return work(comm, *args)

        futures = [self._pool.submit(run, comm) for comm in self.comms]
        for future in futures:
            future.exception(120.0)
        return [future.result() for future in futures]


def _address(child: Child) -> str:
    assert child.pipe.poll(10.0), f"{child.name} says nothing"
    address: str = child.receive().address
    return address
