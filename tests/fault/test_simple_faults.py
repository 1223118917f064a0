"""Processes die, stop, come late and come back; survivors get typed errors that name them, and go on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from epmesh import MeshUnavailable, PeerLost
from epmesh.testing import LocalMesh
from tests.fault import works
from tests.fault.works import Seen
from tests.integration.mesh_works import Inbox

pytestmark = pytest.mark.fault

# The promises, and how far a busy test machine may stretch them.
KILLED_S, RESUMED_S, STOPPED_S, STRETCH = 0.5, 1.5, 2.0, 4
EXPERTS = list(range(8))


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    with contextlib.closing(Inbox(tmp_path)) as inbox:
        yield inbox


def two_by_two(**options: float | bool) -> LocalMesh:
    """Rank r holds experts 2r and 2r + 1."""
    return LocalMesh(2, 2, num_experts=8, **options)  # type: ignore[arg-type]


def fault(mesh: LocalMesh, inbox: Inbox, plan: str, victims: list[int], strike: Callable[[], None]) -> list[Seen]:
    """Runs `plan`, strikes in the middle of it, and returns what the survivors saw."""
    world_size = len(mesh.ranks)
    future = mesh.start(works.until_error, inbox.path, plan, victims, EXPERTS)
    inbox.lines(world_size)
    struck_at = time.monotonic()
    strike()
    return check(future.result(60), victims, struck_at, KILLED_S)


def check(results: list[Seen | PeerLost], victims: list[int], struck_at: float, bound_s: float) -> list[Seen]:
    """Every survivor got `PeerLost` with the victims in time, and goes on without them in one view."""
    survivors = []
    for rank, result in enumerate(results):
        if rank in victims:
            assert isinstance(result, PeerLost)
            assert result.rank == rank
            continue
        assert isinstance(result, Seen)
        assert (result.error, set(result.ranks) <= set(victims)) == ("PeerLost", True), result
        assert result.ranks
        assert result.at - struck_at < STRETCH * bound_s
        assert result.resumed_at - struck_at < STRETCH * (bound_s + RESUMED_S - KILLED_S)
        assert result.view == [other for other in range(len(results)) if other not in victims]
        lost = [expert for victim in victims for expert in (2 * victim, 2 * victim + 1)]
        assert result.sums == [expert + 1.0 for expert in EXPERTS if expert not in lost]
        assert result.unavailable == tuple(lost)
        survivors.append(result)
    assert len({seen.epoch for seen in survivors}) == 1
    return survivors


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "secured"])
@pytest.mark.parametrize("plan", ["dispatch", "combine", "exchanges"])
@pytest.mark.parametrize("victim", [1, 2])
def test_survivors_get_peer_lost_and_go_on_when_a_rank_is_killed(
    inbox: Inbox, plan: str, victim: int, tls: bool
) -> None:
    with two_by_two(tls=tls) as mesh:
        survivors = fault(mesh, inbox, plan, [victim], lambda: mesh.kill_rank(victim))
        assert {seen.ranks for seen in survivors} == {(victim,)}


def test_survivors_get_peer_lost_when_a_rank_was_killed_while_all_were_idle(inbox: Inbox, tmp_path: Path) -> None:
    with two_by_two() as mesh:
        future = mesh.start(works.wait_outside, inbox.path, tmp_path / "go", EXPERTS)
        inbox.lines(4)
        mesh.kill_rank(3)
        struck_at = time.monotonic()
        (tmp_path / "go").touch()
        check(future.result(60), [3], struck_at, KILLED_S)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "secured"])
@pytest.mark.parametrize("plan", ["dispatch", "combine", "exchanges"])
def test_survivors_go_on_without_a_killed_node_and_take_it_back_in_its_old_slot(
    inbox: Inbox, plan: str, tls: bool
) -> None:
    with two_by_two(tls=tls) as mesh:
        fault(mesh, inbox, plan, [2, 3], lambda: mesh.kill_node(1))
        assert [node.slot for node in mesh.view().nodes] == [0]
        mesh.start_node(1)
        view = mesh.view()
        assert [(node.slot, node.node_id) for node in view.nodes] == [(0, "node-0"), (1, "node-1")]
        for sums, ranks, _ in mesh.run(works.sums, EXPERTS):
            assert ranks == [0, 1, 2, 3]
            assert sums == [expert + 1.0 for expert in EXPERTS]


def test_the_first_nodes_death_is_like_any_others(inbox: Inbox) -> None:
    with two_by_two() as mesh:
        fault(mesh, inbox, "exchanges", [0, 1], lambda: mesh.kill_node(0))
        mesh.start_node(0)
        assert [sums for sums, _, _ in mesh.run(works.sums, EXPERTS)] == [[expert + 1.0 for expert in EXPERTS]] * 4


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "secured"])
def test_a_killed_rank_comes_back_with_its_experts(inbox: Inbox, tls: bool) -> None:
    with two_by_two(tls=tls) as mesh:
        fault(mesh, inbox, "exchanges", [1], lambda: mesh.kill_rank(1))
        mesh.start_node(0)
        assert mesh.ranks == [0, 1, 2, 3]
        assert [sums for sums, _, _ in mesh.run(works.sums, EXPERTS)] == [[expert + 1.0 for expert in EXPERTS]] * 4


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "secured"])
@pytest.mark.parametrize("victim", [0, 3])
def test_a_stopped_rank_is_lost_within_seconds_and_joins_again(inbox: Inbox, victim: int, tls: bool) -> None:
    with two_by_two(tls=tls) as mesh:
        future = mesh.start(works.until_error, inbox.path, "exchanges", [], EXPERTS)
        inbox.lines(4)
        struck_at = time.monotonic()
        mesh.pause_rank(victim)
        survivors = [rank for rank in range(4) if rank != victim]
        assert inbox.lines(3) == [f"saw {rank}" for rank in survivors]
        eventually_without(mesh, victim)
        mesh.kill_rank(victim)  # its own work would try to go on where it is no member any more
        check(future.result(60), [victim], struck_at, STOPPED_S)


def eventually_without(mesh: LocalMesh, victim: int) -> None:
    deadline = time.monotonic() + 10
    while victim in mesh.view().ranks:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_resumed_rank_is_refused_until_it_joins_again() -> None:
    with two_by_two() as mesh:
        mesh.pause_rank(2)
        assert [ranks for _, ranks, _ in mesh.run(works.sums, [0, 1])] == [[0, 1, 3]] * 3
        mesh.resume_rank(2)
        assert [sums for sums, _, _ in mesh.run(works.sums, EXPERTS)] == [[expert + 1.0 for expert in EXPERTS]] * 4


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "secured"])
@pytest.mark.parametrize("who", [0, 3])
def test_a_late_rank_is_named_and_not_evicted_and_the_group_goes_on(who: int, tls: bool) -> None:
    with two_by_two(exchange_timeout_s=2.0, tls=tls) as mesh:  # late for the first exchange, long in time for the next
        for rank, (seen, epoch) in enumerate(mesh.run(works.late, who, 2.5)):
            assert seen.error == "DeadlineExceeded", seen
            assert rank == who or seen.ranks == (who,)
            assert seen.sums == [1.0, 2.0]
            assert seen.view == [0, 1, 2, 3]
            assert seen.epoch == epoch


def test_exchanges_go_on_without_a_coordinator_and_joins_work_once_it_is_back(inbox: Inbox, tmp_path: Path) -> None:
    with two_by_two() as mesh:
        before = mesh.view()
        future = mesh.start(works.exchange_until, inbox.path, tmp_path / "stop")
        inbox.lines(4)
        mesh.kill_coordinator()
        mesh.start_coordinator()
        (tmp_path / "stop").touch()
        results = future.result(60)
        assert {epoch for _, epoch, _ in results} == {before.epoch}
        assert len({count for count, _, _ in results}) == 1
        mesh.kill_rank(3)
        mesh.start_node(1)
        for sums, ranks, epoch in mesh.run(works.sums, EXPERTS):
            assert sums == [expert + 1.0 for expert in EXPERTS]
            assert ranks == [0, 1, 2, 3]
            assert epoch > before.epoch


def test_a_death_without_a_coordinator_is_a_typed_error_and_mends_when_it_is_back(inbox: Inbox) -> None:
    with LocalMesh(1, 2, num_experts=8) as mesh:
        mesh.kill_coordinator()
        mesh.kill_rank(1)
        with pytest.MonkeyPatch.context() as impatient:
            impatient.setattr(mesh, "_timeout_s", 2.0)
            with pytest.raises(MeshUnavailable):
                mesh.run(works.sums, [0])
        mesh.start_coordinator()
        ((sums, ranks, _),) = mesh.run(works.sums, [0, 3])
        assert (sums, ranks) == ([1.0, 4.0], [0])
