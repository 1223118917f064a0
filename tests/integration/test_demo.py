"""The demo as a user sees it: it passes, it fails where it must, and it leaves nothing."""

from __future__ import annotations

import codecs
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from epmesh_server.cli.demo import DemoPlan, run_demo
from epmesh_server.cli.demo.rank_work import RankReport
from tests.integration import demo_works

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "epmesh_server.cli", "demo"]
END_S = 2.0  # after Ctrl-C


class Traces:
    """An environment whose processes and files can be found again."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, "DEMO_MARK": self.mark, "TMPDIR": folder, "TERM": "xterm", "COLUMNS": "100"}

    def processes(self) -> list[int]:
        """Processes that carry the mark and are more than a zombie."""
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._carries_mark(path)]

    def _carries_mark(self, path: Path) -> bool:
        try:
            return self.mark.encode() in path.read_bytes()
        except OSError:
            return False

    def check_that_nothing_is_left(self) -> None:
        """Waits until the kernel is done with what was ended."""
        deadline = time.monotonic() + 4 * END_S
        while self.processes():
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.01)
        assert list(self.folder.iterdir()) == []


@pytest.fixture
def traces() -> Iterator[Traces]:
    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as folder:  # a short name: unix sockets go in there
        yield Traces(folder)


@pytest.mark.slow
def test_the_demo_passes_and_leaves_nothing(traces: Traces) -> None:
    done = subprocess.run(
        COMMAND,
        cwd=ROOT,
        env={**traces.environment, "PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    lines = done.stdout.splitlines()
    assert lines[-1] == "demo: PASS"
    progress = [line for line in lines if re.match(r" *\d+/512 tokens +\d+ tokens/s", line)]
    assert len([line for line in progress if "rank " in line]) > 1
    assert len([line for line in progress if "router " in line]) > 1
    assert len([line for line in lines if "8 of 8 the same" in line]) == 2
    for words in (
        "act 1",
        "act 2",
        "largest difference ",
        "tolerance ",
        "floor ",
        "In the beginning God created the heaven",
    ):
        assert words in done.stdout
    traces.check_that_nothing_is_left()


class Terminal:
    """The demo on a terminal of its own."""

    def __init__(self, traces: Traces) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(COMMAND[0], COMMAND, traces.environment)
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end in the middle of a character

    def read_until(self, words: str, timeout_s: float) -> None:
        """Reads on until `words` came; the end of the output is "" (which always comes)."""
        deadline = time.monotonic() + timeout_s
        while not words or words not in self.text:
            assert select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0], self.text
            try:
                self.text += self._decoder.decode(os.read(self._fd, 65536))
            except OSError:  # how a pty says that nobody is there any more
                assert not words, self.text
                return

    def type(self, keys: bytes) -> None:
        """As if on the keyboard."""
        os.write(self._fd, keys)

    def wait(self) -> int:
        """The exit code."""
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def end_by_keyboard(terminal: Terminal) -> None:
    terminal.type(b"\x03")


def end_by_sigterm(terminal: Terminal) -> None:
    os.kill(terminal.pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("moment", "end"),
    [
        ("starting", end_by_keyboard),
        ("tokens/s", end_by_keyboard),
        ("tokens/s", end_by_sigterm),
        ("serving ranks", end_by_keyboard),
        ("router 1 ", end_by_keyboard),
    ],
    ids=["at-the-start", "in-act-1", "in-act-1-by-sigterm", "between-the-acts", "in-act-2"],
)
def test_the_demo_ends_at_once_and_leaves_nothing(traces: Traces, moment: str, end: Callable[[Terminal], None]) -> None:
    terminal = Terminal(traces)
    terminal.read_until(moment, 100.0)
    started = time.monotonic()
    end(terminal)
    terminal.read_until("", 4 * END_S)
    assert time.monotonic() - started < 4 * END_S
    assert terminal.wait() == 1, terminal.text
    assert "demo: FAIL" in terminal.text.splitlines()[-1]
    assert "interrupted" in terminal.text
    assert "Traceback" not in terminal.text
    traces.check_that_nothing_is_left()


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (demo_works.refuse, "InvalidRequest: rank 2 does not like it"),
        (demo_works.die, "PeerLost: "),
        (demo_works.miscalculate, "a logit differs by"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_demo_fails_where_it_must(work: Callable[..., RankReport], words: str) -> None:
    out = io.StringIO()
    assert run_demo(DemoPlan(num_steps=6, exchange_timeout_s=5.0), work=work, console=Console(file=out, width=120)) == 1
    assert words in out.getvalue()
    assert out.getvalue().splitlines()[-1] == "demo: FAIL"


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (demo_works.wrong_experts, "a logit differs by"),
        (demo_works.failing_experts, "ArithmeticError: no result today"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_demo_fails_where_served_experts_do(experts: Callable[..., object], words: str) -> None:
    out = io.StringIO()
    factory = f"{experts.__module__}:{experts.__name__}"
    plan = DemoPlan(num_steps=3, exchange_timeout_s=5.0, served_experts=factory)
    assert run_demo(plan, console=Console(file=out, width=120)) == 1
    assert words in out.getvalue()
    assert out.getvalue().splitlines()[-1] == "demo: FAIL"
