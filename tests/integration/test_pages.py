"""The programs and by-hand commands on the pages do what the pages say."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.integration.hosted_mesh import HostedMesh

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
EPMESH = (sys.executable, "-m", "epmesh_server.cli")


@contextmanager
def service(*arguments: str | Path) -> Iterator[str]:
    """A service on a free port; gives its address, and ends it as Ctrl-C does."""
    command = [*EPMESH, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield listening_address(process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            finally:
                process.kill()
    assert process.returncode == 0


def listening_address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"(?:listens|started) at ([\d.]+:\d+)", line):
            return found[1]
    raise AssertionError(f"{process.args!r} ended with {process.wait()}: {''.join(lines)}")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Addresses of two nodes that know one coordinator."""
    with ExitStack() as stack:
        coordinator = stack.enter_context(service("coordinator", "--port", "0", "--data-dir", tmp_path / "log"))
        beside = ("serve", "--port", "0", "--coordinator", coordinator)
        yield stack.enter_context(service(*beside)), stack.enter_context(service(*beside))


def test_the_ten_lines_run_in_two_processes(nodes: tuple[str, str], tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert "127.0.0.1:7400" in block
    program = tmp_path / "two.py"
    for together in (nodes, (nodes[0], nodes[0])):  # on two nodes, then on one
        ranks = []
        for index, address in enumerate(together):
            program.write_text(block.replace("127.0.0.1:7400", address))
            ranks.append(
                subprocess.Popen([sys.executable, "-c", program.read_text(), str(index)], stdout=-1, stderr=-1)
            )
        outputs = [rank.communicate(timeout=200) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], outputs
        assert all(b"of 2: " in out and b"ok=True" in out for out, _ in outputs), outputs


def test_status_shows_both_nodes(nodes: tuple[str, str]) -> None:
    deadline = time.monotonic() + 20
    shown: dict[str, list[dict[str, str]]] = {}
    while len(shown.get("nodes", ())) < 2 and time.monotonic() < deadline:
        done = subprocess.run([*EPMESH, "status", nodes[0], "--json"], capture_output=True, timeout=30, check=True)
        shown = json.loads(done.stdout)
    assert {node["address"] for node in shown["nodes"]} == set(nodes)


ENGINE = (ROOT / "docs" / "attach-from-an-engine.md").read_text()


def programs(page: str, word: str) -> str:
    """The one program on a page that has `word`."""
    block: str
    (block,) = [code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if word in code]
    return block


def test_the_driver_on_the_page_of_engines_drives_hosted_ranks(tmp_path: Path) -> None:
    program = programs(ENGINE, "comm.transport")
    with ExitStack() as stack:
        coordinator = stack.enter_context(service("coordinator", "--port", "0", "--data-dir", tmp_path / "log"))
        address = stack.enter_context(service("serve", "--ranks", "2", "--port", "0", "--coordinator", coordinator))
        command = [sys.executable, "-c", program.replace("127.0.0.1:7400", address)]
        drivers = [subprocess.Popen([*command, str(rank)], stdout=-1, stderr=-1) for rank in range(2)]
        outputs = [driver.communicate(timeout=200) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert all(b"of 2 by shm: ok=True" in out for out, _ in outputs), outputs


def test_the_test_kit_program_of_engines_prints_what_its_comment_says(tmp_path: Path) -> None:
    block = programs(ENGINE, "LocalMesh")
    (expected,) = re.findall(r"print\(.*# (.*)", block)
    program = tmp_path / "total.py"
    program.write_text(block)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_the_bare_stub_on_the_wire_page_sums(tmp_path: Path) -> None:
    program = programs((ROOT / "docs" / "wire.md").read_text(), "CommunicatorServiceStub")
    with HostedMesh(1, 1) as mesh:
        mesh.attach(0).destroy()  # it is there
        program = program.replace("127.0.0.1:7400", mesh.addresses[0]).replace("rank=3", "rank=0")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[1. 1.]"), done.stderr


def test_the_test_kit_program_prints_what_its_comment_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    (block,) = [code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "LocalMesh" in code]
    (expected,) = re.findall(r"print\(.*# (.*)", block)
    program = tmp_path / "total.py"
    program.write_text(block)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
