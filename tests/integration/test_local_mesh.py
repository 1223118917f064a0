"""The test kit: works run in every rank, real processes die and come back, and nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import epmesh
from epmesh import EpmeshError, InvalidRequest, MeshUnavailable, PeerLost, linear_placement
from epmesh.testing import LocalMesh
from tests.integration import mesh_works
from tests.integration.mesh_works import Inbox, Peculiar

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    """Two nodes with two ranks each; tests leave it whole."""
    with LocalMesh(nodes=2, ranks_per_node=2) as mesh:
        yield mesh


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    with contextlib.closing(Inbox(tmp_path)) as inbox:
        yield inbox


# Work -----------------------------------------------------------------------------------------------------------


def test_run_calls_the_work_in_every_rank_and_lists_results_by_global_rank(mesh: LocalMesh) -> None:
    assert mesh.run(mesh_works.place, 3.0, "word") == [(rank, 3.0, "word") for rank in range(4)]
    assert mesh.run(mesh_works.total) == [6, 6, 6, 6]


def test_processes_and_communicators_persist_between_works(mesh: LocalMesh) -> None:
    first = mesh.run(mesh_works.identity)
    assert mesh.run(mesh_works.identity) == first
    assert len({pid for pid, _, _ in first}) == 4


def test_a_placement_persists_between_works(mesh: LocalMesh) -> None:
    mesh.run(mesh_works.set_linear, 9)
    assert mesh.run(mesh_works.placement) == [linear_placement(9, range(4))] * 4


def test_start_returns_a_future_and_works_take_turns(mesh: LocalMesh, inbox: Inbox, tmp_path: Path) -> None:
    future = mesh.start(mesh_works.tell_and_wait_for_file, inbox.path, tmp_path / "go")
    after = mesh.start(mesh_works.total)
    assert inbox.lines(4) == ["0", "1", "2", "3"]
    assert not future.done()
    (tmp_path / "go").touch()
    assert future.result(20) == [0, 1, 2, 3]
    assert after.result(20) == [6] * 4


def test_tensors_come_back_whole_and_hold_no_descriptor(mesh: LocalMesh) -> None:
    mesh.run(mesh_works.give_tensors, 1)
    before = descriptors()
    results = mesh.run(mesh_works.give_tensors, 100)
    assert descriptors() < before + 100
    assert all(torch.equal(t, torch.full((3,), float(rank)).bfloat16()) for rank, r in enumerate(results) for t in r)


def test_an_exception_is_raised_here_with_its_type_and_says_where_it_came_from(mesh: LocalMesh) -> None:
    with pytest.raises(Peculiar) as caught:
        mesh.run(mesh_works.fail_on, [2])
    assert caught.value.value == 22
    assert "rank 2" in caught.value.__notes__[0]
    assert "fail_on" in caught.value.__notes__[0]
    assert mesh.run(mesh_works.total) == [6] * 4


def test_of_several_exceptions_the_lowest_ranks_is_raised_and_notes_the_others(mesh: LocalMesh) -> None:
    with pytest.raises(Peculiar) as caught:
        mesh.run(mesh_works.fail_on, [3, 1])
    assert caught.value.value == 11
    assert "rank 1" in caught.value.__notes__[0]
    assert "rank 3" in caught.value.__notes__[1]


def test_what_cannot_be_pickled_is_an_error_and_ends_no_rank(mesh: LocalMesh) -> None:
    with pytest.raises(InvalidRequest, match="module-level"):
        mesh.run(lambda comm: comm.rank)
    with pytest.raises(EpmeshError, match="rank 0 will not travel"):
        mesh.run(mesh_works.fail_stubbornly)
    with pytest.raises((AttributeError, TypeError), match="lambda"):
        mesh.run(mesh_works.give_lambda)
    with pytest.raises(SystemExit):
        mesh.run(mesh_works.leave_process)
    assert mesh.run(mesh_works.total) == [6] * 4


def test_works_of_the_main_module_run_too(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
from epmesh.testing import LocalMesh

class Odd(Exception):
    pass

def work(comm, number):
    if number < 0:
        raise Odd(comm.rank)
    return comm.rank * number

if __name__ == "__main__":
    with LocalMesh(1, 2) as mesh:
        print(mesh.run(work, 3.0))
        try:
            mesh.run(work, -1.0)
        except Odd as error:
            print("odd", error)
"""
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[0.0, 3.0]\nodd 0\n", "", 0)


# What there is --------------------------------------------------------------------------------------------------


def test_addresses_and_view_show_the_mesh(mesh: LocalMesh) -> None:
    view = mesh.view()
    assert [node.address for node in view.nodes] == mesh.addresses
    assert mesh.address in mesh.addresses
    assert [node.slot for node in view.nodes] == [0, 1]
    assert list(view.ranks) == mesh.ranks == [0, 1, 2, 3]
    assert view.stride == mesh.ranks_per_node == 2
    assert mesh.coordinator_address not in mesh.addresses


def test_experts_are_declared_on_the_way_in() -> None:
    experts = [[0, 3], [1], [], [2, 3]]
    with LocalMesh(2, 2, num_experts=4, experts=experts) as mesh:
        (placement, *others) = mesh.run(mesh_works.placement)
        assert dict(placement.experts_of) == {rank: tuple(mine) for rank, mine in enumerate(experts)}
        assert others == [placement] * 3


