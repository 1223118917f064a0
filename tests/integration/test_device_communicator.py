"""What only `DeviceCommunicator` promises; the contract suite runs over it besides."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import epmesh
from epmesh import Communicator, DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable
from epmesh.view import View
from epmesh_server.ranks import flat_exchange, flat_member, flat_messages
from tests.integration import contract
from tests.integration.contract import Shape
from tests.integration.flat_ranks import start_flat_ranks
from tests.integration.flat_threads import gloo_group, hash_store, together

RANKS = [5, 2, 9]


def rows(
    comm: Communicator, num_tokens: int, experts: list[int], hidden: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.tensor(experts).repeat(num_tokens, 1)
    return torch.full((num_tokens, hidden), float(comm.rank + 1)), torch.ones(ids.shape), ids


# Groups that torch does not know ------------------------------------------------------------------------------------


def stand(comm: Communicator) -> dict[str, Any]:
    names = ("rank", "rank_in_group", "world_size", "ranks", "global_rank", "global_world_size", "epoch", "use_all2all")
    return {name: getattr(comm, name) for name in names}


def test_a_group_that_torch_does_not_know_takes_its_members_from_the_caller() -> None:
    found = together(3, stand, global_ranks=RANKS, global_world_size=12)
    for position, each in enumerate(found):
        assert each == {
            "rank": position,
            "rank_in_group": position,
            "world_size": 3,
            "ranks": RANKS,
            "global_rank": RANKS[position],
            "global_world_size": 12,
            "epoch": 0,
            "use_all2all": True,
        }
    assert [each["ranks"] for each in together(2, stand)] == [[0, 1]] * 2
    assert [each["use_all2all"] for each in together(2, stand, use_all2all=False)] == [False] * 2
    assert [each["use_all2all"] for each in together(2, stand, name="tp:0")] == [False] * 2


def exchange_by_global_ranks(comm: Communicator) -> tuple[list[int], list[float], str]:
    comm.set_expert_placement(3, [comm.rank])
    received, _, _ = comm.dispatch(*rows(comm, 2, [1]), True)
    combined = comm.combine(received * 10, True)
    try:
        comm.dispatch(*rows(comm, 1, [7] if comm.rank == 2 else [1]), True)
    except InvalidRequest as exc:
        return received[:, 0].tolist(), combined[:, 0].tolist(), str(exc)
    raise AssertionError("an id out of range was taken")


def test_placements_and_errors_name_global_ranks() -> None:
    for position, (received, combined, text) in enumerate(together(3, exchange_by_global_ranks, global_ranks=RANKS)):
        assert received == ([1, 1, 2, 2, 3, 3] if position == 1 else [])
        assert combined == [10.0 * (position + 1)] * 2
        assert text.startswith("dispatch on rank 9: topk_ids has 7")


def placement_view(comm: Communicator) -> View:
    comm.set_expert_placement(2000, range(comm.rank, 2000, 3), layer=4)
    return comm.view


def test_a_placement_that_does_not_fit_into_one_block_arrives_whole() -> None:
    views = together(3, placement_view, global_ranks=RANKS)
    assert views[0] == views[1] == views[2]
    placement = views[0].placement(4)
    assert placement is not None
    assert placement.experts_of == {rank: tuple(range(position, 2000, 3)) for position, rank in enumerate(RANKS)}
    assert views[0].epoch == 0
    assert views[0].placement(5) is None


# What there is not --------------------------------------------------------------------------------------------------


def ask_for_groups(comm: Communicator) -> list[str]:
    assert comm.group("ep") is comm
    said = []
    for method, args in (("group", ["world"]), ("create_group", ["pair", [0, 1]]), ("destroy_group", ["pair"])):
        with pytest.raises(InvalidRequest) as caught:
            getattr(comm, method)(*args)
        said.append(str(caught.value))
    return said


def test_other_groups_are_refused_with_the_reason_and_the_mend() -> None:
    for said in together(2, ask_for_groups):
        assert ["world" in said[0], "pair" in said[1], "pair" in said[2]] == [True] * 3
        assert all("process groups that its caller made" in text and "make process groups" in text for text in said)


def wait_ready(comm: Communicator) -> tuple[int, int, str]:
    comm.all_reduce(torch.ones(1))
    handle = comm.dispatch_async(*rows(comm, 1, [0]), True)
    view, completed = comm.wait_ready()
    with pytest.raises(InvalidRequest, match="not open") as caught:
        comm.combine(handle.wait()[0], handle=handle)
    comm.all_reduce(torch.ones(1))
    return view.epoch, completed, str(caught.value)


def test_wait_ready_returns_at_once_and_forgets_what_is_open() -> None:
    assert [found[:2] for found in together(2, wait_ready)] == [(0, 2)] * 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cpu_group": None}, "cpu_group is None"),
        ({"device": "cuda:0"}, "cuda:0"),
        ({"device": "abacus"}, "abacus"),
        ({"global_ranks": [0, 1]}, r"global_ranks is \[0, 1\]"),
        ({"global_ranks": [-1]}, r"global_ranks is \[-1\]"),
        ({"global_ranks": [3], "global_world_size": 3}, "global_world_size is 3"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        ({"max_tokens_per_rank": 0}, "max_tokens_per_rank is 0"),
        ({"exchange_timeout_s": 0.0}, "exchange_timeout_s is 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(options: dict[str, Any], words: str) -> None:
    group = gloo_group(hash_store(), 0, 1)
    with pytest.raises(InvalidRequest, match=words):
        epmesh.DeviceCommunicator(**{"cpu_group": group, **options})


# What vLLM asks for -------------------------------------------------------------------------------------------------


def ask_the_manager(comm: Communicator) -> dict[str, Any]:
    manager = comm.all2all_manager
    manager.set_num_sms(20)
    manager.clean_buffers()
    manager.stage_ep_size(2)
    received = manager.dispatch(*rows(comm, 1, [0]), True)[0]
    combined = manager.combine(received, True)
    manager.destroy()
    return {
        "stands": (manager.rank, manager.world_size, manager.dp_world_size),
        "tolerates": manager.support_fault_tolerance,
        "sms": manager.max_sms_used(),
        "fault": bool(manager.query_fault()),
        "mask": manager.query_active_mask().tolist(),
        "combined": combined[0, 0].item(),
    }


def test_the_manager_answers_what_vllm_asks_of_it() -> None:
    for rank, found in enumerate(together(4, ask_the_manager, tensor_parallel_size=2)):
        assert found == {
            "stands": (rank, 4, 2),
            "tolerates": False,
            "sms": None,
            "fault": False,
            "mask": [0] * 4,
            "combined": 4.0 * (rank + 1),
        }


# What travels -------------------------------------------------------------------------------------------------------


def bytes_of_an_exchange(comm: Any) -> tuple[int, int]:
    comm.set_expert_placement(2, [comm.rank])
    before = comm.stats.bytes_sent
    received, _, _ = comm.dispatch(*rows(comm, 100, [0], hidden=1024), True)
    sent = comm.stats.bytes_sent - before
    comm.combine(received, True)
    return sent, comm.stats.bytes_sent - before - sent


def test_rows_go_only_to_the_ranks_that_hold_their_experts() -> None:
    (there_0, back_0), (there_1, back_1) = together(2, bytes_of_an_exchange)
    row = 1024 * 4
    assert there_0 < 2048  # its rows are its own
    assert 100 * row < there_1 < 101 * row + 100 * 12
    assert 100 * row < back_0 < 101 * row
    assert back_1 < 2048


def sum_noise(comm: Communicator, numel: int) -> list[torch.Tensor]:
    noise = contract.noise(comm.rank, numel)
    halves = comm.reduce_scatterv(noise.bfloat16(), dim=0, sizes=[1, 0, numel - 1])
    return [comm.all_reduce(noise.clone()), comm.all_reduce(noise.bfloat16()), halves]


@pytest.mark.parametrize("numel", [1000, 100_003])
def test_sums_are_formed_in_rank_order_in_fp32_and_rounded_once(numel: int) -> None:
    noises = [contract.noise(rank, numel) for rank in range(3)]
    wide = noises[0] + noises[1] + noises[2]
    rounded = (noises[0].bfloat16().float() + noises[1].bfloat16().float() + noises[2].bfloat16().float()).bfloat16()
    slices = [rounded[:1], rounded[1:1], rounded[1:]]
    for (total, half, own), expected in zip(together(3, sum_noise, numel), slices, strict=True):
        assert torch.equal(total, wide)
        assert torch.equal(half, rounded)
        assert torch.equal(own, expected)


# Handles and messages -----------------------------------------------------------------------------------------------


def answer_before_dispatching(comm: Communicator) -> list[float]:
    """Rank 1 dispatches only when rank 0, whose dispatch is under way, has sent it something."""
    if comm.rank == 1:
        comm.recv(1, torch.float32, 0)
    handle = comm.dispatch_async(*rows(comm, 1, [0]), True)
    if comm.rank == 0:
        comm.send(torch.ones(1), 1)
    received = handle.wait()[0]
    assert handle.wait()[0] is received
    return comm.combine(received, True, handle=handle)[:, 0].tolist()


def test_dispatch_async_waits_for_nobody() -> None:
    assert together(2, answer_before_dispatching) == [[2.0], [4.0]]


def refused_later(comm: Communicator) -> tuple[str, str]:
    hidden, weights, ids = rows(comm, 1, [0])
    handle = comm.dispatch_async(hidden, weights, ids.float() if comm.rank == 1 else ids, True)
    following = comm.dispatch_async(*rows(comm, 1, [0]), True)
    with pytest.raises(InvalidRequest) as caught:
        handle.wait()
    with pytest.raises(InvalidRequest):
        handle.wait()
    total = comm.combine(following.wait()[0], True, handle=following)
    return str(caught.value), str(total[0, 0].item())


def test_a_handles_refusal_is_raised_by_its_wait_on_all_ranks() -> None:
    (text, first), (other, second) = together(2, refused_later)
    assert text == other
    assert "dispatch on rank 1" in text
    assert (first, second) == ("2.0", "4.0")


def send_much(comm: Communicator) -> bool:
    """Each message is larger than the budget: the second waits for the first, which is read in the end."""
    if comm.rank == 0:
        for number in range(3):
            comm.send(torch.full((64,), float(number)), 1)
        comm.all_reduce(torch.ones(1))
        assert [len(unread) for unread in comm._point_to_point._unread] == [0, 1]  # type: ignore[attr-defined]
        comm.send(torch.ones(1), 1)
        return len(comm._point_to_point._unread[1]) == 1  # type: ignore[attr-defined]
    received = [comm.recv(64, torch.float32, 0)[0].item() for _ in range(3)]
    comm.all_reduce(torch.ones(1))
    comm.recv(1, torch.float32, 0)
    return received == [0.0, 1.0, 2.0]


def test_a_sender_waits_for_room_and_forgets_what_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_messages, "BUDGET_BYTES", 100)
    assert together(2, send_much) == [True, True]


def across(comm: Communicator, count: int) -> list[float]:
    """Sends first, and waits in order; then one message more, behind those that are open."""
    peer = 1 - comm.rank
    received = [torch.zeros(64) for _ in range(count)]
    sent = [torch.full((64,), 10.0 * comm.rank + number) for number in range(count + 1)]
    sends = [SimpleNamespace(op=dist.isend, tensor=tensor, group_peer=peer) for tensor in sent]
    receives = [SimpleNamespace(op=dist.irecv, tensor=tensor, group_peer=peer) for tensor in received]
    works = comm.batch_isend_irecv([*sends, *receives])
    last = comm.recv(64, torch.float32, peer)
    for work in works:
        work.wait()
    return [tensor[0].item() for tensor in [*received, last]]


def test_a_batch_sends_more_both_ways_than_may_wait_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_messages, "BUDGET_BYTES", 100)
    assert together(2, across, 2) == [[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]]


def receives_left_open(comm: Communicator) -> list[float]:
    """Rank 0 sends what rank 1 waits for only after a call of both."""
    received = [torch.zeros(64) for _ in range(3 * comm.rank)]
    receives = [SimpleNamespace(op=dist.irecv, tensor=tensor, group_peer=0) for tensor in received]
    works = comm.batch_isend_irecv(receives)
    for number in range(3 - 3 * comm.rank):
        comm.send(torch.full((64,), float(number)), 1)
    comm.all_reduce(torch.ones(1))
    for work in works:
        work.wait()
    return [tensor[0].item() for tensor in received]


def test_open_receives_make_room_while_their_rank_is_in_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_messages, "BUDGET_BYTES", 100)
    assert together(2, receives_left_open) == [[], [0.0, 1.0, 2.0]]


def wait_for_nothing(comm: Communicator) -> str:
    if comm.rank == 1:
        return "DeadlineExceeded rank 1, MeshUnavailable"
    (work,) = comm.batch_isend_irecv([SimpleNamespace(op=dist.irecv, tensor=torch.zeros(1), group_peer=1)])
    with pytest.raises(DeadlineExceeded) as caught:
        work.wait()
    with pytest.raises(MeshUnavailable) as later:
        comm.send(torch.zeros(1), 1)
    return f"{caught.type.__name__} rank {caught.value.rank}, {later.type.__name__}"


def test_an_open_receive_of_what_nobody_sends_ends_at_the_limit() -> None:
    expected = "DeadlineExceeded rank 1, MeshUnavailable"
    assert together(2, wait_for_nothing, exchange_timeout_s=1.0) == [expected] * 2


def receive_and_leave(comm: Communicator) -> None:
    if comm.rank == 0:
        comm.batch_isend_irecv([SimpleNamespace(op=dist.irecv, tensor=torch.zeros(4), group_peer=1)])
    comm.all_reduce(torch.ones(1))


def test_a_process_ends_well_that_leaves_a_receive_open_for_ever() -> None:
    works = f"from {__name__} import receive_and_leave, together"
    code = f"{works}; together(2, receive_and_leave); print('left')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def refused_by_all(comm: Communicator) -> tuple[str, float]:
    with pytest.raises(InvalidRequest) as caught:
        comm.dispatch(*rows(comm, 2, [0]), True)
    return str(caught.value), comm.all_reduce(torch.ones(1)).item()


def test_a_rank_without_memory_for_its_rows_is_a_refusal_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = flat_exchange.FlatDispatch._pack

    def pack_or_fail(stage: Any, layout: Any) -> None:
        if stage._member.topology.me == 1:
            raise MemoryError("no room for rows")
        pack(stage, layout)

    monkeypatch.setattr(flat_exchange.FlatDispatch, "_pack", pack_or_fail)
    assert together(2, refused_by_all) == [("dispatch on rank 1: MemoryError: no room for rows", 2.0)] * 2


def test_ranks_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherHead:
        size = flat_member._HEAD.size
        pack = staticmethod(lambda _, *rest: struct.pack(flat_member_format, 7, *rest))
        unpack_from = flat_member._HEAD.unpack_from

    flat_member_format = flat_member._HEAD.format
    monkeypatch.setattr(flat_member, "_HEAD", OtherHead)
    with pytest.raises(InvalidRequest, match=r"format 7, this one 1; install the same version"):
        together(2, lambda comm: comm.all_reduce(torch.ones(1)))


# Placements that change ---------------------------------------------------------------------------------------------


def test_load_hears_what_comes_before_what_goes() -> None:
    heard: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def change(comm: Communicator) -> None:
        for own in ([0, 1], [1, 2], [1, 2]):
            comm.set_expert_placement(3, own)

    together(1, change, load=lambda added, removed: heard.append((added, removed)))
    assert heard == [((0, 1), ()), ((2,), ()), ((), (0,))]


def test_a_load_that_fails_is_refused_on_all_ranks() -> None:
    def load(added: tuple[int, ...], removed: tuple[int, ...]) -> None:
        if 3 in added:
            raise OSError("no weights of expert 3")

    def change(comm: Communicator) -> Any:
        with pytest.raises(InvalidRequest, match=r"rank 1.*no weights of expert 3"):
            comm.set_expert_placement(4, [0, 1] if comm.rank == 0 else [2, 3])
        return comm.view.placement(None), comm.all_reduce(torch.ones(1)).item()

    assert together(2, change, load=load) == [(None, 2.0)] * 2


# Ends ---------------------------------------------------------------------------------------------------------------


def destroy_and_use_the_group(comm: Communicator) -> float:
    comm.all_reduce(torch.ones(1))
    comm.destroy()
    comm.destroy()
    with pytest.raises(InvalidRequest, match="destroyed"):
        comm.all_reduce(torch.ones(1))
    again = epmesh.DeviceCommunicator(comm.cpu_group, unique_name="ep", exchange_timeout_s=20.0)
    return float(again.all_reduce(torch.ones(1)))


def test_destroy_leaves_the_callers_group_to_its_caller() -> None:
    assert together(2, destroy_and_use_the_group) == [2.0, 2.0]


def test_a_rank_that_does_not_come_is_late_and_the_group_of_no_use_afterwards() -> None:
    over = threading.Event()

    def wait_for_the_other(comm: Communicator) -> list[EpmeshError]:
        if comm.rank == 1:
            over.wait(20)
            return []
        errors = []
        for method, args in (("all_reduce", [torch.ones(1)]), ("recv", [1, torch.float32]), ("check", [])):
            with pytest.raises(EpmeshError) as caught:
                getattr(comm, method)(*args)
            errors.append(caught.value)
        over.set()
        return errors

    late, broken, checked = together(2, wait_for_the_other, exchange_timeout_s=1.0)[0]
    assert isinstance(late, DeadlineExceeded)
    assert "1 s" in str(late)
    for error in (broken, checked):
        assert isinstance(error, MeshUnavailable)
        assert "make new ones" in str(error)


def test_a_message_that_does_not_come_names_its_sender() -> None:
    over = threading.Event()

    def receive(comm: Communicator) -> str:
        if comm.rank == 1:
            over.wait(20)
            return ""
        with pytest.raises(DeadlineExceeded) as caught:
            comm.recv(1, torch.float32, 1)
        over.set()
        return f"{caught.value.rank} {caught.value}"

    text = together(2, receive, exchange_timeout_s=1.0, global_ranks=[4, 8])[0]
    assert text.startswith("8 rank 8")


def die_in_an_exchange(comm: Communicator) -> str:
    """The last rank dies between its dispatch and its combine."""
    received, _, _ = comm.dispatch(*rows(comm, 3, [0]), True)
    if comm.rank == comm.world_size - 1:
        os._exit(1)
    with pytest.raises(EpmeshError) as caught:
        comm.combine(received, True)
    return type(caught.value).__name__


def test_a_rank_that_dies_is_a_typed_error_on_the_others() -> None:
    with start_flat_ranks(Shape(1, 3)) as run:
        assert run(die_in_an_exchange) == ["MeshUnavailable", "MeshUnavailable", None]
