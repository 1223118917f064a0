"""`epmesh serve`, `coordinator` and `status` as a person runs them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import Iterator

import grpc
import pytest

from epmesh.errors import StaleEpoch
from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from tests.integration.commands import Shell, children, gone, open_shell
from tests.integration.raw_rank import RawRank
from tests.integration.waiting import PATIENCE_S, on_event_loop

STOP_BOUND_S = 4 * 2.0


@pytest.fixture
def shell() -> Iterator[Shell]:
    with open_shell() as made:
        yield made


async def describe(address: str) -> rank_service_pb2.DescribeNodeResponse:
    """What a node service says of itself."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rank_service_pb2_grpc.RankServiceStub(channel)
        return await stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=PATIENCE_S)


def test_two_nodes_serve_and_status_shows_them_everywhere(shell: Shell) -> None:
    shell.serve("--node-id", "left")
    shell.serve("--port", "7410", "--node-id", "right", "--coordinator", shell.coordinator)
    for address in (shell.address, f"{shell.host}:7410", shell.coordinator):
        status = shell.status_with(2, address)
        assert [(node["slot"], node["node_id"]) for node in status["nodes"]] == [(0, "left"), (1, "right")]
        assert [node["address"] for node in status["nodes"]] == [shell.address, f"{shell.host}:7410"]
    table = shell.run("status").output
    assert re.search(r"0 +left +127\.", table)
    assert "world" in table


def test_health_says_ready_by_its_exit_code(shell: Shell) -> None:
    shell.serve("--node-id", "left")
    for address in (shell.address, shell.coordinator):
        asked = shell.run("health", address)
        assert (asked.process.returncode, asked.output.strip()) == (0, "ready")
    for options in ((), ("--alive",)):
        nobody = shell.run("health", *options, f"{shell.host}:1")
        assert nobody.process.returncode == 1
        assert "MeshUnavailable" in nobody.output


def test_a_node_that_waits_for_its_coordinator_is_alive_and_not_ready(shell: Shell) -> None:
    shell.start("serve", "--coordinator", f"{shell.host}:1").line("coordinator is away")
    alive, ready = shell.run("health", "--alive"), shell.run("health")
    assert (alive.process.returncode, alive.output.strip()) == (0, "alive")
    assert (ready.process.returncode, "NotReady" in ready.output) == (1, True)


def test_a_node_that_stands_still_is_not_alive(shell: Shell) -> None:
    node = shell.serve()
    node.process.send_signal(signal.SIGSTOP)
    try:
        asked = shell.run("health", "--alive")
    finally:
        node.process.send_signal(signal.SIGCONT)
    assert asked.process.returncode == 1
    assert re.search("MeshUnavailable|DeadlineExceeded", asked.output)  # by how far gRPC came with it


@on_event_loop
async def test_status_shows_a_rank_with_its_device_and_experts() -> None:
    with open_shell() as shell:
        await asyncio.to_thread(shell.serve)
        rank = RawRank(await describe(shell.address))
        await rank.open(local_rank=3, experts={"num_experts": 4, "experts": [1, 2]})
        await rank.view_with(3)
        status = await asyncio.to_thread(shell.status)
        (shown,) = status["nodes"][0]["ranks"]
        assert (shown["rank"], shown["device"], shown["mode"]) == (3, "cpu", "exchange")
        assert shown["experts"] == [{"layer": None, "experts": [1, 2]}]
        table = (await asyncio.to_thread(shell.run, "status")).output
        assert "no living rank holds experts 0, 3" in table
        await rank.hang_up()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_and_leaves_nothing(shell: Shell, number: signal.Signals) -> None:
    node = shell.serve()
    pids = children(node.process.pid)
    assert len(pids) == 1
    assert node.stop(number) < STOP_BOUND_S
    assert all(map(gone, pids))
    assert [path.name for path in shell.directory.iterdir()] == ["state"]
    assert "Traceback" not in node.output
    with socket.create_server((shell.host, 7400)), socket.create_server((shell.host, 7401)):
        pass  # both ports are free


@pytest.mark.fault
def test_a_killed_node_service_takes_its_coordinator_along(shell: Shell) -> None:
    node = shell.serve()
    (pid,) = children(node.process.pid)
    node.process.kill()
    assert gone(pid)


