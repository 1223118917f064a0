"""Containers that die, stand still, lose their network, are replaced, join and leave: no router request fails.

Every expert is on both nodes, so a router has somewhere to go whatever happens to one of them.
"""

from __future__ import annotations

from tests.compose.stack import Stack, Traffic, generate, wait_until


def test_the_text_is_that_of_one_process(whole: Stack, text: str) -> None:
    assert generate(whole.url()) == text


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
    image = f"epmesh-router:{whole.environment.get('EPMESH_TAG', 'latest')}"
    with Traffic(whole.url()) as traffic:
        traffic.wait_more()
        whole.docker("network", "disconnect", whole.network, whole.container("node-1"))
        whole.wait_ranks({"node-0": 2})
        traffic.wait_more()
        whole.docker(
            *("run", "--detach", "--rm", "--name", placeholder, "--network", whole.network, "--entrypoint", "sleep"),
            *(image, "300"),  # it takes the address that is free now
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
