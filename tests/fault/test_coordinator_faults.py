"""The coordinator is killed at random moments and its log torn; what it acknowledged is there when it is back."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from epmesh.errors import EpmeshError, InvalidRequest
from epmesh.testing import LocalMesh
from epmesh.v1 import group_service_pb2 as groups
from epmesh.v1 import group_service_pb2_grpc as groups_rpc
from epmesh_server.coordinator.log import LOG_NAME
from tests.fault import works
from tests.integration.mesh_works import Inbox
from tests.integration.raw_node import Client, RawNode, rank

pytestmark = pytest.mark.fault

BACK_S, STRETCH = 2.0, 4

_COORDINATOR = """
import asyncio, sys
from pathlib import Path
from epmesh_server.coordinator import CoordinatorSettings, run_coordinator

settings = CoordinatorSettings(data_dir=Path(sys.argv[1]), port=int(sys.argv[2]))
asyncio.run(run_coordinator(settings, asyncio.Event(), lambda address: print(address, flush=True)))
"""


def half_a_frame(chance: random.Random) -> bytes:
    """What a crash leaves of a frame that was being written: a part, or all of it with other bytes than it should."""
    body = chance.randbytes(chance.randint(1, 300))
    words = struct.pack("<II", len(body), zlib.crc32(body))
    frame = words + struct.pack("<I", zlib.crc32(words)) + body
    if chance.random() < 0.5:
        return frame[: chance.randrange(1, len(frame))]
    return frame[:12] + chance.randbytes(chance.randint(0, len(body) - 1)) + bytes([body[-1] ^ 1])


def tear(data_dir: Path, chance: random.Random) -> None:
    """Adds a torn frame to a dead coordinator's log, unless its death left one."""
    with (data_dir / LOG_NAME).open("ab") as log:
        log.write(half_a_frame(chance))


class Mesh:
    """Nodes of raw stubs that keep themselves registered, and what they were told."""

    def __init__(self) -> None:
        self.address = ""
        self.slots: dict[str, int] = {}  # acknowledged registrations
        self.incarnations: dict[str, int] = {}
        self.epochs: dict[str, int] = {}  # newest that each node heard of
        self.evicted: Counter[str] = Counter()
        self.failures: list[str] = []

    @contextlib.asynccontextmanager
    async def registered(self, node_id: str) -> AsyncIterator[RawNode]:
        """A node that is registered, and that the answer is the one of before; its connection ends with the block."""
        node = RawNode(self.address, node_id, self.incarnations.setdefault(node_id, len(self.incarnations) + 1))
        try:
            granted = await node.register()
            if self.slots.setdefault(node_id, granted.slot) != granted.slot:
                self.failures.append(f"{node_id} had slot {self.slots[node_id]}, and has {granted.slot}")
            yield node
        finally:
            await node.client.channel.close()

    async def register(self, node_id: str) -> None:
        """Registers, and goes away without a stream."""
        async with self.registered(node_id):
            pass

    async def live(self, node_id: str) -> None:
        """Registers, answers every command, and begins again whenever the stream breaks."""
        task = asyncio.current_task()
        assert task is not None
        while not task.cancelling():  # a call that fails as it is cancelled raises its own error, and the task lives on
            try:
                async with self.registered(node_id) as node:
                    await self._follow(node)
            except InvalidRequest as error:  # such as: the node's epoch is higher than the log's
                self.failures.append(f"{node_id}: {error}")
                return
            except EpmeshError:
                await asyncio.sleep(0.05)

    async def _follow(self, node: RawNode) -> None:
        """Reports ranks and obeys; returns when they were evicted, as a slow machine may have it."""
        node.open(self.epochs.get(node.node_id, 0))
        node.report(*(rank(8 * node.slot + local, 1 + self.evicted[node.node_id]) for local in range(2)))
        beating = asyncio.create_task(node.beat())
        try:
            while True:
                command = await node.hear()
                node.answer(command)
                if command.WhichOneof("command") == "evict":
                    self.evicted[node.node_id] += 1
                    return
                if command.WhichOneof("command") == "commit":
                    self._note_epoch(node.node_id, command.commit.view.epoch)
        finally:
            beating.cancel()
            node.leave()

    def _note_epoch(self, node_id: str, epoch: int) -> None:
        before = self.epochs.get(node_id, 0)
        if epoch < before:
            self.failures.append(f"{node_id} had epoch {before}, then {epoch}")
        self.epochs[node_id] = epoch

    async def newcomers(self, first: int) -> None:
        """Registers one node after the other until nobody answers."""
        for number in range(first, first + 1000):
            try:
                await self.register(f"newcomer-{number}")
            except EpmeshError:
                return


