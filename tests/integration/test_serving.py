"""Ranks that serve, asked over their fronts by a plain router."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from epmesh import DeadlineExceeded, InvalidRequest, StaleEpoch
from epmesh.testing import LocalMesh
from epmesh.v1 import front_pb2
from epmesh_server.ranks.tensors import from_bytes
from tests.integration import serve_works
from tests.integration.serve_works import HIDDEN, PlainRouter, reference, serving, some_rows, wait_serving

EXPERTS = 8


@dataclass
class Served:
    """A mesh whose ranks all serve."""

    mesh: LocalMesh
    router: PlainRouter


@pytest.fixture(scope="module", params=[(1, 1), (1, 4), (2, 2)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    nodes, ranks_per_node = request.param
    stop = tmp_path_factory.mktemp("serve") / "stop"
    with LocalMesh(nodes, ranks_per_node, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve, stop)
        view = wait_serving(mesh.view, list(range(nodes * ranks_per_node)))
        with closing(PlainRouter(view)) as router:
            yield Served(mesh, router)
        stop.touch()
        done.result(30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 7, 300])
def test_sums_are_those_of_a_plain_reference(served: Served, num_rows: int, dtype: torch.dtype) -> None:
    hidden, weights, ids = some_rows(num_rows, EXPERTS, 3, num_rows, dtype)
    got = served.router.forward(hidden, weights, ids, layer=2)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 0.06
    torch.testing.assert_close(got.double(), reference(2, hidden, weights, ids), rtol=tolerance, atol=tolerance)


def test_many_routers_at_once_get_their_own_sums(served: Served) -> None:
    ranks = serving(served.router.view)

    def ask(seed: int) -> int:
        chance = random.Random(seed)
        with closing(PlainRouter(served.router.view)) as router:
            for step in range(15):
                dtype, layer = chance.choice([torch.float32, torch.float64]), chance.choice([None, 0, 3])
                rows = some_rows(chance.choice([1, 5, 64, 700]), EXPERTS, chance.choice([1, 4]), step, dtype)
                got = router.forward(*rows, layer=layer, entry=chance.choice(ranks))
                torch.testing.assert_close(got.double(), reference(layer, *rows), rtol=1e-5, atol=1e-5)
        return 15

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(ask, range(6))) == 90


def test_rows_of_which_none_is_for_this_node_come_back_as_zeros(served: Served) -> None:
    view = served.router.view
    request = front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(epoch=view.epoch, ranks=[0]))
    tensors = [torch.ones(2, HIDDEN), torch.ones(2, 1), torch.tensor([[-1], [0]]), torch.tensor([[0], [127]]).byte()]
    reply = served.router.call(0, request, tensors).result(20)
    assert from_bytes(reply.tensors[0], torch.float32, (2, HIDDEN)).tolist() == [[0.0] * HIDDEN] * 2


def test_rows_by_another_placement_are_stale_and_rows_that_are_wrong_are_refused(served: Served) -> None:
    view = served.router.view
    placement = view.placement(None)
    assert placement is not None
    hidden, weights = torch.ones(1, HIDDEN), torch.ones(1, 1)
    if len(view.ranks) > 1:
        elsewhere = placement.experts_of[1][0]
        with pytest.raises(StaleEpoch) as stale:
            served.router.start(hidden, weights, torch.tensor([[elsewhere]]), targets=torch.tensor([[0]]))[
                0
            ].reply.result(20)
        assert stale.value.epoch == view.epoch
    with pytest.raises(InvalidRequest, match=f"topk_ids has {EXPERTS}"):
        served.router.start(hidden, weights, torch.tensor([[EXPERTS]]), targets=torch.tensor([[0]]))[0].reply.result(20)
    driver_call = front_pb2.FrontRequest(driver_call=front_pb2.DriverCall())
    with pytest.raises(InvalidRequest, match="serves routers"):
        served.router.call(0, driver_call, []).result(20)


def test_a_request_of_a_later_epoch_waits_a_moment_for_the_view_and_then_goes_by_what_is_known(served: Served) -> None:
    view = served.router.view
    placement = view.placement(None)
    assert placement is not None
    request = front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(epoch=view.epoch + 1, ranks=[0]))
    ids = torch.tensor([[placement.experts_of[0][0]]])
    tensors = [torch.ones(1, HIDDEN), torch.ones(1, 1), ids, torch.tensor([[0]]).byte()]
    reply = served.router.call(0, request, tensors).result(20)
    expected = reference(None, *tensors[:3]).float()
    assert torch.equal(from_bytes(reply.tensors[0], torch.float32, (1, HIDDEN)), expected)


@pytest.mark.parametrize("place", [{"result_offset": 1 << 50}, {"result_bytes": 1 << 63}])
def test_a_share_whose_results_have_no_place_is_refused_and_the_rank_goes_on(
    served: Served, place: dict[str, int]
) -> None:
    view = served.router.view
    if len(view.ranks) == 1:
        pytest.skip("there is no neighbour to send shares")
    share = front_pb2.ServeShare(membership_epoch=view.membership_epoch, source=1, result_bytes=4096)
    for field, value in place.items():
        setattr(share, field, value)
    request = front_pb2.FrontRequest(serve_share=share, places=[-1, -1, -1])
    placement = view.placement(None)
    assert placement is not None
    tensors = [torch.ones(1, HIDDEN), torch.ones(1, 1), torch.tensor([[placement.experts_of[0][0]]])]
    with pytest.raises(InvalidRequest, match="of a section of"):
        served.router.call(0, request, tensors).result(20)
    rows = some_rows(5, EXPERTS, 2, 5)
    torch.testing.assert_close(served.router.forward(*rows).double(), reference(None, *rows), rtol=1e-5, atol=1e-5)


def test_shares_without_room_in_shared_memory_travel_as_frames(tmp_path: Path) -> None:
    with LocalMesh(1, 2, num_experts=EXPERTS, buffer_bytes=4096) as mesh:
        done = mesh.start(serve_works.serve, tmp_path / "stop")
        with closing(PlainRouter(wait_serving(mesh.view, [0, 1]))) as router:
            for num_rows in (4, 2000, 4):
                rows = some_rows(num_rows, EXPERTS, 3, num_rows, torch.bfloat16)
                got = router.forward(*rows)
                torch.testing.assert_close(got.double(), reference(None, *rows), rtol=0.06, atol=0.06)
        (tmp_path / "stop").touch()
        done.result(30)


def test_shares_in_memory_that_a_neighbour_cannot_map_any_more_are_sent_again_as_frames(tmp_path: Path) -> None:
    with LocalMesh(1, 2, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve_unmapped, tmp_path / "stop", 1)
        with closing(PlainRouter(wait_serving(mesh.view, [0, 1]))) as router:
            rows = some_rows(50, EXPERTS, 3, 1)
            for entry in (0, 1):
                got = router.forward(*rows, entry=entry)
                torch.testing.assert_close(got.double(), reference(None, *rows), rtol=1e-5, atol=1e-5)
        (tmp_path / "stop").touch()
        assert [stats.failures for stats in done.result(30)] == [0, 1]  # the first try counts at the neighbour


def test_memory_of_shares_that_were_given_up_comes_back_once_the_neighbour_is_done(tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    with LocalMesh(1, 2, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve_held_and_count, tmp_path, 1)
        with closing(PlainRouter(wait_serving(mesh.view, [0, 1]))) as router:
            rows = some_rows(50, EXPERTS, 3, 1)
            given_up = [call for _ in range(6) for call in router.start(*rows, timeout_s=0.5, entry=0)]
            for call in given_up[:3]:
                call.reply.cancel()  # one is being computed, others wait
            for call in given_up[3:]:
                with pytest.raises(DeadlineExceeded):
                    call.reply.result(20)
            (tmp_path / "hold").unlink()
            got = router.forward(*rows, entry=0)  # its shares come after those in every queue
            torch.testing.assert_close(got.double(), reference(None, *rows), rtol=1e-5, atol=1e-5)
        (tmp_path / "stop").touch()
        assert done.result(30) == [0, 0]
