"""The commands as a person runs them: real processes, on a loopback address of their own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.integration.waiting import PATIENCE_S

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

    def line(self, pattern: str, count: int = 1, *, within_s: float = PATIENCE_S) -> str:
        """Waits for the `count`th line that matches."""

        def found() -> list[str]:
            return [line for line in self.lines if re.search(pattern, line)]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= count, within_s), "".join(self.lines)
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


def descendants(pid: int) -> list[int]:
    """Living children, their children, and so on."""
    found = children(pid)
    return found + [further for child in found for further in descendants(child)]
