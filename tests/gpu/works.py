"""What GPU tests run in the ranks, besides what the contract suite runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from epmesh import Communicator, EpmeshError
from tests.integration.mesh_works import tell

HIDDEN, TOPK, EXPERTS_A_RANK = 256, 4, 8


@dataclass
class Replays:
    """How replays of a captured exchange ended on one rank.

    Attributes:
        worst: largest error, beside the largest result.
        wrong: replays whose error was too large.
    """

    worst: float = 0.0
    wrong: int = 0


def mixture(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """Expert e multiplies by (e + 1) / 16; only those that are held count."""
    mine = held[ids.clamp(min=0)] & (ids >= 0)
    scale = torch.where(mine, weights * (ids + 1) / 16, 0.0).sum(1, keepdim=True)
    return torch.where(scale != 0, rows.float() * scale, 0.0)


def replay(comm: Communicator, tokens: int, times: int, in_place: bool = False) -> Replays:
    """Captures a static dispatch and combine once, and replays them with other rows and another routing every time.

    In the middle all experts move to the next rank. With `in_place`, results are made where peers read them.
    """
    num_experts = EXPERTS_A_RANK * comm.world_size
    device = comm.device
    held = torch.zeros(num_experts, dtype=torch.bool, device=device)
    held[comm.rank * EXPERTS_A_RANK : (comm.rank + 1) * EXPERTS_A_RANK] = True
    everything = torch.ones_like(held)
    source = torch.Generator(device=device).manual_seed(comm.rank)
    rows = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16, device=device)
    weights = torch.zeros(tokens, TOPK, device=device)
    ids = torch.zeros(tokens, TOPK, dtype=torch.int64, device=device)

    def refill() -> None:
        rows.copy_(torch.randn(rows.shape, generator=source, device=device))
        weights.copy_(torch.rand(weights.shape, generator=source, device=device))
        scores = torch.rand(tokens, num_experts, generator=source, device=device)
        ids.copy_(scores.argsort(dim=1)[:, :TOPK])
        ids.masked_fill_(torch.rand(ids.shape, generator=source, device=device) < 0.2, -1)

    def exchange() -> torch.Tensor:
        received, its_weights, its_ids = comm.dispatch(rows, weights, ids, static=True)
        results = mixture(received, its_weights, its_ids, held)
        if in_place:
            buffer = comm.allocate_combine_input(results.shape, results.dtype, device)
            assert buffer is not None
            results = buffer.copy_(results)
        return comm.combine(results)

    refill()
    exchange()  # makes the memory and compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = exchange()
    seen = Replays()
    for number in range(times):
        if number == times // 2:
            first = (comm.rank + 1) % comm.world_size * EXPERTS_A_RANK
            comm.set_expert_placement(num_experts, range(first, first + EXPERTS_A_RANK))
            held.zero_()[first : first + EXPERTS_A_RANK] = True
        refill()
        graph.replay()
        wanted = mixture(rows, weights, ids, everything)
        error = float((output - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        comm.check()
        seen.worst = max(seen.worst, error)
        seen.wrong += error > 1e-4
    return seen


def replay_what_has_no_replicas(comm: Communicator) -> tuple[str, list[float]]:
    """Replays a graph once expert 0 has a replica, between which rank 2 has to choose; what that raises, and what an
    exchange then gives."""
    rows, weights = torch.ones(2, 8, device=comm.device), torch.ones(2, 1, device=comm.device)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=comm.device)

    def exchange() -> torch.Tensor:
        return comm.combine(comm.dispatch(rows, weights, ids, static=True)[0])

    exchange()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange()
    graph.replay()
    torch.cuda.synchronize()
    comm.check()
    comm.set_expert_placement(3, [[0], [0, 1], [2]][comm.rank])
    graph.replay()
    torch.cuda.synchronize()
    stale = _error(comm.check)
    total = exchange()
    torch.cuda.synchronize()
    comm.check()
    return stale, total[:, 0].tolist()


def combine_in_place(comm: Communicator, times: int) -> int:
    """Exact exchanges whose results every second rank makes where peers read them; how many gave wrong sums."""
    num_experts, device, wrong = EXPERTS_A_RANK * comm.world_size, comm.device, 0
    held = torch.zeros(num_experts, dtype=torch.bool, device=device)
    held[comm.rank * EXPERTS_A_RANK : (comm.rank + 1) * EXPERTS_A_RANK] = True
    for number in range(times):
        rows = torch.randn(11, HIDDEN, device=device).bfloat16()
        weights = torch.rand(11, TOPK, device=device)
        ids = torch.rand(11, num_experts, device=device).argsort(dim=1)[:, :TOPK].contiguous()
        received, its_weights, its_ids = comm.dispatch(rows, weights, ids)
        results = mixture(received, its_weights, its_ids, held)
        if (number + comm.rank) % 2:
            buffer = comm.allocate_combine_input(results.shape, results.dtype, device)
            assert (buffer is None) == (not len(results))
            results = results if buffer is None else buffer.copy_(results)
        total, wanted = comm.combine(results), mixture(rows, weights, ids, torch.ones_like(held))
        comm.check()
        wrong += not torch.allclose(total, wanted, rtol=1e-4, atol=1e-4)
    return wrong


def refuse_one_static(comm: Communicator, victim: int) -> tuple[str, list[float]]:
    """One rank's static dispatch is refused; the error each rank meets, and what an exchange gives afterwards."""
    rows = torch.ones(2, 8, device=comm.device)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=comm.device)
    weights = torch.ones(2, 1, device=comm.device)
    comm.combine(comm.dispatch(rows, weights, ids, static=True)[0])
    error = ""
    try:
        bad = weights.to(torch.float32)[:, :0] if comm.rank == victim else weights
        comm.combine(comm.dispatch(rows, bad, ids, static=True)[0])
        torch.cuda.synchronize()
        comm.check()
    except Exception as exc:  # noqa: BLE001 - what is reported
        error = type(exc).__name__
    total = comm.combine(comm.dispatch(rows, weights, ids, static=True)[0])
    torch.cuda.synchronize()
    comm.check()
    return error, total[:, 0].tolist()


