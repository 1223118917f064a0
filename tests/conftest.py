"""What every test shares: how properties are tried, and which tests this machine can run."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from tests.integration import security_matrix

# The same examples on every run, and no wall-clock limit for one: a busy machine must not fail a property.
# HYPOTHESIS_PROFILE=search looks for new counterexamples instead.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--soak-s 60`` runs the load tests for a minute each."""
    parser.addoption("--soak-s", type=float, default=6.0, help="seconds that load tests go on")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands that a test runs in this process configure logging, which later tests look at."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("", "asyncio", "grpc")}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def pytest_configure() -> None:
    """Hears Ctrl-C also where whoever started the tests has it ignored, as shells do for what runs in the background:
    processes that tests start inherit that, and some tests interrupt them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what was tried against secured meshes, and how each attempt was refused."""
    lines = security_matrix.table()
    if lines:
        terminalreporter.section("refused")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, what needs hardware or an engine that is not here."""
    for marker, missing in (("gpu", _no_gpu), ("compose", _no_container_engine)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = missing() if marked else ""
        if reason:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device here"


def _no_container_engine() -> str:
    return "" if shutil.which("docker") else "no docker command here"
