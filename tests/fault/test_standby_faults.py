"""With its log in etcd, a coordinator that dies is followed by one that stood by; a mesh hardly notices."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from epmesh.testing import LocalMesh
from epmesh_server.coordinator import CoordinatorSettings
from epmesh_server.processes.child import Child, end_all
from epmesh_server.testing.local_mesh import _bound
from epmesh_server.testing.ports import HOST, Port
from epmesh_server.testing.services import coordinator_main
from tests.etcd_server import EtcdServer, needs_etcd, running_etcd
from tests.fault import works
from tests.fault.test_coordinator_faults import create_group
from tests.integration.mesh_works import Inbox
from tests.integration.raw_node import RawNode

pytestmark = [pytest.mark.fault, needs_etcd]

LEADS_S, STRETCH = 5.0, 4


class StandbyMesh(LocalMesh):
    """A mesh with two coordinators, whose log is in etcd."""

    def __init__(self, store: str) -> None:
        super().__init__(2, 2, num_experts=8)
        self._store = store
        self.places = [Port(), Port()]
        self.coordinators: list[Child] = []

    def start_coordinator(self) -> None:
        self._coordinator = self._new_coordinator(0)
        self.coordinators.append(self._coordinator)
        _bound(self.coordinators[0], time.monotonic() + 30)  # it leads before the other one asks
        self.coordinators.append(self._new_coordinator(1))

    def _new_coordinator(self, number: int) -> Child:
        port = self.places[number].number
        settings = CoordinatorSettings(host=HOST, port=port, data_dir=self._path("none"), stride=2, store=self._store)
        return Child(f"coordinator-{number}", coordinator_main, settings)

    @property
    def coordinator_address(self) -> str:
        return ",".join(place.address for place in self.places)

    def close(self) -> None:
        super().close()
        end_all(self.coordinators[1:], 2.0)
        self.coordinators = []
        for place in self.places:
            place.close()


def slot_given(place: Port, node_id: str) -> int:
    """Registers a node at one of the coordinators; the slot that was acknowledged."""

    async def register() -> int:
        node = RawNode(place.address, node_id)
        try:
            return (await node.register()).slot
        finally:
            await node.client.channel.close()

    return asyncio.run(register())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path) as server:
        yield server


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    with contextlib.closing(Inbox(tmp_path)) as inbox:
        yield inbox


def test_a_standby_leads_and_commits_when_the_leader_is_killed(
    server: EtcdServer, inbox: Inbox, tmp_path: Path
) -> None:
    with StandbyMesh(server.store()) as mesh:
        future = mesh.start(works.exchange_until, inbox.path, tmp_path / "stop")
        inbox.lines(4)
        before = mesh.view()
        slot = slot_given(mesh.places[0], "newcomer")
        killed_at = time.monotonic()
        mesh.coordinators[0].kill()
        mesh.coordinators[0].wait()
        made = create_group(mesh.address, "after", killed_at + STRETCH * LEADS_S)
        took_s = time.monotonic() - killed_at
        assert made > before.epoch
        assert took_s < STRETCH * LEADS_S
        assert slot_given(mesh.places[1], "newcomer") == slot
        assert slot_given(mesh.places[1], "another") not in (0, 1, slot)
        (tmp_path / "stop").touch()
        results = future.result(60)
        assert len({count for count, _, _ in results}) == 1
        after = mesh.view()
        assert after.epoch >= made
        assert after.mesh_id == before.mesh_id
        assert [node.node_id for node in after.nodes] == [node.node_id for node in before.nodes]


def test_while_etcd_is_away_nothing_changes_and_exchanges_go_on(
    server: EtcdServer, inbox: Inbox, tmp_path: Path
) -> None:
    with StandbyMesh(server.store()) as mesh:
        future = mesh.start(works.exchange_until, inbox.path, tmp_path / "stop")
        inbox.lines(4)
        epoch = mesh.view().epoch
        server.pause()
        try:
            mesh.coordinators[0].wait(time.monotonic() + 30)  # it ends with its lease
            assert not mesh.coordinators[0].alive
            with pytest.raises(grpc.RpcError) as refused:
                create_group(mesh.address, "away", deadline=0.0)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert mesh.view().epoch == epoch
        finally:
            server.resume()
        assert create_group(mesh.address, "back", time.monotonic() + STRETCH * LEADS_S) > epoch
        (tmp_path / "stop").touch()
        assert len({count for count, _, _ in future.result(60)}) == 1
