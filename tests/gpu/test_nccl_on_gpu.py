"""Device groups over NCCL: what returns without waiting, what memory it takes, and what a death or a busy device does.

On one GPU: each rank's process passes for a host of its own, so NCCL lets them share the GPU, and moves bytes by
sockets. The contract suite runs on such ranks too: ``pytest tests/integration -k join-cuda-nccl``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from epmesh import PeerLost
from epmesh.testing import LocalMesh
from tests.gpu import nccl_works as works
from tests.integration.implementations import claim_own_host
from tests.integration.mesh_works import Inbox

_log = logging.getLogger(__name__)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

LOST_S, RESUMED_S, STRETCH = 0.5, 1.5, 4


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    with contextlib.closing(Inbox(tmp_path)) as inbox:
        yield inbox


@contextlib.contextmanager
def mesh(ranks: int, exchange_timeout_s: float = 60.0) -> Iterator[LocalMesh]:
    with LocalMesh(1, ranks, device="cuda:0", exchange_timeout_s=exchange_timeout_s, timeout_s=60.0) as made:
        made.run(claim_own_host)
        assert made.run(works.kind_of_group) == ["ProcessGroupNCCL"] * ranks
        yield made


def test_ranks_that_share_a_gpu_have_no_nccl_group() -> None:
    with LocalMesh(1, 2, device="cuda:0", timeout_s=60.0) as two:
        assert two.run(works.kind_of_group) == ["ProcessGroupGloo"] * 2
        assert two.run(works.total) == [3.0, 3.0]


def test_collectives_return_before_the_device_is_done_and_use_the_callers_stream() -> None:
    with mesh(2) as two:
        for rank, (running, idle, sums) in enumerate(two.run(works.is_left_running)):
            assert running == [True] * 4
            assert idle
            assert sums == [96.0, 96.0, 96.0 if rank == 0 else 0.0, 64.0]


def test_a_thousand_collectives_take_no_more_memory() -> None:
    with mesh(2) as two:
        for wrong, early, late in two.run(works.repeat, 500):
            assert wrong == 0
            assert late - early < 32 << 20


def test_a_collective_in_a_capture_is_refused_on_all_ranks() -> None:
    with mesh(2) as two:
        for error, total in two.run(works.capture):
            assert error.startswith("InvalidRequest: all_reduce on rank 0: a CUDA graph is being captured")
            assert total == 3.0


def test_a_device_that_does_not_come_in_time_voids_the_collective_on_all_ranks() -> None:
    with mesh(2, exchange_timeout_s=3.0) as two:
        results = two.run(works.meet_busy_device, 1, 4, 5)
        _log.info("busy device: %s", results)
        for errors, total in results:
            assert errors[0].startswith("DeadlineExceeded: ")
            assert "its result is void" in errors[0]
            assert errors[-1] == ""
            assert total == 3.0
        assert results[0][0][0] == results[1][0][0]


@pytest.mark.fault
@pytest.mark.parametrize("plan", ["host", "device", "calls"])
def test_survivors_get_peer_lost_and_go_on_when_a_rank_is_killed_in_a_collective(inbox: Inbox, plan: str) -> None:
    with mesh(3) as three:
        future = three.start(works.meet_death, inbox.path, plan, 1)
        inbox.lines(3)
        struck_at = time.monotonic()
        three.kill_rank(1)
        results = future.result(60)
    assert isinstance(results[1], PeerLost)
    for seen in (results[0], results[2]):
        error_s, resumed_s = seen.at - struck_at, seen.resumed_at - struck_at
        _log.info("%s: error %.3f s, next collective %.3f s: %s", plan, error_s, resumed_s, seen.text)
        assert (seen.error, seen.ranks) == ("PeerLost", (1,)), seen
        assert seen.view == [0, 2]
        assert seen.sums == [4.0]
        assert error_s < STRETCH * LOST_S
        assert resumed_s < STRETCH * RESUMED_S