class Coordinator:
    """A coordinator's process, on one port and one log."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._port = 0
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> str:
        """Starts it, at the address it had before; returns that."""
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _COORDINATOR, str(self._data_dir), str(self._port), stdout=subprocess.PIPE
        )
        assert self._child.stdout is not None
        address = (await asyncio.wait_for(self._child.stdout.readline(), 30)).decode().strip()
        self._port = int(address.rsplit(":", 1)[1])
        return address

    async def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()


@contextlib.asynccontextmanager
async def living(mesh: Mesh, coordinator: Coordinator, *node_ids: str) -> AsyncIterator[None]:
    """Nodes that live, and a coordinator, until the end of the block."""
    tasks = [asyncio.create_task(mesh.live(node_id)) for node_id in node_ids]
    try:
        yield
    finally:
        await coordinator.kill()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def commits_again(mesh: Mesh, name: str) -> None:
    """Control is back: a registration is answered, and a change is committed, in a later epoch than any before."""
    before = max(mesh.epochs.values(), default=0)
    await mesh.register("node-0")
    client = Client(mesh.address)
    request = groups.CreateGroupRequest(request_id=name, name=name, ranks=[0])
    while True:
        try:
            answer = await client.groups.CreateGroup(request, timeout=5)
            break
        except grpc.aio.AioRpcError:  # rank 0 is not in a view yet
            assert mesh.failures == []
            await asyncio.sleep(0.02)
    assert answer.epoch > before
    assert (await client.view()).epoch >= answer.epoch
    await client.channel.close()


def test_nothing_acknowledged_is_lost_when_the_coordinator_is_killed_and_its_log_torn(tmp_path: Path) -> None:
    chance = random.Random(1)

    async def main() -> None:
        mesh, coordinator = Mesh(), Coordinator(tmp_path)
        mesh.address = await coordinator.start()
        async with asyncio.timeout(60), living(mesh, coordinator, "node-0", "node-1", "node-2"):
            for number in range(4):
                await commits_again(mesh, f"group-{number}")
                newcomers = asyncio.create_task(mesh.newcomers(100 * number))
                await asyncio.sleep(chance.uniform(0.0, 0.3))  # what is tested: any moment
                killed_at = time.monotonic()
                await coordinator.kill()
                await newcomers
                tear(tmp_path, chance)
                assert await coordinator.start() == mesh.address
                # Where a registration was lost, this one gets its slot.
                await mesh.register(f"newcomer-after-{number}")
                await commits_again(mesh, f"back-{number}")
                assert time.monotonic() - killed_at < STRETCH * BACK_S
                for node_id in [node_id for node_id in mesh.slots if node_id.startswith("newcomer")]:
                    await mesh.register(node_id)
                assert mesh.failures == []
        assert len(mesh.slots) > 20
        assert len(set(mesh.slots.values())) == len(mesh.slots)

    asyncio.run(main())


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    with contextlib.closing(Inbox(tmp_path)) as inbox:
        yield inbox


def test_exchanges_see_no_error_while_the_coordinator_dies_again_and_again(inbox: Inbox, tmp_path: Path) -> None:
    chance = random.Random(3)
    with LocalMesh(2, 2, num_experts=8) as mesh:
        future = mesh.start(works.exchange_until, inbox.path, tmp_path / "stop")
        inbox.lines(4)
        epoch = mesh.view().epoch
        for number in range(3):
            killed_at = time.monotonic()
            mesh.kill_coordinator()
            tear(mesh._path("coordinator"), chance)
            mesh.start_coordinator()
            made = create_group(mesh.address, f"group-{number}", killed_at + STRETCH * BACK_S)
            assert made > epoch
            epoch = made
        (tmp_path / "stop").touch()
        results = future.result(60)
        assert len({count for count, _, _ in results}) == 1
        assert all(seen <= epoch for _, seen, _ in results)
        assert mesh.view().epoch == epoch


def create_group(address: str, name: str, deadline: float) -> int:
    """Makes a group through a node service, as soon as that works; the epoch that has it."""
    request = groups.CreateGroupRequest(request_id=name, name=name, ranks=[0, 1, 2, 3])
    with grpc.insecure_channel(address) as channel:
        stub = groups_rpc.GroupServiceStub(channel)
        while True:
            try:
                return stub.CreateGroup(request, timeout=5).epoch
            except grpc.RpcError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
