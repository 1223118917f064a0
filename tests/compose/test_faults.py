"""Containers that die, stand still, lose their network, are replaced, join and leave: no router request fails.

Every expert is on both nodes, so a router has somewhere to go whatever happens to one of them.
"""

from __future__ import annotations

import json
import re
import sys

import pytest

from tests.compose.stack import COMPOSE_FILE, MESH, Stack, Traffic, generate, wait_until

PROMETHEUS = COMPOSE_FILE.with_name("prometheus.yml")
TARGETS = re.findall(r'"([a-z0-9-]+:\d+)"', PROMETHEUS.read_text())


def test_the_text_is_that_of_one_process(stack: Stack, text: str) -> None:
    assert generate(stack.url()) == text


@pytest.mark.parametrize("target", [target for target in TARGETS if target.split(":")[0] in MESH])
def test_every_target_of_prometheus_has_figures(stack: Stack, target: str) -> None:
    fetch = f"import urllib.request as r; print(r.urlopen('http://{target}/metrics', timeout=5).read().decode())"
    figures = stack.docker("exec", stack.container("router"), "python3", "-c", fetch)
    assert re.search(r"^(epmesh|router)_\w+(\{.*\})? [0-9.e+]+$", figures, re.MULTILINE)


def test_no_service_sees_the_key_of_another(stack: Stack) -> None:
    for service in MESH:
        mounts = json.loads(stack.docker("inspect", stack.container(service)))[0]["Mounts"]
        names = [mount["Name"].removeprefix(f"{stack.project}_") for mount in mounts if mount["Destination"] == "/tls"]
        assert names == [f"{service}-tls"]
        assert "authority" not in str(mounts)


def test_containers_run_as_nobody_special(stack: Stack) -> None:
    for service in MESH:
        shown = json.loads(stack.docker("inspect", stack.container(service)))[0]
        assert shown["HostConfig"]["ReadonlyRootfs"]
        assert stack.docker("exec", stack.container(service), "id", "-u").strip() == "10001"


@pytest.mark.parametrize("service", ["node-0", "coordinator"])
def test_the_doctor_finds_nothing_wrong_with_a_service(stack: Stack, service: str) -> None:
    small_machine = {"memory-used", "buffers-beyond-memory", "cpu-quota"}

    def well() -> bool:
        found = stack.doctor("exec", stack.container(service), "epmesh", "doctor", "--json")
        sys.stdout.write(f"{service}: {found}\n")  # shown where the test fails
        return set(found) <= small_machine

    # On a starved machine a service may answer late, and the doctor says so: once, not for good.
    wait_until(well, f"the doctor finds nothing wrong with {service}")


def test_the_doctor_names_what_is_wrong_with_a_container_and_what_mends_it(stack: Stack) -> None:
    limits = ("--memory", "256m", "--pids-limit", "40", "--read-only", "--tmpfs", "/tmp", "--network", stack.network)
    settings = {
        "RANKS": 2,
        "INSECURE": 1,
        "DEVICE": "cuda",
        "COORDINATOR": "coordinater:7401",
        "ADVERTISE": "127.0.0.1",
    }
    given = (part for name, value in settings.items() for part in ("--env", f"EPMESH_{name}={value}"))
    found = stack.doctor("run", "--rm", *limits, *given, stack.image("node"), "doctor", "--json")
    mends = {
        "name-unknown": "service name",
        "advertised-loopback": "leave --advertise (EPMESH_ADVERTISE) out",
        "memory-limit": "`mem_limit:`",
        "pids-limit": "`pids_limit:`",
        "shm-small": "`shm_size: 2gb`",
        "locked-memory": "`ulimits: {memlock: -1}`",
        "read-only": "`tmpfs: [/tmp, /run/epmesh]`",
        "gpu-missing": "--device cpu",
    }
    assert {cause: mend for cause, mend in mends.items() if mend not in found.get(cause, "")} == {}


