"""Attributes, groups and placement of the communicator, over every shape of mesh and for subsets."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from epmesh import Communicator, InvalidRequest, linear_placement
from tests.integration import contract
from tests.integration.contract import Feature, Shape
from tests.integration.implementations import on
from tests.integration.targets import Target


def describe(comm: Communicator) -> dict[str, Any]:
    names = (
        *("rank", "rank_in_group", "world_size", "ranks", "global_rank", "global_world_size", "device", "unique_name"),
        *("is_ep_communicator", "use_all2all", "all2all_backend", "epoch"),
    )
    described = {name: getattr(comm, name) for name in names}
    described["process groups"] = comm.cpu_group is not None and comm.device_group is not None
    described["manager"] = comm.all2all_manager is not None
    return described


def test_attributes_say_where_a_rank_stands_in_its_group_and_in_the_mesh(target: Target) -> None:
    for group, members in target.groups.items():
        for position, found in enumerate(target.run(group, describe)):
            is_ep = group == "ep"
            assert found["rank"] == found["rank_in_group"] == position
            assert found["world_size"] == len(members.ranks)
            assert found["ranks"] == list(members.ranks)
            assert found["global_rank"] == members.ranks[position]
            assert found["global_world_size"] == target.shape.world_size
            assert found["device"] == torch.device("cpu")
            assert found["unique_name"].split(":")[0] == group
            assert found["is_ep_communicator"] is is_ep
            assert found["use_all2all"] is (is_ep and len(members.ranks) > 1)
            assert isinstance(found["all2all_backend"], str)
            assert found["manager"]
            assert found["process groups"] or not target.has(Feature.PROCESS_GROUPS)
            assert (found["epoch"] > 0) is target.has(Feature.VIEWS)


def test_the_view_shows_nodes_ranks_groups_and_placements(target: Target) -> None:
    target.needs(Feature.VIEWS)
    shape = target.shape
    for view in target.run("ep", view_of):
        assert [node.slot for node in view.nodes] == list(range(shape.nodes))
        assert list(view.ranks) == list(range(shape.world_size))
        assert view.stride == shape.ranks_per_node
        assert {group.name for group in view.groups} >= {"world", *target.groups}
        assert view.group("world").ranks == view.group("ep").ranks == tuple(range(shape.world_size))
        assert {layer: view.placement(layer) for layer in shape.placements()} == shape.placements()
        assert view.placement(contract.UNDECLARED) is None


def view_of(comm: Communicator) -> Any:
    return comm.view


def sum_in_world(comm: Communicator) -> tuple[list[int], list[int]]:
    world = comm.group("world")
    return world.ranks, world.all_reduce(torch.tensor([comm.global_rank])).tolist()


def test_world_is_a_group_of_all_ranks(target: Target) -> None:
    target.needs(Feature.GROUPS)
    everyone = list(range(target.shape.world_size))
    assert target.run("ep", sum_in_world) == [(everyone, [sum(everyone)])] * len(everyone)


def make_and_destroy(comm: Communicator, name: str, ranks: list[int]) -> tuple[Any, Any]:
    """A sum over a new group, and what asking for it says once it is destroyed."""
    group = comm.create_group(name, ranks)
    total = None if group is None else group.all_reduce(torch.tensor([comm.global_rank])).tolist()
    comm.destroy_group(name)
    try:
        comm.group(name)
    except InvalidRequest as error:
        return total, str(error)
    return total, None


def test_groups_come_and_go_without_anyone_calling_wait_ready(target: Target) -> None:
    target.needs(Feature.GROUPS)
    world_size = target.shape.world_size
    for ranks in ([0], [world_size - 1], list(range(world_size)), list(range(0, world_size, 2))):
        for _ in range(2):  # a name is free again once its group is gone
            for rank, (total, refusal) in enumerate(target.run("ep", make_and_destroy, "passing", ranks)):
                assert total == ([sum(ranks)] if rank in ranks else None)
                assert "passing" in refusal


def many_groups(comm: Communicator, count: int) -> list[int]:
    sums = []
    for number in range(count):
        group = comm.create_group("again", comm.ranks)
        assert group is not None
        sums.append(int(group.all_reduce(torch.tensor([number]))))
        comm.destroy_group("again")
    return sums


@on(Shape(2, 2))
def test_more_groups_may_be_made_and_destroyed_than_a_rank_can_be_in_at_once(target: Target) -> None:
    target.needs(Feature.GROUPS)
    assert target.run("ep", many_groups, 66) == [[4 * number for number in range(66)]] * 4


def group_in_group(comm: Communicator) -> list[int] | None:
    inner = comm.create_group("inner", comm.ranks[1:])
    total = None if inner is None else inner.all_reduce(torch.tensor([comm.global_rank])).tolist()
    comm.destroy_group("inner")
    return total


@on(Shape(2, 2))
def test_members_of_a_group_make_groups_among_themselves(target: Target) -> None:
    target.needs(Feature.GROUPS)
    assert target.run("uneven", group_in_group) == [None, [4], [4]]


def ranks_of_group_order(comm: Communicator) -> list[Any]:
    group = comm.create_group("turned", comm.ranks[::-1])
    assert group is not None
    gathered = group.all_gather(torch.tensor([comm.global_rank]), dim=0).tolist()
    ranks = group.ranks
    received = group.dispatch(
        torch.full((1, 2), comm.global_rank), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), True, layer=99
    )[0]
    combined = group.combine(received.float(), True).tolist()
    comm.destroy_group("turned")
    return [ranks, gathered, received[:, 0].tolist(), combined]


def test_a_groups_order_is_the_one_it_was_made_with(target: Target) -> None:
    target.needs(Feature.GROUPS)
    world_size = target.shape.world_size
    turned = list(range(world_size))[::-1]
    for rank, found in enumerate(target.run("ep", ranks_of_group_order)):
        assert found == [turned, turned, turned, [[rank * world_size] * 2]]


def place_and_show(comm: Communicator, num_experts: int, experts: list[list[int]] | None, layer: int | None) -> Any:
    comm.set_expert_placement(num_experts, None if experts is None else experts[comm.rank], layer=layer)
    return comm.epoch, comm.view.placement(layer)


def test_a_placement_holds_when_the_call_returns_and_may_change(target: Target) -> None:
    ranks = list(range(target.shape.world_size))
    turned = [[rank] for rank in reversed(ranks)]
    epoch = 0
    for experts in (None, turned, [[rank] for rank in ranks], turned):
        found = target.run("ep", place_and_show, len(ranks), experts, 50)
        expected = linear_placement(len(ranks), ranks).experts_of
        if experts is not None:
            expected = {rank: tuple(experts[rank]) for rank in ranks}
        assert {dict(placement.experts_of) == dict(expected) for _, placement in found} == {True}
        assert len({each for each, _ in found}) == 1
        assert found[0][0] >= epoch
        epoch = found[0][0]


class FusedMoE(nn.Module):
    """Named as vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared = 0

    def maybe_init_modular_kernel(self) -> None:
        self.prepared += 1


