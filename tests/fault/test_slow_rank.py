"""A rank that takes its time is named, by the ranks that wait for it and by `epmesh status`, wherever they are."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from epmesh import Communicator
from epmesh.channels import open_channel
from epmesh.testing import LocalMesh
from epmesh_server.cli.status import show
from epmesh_server.cli.waits import read_waits
from epmesh_server.ranks.communicator import JoinedCommunicator
from tests.processes import eventually

pytestmark = pytest.mark.fault

_NAP_S = 0.15  # far longer than an exchange of this size takes on a busy machine
EXPERTS = 8


def exchange_until(comm: Communicator, stop: Path, sleeper: int) -> dict[int, float]:
    """Exchanges until the file is there and all know; the experts of `sleeper` take their time. Whom it waited for."""
    assert isinstance(comm, JoinedCommunicator)
    hidden = torch.ones(8, 16)
    ids = torch.arange(8).unsqueeze(1)  # every rank gets rows of every other
    going = True
    while going:
        rows, weights, _ = comm.dispatch(hidden, torch.ones(8, 1), ids)
        if comm.global_rank == sleeper:
            time.sleep(_NAP_S)  # what is tested: experts that take their time
        comm.combine(rows * weights)
        going = bool(comm.all_reduce(torch.tensor([int(stop.exists())])).item() == 0)
    return dict(comm.waits.by_rank)


@pytest.mark.parametrize(("nodes", "ranks", "tls"), [(1, 4, False), (2, 2, False), (4, 1, False), (2, 2, True)])
def test_a_rank_with_slow_experts_is_the_one_that_all_others_wait_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nodes: int, ranks: int, tls: bool
) -> None:
    with LocalMesh(nodes, ranks, num_experts=EXPERTS, tls=tls) as mesh:
        sleeper = mesh.ranks[-1]
        done = mesh.start(exchange_until, tmp_path / "stop", sleeper)

        def named() -> bool:
            waits = read_waits(mesh.view(), partial(open_channel, tls=mesh.tls), 5.0)
            return (
                max(waits.shares, key=waits.shares.__getitem__, default=-1) == sleeper and waits.shares[sleeper] > 0.3
            )

        assert eventually(named)
        show(mesh.address, as_json=True, watch=False, tls=mesh.tls)
        most, *_ = json.loads(capsys.readouterr().out)["waits"]["waited_for"]
        assert most["rank"] == sleeper
        (tmp_path / "stop").touch()
        global_ranks, waited = mesh.ranks, done.result(60)
    for rank, by_rank in zip(global_ranks, waited, strict=True):
        if rank != sleeper:
            assert max(by_rank, key=by_rank.__getitem__) == sleeper, (rank, by_rank)
            assert by_rank[sleeper] > 0.5 * sum(by_rank.values()), (rank, by_rank)