def test_a_killed_node_costs_no_request_and_comes_back(whole: Stack, text: str) -> None:
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        whole.docker("kill", whole.container("node-1"))
        whole.wait_ranks({"node-0": 2})
        traffic.wait_more()
        whole.docker("start", whole.container("node-1"))
        whole.wait_ranks({"node-0": 2, "node-1": 2})
        traffic.wait_more()
    traffic.check(text)


def test_a_node_that_stands_still_is_done_without(whole: Stack, text: str) -> None:
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        whole.docker("pause", whole.container("node-1"))
        try:
            whole.wait_ranks({"node-0": 2})
            traffic.wait_more()
        finally:
            whole.docker("unpause", whole.container("node-1"))
        whole.wait_ranks({"node-0": 2, "node-1": 2})
        traffic.wait_more()
    traffic.check(text)


def test_a_node_comes_back_with_another_address_after_its_network_was_cut(whole: Stack, text: str) -> None:
    before = whole.address("node-1")
    placeholder = f"{whole.project}-placeholder"
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        whole.docker("network", "disconnect", whole.network, whole.container("node-1"))
        whole.wait_ranks({"node-0": 2})
        traffic.wait_more()
        whole.docker(
            *("run", "--detach", "--rm", "--name", placeholder, "--network", whole.network, "--entrypoint", "sleep"),
            *(whole.image("router"), "300"),  # it takes the address that is free now
        )
        try:
            whole.docker("network", "connect", "--alias", "node-1", whole.network, whole.container("node-1"))
            whole.wait_ranks({"node-0": 2, "node-1": 2})
            traffic.wait_more()
        finally:
            whole.docker("rm", "--force", placeholder)
    traffic.check(text)
    assert whole.address("node-1") not in ("", before)
    advertised = {node["node_id"]: node["address"] for node in whole.view()["nodes"]}
    assert advertised["node-1"] == f"{whole.address('node-1')}:7400"


def test_a_node_is_replaced_by_a_new_container_in_its_slot(whole: Stack, text: str) -> None:
    old, slots = whole.container("node-1"), _slots(whole)
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        whole.compose("rm", "--stop", "--force", "node-1")
        whole.wait_ranks({"node-0": 2})
        whole.compose("up", "--detach", "--no-deps", "node-1")
        whole.wait_ranks({"node-0": 2, "node-1": 2})
        traffic.wait_more()
    traffic.check(text)
    assert whole.container("node-1") != old
    assert _slots(whole) == slots


def test_a_coordinator_that_restarts_disturbs_nobody(whole: Stack, text: str) -> None:
    epoch = whole.view()["epoch"]
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        whole.docker("kill", whole.container("coordinator"))
        traffic.wait_more()
        whole.docker("start", whole.container("coordinator"))
        traffic.wait_more()
        whole.docker("kill", whole.container("node-1"))  # it decides again
        whole.wait_ranks({"node-0": 2})
        whole.docker("start", whole.container("node-1"))
        whole.wait_ranks({"node-0": 2, "node-1": 2})
    traffic.check(text)
    assert whole.view()["epoch"] > epoch


def test_a_third_node_joins_and_leaves(whole: Stack, text: str) -> None:
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        whole.compose("--profile", "more", "up", "--detach", "--no-deps", "node-2")
        whole.wait_ranks({"node-0": 2, "node-1": 2, "node-2": 2})
        traffic.wait_more()
        whole.compose("--profile", "more", "rm", "--stop", "--force", "node-2")
        whole.wait_ranks({"node-0": 2, "node-1": 2})
        traffic.wait_more()
    traffic.check(text)


def test_a_rolling_restart_costs_no_request(whole: Stack, text: str) -> None:
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        for service, other in (("node-1", "node-0"), ("node-0", "node-1")):
            whole.compose("restart", service)
            wait_until(lambda: whole.ranks(other).get(service) == 2, f"{service} is back")  # noqa: B023
            traffic.wait_more()
    traffic.check(text)


def _slots(stack: Stack) -> dict[str, int]:
    return {node["node_id"]: node["slot"] for node in stack.view()["nodes"]}