class SharedFusedMoE(FusedMoE):
    """Named as vLLM's."""


class Dense(FusedMoE):
    """Not one of those."""


def prepare_model(comm: Communicator) -> list[int]:
    model = nn.Sequential(FusedMoE(), nn.Sequential(SharedFusedMoE(), Dense()))
    comm.prepare_communication_buffer_for_model(model)
    return [module.prepared for module in model.modules() if isinstance(module, FusedMoE)]


def test_models_are_prepared_by_the_ep_communicator_alone(target: Target) -> None:
    for group in target.groups:
        expected = [1, 1, 0] if group == "ep" else [0, 0, 0]
        assert target.run(group, prepare_model) == [expected] * len(target.groups[group].ranks)


class MappedMoE(FusedMoE):
    """Says which experts it holds, as vLLM's do."""

    def __init__(self, num_experts: int, held: list[int]) -> None:
        super().__init__()
        self.global_num_experts = num_experts
        self.expert_map = torch.full((num_experts,), -1, dtype=torch.int32)
        self.expert_map[held] = torch.arange(len(held), dtype=torch.int32)


MappedMoE.__name__ = "FusedMoE"


def prepare_mapped_model(comm: Communicator) -> Any:
    """Layers 50 and 51 differ: this rank holds the experts of its own number, and of the next one's."""
    world_size = comm.world_size
    model = nn.Sequential(
        MappedMoE(world_size, [comm.rank]), nn.Linear(1, 1), MappedMoE(world_size, [(comm.rank + 1) % world_size])
    )
    for layer, module in zip((50, 51), (model[0], model[2]), strict=True):
        module.layer_id = layer  # type: ignore[assignment]
    comm.prepare_communication_buffer_for_model(model)
    return [dict(comm.view.placements[layer].experts_of) for layer in (50, 51)]


@on(Shape(2, 2))
def test_a_models_modules_say_where_their_experts_are(target: Target) -> None:
    ranks = range(target.shape.world_size)
    own = {rank: (rank,) for rank in ranks}
    following = {rank: ((rank + 1) % len(ranks),) for rank in ranks}
    assert target.run("ep", prepare_mapped_model) == [[own, following]] * len(ranks)


def optional_calls(comm: Communicator) -> list[Any]:
    comm.check()
    for call in (comm.suspend, comm.resume, comm.checkpoint_prepare, comm.checkpoint_restore):
        call()
    buffer = comm.get_symmetric_memory_buffer("combine", (3, 4), torch.bfloat16, comm.device)
    input_ = comm.allocate_combine_input((3, 4), torch.bfloat16, comm.device)
    return [None if each is None else (tuple(each.shape), each.dtype) for each in (buffer, input_)]


def test_buffers_are_of_the_shape_asked_for_or_none(target: Target) -> None:
    for group in target.groups:
        for found in target.run(group, optional_calls):
            assert all(each in (None, ((3, 4), torch.bfloat16)) for each in found)


def wait_ready_when_nothing_changed(comm: Communicator) -> tuple[int, int, int, int]:
    before = comm.epoch
    comm.all_reduce(torch.ones(1))
    view, completed = comm.wait_ready(5.0)
    comm.all_reduce(torch.ones(1))
    return before, view.epoch, comm.epoch, completed


def test_wait_ready_returns_at_once_when_nothing_changed(target: Target) -> None:
    for before, seen, after, completed in target.run("ep", wait_ready_when_nothing_changed):
        assert before == seen == after
        assert completed >= 0
