"""The log in etcd: a coordinator whose container is gone for good is followed by the other one, under requests."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.compose.conftest import new_stack
from tests.compose.stack import ETCD_FILE, Stack, Traffic, generate, ready, wait_until

COORDINATORS = ("coordinator", "standby")
WITHOUT_ETCD = os.environ.get("EPMESH_WITHOUT_ETCD", "")
pytestmark = pytest.mark.skipif(bool(WITHOUT_ETCD), reason=WITHOUT_ETCD)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with new_stack("etcd", "--env-file", str(ETCD_FILE)) as stack:
        stack.compose("up", "--detach", "--no-build")
        stack.wait_ranks({"node-0": 2, "node-1": 2})
        wait_until(lambda: ready(stack.url()), "the router service is ready")
        yield stack


def leads(stack: Stack, service: str) -> bool:
    """Whether a coordinator answers; one that stands by has no open port."""
    command = ("docker", "exec", stack.container(service), "epmesh", "health", "127.0.0.1:7401")
    return subprocess.run(command, env=stack.environment, capture_output=True, timeout=60, check=False).returncode == 0


def test_nobody_but_coordinators_is_on_the_network_of_etcd(stack: Stack) -> None:
    network = json.loads(stack.docker("network", "inspect", f"{stack.project}_store"))[0]
    assert set(network["Containers"]) == {stack.container(service) for service in (*COORDINATORS, "etcd")}


def test_a_coordinator_that_is_gone_for_good_is_followed_by_the_other(stack: Stack, text: str) -> None:
    assert generate(stack.url()) == text
    # A busy machine may make them change places.
    leader = wait_until(lambda: next((one for one in COORDINATORS if leads(stack, one)), ""), "one of them leads")
    (other,) = set(COORDINATORS) - {leader}
    before = stack.view()
    with Traffic(stack.url()) as traffic:
        traffic.wait_more()
        stack.docker("rm", "--force", stack.container(leader))
        wait_until(lambda: leads(stack, other), f"{other} leads")
        traffic.wait_more()
        stack.compose("--profile", "more", "up", "--detach", "--no-build", "--no-deps", "node-2")
        stack.wait_ranks({"node-0": 2, "node-1": 2, "node-2": 2})
        traffic.wait_more()
    traffic.check(text)
    after = stack.view()
    assert after["mesh_id"] == before["mesh_id"]
    assert after["epoch"] > before["epoch"]
