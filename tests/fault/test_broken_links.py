"""Connections between nodes break: those that come back are not noticed, those that do not are a loss in time."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from epmesh.testing import LocalMesh
from tests.fault import link_works
from tests.fault.works import Seen
from tests.integration.mesh_works import Inbox

pytestmark = pytest.mark.fault

LOST_S, RESUMED_S, STRETCH = 2.0, 3.0, 4


@pytest.mark.parametrize("seed", [1, 2])
def test_exchanges_go_on_and_are_right_to_the_bit_while_connections_break(seed: int) -> None:
    with LocalMesh(2, 2, num_experts=8) as mesh:
        epoch = mesh.view().epoch
        mesh.run(link_works.put_proxies_before_links)
        results = mesh.run(link_works.exchange_while_links_break, 200, seed)
        assert [right for right, _, _ in results] == [200] * 4
        assert all(connections > 5 for _, connections, _ in results), results
        assert {epoch for _, _, epoch in results} == {epoch}


@pytest.mark.parametrize("mode", ["refused", "silent"])
def test_a_link_that_does_not_come_back_is_a_typed_loss_in_time(mode: str, tmp_path: Path) -> None:
    with LocalMesh(2, 2, num_experts=8) as mesh, contextlib.closing(Inbox(tmp_path)) as inbox:
        mesh.run(link_works.put_proxies_before_links)
        future = mesh.start(link_works.lose_a_link_for_good, inbox.path, 3, mode)
        inbox.lines(4)
        broken_at = time.monotonic()
        results: list[Seen] = future.result(60)
        for seen in results:
            assert seen.error in ("PeerLost", "StaleEpoch"), seen
            assert seen.at - broken_at < STRETCH * LOST_S
        (left_out,) = {1, 3} - set(results[0].view)  # rank 1 and rank 3 are each other's rail
        assert results[0].view == [rank for rank in range(4) if rank != left_out]
        assert [seen.view for rank, seen in enumerate(results) if rank != left_out] == [results[0].view] * 3
        assert results[left_out].view == []
        assert all(seen.ranks in ((left_out,), (1,), (3,)) for seen in results if seen.error == "PeerLost")
        assert all(seen.resumed_at - broken_at < STRETCH * RESUMED_S for seen in results if seen.view)
