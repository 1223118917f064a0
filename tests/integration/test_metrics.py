"""``/metrics`` of node services and coordinators, as Prometheus asks for it."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import epmesh
from tests.integration.commands import Shell, open_shell
from tests.processes import eventually

NUM_EXCHANGES = 30
_NODE_PORT, _COORDINATOR_PORT = 7402, 7403


def get(host: str, port: int, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def metrics(host: str, port: int) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    status, text = get(host, port)
    assert status == 200
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(found: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), float("nan"))


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    """A node with two hosted ranks and a coordinator beside it."""
    with open_shell() as shell:
        ports = ("--metrics-port", str(_NODE_PORT), "--coordinator-metrics-port", str(_COORDINATOR_PORT))
        shell.start("serve", "--ranks", "2", "--num-experts", "4", *ports).line("metrics at")
        with epmesh.connect(shell.address, timeout_s=30) as mesh:
            mesh.wait_view(lambda view: view.has_group("ep") and len(view.group("ep").ranks) == 2, 30)
        yield shell


def exchange(shell: Shell, rank: int, together: threading.Barrier) -> None:
    """Drives a rank; rank 0's driver looks how many there are while both are."""
    with epmesh.attach(shell.address, rank=rank) as comm:
        rows, ids = np.ones((6, 8), np.float32), np.array([[0], [1], [2], [3], [0], [2]])
        for _ in range(NUM_EXCHANGES):
            received, weights, _ = comm.dispatch(rows, np.ones((6, 1), np.float32), ids)
            comm.combine(received * weights)
        together.wait(30)
        if rank == 0:
            assert value(metrics(shell.host, _NODE_PORT), "epmesh_node_drivers") == 2
        together.wait(30)


def test_a_nodes_metrics_count_what_its_ranks_exchanged(shell: Shell) -> None:
    together = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(exchange, shell, rank, together) for rank in range(2)]:
            done.result(60)

    def counted() -> bool:
        seconds = "epmesh_exchange_seconds_count"
        found = metrics(shell.host, _NODE_PORT)
        return all(value(found, seconds, rank=rank, group="ep", phase="combine") == NUM_EXCHANGES for rank in "01")

    assert eventually(counted)
    found = metrics(shell.host, _NODE_PORT)
    for rank, peer in ("01", "10"):
        ep = {"rank": rank, "group": "ep"}
        # Of six rows, three are for experts 0 and 1, which rank 0 holds, and three for rank 1.
        assert value(found, "epmesh_rows_total", **ep, scope="inside", direction="sent") == 3 * NUM_EXCHANGES
        assert value(found, "epmesh_rows_total", **ep, scope="inside", direction="received") == 3 * NUM_EXCHANGES
        assert value(found, "epmesh_rows_total", **ep, scope="between", direction="sent") == 0
        assert value(found, "epmesh_sent_bytes_total", **ep, scope="inside") == 3 * NUM_EXCHANGES * (8 * 4 + 4 + 8)
        buckets = [each for (name, _), each in found.items() if name == "epmesh_exchange_seconds_bucket"]
        assert len(buckets) == 2 * 2 * 16
        assert value(found, "epmesh_exchange_seconds_sum", **ep, phase="dispatch") > 0
        assert value(found, "epmesh_wait_seconds_total", **ep, peer=peer) > 0
        assert value(found, "epmesh_exchange_sequence", **ep, state="completed") >= NUM_EXCHANGES
        assert value(found, "epmesh_frames_refused_total", rank=rank) == 0
        assert value(found, "epmesh_rank_report_age_seconds", rank=rank) >= 0
    assert value(found, "epmesh_coordinator_reachable") == 1
    assert value(found, "epmesh_node_ranks") == 2


def test_a_coordinators_metrics_count_commits_and_those_who_are_out(shell: Shell) -> None:
    before = metrics(shell.host, _COORDINATOR_PORT)
    second = shell.serve("--port", "7410", "--node-id", "second", "--coordinator", shell.coordinator)
    assert eventually(lambda: value(metrics(shell.host, _COORDINATOR_PORT), "epmesh_view_nodes") == 2)
    found = metrics(shell.host, _COORDINATOR_PORT)
    assert 0 <= value(found, "epmesh_coordinator_heartbeat_age_seconds", node="second", slot="1") < 3
    assert value(found, "epmesh_epoch") > value(before, "epmesh_epoch")
    assert value(found, "epmesh_coordinator_commit_seconds_count") == value(found, "epmesh_coordinator_commits_total")
    assert value(found, "epmesh_coordinator_log_bytes") > value(before, "epmesh_coordinator_log_bytes") > 0
    assert value(found, "epmesh_coordinator_nodes", status="live") == 2
    second.process.kill()
    assert eventually(lambda: value(metrics(shell.host, _COORDINATOR_PORT), "epmesh_view_nodes") == 1)
    after = metrics(shell.host, _COORDINATOR_PORT)
    assert value(after, "epmesh_coordinator_evictions_total", cause="stream") == 1
    assert value(after, "epmesh_coordinator_nodes", status="dead") == 1


def test_what_is_no_scrape_is_told_so(shell: Shell) -> None:
    assert get(shell.host, _NODE_PORT, "/")[0] == 404
    assert get(shell.host, _NODE_PORT, method="POST")[0] == 405
    assert get(shell.host, _NODE_PORT, method="HEAD") == (200, "")
    assert get(shell.host, _NODE_PORT, "/metrics?name=x")[0] == 200
    for garbage, answer in ((b"\x16\x03\x01\r\n\r\n", b"HTTP/1.1 400"), (b"a" * 100_000, b"")):
        with socket.create_connection((shell.host, _NODE_PORT), timeout=20) as stranger:
            stranger.sendall(garbage)
            with contextlib.suppress(ConnectionResetError):
                assert re.match(answer, stranger.recv(100))
    assert get(shell.host, _NODE_PORT)[0] == 200


def test_many_who_say_nothing_keep_nobody_from_scraping_for_long(shell: Shell) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection((shell.host, _NODE_PORT), timeout=20))

        def scraped() -> bool:
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                return get(shell.host, _NODE_PORT)[0] == 200
            return False

        assert eventually(scraped)


def test_a_metrics_port_that_is_taken_is_named() -> None:
    with open_shell() as shell, socket.create_server((shell.host, _NODE_PORT)):
        command = shell.start("serve", "--metrics-port", str(_NODE_PORT))
        assert command.ended() == 1
        assert f"cannot listen for metrics at {shell.host}:{_NODE_PORT}" in command.output
