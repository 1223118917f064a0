"""Fifty routers at once, ragged sizes, deadlines that are too short, tasks that are cancelled: and nothing piles up."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest
import torch

from epmesh import AsyncRouter, DeadlineExceeded, Router
from epmesh.testing import LocalMesh
from tests.integration import serve_works
from tests.integration.serve_works import reference, some_rows, wait_serving
from tests.processes import eventually, open_descriptors, resident_bytes

EXPERTS = 8
REPLICATED = [range(8), range(4), range(4, 8), range(8)]
ROUTERS, CALLERS_EACH = 25, 1  # of each kind
MAX_GROWTH_BYTES = 48 << 20


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    with LocalMesh(2, 2, num_experts=EXPERTS, experts=REPLICATED) as mesh:
        done = mesh.start(serve_works.serve, tmp_path / "stop")
        wait_serving(mesh.view, [0, 1, 2, 3])
        yield mesh
        (tmp_path / "stop").touch()
        done.result(30)


class Load:
    """Callers of all kinds until `over`; what they did is counted."""

    def __init__(self, over: threading.Event) -> None:
        self._over = over
        self._lock = threading.Lock()  # guards what follows
        self.right = self.given_up = 0

    def call(self, router: Router, seed: int) -> None:
        """One thread's calls; now and then with a deadline that is too short."""
        dice = random.Random(seed)
        while not self._over.is_set():
            given = some_rows(dice.choice((0, 1, 2, 7, 33, 129)), EXPERTS, 3, dice.randrange(1 << 30))
            try:
                out = router.forward(*given, layer=1, timeout=dice.uniform(0.001, 0.01) if dice.random() < 0.1 else 20)
            except DeadlineExceeded:
                self._count(given_up=1)
            else:
                self._check(out, given)

    async def acall(self, router: AsyncRouter, seed: int) -> None:
        """One task's calls; now and then one is cancelled."""
        dice = random.Random(seed)
        while not self._over.is_set():
            given = some_rows(dice.choice((0, 1, 2, 7, 33, 129)), EXPERTS, 3, dice.randrange(1 << 30))
            call = asyncio.create_task(router.forward(*given, layer=1, timeout=20))
            if dice.random() < 0.1:
                await asyncio.sleep(dice.uniform(0, 0.01))  # a moment to be cancelled at, not one to wait for
                call.cancel()
            try:
                self._check(await call, given)
            except asyncio.CancelledError:
                self._count(given_up=1)

    def _check(self, out: torch.Tensor, given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        torch.testing.assert_close(out.double(), reference(1, *given), rtol=1e-5, atol=1e-5)
        self._count(right=1)

    def _count(self, right: int = 0, given_up: int = 0) -> None:
        with self._lock:
            self.right += right
            self.given_up += given_up


def run_tasks(mesh: LocalMesh, load: Load) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            routers = [await stack.enter_async_context(AsyncRouter(mesh.addresses)) for _ in range(ROUTERS)]
            await asyncio.gather(*(load.acall(routers[seed % ROUTERS], seed) for seed in range(ROUTERS * CALLERS_EACH)))

    asyncio.run(main())


def start_load(mesh: LocalMesh, load: Load, pool: ThreadPoolExecutor, stack: ExitStack) -> list[Future[None]]:
    routers = [stack.enter_context(Router(mesh.addresses)) for _ in range(ROUTERS)]
    threads = [pool.submit(load.call, routers[i % ROUTERS], 1000 + i) for i in range(ROUTERS * CALLERS_EACH)]
    return [*threads, pool.submit(run_tasks, mesh, load)]


def under_load(mesh: LocalMesh, seconds: float, look: Callable[[], None]) -> Load:
    """Runs callers for so long; looks once in the middle and once at the end, while they run."""
    over = threading.Event()
    load = Load(over)
    with ExitStack() as stack, ThreadPoolExecutor(ROUTERS * CALLERS_EACH + 1) as pool:
        running = start_load(mesh, load, pool, stack)
        try:
            for _ in range(2):
                until = time.monotonic() + seconds / 2
                while time.monotonic() < until and not any(one.done() for one in running):
                    over.wait(0.05)
                look()
        finally:
            over.set()
        for one in running:
            one.result(30)
    return load


@pytest.mark.slow
@pytest.mark.timeout(0)  # its own deadlines bound it, however long the soak
def test_fifty_routers_get_right_answers_and_nothing_piles_up(mesh: LocalMesh, pytestconfig: pytest.Config) -> None:
    seconds = pytestconfig.getoption("--soak-s")
    pids: list[int | str] = ["self", *(child.pid for child in mesh._rank_children.values())]
    under_load(mesh, 1.0, lambda: None)  # what is made once is made
    gc.collect()
    before = [open_descriptors(pid) for pid in pids]
    memory: list[list[int]] = []
    load = under_load(mesh, seconds, lambda: memory.append([resident_bytes(pid) for pid in pids]))
    assert load.right > 2 * ROUTERS * CALLERS_EACH
    assert load.given_up > 0
    gc.collect()
    for pid, opened in zip(pids, before, strict=True):
        assert eventually(lambda pid=pid, opened=opened: open_descriptors(pid) <= opened + 3), pid  # type: ignore[misc]
    for middle, end in zip(*memory, strict=True):
        assert end - middle < MAX_GROWTH_BYTES, memory