def test_without_a_list_the_experts_are_placed_linearly() -> None:
    with LocalMesh(2, 1, num_experts=5) as mesh:
        assert mesh.run(mesh_works.placement) == [linear_placement(5, [0, 1])] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"nodes": 0}, "0 nodes"), ({"ranks_per_node": -1}, "-1"), ({"num_experts": 2, "experts": [[0]]}, "1 entries")],
    ids=str,
)
def test_wrong_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        LocalMesh(**arguments)  # type: ignore[arg-type]


def test_a_mesh_that_is_not_started_or_over_says_so(mesh: LocalMesh) -> None:
    with pytest.raises(InvalidRequest, match="not started"):
        LocalMesh().run(mesh_works.total)
    with pytest.raises(InvalidRequest, match="no rank 9"):
        mesh.kill_rank(9)
    with pytest.raises(InvalidRequest, match="no node in slot 5"):
        mesh.kill_node(5)
    with pytest.raises(InvalidRequest, match="started before"), mesh:
        pass


# Deaths ---------------------------------------------------------------------------------------------------------


def test_a_rank_killed_during_the_work_is_a_peer_lost_in_the_list(inbox: Inbox, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with LocalMesh(1, 3) as mesh:
        future = mesh.start(mesh_works.tell_and_wait_for_file, inbox.path, go)
        inbox.lines(3)
        mesh.kill_rank(1)
        go.touch()
        first, lost, last = future.result(20)
        assert (first, last) == (0, 2)
        assert isinstance(lost, PeerLost)
        assert lost.rank == 1
        assert mesh.ranks == [0, 2]
        assert mesh.run(mesh_works.total) == [2, 2]


def test_a_paused_rank_is_left_out_and_joins_again_when_it_is_resumed() -> None:
    with LocalMesh(1, 2) as mesh:
        mesh.pause_rank(1)
        assert mesh.run(mesh_works.total) == [0]
        mesh.resume_rank(1)
        assert mesh.run(mesh_works.total) == [1, 1]


def test_a_rank_that_left_joins_again(mesh: LocalMesh) -> None:
    mesh.run(leave_on, 3)
    assert mesh.run(mesh_works.total) == [6] * 4


def leave_on(comm: epmesh.Communicator, rank: int) -> None:
    if comm.global_rank == rank:
        comm.destroy()


# Nothing is left ------------------------------------------------------------------------------------------------


def children() -> set[int]:
    """Process ids of all children of the fork server."""
    server: object = multiprocessing.forkserver._forkserver
    pid = getattr(server, "_forkserver_pid", None)
    return set() if pid is None else set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def descriptors() -> int:
    gc.collect()  # what earlier tests left to be collected must not go in between
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


def test_nothing_is_left_of_a_mesh(inbox: Inbox) -> None:
    with LocalMesh(1, 1) as warm:
        warm.view()
    processes, open_before = children(), descriptors()
    shared_before, threads = shared_memory(), threading.active_count()
    with LocalMesh(2, 2) as mesh:
        mesh.view()
        assert len(children() - processes) == 8
        folder, ports = mesh._folder, [*mesh.addresses, mesh.coordinator_address]
        mesh.start(mesh_works.hold_the_interpreter, inbox.path)
        inbox.lines(4)
        mesh.pause_rank(2)
        started = time.monotonic()
    assert time.monotonic() - started < 4 * 2
    assert children() == processes
    eventually(lambda: descriptors() <= open_before, "descriptors are left")  # gRPC closes its own a moment later
    assert shared_memory() <= shared_before
    assert threading.active_count() <= threads
    assert folder is not None
    assert not folder.exists()
    for address in ports:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections may linger in TIME_WAIT
            again.bind(("127.0.0.1", int(address.rpartition(":")[2])))


OWNER = """
import os, sys, threading
from epmesh.testing import LocalMesh
from tests.integration import mesh_works
from tests.integration.mesh_works import Inbox
from pathlib import Path
if __name__ == "__main__":
    inbox = Inbox(Path(sys.argv[1]))
    mesh = LocalMesh(2, 1)
    mesh.__enter__()
    mesh.start(mesh_works.hold_the_interpreter, inbox.path)
    inbox.lines(2)
    mesh.pause_rank(1)
    pids = [c.pid for c in (*mesh._rank_children.values(), *mesh._node_children.values(), mesh._coordinator)]
    print(mesh._folder, *pids, flush=True)
    sys.stdin.read(1)
"""


@pytest.mark.parametrize("end", ["kill", "exit", "end of the process group"])
def test_nothing_is_left_when_the_owner_ends_without_closing(tmp_path: Path, end: str) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        process_group=0,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdin is not None
        folder, *pids = owner.stdout.readline().split()
        assert all(map(running, pids))
        if end == "exit":
            owner.stdin.write("x")
            owner.stdin.flush()
        elif end == "kill":
            owner.kill()
        else:
            os.killpg(owner.pid, signal.SIGTERM)
    eventually(lambda: not any(map(running, pids)), "processes are left")
    eventually(lambda: not Path(folder).exists(), "the folder is left")


def running(pid: str) -> bool:
    """Whether there is such a process, and it is not only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(holds: Callable[[], bool], otherwise: str, timeout_s: float = 20.0) -> None:
    """Waits until the kernel is done with what was killed."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def test_a_mesh_starts_in_two_seconds_once_warm() -> None:
    with LocalMesh(1, 1):
        pass
    started = time.monotonic()
    with LocalMesh(2, 2):
        took_s = time.monotonic() - started
    assert took_s < 4 * 2


def test_a_mesh_whose_coordinator_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    before = children()
    with pytest.raises(MeshUnavailable, match="coordinator"), LocalMesh(1, 1, timeout_s=0.0):
        pass
    assert children() == before
