"""`epmesh serve --ranks N`: hosted ranks are kept alive in their slots, and end with the service."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import epmesh
from epmesh.view import RankInfo, RankMode, View
from tests.integration import serve_works
from tests.integration.commands import Command, Shell, descendants, gone, open_shell
from tests.integration.serve_works import PlainRouter
from tests.integration.waiting import PATIENCE_S

EXPERTS = "tests.integration.hosted_experts"
STOP_BOUND_S = 4 * 2.0
START_WITHIN_S = 120.0  # torch is imported first


@pytest.fixture
def shell() -> Iterator[Shell]:
    with open_shell() as made:
        yield made


def serve(shell: Shell, *arguments: str, ranks: int = 2) -> Command:
    """A node service whose hosted ranks are in the mesh."""
    service = shell.start("serve", "--ranks", str(ranks), *arguments)
    service.line("hosted by process", count=ranks, within_s=START_WITHIN_S)
    return service


def processes(service: Command) -> dict[int, int]:
    """Global rank -> process id, the newest."""
    hosted = re.findall(r" rank (\d+), epoch \d+: hosted by process (\d+)", service.output)
    return {int(rank): int(pid) for rank, pid in hosted}


def ranks_when(shell: Shell, ready: Callable[[dict[int, RankInfo]], bool]) -> dict[int, tuple[int, ...]]:
    """The ranks of the first view in which they are as they should be, and the experts of each."""
    with epmesh.connect(shell.address) as mesh:
        view = mesh.wait_view(lambda view: ready(view.ranks), timeout_s=PATIENCE_S)
    placement = view.placement(None)
    return {rank: placement.experts_of.get(rank, ()) if placement else () for rank in view.ranks}


def both(ranks: dict[int, RankInfo]) -> bool:
    return list(ranks) == [0, 1]


def exchanging(ranks: dict[int, RankInfo]) -> bool:
    return both(ranks) and {info.mode for info in ranks.values()} == {RankMode.EXCHANGE}


def test_hosted_ranks_join_and_their_lines_are_marked(shell: Shell) -> None:
    service = serve(shell, "--experts", f"{EXPERTS}:plus_id", "--num-experts", "5")
    first, second = shell.status()["nodes"][0]["ranks"]
    assert [(rank["rank"], rank["mode"], rank["device"]) for rank in (first, second)] == [
        (0, "serve", "cpu"),
        (1, "serve", "cpu"),
    ]
    assert first["experts"] == [{"layer": None, "experts": [0, 1, 2]}]
    assert service.line(r"local rank 1 \| INFO .*join.complete")
    assert re.fullmatch(r"[-0-9]+ [0-9:.]+ local rank 0 \| INFO .*\n", service.line(r"local rank 0 \|"))


def test_a_node_is_ready_with_the_ranks_that_answer_routers(shell: Shell) -> None:
    serve(shell, "--experts", f"{EXPERTS}:plus_id", "--num-experts", "4")
    ranks_when(shell, lambda ranks: both(ranks) and all(info.front_endpoint for info in ranks.values()))
    enough, more = (shell.run("health", "--ranks", number) for number in ("2", "3"))
    assert (enough.process.returncode, enough.output.strip()) == (0, "ready")
    assert (more.process.returncode, "2 of 3 ranks" in more.output) == (1, True)


def test_without_experts_they_exchange_and_hold_what_they_are_told(shell: Shell) -> None:
    serve(shell, "--num-experts", "4", "--hold", "0-2;1,3")
    assert ranks_when(shell, exchanging) == {0: (0, 1, 2), 1: (1, 3)}


def test_they_wait_for_those_of_other_nodes(shell: Shell) -> None:
    options = ("--ranks", "1", "--world-size", "2", "--num-experts", "4")
    first = shell.start("serve", *options)
    first.line("joins at", within_s=START_WITHIN_S)
    second = shell.start("serve", "--port", "7410", "--node-id", "b", "--coordinator", shell.coordinator, *options)
    for service in (first, second):
        service.line("hosted by process", within_s=START_WITHIN_S)
    assert ranks_when(shell, lambda ranks: len(ranks) == 2) == {0: (0, 1), 8: (2, 3)}


def test_one_that_serves_and_holds_nothing_says_so_and_how_to_share(shell: Shell) -> None:
    options = ("--ranks", "1", "--num-experts", "4", "--experts", f"{EXPERTS}:plus_id")
    first = shell.start("serve", *options)
    first.line("hosted by process", within_s=START_WITHIN_S)
    second = shell.start("serve", "--port", "7410", "--node-id", "b", "--coordinator", shell.coordinator, *options)
    said = second.line("holds none of the 4 experts", within_s=START_WITHIN_S)
    assert "--world-size" in said
    assert "--hold" in said
    assert "holds none" not in first.output


@pytest.mark.fault
def test_one_that_was_in_the_mesh_waits_for_nobody_when_it_comes_back(shell: Shell) -> None:
    options = ("--ranks", "1", "--world-size", "2", "--num-experts", "4")
    first = shell.start("serve", *options)
    first.line("joins at", within_s=START_WITHIN_S)
    second = shell.start("serve", "--port", "7410", "--node-id", "b", "--coordinator", shell.coordinator, *options)
    first.line("hosted by process", within_s=START_WITHIN_S)
    second.process.kill()
    ranks_when(shell, lambda ranks: list(ranks) == [0])
    os.kill(processes(first)[0], signal.SIGKILL)
    first.line("hosted by process", count=2, within_s=START_WITHIN_S)
    with epmesh.connect(shell.address) as mesh:
        view = mesh.wait_view(lambda view: list(view.ranks) == [0], timeout_s=PATIENCE_S)
        assert view.placements[None].experts_of == {0: (0, 1), 8: (2, 3)}


@pytest.mark.fault
def test_a_killed_rank_comes_back_into_its_slot(shell: Shell) -> None:
    service = serve(shell, "--experts", f"{EXPERTS}:plus_id", "--num-experts", "4")
    before = processes(service)
    os.kill(before[1], signal.SIGKILL)
    service.line(r"WARNING .* hosted local rank 1 .* ended with SIGKILL; again in 0\.05 s")
    service.line("hosted by process", count=3, within_s=START_WITHIN_S)
    after = processes(service)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert ranks_when(shell, both) == {0: (0, 1), 1: (2, 3)}


@pytest.mark.fault
def test_a_killed_fork_server_is_replaced_with_all_that_came_from_it(shell: Shell) -> None:
    service = serve(shell, "--num-experts", "4")
    before = processes(service)
    (fork_server,) = {parent_of(pid) for pid in before.values()}
    os.kill(fork_server, signal.SIGKILL)
    assert all(map(gone, before.values()))
    service.line("hosted by process", count=4, within_s=START_WITHIN_S)
    assert set(processes(service).values()).isdisjoint(before.values())
    assert ranks_when(shell, both) == {0: (0, 1), 1: (2, 3)}
    pids = descendants(service.process.pid)
    assert service.stop() < STOP_BOUND_S
    assert all(map(gone, pids))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.fault
def test_ranks_are_there_again_with_their_experts_when_the_mesh_begins_anew(shell: Shell) -> None:
    coordinator = shell.start("coordinator")
    coordinator.line("coordinator.started")
    service = serve(shell, "--num-experts", "5", "--coordinator", shell.coordinator)
    before = processes(service)
    coordinator.stop()
    shell.start("coordinator", "--data-dir", str(shell.directory / "state" / "another")).line("coordinator.started")
    service.line("hosted by process", count=4, within_s=START_WITHIN_S)
    assert processes(service) == before
    assert ranks_when(shell, both) == {0: (0, 1, 2), 1: (3, 4)}


@pytest.mark.fault
def test_a_rank_that_ends_again_and_again_is_started_ever_less_often(shell: Shell) -> None:
    service = shell.start("serve", "--ranks", "2", "--experts", f"{EXPERTS}:ends_the_process", "--num-experts", "4")
    for wait in (r"0\.05", r"0\.10", r"0\.20"):
        service.line(rf"hosted local rank 1 .* ended with code 3; again in {wait} s", within_s=START_WITHIN_S)
    assert service.stop() < STOP_BOUND_S


@pytest.mark.fault
@pytest.mark.slow
def test_a_rank_that_was_stopped_for_too_long_joins_again_in_the_same_process(shell: Shell) -> None:
    service = serve(shell, "--num-experts", "4")
    pid = processes(service)[1]
    os.kill(pid, signal.SIGSTOP)
    ranks_when(shell, lambda ranks: list(ranks) == [0])
    os.kill(pid, signal.SIGCONT)
    service.line(r"rank 1 \| WARNING .*out of the mesh, joins again")
    service.line("hosted by process", count=3, within_s=START_WITHIN_S)
    assert processes(service)[1] == pid
    ranks_when(shell, both)


def test_drivers_use_them_and_one_that_dies_costs_a_membership_and_no_process(shell: Shell) -> None:
    service = serve(shell, "--num-experts", "4")
    before = processes(service)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: doubled(shell.address, rank), (0, 1))) == [6.0, 6.0]
    code = f"import epmesh, os; epmesh.attach({shell.address!r}, rank=1, world_size=2); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
    service.line(r"rank 1 \| WARNING .*out of the mesh, joins again .*its driver, .* is gone")
    service.line("hosted by process", count=3, within_s=START_WITHIN_S)
    assert processes(service) == before
    assert ranks_when(shell, both) == {0: (0, 1), 1: (2, 3)}
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: doubled(shell.address, rank), (0, 1))) == [6.0, 6.0]


def doubled(address: str, rank: int) -> float:
    """The sum over two ranks of 3."""
    with epmesh.attach(address, rank=rank, world_size=2, timeout_s=PATIENCE_S) as comm:
        return float(comm.all_reduce(torch.tensor([3.0])))


@pytest.mark.parametrize(
    ("experts", "reason"),
    [
        (f"{EXPERTS}:without_weights", r"the factory raised FileNotFoundError: weights\.safetensors is not there"),
        (f"{EXPERTS}:nothing", r"the factory returned None; return a function experts\(layer, "),
        (f"{EXPERTS}:NOT_CALLABLE", r"it is 7, not a function that takes the communicator"),
        ("tests.no_such_module:f", r"importing tests\.no_such_module failed with ModuleNotFoundError"),
    ],
)
def test_experts_that_cannot_be_made_end_the_service_with_the_reason_on_one_line(
    shell: Shell, experts: str, reason: str
) -> None:
    service = shell.run("serve", "--ranks", "2", "--experts", experts, "--num-experts", "4")
    assert service.process.returncode == 1
    assert re.match(rf"epmesh: InvalidRequest: experts .*{reason}", service.output.splitlines()[-1]), service.output
    assert [path.name for path in shell.directory.iterdir()] == ["state"]


def test_more_ranks_than_a_node_may_have_end_the_service_with_the_reason(shell: Shell) -> None:
    service = shell.run("serve", "--ranks", "2", "--stride", "1")
    assert service.process.returncode == 1
    last = service.output.splitlines()[-1]
    assert re.match(r"epmesh: InvalidRequest: --ranks is 2, .* at most 1 ranks; .* --stride 2 ", last), service.output


def test_what_was_taken_in_is_answered_before_the_service_ends(shell: Shell) -> None:
    service = serve(shell, "--experts", f"{EXPERTS}:slow", "--num-experts", "4")
    router = PlainRouter(serve_works.wait_serving(lambda: view_of(shell), [0, 1]))
    hidden = torch.randn(3, 8)
    calls = router.start(hidden, torch.ones(3, 2), torch.tensor([[0, 1], [2, 3], [1, 2]]))
    service.line("computing", count=2)
    service.process.send_signal(signal.SIGTERM)
    sums = serve_works.total(hidden, calls)
    torch.testing.assert_close(sums, 2 * hidden + torch.tensor([[1.0], [5.0], [3.0]]))
    assert service.ended() == 0
    router.close()


def test_a_second_signal_does_not_wait_for_answers(shell: Shell) -> None:
    service = serve(shell, "--experts", f"{EXPERTS}:stuck", "--num-experts", "4", "--drain", "60")
    router = PlainRouter(serve_works.wait_serving(lambda: view_of(shell), [0, 1]))
    (call,) = router.start(torch.randn(1, 8), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    service.line("computing")
    pids = descendants(service.process.pid)
    service.process.send_signal(signal.SIGINT)
    service.line("drain for 60 s at most")
    assert service.stop(signal.SIGINT) < STOP_BOUND_S
    assert all(map(gone, pids))
    call.reply.cancel()
    router.close()


def view_of(shell: Shell) -> View:
    with epmesh.connect(shell.address) as mesh:
        return mesh.wait_view(lambda view: True, timeout_s=PATIENCE_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_ranks_first_and_leaves_nothing(shell: Shell, number: signal.Signals) -> None:
    service = serve(shell, "--num-experts", "4")
    pids = descendants(service.process.pid)
    assert set(processes(service).values()) < set(pids)
    assert service.stop(number) < STOP_BOUND_S
    assert all(map(gone, pids))
    assert "Traceback" not in service.output
    assert len(re.findall("session.closed", service.output)) == 2  # they left in good order
    assert [path.name for path in shell.directory.iterdir()] == ["state"]


def test_a_signal_to_every_process_of_the_terminal_does_the_same(shell: Shell) -> None:
    service = serve(shell, "--num-experts", "4")
    pids = descendants(service.process.pid)
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in pids:
            os.kill(pid, number)
    assert service.stop(signal.SIGINT) < STOP_BOUND_S
    assert all(map(gone, pids))
    assert "SIGKILL" not in service.output


def test_a_signal_before_the_ranks_are_there_ends_everything(shell: Shell) -> None:
    service = shell.start("serve", "--ranks", "2", "--num-experts", "4")
    service.line("node service listens")
    pids = descendants(service.process.pid)
    assert service.stop() < STOP_BOUND_S
    assert all(map(gone, pids))


def test_ranks_that_wait_for_others_end_at_once(shell: Shell) -> None:
    service = shell.start("serve", "--ranks", "1", "--world-size", "2", "--drain", "60")
    service.line("session.opened", within_s=START_WITHIN_S)
    pids = descendants(service.process.pid)
    assert service.stop() < STOP_BOUND_S
    assert all(map(gone, pids))


@pytest.mark.fault
def test_a_killed_service_takes_its_ranks_along_stopped_ones_too(shell: Shell) -> None:
    service = serve(shell, "--num-experts", "4")
    pids = descendants(service.process.pid)
    os.kill(processes(service)[0], signal.SIGSTOP)
    service.process.kill()
    assert all(map(gone, pids))
