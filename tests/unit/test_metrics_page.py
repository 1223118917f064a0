"""docs/observe.md has every metric of node services and coordinators, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.core import Metric

from epmesh import Overloaded
from epmesh_server.coordinator.metrics import CommitCounters, CoordinatorCollector
from epmesh_server.membership import Membership, MeshCreated
from epmesh_server.membership.nodes import NodeStatus
from epmesh_server.node.call_budget import CallBudget
from epmesh_server.node.drivers import Drivers
from epmesh_server.node.metrics import BUCKETS_S, NodeCollector
from epmesh_server.node.rank_stats import StatsBook
from epmesh_server.node.ranks import RankTable
from epmesh_server.node.registration import Enrolment
from epmesh_server.node.views import ViewBoard
from epmesh_server.ranks import open_exchange
from tests.unit.fake_mesh import SETTINGS, fold

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "observe.md").read_text()


def names(metrics: Iterable[Metric]) -> set[str]:
    return {metric.name + ("_total" if metric.type == "counter" else "") for metric in metrics}


def section(title: str) -> set[str]:
    text = PAGE.split(f"### {title}\n")[1].split("\n### ")[0]
    return set(re.findall(r"`(epmesh_\w+)`", text))


def test_the_page_has_the_metrics_of_a_node_service() -> None:
    table, board = RankTable(), ViewBoard()
    drivers = Drivers(table, board, Enrolment(), lambda *_: None, 4096)
    budget = CallBudget(8)
    with budget.holding(5), pytest.raises(Overloaded), budget.holding(4):
        raise AssertionError("it does not fit")
    collector = NodeCollector(
        table, board, StatsBook(), drivers, {"router": budget}, coordinator_reachable=lambda: True
    )
    metrics = list(collector.collect())
    assert names(metrics) == section("Node service")
    (refused,) = [metric for metric in metrics if metric.name == "epmesh_node_overloaded"]
    assert [(sample.labels, sample.value) for sample in refused.samples] == [({"caller": "router"}, 1)]


def test_the_page_has_the_metrics_of_a_coordinator() -> None:
    machine = Membership(SETTINGS, fold([MeshCreated("mesh", SETTINGS.stride)]), 0.0)
    collector = CoordinatorCollector(machine, CommitCounters(machine.view), lambda: 0, lambda: 0.0)
    metrics = list(collector.collect())
    assert names(metrics) == section("Coordinator")
    (nodes,) = [metric for metric in metrics if metric.name == "epmesh_coordinator_nodes"]
    assert {sample.labels["status"] for sample in nodes.samples} == {status.name.lower() for status in NodeStatus}


def test_the_page_asks_for_no_metric_that_is_not_there() -> None:
    known = section("Node service") | section("Coordinator")
    assert set(re.findall(r"\bepmesh_\w+", PAGE)) <= known


def test_ranks_and_node_services_have_the_same_buckets() -> None:
    assert open_exchange.BUCKETS_S == BUCKETS_S
