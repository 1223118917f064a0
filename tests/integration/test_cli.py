"""The commands as a person runs them: real processes, on a loopback address of their own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from epmesh.errors import StaleEpoch
from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from tests.integration.raw_rank import RawRank
from tests.integration.waiting import PATIENCE_S, on_event_loop

STOP_BOUND_S = 4 * 2.0
_numbers = itertools.count(1)


class Command:
    """One running `epmesh` command and the lines it wrote."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "epmesh_server.cli", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def line(self, pattern: str, count: int = 1) -> str:
        """Waits for the `count`th line that matches."""

        def found() -> list[str]:
            return [line for line in self.lines if re.search(pattern, line)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, PATIENCE_S), "".join(self.lines)
            return found()[count - 1]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Sends a signal; returns how long the end took, in seconds."""
        started = time.monotonic()
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE_S) == 0, self.output
        return time.monotonic() - started

    def ended(self) -> int:
        """Waits for the end; returns the exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        return code

    @property
    def output(self) -> str:
        """Everything it wrote so far."""
        return "".join(self.lines)

    def close(self) -> None:
        """Kills it if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


class Shell:
    """Runs commands with state and sockets in one temporary directory, and default ports on one loopback address."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        number = next(_numbers)
        self.host = f"127.{1 + os.getpid() // 256 % 254}.{os.getpid() % 256}.{number}"
        self.address, self.coordinator = f"{self.host}:7400", f"{self.host}:7401"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("EPMESH_")},
            "XDG_STATE_HOME": str(directory / "state"),
            "TMPDIR": str(directory),
            "EPMESH_HOST": self.host,
            "EPMESH_COORDINATOR_HOST": self.host,
            "EPMESH_ADDRESS": self.address,
            "COLUMNS": "200",
        }
        self._commands: list[Command] = []

    def start(self, *arguments: str) -> Command:
        """Starts a command."""
        self._commands.append(Command(list(arguments), self._environment))
        return self._commands[-1]

    def serve(self, *arguments: str) -> Command:
        """Starts a node service; returns it once it is registered."""
        command = self.start("serve", *arguments)
        command.line("registered at")
        return command

    def run(self, *arguments: str) -> Command:
        """Runs a command to its end."""
        command = self.start(*arguments)
        command.ended()
        return command

    def status(self, *arguments: str) -> dict[str, Any]:
        """What `epmesh status --json` says."""
        document: dict[str, Any] = json.loads(self.run("status", "--json", *arguments).output)
        return document

    def status_with(self, num_nodes: int, *arguments: str) -> dict[str, Any]:
        """The same, once there are so many nodes."""
        deadline = time.monotonic() + PATIENCE_S
        while len((status := self.status(*arguments))["nodes"]) != num_nodes:
            assert time.monotonic() < deadline, status
        return status

    def close(self) -> None:
        """Kills what still runs."""
        for command in self._commands:
            command.close()


@contextlib.contextmanager
def open_shell() -> Iterator[Shell]:
    directory = Path(tempfile.mkdtemp(prefix="cli-"))  # pytest's own would be too long for unix sockets
    shell = Shell(directory)
    try:
        yield shell
    finally:
        shell.close()
        shutil.rmtree(directory)


@pytest.fixture
def shell() -> Iterator[Shell]:
    with open_shell() as made:
        yield made


async def describe(address: str) -> rank_service_pb2.DescribeNodeResponse:
    """What a node service says of itself."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rank_service_pb2_grpc.RankServiceStub(channel)
        return await stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=PATIENCE_S)


def children(pid: int) -> list[int]:
    """Living child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """Whether a process ended, within patience."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                continue
        return True
    return False


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
