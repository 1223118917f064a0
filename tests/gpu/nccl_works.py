"""What the tests of NCCL device groups run in the ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from epmesh import Communicator, EpmeshError
from tests.fault.works import Seen
from tests.integration.mesh_works import tell

BUSY_CYCLES = 1 << 31  # over a second on every GPU there is

_cuda: Any = torch.cuda  # streams are not typed


def total(comm: Communicator, numel: int = 5) -> float:
    """The first element of a sum over the ranks' global numbers + 1."""
    result = comm.all_reduce(torch.full((numel,), comm.global_rank + 1.0, device=comm.device))
    return float(result[0])


def kind_of_group(comm: Any) -> str:
    """The class of the device group, which is still the same once there is a group on CPU besides."""
    group = comm.device_group
    assert comm.cpu_group is not None
    assert comm.device_group is group
    return type(group).__name__


@contextlib.contextmanager
def until_idle() -> Iterator[None]:
    """Ends when the device is done."""
    yield
    torch.cuda.synchronize()


def is_left_running(comm: Communicator) -> tuple[list[bool], bool, list[float]]:
    """Collectives on a stream of their own that is busy: whether each returned before the device was done, whether the
    default stream had anything to do, and what came of them."""
    total(comm)
    torch.cuda.synchronize()
    stream = _cuda.Stream()
    rows = torch.full((4, 8), comm.rank + 1.0, device=comm.device, dtype=torch.bfloat16)
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: comm.all_reduce(rows.clone()),
        lambda: comm.all_gather(rows, dim=0),
        lambda: comm.reduce_scatterv(rows, dim=0, sizes=[4] + [0] * (comm.world_size - 1)),
        lambda: comm.broadcast(rows.clone(), src=1),
    ]
    running, results = [], []
    with until_idle(), _cuda.stream(stream):
        stream.wait_stream(_cuda.default_stream())
        for call in calls:
            _cuda._sleep(BUSY_CYCLES)
            results.append(call())
            running.append(not stream.query())
        idle = bool(_cuda.default_stream().query())
    return running, idle, [float(result.float().sum()) for result in results]


def repeat(comm: Communicator, times: int) -> tuple[int, int, int]:
    """Collectives of changing sizes; how many were wrong, and bytes of the device in use early and at the end."""
    wrong, used = 0, []
    world = comm.world_size
    for number in range(times):
        sizes = [(number * 7 + 5 * position) % 11 for position in range(world)]
        rows = torch.full((sizes[comm.rank], 3), float(comm.rank), device=comm.device)
        gathered = comm.all_gatherv(rows, sizes=sizes)
        assert isinstance(gathered, torch.Tensor)
        wanted = torch.cat([torch.full((size, 3), float(position)) for position, size in enumerate(sizes)])
        wrong += not torch.equal(gathered.cpu(), wanted)
        wrong += total(comm, 1 + number * 97) != world * (world + 1) / 2
        if number in (times // 10, times - 1):
            torch.cuda.synchronize()
            comm.check()
            free, whole = torch.cuda.mem_get_info()
            used.append(whole - free)
    return wrong, used[0], used[1]


def meet_death(comm: Communicator, inbox: Path, plan: str, victim: int) -> Seen:
    """The victim never comes to a collective, or its device does not; what the others see once it is killed.

    Args:
        plan: "host": the others wait in the call. "device": their calls have returned, their devices wait.
            "calls": all make calls without a pause.
    """
    total(comm)
    seen = Seen()
    try:
        if plan == "calls":
            _call_for_ever(comm, inbox)
        if comm.global_rank == victim:
            _stay_away(comm, inbox, plan)
        result = None
        if plan == "device":
            result = comm.all_reduce(torch.ones(5, device=comm.device))
        tell(inbox, "ready", comm.global_rank)
        if result is None:
            total(comm)
        torch.cuda.synchronize()  # the kernel is ended by whoever watches
        comm.check()
    except EpmeshError as error:
        seen.at = time.monotonic()
        seen.error, seen.text, seen.ranks = type(error).__name__, str(error), getattr(error, "ranks", ())
    view, _ = comm.wait_ready(20.0)
    seen.view = list(view.ranks)
    seen.sums = [total(comm)]
    seen.resumed_at = time.monotonic()
    return seen


def _call_for_ever(comm: Communicator, inbox: Path) -> None:
    done = 0
    while True:
        total(comm, 1 + done * 1009 % 100_000)
        done += 1
        if done == 20:
            tell(inbox, "ready", comm.global_rank)


def _stay_away(comm: Communicator, inbox: Path, plan: str) -> None:
    if plan == "device":
        for _ in range(60):
            _cuda._sleep(BUSY_CYCLES)
        comm.all_reduce(torch.ones(5, device=comm.device))
    tell(inbox, "ready", comm.global_rank)
    time.sleep(60)


def meet_busy_device(comm: Communicator, victim: int, cycles: int, calls: int) -> tuple[list[str], float]:
    """One rank's device is busy for longer than the time limit: errors of the calls after it, and the last sum."""
    total(comm)
    busy = comm.rank == victim
    for _ in range(cycles if busy else 0):
        _cuda._sleep(BUSY_CYCLES)
    comm.all_reduce(torch.ones(5, device=comm.device))
    if busy:
        time.sleep(3.0)  # its host is elsewhere too
    else:
        torch.cuda.synchronize()
    errors, last = [], 0.0
    for _ in range(calls):
        try:
            last = total(comm)
            errors.append("")
        except EpmeshError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors, last


def capture(comm: Communicator) -> tuple[str, float]:
    """A collective while a graph is captured: its error, and a sum afterwards."""
    total(comm)
    values = torch.ones(5, device=comm.device)
    torch.cuda.synchronize()
    error = ""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            comm.all_reduce(values)
        except EpmeshError as exc:
            error = f"{type(exc).__name__}: {exc}"
    return error, total(comm)