@pytest.mark.fault
def test_a_killed_coordinator_is_started_again_and_knows_everybody(shell: Shell) -> None:
    node = shell.serve()
    before = shell.status_with(1)
    (pid,) = children(node.process.pid)
    os.kill(pid, signal.SIGKILL)
    node.line("registered at", count=2)
    after = shell.status(shell.coordinator)
    assert after["mesh_id"] == before["mesh_id"]
    assert after["epoch"] >= before["epoch"]
    assert [node["slot"] for node in after["nodes"]] == [0]
    assert shell.status()["epoch"] >= before["epoch"]


def test_a_restarted_node_takes_its_old_slot(shell: Shell) -> None:
    shell.start("coordinator").line("started")
    first = shell.serve("--node-id", "a", "--coordinator", shell.coordinator)
    second = shell.serve("--node-id", "b", "--coordinator", shell.coordinator, "--port", "7410")
    shell.status_with(2)
    second.stop()
    shell.status_with(1)
    shell.serve("--node-id", "b", "--coordinator", shell.coordinator, "--port", "7410")
    assert [(node["slot"], node["node_id"]) for node in shell.status_with(2)["nodes"]] == [(0, "a"), (1, "b")]
    assert first.stop() < STOP_BOUND_S


def test_a_node_may_be_started_before_its_coordinator(shell: Shell) -> None:
    node = shell.start("serve", "--coordinator", shell.coordinator)
    node.line("coordinator is away")
    assert shell.status()["epoch"] == 0
    table = shell.run("status").output
    assert "no view yet" in table
    assert f"the coordinator at {shell.coordinator} is out of reach" in table
    shell.start("coordinator")
    node.line("registered at")


def test_a_port_in_use_is_one_line_and_exit_code_1(shell: Shell) -> None:
    shell.serve()
    second = shell.run("serve", "--coordinator", shell.coordinator)
    assert second.process.returncode == 1
    last = second.output.splitlines()[-1]
    assert last.startswith(f"epmesh: InvalidRequest: cannot listen at {shell.address}: it is in use")
    assert "Traceback" not in second.output


def test_a_coordinator_that_cannot_start_ends_the_node_with_its_reason(shell: Shell) -> None:
    with socket.create_server((shell.host, 7401)):
        node = shell.run("serve")
    assert node.process.returncode == 1
    assert f"{shell.host}:7401" in node.output
    assert "did not start; its reason stands above" in node.output
    assert "Traceback" not in node.output
    assert not [path for path in shell.directory.iterdir() if path.name != "state"]


def test_two_live_nodes_with_one_id_are_refused(shell: Shell) -> None:
    shell.serve("--node-id", "same")
    second = shell.run("serve", "--node-id", "same", "--port", "7410", "--coordinator", shell.coordinator)
    assert second.process.returncode == 1
    assert "InvalidRequest" in second.output.splitlines()[-1]
    assert "same" in second.output.splitlines()[-1]
    assert "Traceback" not in second.output


def test_status_of_nothing_is_one_line_and_exit_code_1(shell: Shell) -> None:
    started = time.monotonic()
    status = shell.run("status")
    assert time.monotonic() - started < STOP_BOUND_S
    assert status.process.returncode == 1
    (line,) = status.output.splitlines()
    assert line.startswith(f"epmesh: MeshUnavailable: nobody answers at {shell.address}")


def test_watching_shows_every_new_view_until_interrupted(shell: Shell) -> None:
    shell.serve("--node-id", "a")
    shell.status_with(1)
    watch = shell.start("status", "--json", "--watch")
    watch.line('"node_id": "a"')
    shell.serve("--node-id", "b", "--port", "7410", "--coordinator", shell.coordinator)
    watch.line('"node_id": "b"')
    assert watch.stop(signal.SIGINT) < STOP_BOUND_S
    assert "Traceback" not in watch.output


@pytest.mark.fault
@pytest.mark.slow
@on_event_loop
async def test_a_node_service_that_was_stopped_comes_back_without_its_old_ranks() -> None:
    with open_shell() as shell:
        await asyncio.to_thread(shell.serve, "--node-id", "a", "--min-nodes", "1")
        arguments = ("--node-id", "b", "--port", "7410", "--coordinator", shell.coordinator)
        node = await asyncio.to_thread(shell.serve, *arguments)
        old, new = RawRank(await describe(f"{shell.host}:7410")), RawRank(await describe(f"{shell.host}:7410"))
        await old.open(incarnation=1)
        await old.view_with(8)
        page = await old.page()
        node.process.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(shell.status_with, 1)
        node.process.send_signal(signal.SIGCONT)
        with pytest.raises(StaleEpoch, match="join again"):
            await old.view(1 << 60)
        assert page.closed
        await new.open(incarnation=2)
        await new.view_with(8)
        await old.hang_up()
        await new.hang_up()
