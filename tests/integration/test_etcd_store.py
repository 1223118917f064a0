"""The log in etcd: what was acknowledged is read again, and whoever leads no more writes nothing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from epmesh.errors import InvalidRequest, MeshUnavailable
from epmesh_server.coordinator import etcd_store
from epmesh_server.coordinator.etcd_client import EtcdClient, encoded, parse_store
from epmesh_server.coordinator.etcd_leader import Leadership, campaign
from epmesh_server.coordinator.etcd_store import EtcdStore
from epmesh_server.membership import EpochUsed
from tests.etcd_server import EtcdServer, needs_etcd, running_etcd
from tests.unit.test_coordinator_log import BATCHES, CREATED, committed, folded, registered

pytestmark = needs_etcd
Lead = Callable[..., EtcdStore]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


def leadership(store: str) -> Leadership:
    found = campaign(parse_store(store), "test", threading.Event())
    assert found is not None
    return found


@pytest.fixture
def lead(server: EtcdServer, request: pytest.FixtureRequest) -> Iterator[Lead]:
    """Makes the leader's store under this test's prefix."""
    prefix = f"/{request.node.name}"
    with contextlib.ExitStack() as stack:

        def make(**options: int) -> EtcdStore:
            return stack.enter_context(contextlib.closing(EtcdStore(leadership(server.store(prefix)), **options)))

        yield make


def depose(server: EtcdServer, prefix: str) -> None:
    """Removes the leader's key as the end of its lease does; the leader hears nothing of it."""
    EtcdClient((server.address,)).call("kv/deleterange", {"key": encoded(f"{prefix}/leader")})


def test_what_was_written_is_read_by_the_next_leader(lead: Lead) -> None:
    first = lead()
    assert first.load() == []
    for batch in BATCHES:
        first.append(batch)
    assert first.num_bytes > 0
    first.close()
    first.close()
    second = lead()
    assert second.load() == folded(BATCHES)
    second.append([EpochUsed(3, 65_538)])
    second.close()
    assert lead().load() == folded([*BATCHES, [EpochUsed(3, 65_538)]])


def test_a_long_log_is_replaced_by_what_matters(lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd_store, "_PAGE_BATCHES", 3)
    store = lead(compact_at_batches=8)
    store.load()
    store.append([CREATED])
    sizes = []
    for epoch in range(1, 40):
        store.append([EpochUsed(epoch, 65_536), committed(epoch)])
        sizes.append(store.num_bytes)
    store.close()
    assert max(sizes) < 10 * sizes[0]
    assert lead().load() == [CREATED, EpochUsed(39, 65_536), committed(39)]


def test_a_deposed_leader_appends_nothing(lead: Lead, server: EtcdServer, request: pytest.FixtureRequest) -> None:
    first = lead()
    first.load()
    first.append([CREATED])
    depose(server, f"/{request.node.name}")
    second = lead()
    assert second.load() == [CREATED]
    with pytest.raises(MeshUnavailable, match="another coordinator leads"):
        first.append([registered(0)])
    with pytest.raises(MeshUnavailable, match="no longer"):
        first.append([registered(0)])
    second.append([registered(1)])
    second.close()
    assert lead().load() == [CREATED, registered(1)]


def test_a_write_that_was_carried_out_unheard_is_not_repeated(lead: Lead) -> None:
    store = lead()
    store.load()
    store.append([CREATED])
    batch = etcd_store._batch([registered(0)])
    store._write(store._next, batch, [])  # as a member did that died before it answered
    store.append([registered(0)])
    store.append([registered(1)])
    store.close()
    assert lead().load() == [CREATED, registered(0), registered(1)]


def test_a_log_with_a_hole_is_refused(lead: Lead, server: EtcdServer, request: pytest.FixtureRequest) -> None:
    first = lead()
    first.load()
    for batch in BATCHES:
        first.append(batch)
    first.close()
    EtcdClient((server.address,)).call("kv/deleterange", {"key": encoded(f"/{request.node.name}/log/{2:016d}")})
    with pytest.raises(InvalidRequest, match="damaged at batch 2"):
        lead().load()


def test_a_batch_that_etcd_would_not_take_is_refused(lead: Lead, monkeypatch: pytest.MonkeyPatch) -> None:
    store = lead()
    store.load()
    store.append([CREATED])
    monkeypatch.setattr(etcd_store, "MAX_BATCH_BYTES", 60)
    with pytest.raises(MeshUnavailable, match="larger than 60"):
        store.append([committed(1)])
    store.append([EpochUsed(1, 65_536)])


@pytest.mark.parametrize(
    "store", ["", "etcd://", "http://a:1", "etcd://a", "etcd://a:1,b", "etcd://a:1/x y", "file:/x"]
)
def test_a_store_that_is_no_etcd_is_refused(store: str) -> None:
    with pytest.raises(InvalidRequest, match="store is"):
        parse_store(store)


def test_a_store_names_members_and_prefix() -> None:
    assert str(parse_store("etcd://a:1,b:2/x/y")) == "etcd://a:1,b:2/x/y"
    assert str(parse_store("etcd://[::1]:1")) == "etcd://[::1]:1/epmesh"