def capture_between_nodes(comm: Communicator) -> tuple[str, list[float]]:
    """A dispatch inside a capture, where the group spans nodes; its refusal, and what an exchange gives afterwards."""
    rows = torch.ones(2, 8, device=comm.device)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=comm.device)
    weights = torch.ones(2, 1, device=comm.device)
    refusal = ""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        rows.add_(0.0)  # a graph must not be empty
        try:
            comm.dispatch(rows, weights, ids, static=True)
        except EpmeshError as exc:
            refusal = f"{type(exc).__name__}: {exc}"
    total = comm.combine(comm.dispatch(rows, weights, ids, static=True)[0])
    return refusal, total[:, 0].tolist()


def replay_after_a_loss(comm: Communicator, inbox: Path, victim: int) -> tuple[str, str, list[float]]:
    """Captures an exchange, loses a member, and replays: what each replay raises, and what an exchange then gives."""
    rows = torch.ones(2, 8, device=comm.device)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=comm.device)
    weights = torch.ones(2, 1, device=comm.device)

    def exchange() -> torch.Tensor:
        return comm.combine(comm.dispatch(rows, weights, ids, static=True)[0])

    exchange()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange()
    graph.replay()
    torch.cuda.synchronize()
    comm.check()
    tell(inbox, "ready", comm.global_rank)
    if comm.global_rank == victim:
        time.sleep(60)
    graph.replay()
    torch.cuda.synchronize()  # the kernels give up once the member is lost
    lost = _error(comm.check)
    comm.wait_ready(20.0)
    graph.replay()
    torch.cuda.synchronize()
    stale = _error(comm.check)
    total = exchange()
    torch.cuda.synchronize()
    comm.check()
    return lost, stale, total[:, 0].tolist()


