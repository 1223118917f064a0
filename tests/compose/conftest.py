"""A mesh in containers for all tests of this folder, and the text it has to write."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from examples import moe_lm
from tests.compose.stack import MESH, NUM_TOKENS, PROMPT, Stack, ready, wait_until


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--orders 20`` starts the mesh in twenty random orders."""
    parser.addoption("--orders", type=int, default=3, help="random orders to start the containers in")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.compose)
        item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what the containers of its stack wrote."""
    report = yield
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.failed and isinstance(stack, Stack):
        report.sections.append(("containers", stack.logs()))
    return report


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "order" in metafunc.fixturenames:
        metafunc.parametrize("order", range(metafunc.config.getoption("--orders")))


@pytest.fixture(scope="session")
def text() -> str:
    """What one process with the whole model writes."""
    tokenizer = moe_lm.load_tokenizer()
    prompts = moe_lm.encode_prompts(tokenizer, [PROMPT])
    generation = moe_lm.generate(moe_lm.load(), prompts, end=tokenizer.end, num_steps=NUM_TOKENS, temperature=0.0)
    return generation.texts(tokenizer)[0]


def new_stack(name: str, *options: str) -> Stack:
    """A project of its own, on a free port; `options` of docker-compose."""
    return Stack(f"epmesh-{name}-{os.getpid()}", {**os.environ, "ROUTER_PORT": "0"}, options)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A mesh that is ready; tests leave it as they found it."""
    with new_stack("faults") as stack:
        stack.compose("up", "--detach", "certs", *MESH)
        stack.wait_ranks({"node-0": 2, "node-1": 2})
        wait_until(lambda: ready(stack.url()), "the router service is ready")
        yield stack


@pytest.fixture
def whole(stack: Stack) -> Iterator[Stack]:
    """The mesh before and after a fault: both nodes with both ranks."""
    stack.wait_ranks({"node-0": 2, "node-1": 2})
    yield stack
    stack.wait_ranks({"node-0": 2, "node-1": 2})
