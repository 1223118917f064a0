"""More than a mesh can do, and clients that take more than their part, read nothing, or say nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from epmesh import DeadlineExceeded, Overloaded, Router
from epmesh.testing import LocalMesh
from tests.integration import serve_works
from tests.integration.serve_works import some_rows, wait_serving

EXPERTS = 4
BATCH_S, BATCH_ROWS, ROWS = 0.05, 16, 4


@pytest.fixture
def slow_mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    """Two ranks of one node; each call of the experts takes its time."""
    stop = tmp_path / "stop"
    with LocalMesh(1, 2, num_experts=EXPERTS) as mesh:
        done = mesh.start(serve_works.serve, stop, BATCH_S, BATCH_ROWS)
        wait_serving(mesh.view, [0, 1])
        yield mesh
        stop.touch()
        done.result(30)


class Greedy:
    """Threads that ask again as soon as they are answered, or refused, until closed."""

    def __init__(self, router: Router, threads: int) -> None:
        self.refused = self.done = 0
        self._router = router
        self._over = threading.Event()
        self.under_way = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        given = some_rows(ROWS, EXPERTS, 2, seed=1)
        while not self._over.is_set():
            try:
                self._router.forward(*given, layer=None, timeout=1.0)
                self.done += 1
            except (Overloaded, DeadlineExceeded) as exc:
                self.refused += 1
                self.under_way.set()
                self._over.wait(getattr(exc, "retry_after_s", 0.0) / 4)  # less than it was asked to


def test_a_router_that_asks_for_far_too_much_does_not_take_another_s_part(slow_mesh: LocalMesh) -> None:
    given = some_rows(ROWS, EXPERTS, 2, seed=1)
    with Router(slow_mesh.addresses) as modest, Router(slow_mesh.addresses) as other:
        modest.forward(*given, layer=None, timeout=5)
        greedy = Greedy(other, threads=120)
        try:
            assert greedy.under_way.wait(20)
            for _ in range(30):  # none is refused, and none comes as late as the greedy one's own
                modest.forward(*given, layer=None, timeout=1.0)
        finally:
            greedy.close()
    assert greedy.done > 30  # nor is the greedy one cut off
