"""Exchanges that stay open: handles, buffers and tensors that callers change in the meantime, ranks that join."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from epmesh import Communicator, EpmeshError, InvalidRequest, PeerLost, StaleEpoch
from epmesh.testing import LocalMesh
from tests.integration.contract import Shape
from tests.integration.flat_ranks import start_flat_ranks
from tests.integration.targets import Runner

NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def mesh() -> Iterator[Runner]:
    with LocalMesh(2, 2, num_experts=NUM_EXPERTS, exchange_timeout_s=5.0, max_tokens_per_rank=64) as made:
        yield made.run


@pytest.fixture(scope="module")
def flat() -> Iterator[Runner]:
    with start_flat_ranks(Shape(2, 2), max_tokens_per_rank=64) as run:
        run(declare)
        yield run


@pytest.fixture(params=["mesh", "flat"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Runs a work in every rank, of a mesh or of process groups alone."""
    runner: Runner = request.getfixturevalue(request.param)
    return runner


def declare(comm: Communicator) -> None:
    comm.set_expert_placement(NUM_EXPERTS)


def rows_for(comm: Communicator, num_tokens: int, value: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.arange(num_tokens).unsqueeze(1) % NUM_EXPERTS
    return torch.full((num_tokens, 512), value), torch.ones(num_tokens, 1), ids


def change_after_dispatch(comm: Communicator) -> bool:
    """Every rank sends large rows to the last rank's experts, then wipes its own tensor at once."""
    hidden, weights, ids = rows_for(comm, 4096, float(comm.rank + 1))
    handle = comm.dispatch_async(hidden, weights, torch.full_like(ids, NUM_EXPERTS - 1))
    hidden.zero_()
    weights.zero_()
    received, received_weights, _ = handle.wait()
    comm.combine(received, handle=handle)
    expected = torch.arange(1.0, comm.world_size + 1).repeat_interleave(4096)
    return not len(received) or (torch.equal(received[:, 0], expected) and bool((received_weights == 1).all()))


def test_a_tensor_may_be_changed_as_soon_as_dispatch_returns(run: Runner) -> None:
    assert all(run(change_after_dispatch))


def hold_a_handle(comm: Communicator, num_calls: int) -> bool:
    """A handle waited for only after many other calls; rows of all of them must be their own."""
    held = comm.dispatch_async(*rows_for(comm, 16, 100.0 + comm.rank))
    for number in range(num_calls):
        received, _, _ = comm.dispatch(*rows_for(comm, 16, float(number)))
        assert bool((comm.combine(received) == number).all())
        comm.all_reduce(torch.ones(2))
    received, _, _ = held.wait()
    return bool((comm.combine(received, handle=held) == 100.0 + comm.rank).all())


def test_a_handle_keeps_its_rows_over_many_other_calls(run: Runner) -> None:
    assert run(hold_a_handle, 7) == [True] * 4


def static_and_exact(comm: Communicator) -> bool:
    """Two exchanges open at once, one of them static; combined in the other order."""
    hidden, weights, ids = rows_for(comm, 10 + comm.rank, 3.0)
    exact = comm.dispatch_async(hidden, weights, ids)
    static = comm.dispatch_async(2 * hidden, weights, ids, static=True)
    with pytest.raises(InvalidRequest, match="2 exchanges are open"):
        comm.dispatch_async(hidden, weights, ids)
    rows, row_weights, row_ids = static.wait()
    assert rows.shape == (64 * comm.world_size, 512)
    unused = row_ids[:, 0] == -1
    assert bool((row_weights[unused] == 0).all())
    assert bool((rows[~unused] == 6.0).all())
    first = comm.combine(rows, handle=static)
    second = comm.combine(exact.wait()[0], handle=exact)
    return torch.equal(first, 2 * hidden) and torch.equal(second, hidden)


def test_static_and_exact_exchanges_may_be_open_together(run: Runner) -> None:
    assert run(static_and_exact) == [True] * 4


def too_many_static_tokens(comm: Communicator) -> str:
    try:
        comm.dispatch(*rows_for(comm, 65 if comm.rank == 1 else 3, 1.0), static=True)
    except InvalidRequest as exc:
        return str(exc)
    return ""


def test_more_tokens_than_static_mode_has_room_for_are_refused_on_all(run: Runner) -> None:
    (text,) = set(run(too_many_static_tokens))
    assert text == "dispatch on rank 1: 65 tokens in static mode; max_tokens_per_rank is 64"


def combine_in_place(comm: Communicator, part: bool) -> bool:
    """Results computed in the buffer that allocate_combine_input gives, or only in a strided part of it."""
    received, _, _ = comm.dispatch(*rows_for(comm, 12, 5.0))
    buffer = comm.allocate_combine_input((len(received), 512), torch.float32, torch.device("cpu"))
    assert buffer is not None
    buffer[:, :256] = 2.0
    buffer[:, 256:] = 100.0
    out = comm.combine(buffer[:, :256] if part else buffer)
    return bool((out[:, :256] == 2.0).all()) and (part or bool((out[:, 256:] == 100.0).all()))


@pytest.mark.parametrize("part", [False, True])
def test_results_in_the_zero_copy_buffer_are_read_as_they_are(mesh: Runner, part: bool) -> None:
    assert mesh(combine_in_place, part) == [True] * 4


def combine_nothing(comm: Communicator) -> tuple[str, str]:
    """One rank combines what is no tensor."""
    received, _, _ = comm.dispatch(*rows_for(comm, 4, 1.0))
    try:
        comm.combine(None if comm.rank == 2 else received)  # type: ignore[arg-type]
    except EpmeshError as exc:
        return type(exc).__name__, str(exc)
    return "", ""


def test_a_combine_of_no_tensor_is_refused_on_all_ranks(run: Runner) -> None:
    ((kind, text),) = set(run(combine_nothing))
    assert kind == "InvalidRequest"
    assert "combine on rank 2" in text
    assert "None" in text
    assert run(hold_a_handle, 1) == [True] * 4


def overlap_until_stale(comm: Communicator) -> list[int]:
    """Always an exchange open, as in dual-batch overlap, until a rank comes back."""
    lost = 0
    while True:
        try:
            comm.wait_ready()
            if len(comm.ranks) == 4:
                return comm.ranks
            pending = comm.dispatch_async(*rows_for(comm, 2, 1.0))
            while True:
                following = comm.dispatch_async(*rows_for(comm, 2, 1.0))
                comm.combine(pending.wait()[0], handle=pending)
                pending = following
        except (StaleEpoch, PeerLost):
            lost += 1
            assert lost < 20


def test_ranks_join_while_others_always_have_an_exchange_open() -> None:
    experts = [range(NUM_EXPERTS)] * 4
    with LocalMesh(2, 2, num_experts=NUM_EXPERTS, experts=experts, exchange_timeout_s=60.0) as mesh:
        mesh.kill_node(1)
        future = mesh.start(overlap_until_stale)
        mesh.start_node(1)
        # Far less than exchange_timeout_s, for which a commit would wait if open exchanges held it up.
        assert future.result(30) == [[0, 1, 2, 3]] * 2