def _error(call: Callable[[], None]) -> str:
    try:
        call()
    except EpmeshError as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def exchange_and_measure(comm: Communicator, times: int) -> tuple[int, int]:
    """Many exchanges of changing sizes; bytes of the device in use after a tenth of them, and at the end."""
    used = []
    for number in range(times):
        tokens = (number * 7 + comm.rank) % 13
        rows = torch.randn(tokens, HIDDEN, device=comm.device).bfloat16()
        ids = torch.randint(0, 4 * comm.world_size, (tokens, 2), device=comm.device)
        weights = torch.ones(tokens, 2, device=comm.device)
        comm.combine(comm.dispatch(rows, weights, ids, static=number % 3 == 2)[0])
        if number in (times // 10, times - 1):
            torch.cuda.synchronize()
            comm.check()
            comm.all_reduce(torch.ones(1, device=comm.device))
            free, total = torch.cuda.mem_get_info()
            used.append(total - free)
    return used[0], used[1]


def exchange_on_few_sms(comm: Communicator, num_sms: int) -> tuple[int | None, list[int], list[list[float]]]:
    """Exchanges in both modes before and after a bound: what is said to be used, programs afterwards, and the sums."""
    rows = torch.ones(9, 8, device=comm.device)
    ids = torch.zeros(9, 1, dtype=torch.int64, device=comm.device)
    weights = torch.ones(9, 1, device=comm.device)

    def exchange(static: bool) -> list[float]:
        total = comm.combine(comm.dispatch(rows, weights, ids, static=static)[0])
        torch.cuda.synchronize()
        comm.check()
        return [float(each) for each in total[:, 0].tolist()]

    sums = [exchange(static) for static in (False, True)]
    comm.all2all_manager.set_num_sms(num_sms)
    sums += [exchange(static) for static in (False, True, False, True)]
    lanes = [comm._exchange.exact, comm._exchange._static]  # type: ignore[attr-defined]
    return comm.all2all_manager.max_sms_used(), [lane.plan.programs for lane in lanes], sums


def repeat(comm: Communicator, tokens: int, times: int) -> tuple[float, int, int]:
    """Eager exchanges of one shape with other rows and another routing every time, by all three ways to call them.

    Returns:
        The largest error, beside the largest result; how many were wrong; calls that were prepared for them.
    """
    num_experts, device = EXPERTS_A_RANK * comm.world_size, comm.device
    held = torch.zeros(num_experts, dtype=torch.bool, device=device)
    held[comm.rank * EXPERTS_A_RANK : (comm.rank + 1) * EXPERTS_A_RANK] = True
    source = torch.Generator(device=device).manual_seed(comm.rank)
    worst, wrong = 0.0, 0
    for number in range(times):
        rows = torch.randn(tokens, HIDDEN, generator=source, device=device).bfloat16()
        weights = torch.rand(tokens, TOPK, generator=source, device=device)
        ids = torch.rand(tokens, num_experts, generator=source, device=device).argsort(dim=1)[:, :TOPK].contiguous()
        ids.masked_fill_(torch.rand(ids.shape, generator=source, device=device) < 0.2, -1)
        marks = torch.arange(tokens, dtype=torch.int32, device=device)
        extra = [marks, marks[:, None].float().repeat(1, 3)] if number % 3 == 1 else None
        quantize = "fp8" if number % 3 == 2 else None
        received = comm.dispatch(rows, weights, ids, True, extra, static=number % 2 == 1, quantize=quantize)
        values = received[0]
        if quantize:
            values = values.float() * received[3][0].repeat_interleave(128, dim=1)
        results = mixture(values, received[1], received[2], held)
        if number % 4 < 2:
            output = comm.combine(results, True)
        else:
            output = comm.combine_into_output(results, torch.full((tokens, HIDDEN), 7.0, device=device), True)
        wanted = mixture(rows, weights, ids, torch.ones_like(held))
        error = float((output - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        comm.check()
        bound = 0.07 if quantize else 1e-4
        worst, wrong = max(worst, error / bound), wrong + (error > bound)
    return worst, wrong, len(comm._exchange._prepared)  # type: ignore[attr-defined]
