"""Groups, placements, and who may ask for them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.errors import EpmeshError, InvalidRequest, PeerLost
from epmesh.placement import Placement, linear_placement
from epmesh.view import RankMode
from epmesh_server.membership import ExpertDeclaration, RankDeclaration
from epmesh_server.membership.actions import Done, Finish, Prepare
from epmesh_server.membership.events import CreateGroup, DestroyGroup, Finished, SetPlacement, Tick
from tests.unit.fake_mesh import FakeMesh, FakeNode, explicit, linear, rank, two_nodes


def refusal(mesh: FakeMesh, event: type, *fields: object) -> EpmeshError:
    call = mesh.ask(event, *fields)
    mesh.advance(0.1)
    answer = mesh.replies[call]
    assert isinstance(answer, EpmeshError)
    return answer


def done(mesh: FakeMesh, event: type, *fields: object, request_id: str = "") -> int:
    call = mesh.ask(event, *fields, request_id=request_id)
    mesh.advance(0.1)
    answer = mesh.replies[call]
    assert isinstance(answer, Done), answer
    return answer.epoch


def experts_of(mesh: FakeMesh, layer: int | None = None) -> dict[int, tuple[int, ...]]:
    placement = mesh.view.placements[layer]
    return dict(placement.experts_of)


def set_ranks(mesh: FakeMesh, node: FakeNode, *declared: RankDeclaration) -> None:
    node.ranks = {known.info.rank: known for known in declared}
    mesh.report(node)
    mesh.advance(0.1)


# Groups ----------------------------------------------------------------------------------------------------------


def test_world_has_all_ranks_and_ep_those_that_exchange() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, rank(0), rank(1, mode=RankMode.SERVE), rank(2))
    assert [(group.name, group.group_id, group.ranks, group.declared_ranks) for group in mesh.view.groups] == [
        ("world", 0, (0, 1, 2), (0, 1, 2)),
        ("ep", 1, (0, 2), (0, 2)),
    ]


def test_a_group_keeps_the_order_of_its_ranks_and_loses_the_dead() -> None:
    mesh, _, b = two_nodes()
    assert done(mesh, CreateGroup, "odd", (9, 0, 8)) == 2
    group = mesh.view.group("odd")
    assert (group.group_id, group.ranks, group.sequence) == (65_536, (9, 0, 8), 0)
    mesh.kill_rank(b, 8)
    mesh.settle()
    group = mesh.view.group("odd")
    assert (group.ranks, group.declared_ranks) == ((9, 0), (9, 0, 8))
    b.ranks[8] = rank(8, 5)
    mesh.report(b)
    mesh.advance(0.1)
    assert mesh.view.group("odd").ranks == (9, 0, 8)


def test_a_group_of_the_same_name_and_ranks_is_answered_again_without_a_commit() -> None:
    mesh, _, _ = two_nodes()
    assert done(mesh, CreateGroup, "pair", (0, 8)) == 2
    assert done(mesh, CreateGroup, "pair", (0, 8)) == 2
    assert "exists with ranks [0, 8], not [0, 9]" in str(refusal(mesh, CreateGroup, "pair", (0, 9)))
    assert mesh.view.epoch == 2


def test_ids_of_groups_are_never_used_again() -> None:
    mesh, _, _ = two_nodes()
    done(mesh, CreateGroup, "one", (0, 8))
    done(mesh, CreateGroup, "two", (0, 8))
    done(mesh, DestroyGroup, "two")
    mesh = mesh.restarted()
    for node_id, incarnation in (("a", 11), ("b", 12)):
        mesh.advance(3.1)
        mesh.start(node_id, incarnation, num_ranks=2)
    mesh.advance(0.2)
    done(mesh, CreateGroup, "two", (0, 8))
    assert mesh.view.group("two").group_id == 65_538
    assert mesh.view.group("one").group_id == 65_536


def test_what_is_asked_for_together_is_done_in_order_and_in_one_commit() -> None:
    mesh, _, _ = two_nodes()
    calls = [
        mesh.ask(CreateGroup, "x", (0, 8)),
        mesh.ask(CreateGroup, "x", (0, 9)),
        mesh.ask(DestroyGroup, "x"),
        mesh.ask(CreateGroup, "x", (1, 9)),
    ]
    mesh.advance(0.1)
    assert [type(mesh.replies[call]) for call in calls] == [Done, InvalidRequest, Done, Done]
    assert mesh.view.epoch == 2
    assert mesh.view.group("x").declared_ranks == (1, 9)


def test_destroying_what_is_not_there_is_no_error_and_no_commit() -> None:
    mesh, _, _ = two_nodes()
    assert done(mesh, DestroyGroup, "nobody") == 1
    assert len(mesh.views) == 1


@pytest.mark.parametrize(
    ("name", "ranks", "text"),
    [
        ("world", (0,), "epmesh's own"),
        ("ep", (0,), "epmesh's own"),
        ("tp:9", (0,), "epmesh's own"),
        ("", (0,), "1 to 64"),
        ("x" * 65, (0,), "1 to 64"),
        ("a\tb", (0,), "printable"),
        ("g", (), "at least one"),
        ("g", (0, 8, 0), "rank 0 stands twice"),
        ("g", (0, 5), "rank 5 is not in the mesh"),
        ("g", (0, 2**31), "rank 2147483648 is not in the mesh"),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(name: str, ranks: tuple[int, ...], text: str) -> None:
    mesh, _, _ = two_nodes()
    error = refusal(mesh, CreateGroup, name, ranks)
    assert isinstance(error, InvalidRequest)
    assert text in str(error)
    assert len(mesh.views) == 1


def test_a_rank_that_serves_cannot_be_in_a_group() -> None:
    mesh, a, _ = two_nodes()
    a.ranks[1] = rank(1, mode=RankMode.SERVE)
    mesh.report(a)
    assert "rank 1 serves" in str(refusal(mesh, CreateGroup, "g", (0, 1)))


def test_groups_of_epmesh_cannot_be_destroyed() -> None:
    mesh, _, _ = two_nodes()
    assert isinstance(refusal(mesh, DestroyGroup, "world"), InvalidRequest)


def test_a_member_that_dies_before_the_commit_fails_the_call() -> None:
    mesh, _, b = two_nodes()
    call = mesh.ask(CreateGroup, "pair", (0, 8))
    mesh.kill_rank(b, 8)
    mesh.advance(0.1)
    answer = mesh.replies[call]
    assert isinstance(answer, PeerLost)
    assert answer.ranks == (8,)
    assert not mesh.view.has_group("pair")


def test_as_many_groups_as_a_control_page_holds_and_no_more() -> None:
    mesh, _, _ = two_nodes()
    calls = [mesh.ask(CreateGroup, f"g{number}", (0, 8)) for number in range(62)]
    mesh.advance(0.1)
    answers = [mesh.replies[call] for call in calls]
    assert [type(answer) for answer in answers] == [Done] * 61 + [InvalidRequest]
    assert "destroy one first" in str(answers[-1])


# Requests --------------------------------------------------------------------------------------------------------


def test_all_calls_with_one_request_id_are_one_request() -> None:
    mesh, _, _ = two_nodes()
    calls = [mesh.ask(CreateGroup, "pair", (0, 8), request_id="r1") for _ in range(4)]
    mesh.advance(0.1)
    assert [mesh.replies[call] for call in calls] == [Done(2)] * 4
    assert done(mesh, CreateGroup, "pair", (0, 8), request_id="r1") == 2
    done(mesh, DestroyGroup, "pair")
    assert done(mesh, CreateGroup, "pair", (0, 8), request_id="r1") == 2  # answered before, not done again
    assert not mesh.view.has_group("pair")


def test_one_request_id_for_two_things_is_refused() -> None:
    mesh, _, _ = two_nodes()
    mesh.ask(CreateGroup, "pair", (0, 8), request_id="r1")
    other = mesh.ask(CreateGroup, "pair", (0, 9), request_id="r1")
    assert isinstance(mesh.replies[other], InvalidRequest)
    mesh.advance(0.1)
    again = mesh.ask(DestroyGroup, "pair", request_id="r1")
    assert isinstance(mesh.replies[again], InvalidRequest)
    assert "'r1'" in str(mesh.replies[again])


def test_a_request_that_failed_may_be_repeated() -> None:
    mesh, _, b = two_nodes()
    call = mesh.ask(CreateGroup, "g", (0, 10), request_id="r1")
    assert isinstance(mesh.replies[call], InvalidRequest)
    b.ranks[10] = rank(10)
    mesh.report(b)
    assert done(mesh, CreateGroup, "g", (0, 10), request_id="r1") == 2


def test_answered_requests_are_remembered_to_a_limit() -> None:
    mesh, _, _ = two_nodes()
    for number in range(4100):
        mesh.ask(DestroyGroup, "x", request_id=f"r{number}")
    mesh.advance(0.1)
    call = mesh.ask(DestroyGroup, "y", request_id="r4099")
    assert isinstance(mesh.replies[call], InvalidRequest)
    assert done(mesh, DestroyGroup, "y", request_id="r0") == 1


# Tensor parallelism ----------------------------------------------------------------------------------------------


def tp(number: int, size: int = 2, world_size: int = 1, incarnation: int = 1) -> RankDeclaration:
    return rank(number, incarnation, tensor_parallel_size=size, world_size=world_size)


def tp_groups(mesh: FakeMesh) -> dict[str, tuple[int, ...]]:
    return {group.name: group.ranks for group in mesh.view.groups if group.name.startswith("tp:")}


def test_blocks_are_numbered_in_slot_order_once_everybody_is_there() -> None:
    mesh = FakeMesh()
    a, b = mesh.start("a"), mesh.start("b", 2)
    set_ranks(mesh, b, *(tp(number, world_size=8) for number in (8, 9, 10, 11)))
    assert tp_groups(mesh) == {}
    set_ranks(mesh, a, *(tp(number, world_size=8) for number in (0, 1, 2, 3)))
    assert tp_groups(mesh) == {"tp:0": (0, 1), "tp:1": (2, 3), "tp:2": (8, 9), "tp:3": (10, 11)}
    assert mesh.view.tensor_parallel_size == 2
    assert [group.group_id for group in mesh.view.groups[2:]] == [16, 17, 18, 19]


def test_a_block_keeps_its_number_when_others_come_and_go() -> None:
    mesh = FakeMesh()
    a, b = mesh.start("a"), mesh.start("b", 2)
    set_ranks(mesh, b, tp(8), tp(9))
    set_ranks(mesh, a, tp(0), tp(1))
    assert tp_groups(mesh) == {"tp:0": (8, 9), "tp:1": (0, 1)}
    set_ranks(mesh, b)
    assert tp_groups(mesh) == {"tp:0": (), "tp:1": (0, 1)}
    set_ranks(mesh, b, tp(10, incarnation=3), tp(8, incarnation=3))
    assert tp_groups(mesh) == {"tp:0": (8,), "tp:1": (0, 1), "tp:2": (10,)}
    group = mesh.view.group("tp:2")
    assert group.declared_ranks == (10, 11)
    assert not group.complete


def test_another_tensor_parallel_size_is_refused_while_one_is_in_use() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, tp(0), tp(1), tp(2, size=4))
    assert list(mesh.view.ranks) == [0, 1]
    assert "tensor_parallel_size=4, the mesh has 2" in str(a.errors[2, 1])
    set_ranks(mesh, a)
    set_ranks(mesh, a, tp(0, 4, incarnation=2), tp(3, 4, incarnation=2))
    assert tp_groups(mesh) == {"tp:0": (0, 3)}


def test_a_rank_that_fits_into_no_block_is_refused() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, tp(0, 3), tp(6, 3), rank(7))
    assert list(mesh.view.ranks) == [0, 7]
    assert "local rank 6" in str(a.errors[6, 1])
    assert tp_groups(mesh) == {"tp:0": (0,)}


# Placements ------------------------------------------------------------------------------------------------------


def test_the_linear_default_is_frozen_over_all_ranks_at_once() -> None:
    mesh = FakeMesh()
    a, b = mesh.start("a"), mesh.start("b", 2)
    set_ranks(mesh, a, rank(0, world_size=3, experts=[linear(4)]), rank(1, world_size=3, experts=[linear(4)]))
    assert mesh.view.placements == {}
    set_ranks(mesh, b, rank(8, world_size=3, experts=[linear(4)]))
    frozen = {0: (0, 1), 1: (2,), 8: (3,)}
    assert experts_of(mesh) == frozen
    set_ranks(mesh, b, rank(8, 2, world_size=3, experts=[linear(4)]), rank(9, experts=[linear(4)]))
    assert experts_of(mesh) == frozen
    set_ranks(mesh, b)
    assert experts_of(mesh) == frozen


def test_ranks_that_serve_do_not_count_for_the_linear_default() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    experts = [linear(4)]
    set_ranks(mesh, a, rank(0, mode=RankMode.SERVE), rank(1, world_size=2, experts=experts))
    assert mesh.view.placements == {}
    set_ranks(mesh, a, rank(0, mode=RankMode.SERVE), *(rank(n, world_size=2, experts=experts) for n in (1, 2)))
    assert experts_of(mesh) == {1: (0, 1), 2: (2, 3)}


def test_whoever_comes_back_with_what_it_held_finds_the_placement_although_all_were_gone() -> None:
    mesh, a, b = two_nodes()
    a.ranks, b.ranks = {}, {}
    set_ranks(mesh, a, rank(0, 5, experts=[explicit(4, (0, 1))]))
    set_ranks(mesh, b, rank(8, 5, experts=[explicit(4, (2, 3))]))
    set_ranks(mesh, a)
    set_ranks(mesh, b)
    assert mesh.view.ranks == {}
    set_ranks(mesh, a, rank(0, 6, experts=[explicit(4, (0, 1))]))
    assert experts_of(mesh) == {0: (0, 1), 8: (2, 3)}
    set_ranks(mesh, b, rank(8, 6, world_size=2, experts=[linear(4)]))
    assert experts_of(mesh) == {0: (0, 1), 8: (2, 3)}
    set_ranks(mesh, a)
    set_ranks(mesh, b)
    set_ranks(mesh, a, rank(0, 7, experts=[explicit(4, (0, 2))]))
    assert experts_of(mesh) == {0: (0, 2)}  # something else: begun anew


def serving(number: int, incarnation: int = 1, world_size: int = 2, num_experts: int = 4) -> RankDeclaration:
    return rank(number, incarnation, mode=RankMode.SERVE, world_size=world_size, experts=[linear(num_experts)])


def test_ranks_that_serve_share_the_linear_default_among_themselves() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, rank(0, mode=RankMode.EXCHANGE), serving(1))
    assert list(mesh.view.ranks) == [0, 1]  # it waits for the other in the view already
    assert mesh.view.placements == {}
    set_ranks(mesh, a, rank(0), serving(1), serving(2))
    assert experts_of(mesh) == {1: (0, 1), 2: (2, 3)}


def test_an_exchange_mesh_and_serving_ranks_have_a_linear_default_each() -> None:
    mesh = FakeMesh()
    a, b = mesh.start("a"), mesh.start("b", 2)
    exchange = [rank(number, world_size=2, experts=[linear(4)]) for number in (0, 1)]
    set_ranks(mesh, b, serving(8), serving(9))
    set_ranks(mesh, a, *exchange)
    both = {0: (0, 1), 1: (2, 3), 8: (0, 1), 9: (2, 3)}
    assert experts_of(mesh) == both
    set_ranks(mesh, b, serving(9))
    set_ranks(mesh, b, serving(9), serving(8, 2))
    assert experts_of(mesh) == both
    set_ranks(mesh, a, rank(0, 2, world_size=1, experts=[linear(4)]))
    assert experts_of(mesh) == both


def test_a_death_moves_no_expert_to_a_serving_rank_that_came_too_late_for_the_default() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, serving(0), serving(1))
    set_ranks(mesh, a, serving(0), serving(1), serving(2, world_size=1))
    set_ranks(mesh, a, serving(2, world_size=1))
    assert experts_of(mesh) == {0: (0, 1), 1: (2, 3)}


def test_a_placement_that_the_exchanging_ranks_agree_on_leaves_the_serving_ones_theirs() -> None:
    mesh, _, b = two_nodes()
    set_ranks(mesh, b, serving(8, 3), serving(9, 3))
    done(mesh, SetPlacement, None, Placement(4, {0: (0, 1, 2), 1: (3,)}))
    assert experts_of(mesh) == {0: (0, 1, 2), 1: (3,), 8: (0, 1), 9: (2, 3)}


@given(
    modes=st.lists(st.sampled_from(RankMode), min_size=1, max_size=6),
    arrivals=st.randoms(use_true_random=False),
    num_experts=st.integers(1, 9),
)
def test_the_linear_default_of_a_mode_does_not_hang_on_who_came_first(
    modes: list[RankMode], arrivals: random.Random, num_experts: int
) -> None:
    declared = [
        rank(number, mode=mode, world_size=modes.count(mode), experts=[linear(num_experts)])
        for number, mode in enumerate(modes)
    ]
    mesh = FakeMesh()
    a = mesh.start("a")
    come: list[RankDeclaration] = []
    for newcomer in arrivals.sample(declared, len(declared)):
        come.append(newcomer)
        set_ranks(mesh, a, *come)
    wanted: dict[int, tuple[int, ...]] = {}
    for mode in set(modes):
        peers = [number for number, of in enumerate(modes) if of is mode]
        wanted |= linear_placement(num_experts, peers).experts_of
    assert experts_of(mesh) == wanted


def test_a_rank_declares_its_experts_and_they_stay_after_its_death() -> None:
    mesh, a, b = two_nodes()
    set_ranks(mesh, a, rank(0, 5, experts=[explicit(4, (0, 1)), explicit(8, (7,), layer=3)]))
    set_ranks(mesh, b, rank(8, 5, experts=[explicit(4, (2, 3))]))
    assert experts_of(mesh) == {0: (0, 1), 8: (2, 3)}
    assert experts_of(mesh, 3) == {0: (7,)}
    set_ranks(mesh, b)
    assert experts_of(mesh) == {0: (0, 1), 8: (2, 3)}
    set_ranks(mesh, b, rank(8, 6, experts=[explicit(4, (1,))]))
    assert experts_of(mesh) == {0: (0, 1), 8: (1,)}
    set_ranks(mesh, b, rank(8, 7))  # says nothing of experts
    assert experts_of(mesh) == {0: (0, 1), 8: (1,)}


def test_a_declaration_takes_effect_once_and_not_again_at_every_report() -> None:
    mesh, a, _ = two_nodes()
    set_ranks(mesh, a, rank(0, 5, experts=[explicit(4, (0, 1))]))
    done(mesh, SetPlacement, None, Placement(4, {0: (3,)}))
    mesh.report(a)
    mesh.advance(0.1)
    assert experts_of(mesh) == {0: (3,)}


@pytest.mark.parametrize("wrong", [linear(6), explicit(6, (0,))])
def test_another_number_of_experts_refuses_that_rank_and_names_both(wrong: ExpertDeclaration) -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, rank(0, experts=[linear(4)]), rank(1, experts=[wrong]), rank(2, experts=[linear(4)]))
    assert list(mesh.view.ranks) == [0, 2]
    error = a.errors[1, 1]
    assert isinstance(error, InvalidRequest)
    assert "num_experts=6" in str(error)
    assert "has 4" in str(error)


def test_layers_may_have_different_numbers_of_experts() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, rank(0, experts=[linear(4), linear(6, layer=1)]))
    assert mesh.view.placements[None].num_experts == 4
    assert mesh.view.placements[1].num_experts == 6


@pytest.mark.parametrize(
    "experts",
    [
        [explicit(0, ())],
        [linear(65_537)],
        [explicit(4, (4,))],
        [explicit(4, (1, 9))],
        [linear(4), linear(4)],
    ],
)
def test_experts_that_make_no_sense_refuse_the_rank(experts: list[ExpertDeclaration]) -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, rank(0, experts=experts))
    assert isinstance(a.errors[0, 1], InvalidRequest)
    assert not mesh.view.ranks


def test_ranks_are_in_no_view_before_as_many_are_there_as_they_wait_for() -> None:
    """Others would wait in their exchanges for ranks whose ``join`` has not returned."""
    mesh = FakeMesh()
    a, b = mesh.start("a"), mesh.start("b")
    set_ranks(mesh, a, rank(0), rank(1))
    epoch = mesh.view.epoch
    set_ranks(mesh, b, rank(8, world_size=4))
    assert (mesh.view.epoch, list(mesh.view.ranks)) == (epoch, [0, 1])
    set_ranks(mesh, b, rank(8, world_size=4), rank(9, world_size=5))
    assert (mesh.view.epoch, list(mesh.view.ranks)) == (epoch, [0, 1])
    set_ranks(mesh, b, rank(8, world_size=4), rank(9, 2, world_size=4))
    assert list(mesh.view.ranks) == [0, 1, 8, 9]
    set_ranks(mesh, a, rank(0))
    assert list(mesh.view.ranks) == [0, 8, 9]


def test_a_serving_rank_waits_for_nobody() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, rank(0, mode=RankMode.SERVE, world_size=3))
    assert list(mesh.view.ranks) == [0]


def test_after_everybody_died_another_model_may_be_declared() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, *(rank(number, world_size=4, experts=[linear(8)]) for number in range(4)))
    set_ranks(mesh, a)
    assert len(experts_of(mesh)) == 4
    set_ranks(mesh, a, *(rank(number, 2, world_size=2, experts=[linear(6)]) for number in range(2)))
    assert experts_of(mesh) == {0: (0, 1, 2), 1: (3, 4, 5)}


def test_after_everybody_died_the_linear_default_is_computed_anew() -> None:
    mesh = FakeMesh()
    a = mesh.start("a")
    set_ranks(mesh, a, *(rank(number, world_size=4, experts=[linear(8)]) for number in range(4)))
    set_ranks(mesh, a)
    first, second = (rank(number, 2, world_size=2, experts=[linear(8)]) for number in range(2))
    set_ranks(mesh, a, first)
    assert not mesh.view.ranks
    set_ranks(mesh, a, first, second)
    assert experts_of(mesh) == {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}


def test_setting_a_placement_replaces_it_in_one_commit_with_unchanged_members() -> None:
    mesh, _, _ = two_nodes()
    wanted = Placement(4, {0: (0, 1), 9: (2, 3), 77: ()})
    calls = [mesh.ask(SetPlacement, 2, wanted, request_id="all ranks ask") for _ in range(4)]
    mesh.advance(0.1)
    assert [mesh.replies[call] for call in calls] == [Done(2)] * 4
    assert mesh.view.placements == {2: wanted}
    assert mesh.view.membership_epoch == 1


def test_a_placement_of_ranks_that_cannot_exist_is_refused() -> None:
    mesh, _, _ = two_nodes()
    assert "rank 16384" in str(refusal(mesh, SetPlacement, None, Placement(4, {16_384: (0,)})))


def test_a_placement_may_be_set_before_there_is_a_node() -> None:
    mesh = FakeMesh()
    assert done(mesh, SetPlacement, None, Placement(2, {0: (0, 1)})) == 1
    assert mesh.view.epoch == 1


def test_operations_wait_for_a_running_commit_and_go_into_the_next() -> None:
    mesh, a, _ = two_nodes()
    a.ranks[2] = rank(2)
    mesh.report(a)
    mesh.now += 0.05
    mesh.step(Tick())
    call = mesh.ask(CreateGroup, "pair", (0, 2))
    mesh.advance(0.2)
    assert mesh.replies[call] == Done(3)
    assert [type(command) for command in a.heard].count(Prepare) == 3


# Modes -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_turns_to_serving_leaves_ep_in_a_new_membership_and_keeps_its_experts() -> None:
    mesh, a, _ = two_nodes()
    a.ranks = {number: rank(number, 3, world_size=2, experts=[linear(4)]) for number in (0, 1)}
    set_ranks(mesh, a, *a.ranks.values())
    before = mesh.view
    held = experts_of(mesh)
    set_ranks(mesh, a, a.ranks[0], rank(1, 3, mode=RankMode.SERVE, world_size=2, experts=[linear(4)]))
    assert mesh.view.ranks[1].mode is RankMode.SERVE
    assert mesh.view.group("ep").ranks == (0, 8, 9)
    assert mesh.view.membership_epoch == mesh.view.epoch > before.epoch
    assert experts_of(mesh) == held
    prepare = [command for command in a.heard if isinstance(command, Prepare)][-1]
    assert prepare.lost_ranks == ()  # it is alive
    set_ranks(mesh, a, a.ranks[0], rank(1, 3, world_size=2, experts=[linear(4)]))
    assert mesh.view.group("ep").ranks == (0, 1, 8, 9)


def with_front(declared: RankDeclaration, endpoint: str) -> RankDeclaration:
    return replace(declared, info=replace(declared.info, front_endpoint=endpoint))


def test_another_front_endpoint_is_a_view_of_the_same_membership() -> None:
    mesh, a, _ = two_nodes()
    before = mesh.view
    set_ranks(mesh, a, with_front(a.ranks[0], "tcp://127.0.0.1:9"), a.ranks[1])
    assert mesh.view.ranks[0].front_endpoint == "tcp://127.0.0.1:9"
    assert (mesh.view.epoch, mesh.view.membership_epoch) == (before.epoch + 1, before.membership_epoch)
    set_ranks(mesh, a, *a.ranks.values())  # the same again
    assert mesh.view.epoch == before.epoch + 1


def test_a_change_that_comes_during_a_commit_has_the_next() -> None:
    mesh, a, b = two_nodes()
    b.silent.add(Finish)
    mesh.ask(CreateGroup, "g", (0, 8))
    mesh.advance(0.05)
    a.ranks[1] = rank(1, mode=RankMode.SERVE)
    mesh.report(a)
    b.silent.clear()
    assert b.session is not None
    mesh.step(Finished(b.session, 2, b.progress()))
    mesh.advance(0.2)
    assert [view.ranks[1].mode for view in mesh.views[1:]] == [RankMode.EXCHANGE, RankMode.SERVE]


def test_a_process_is_not_judged_again_for_the_experts_it_declared_once() -> None:
    mesh, a, _ = two_nodes()
    set_ranks(mesh, a, rank(0, 3, experts=[linear(4)]), rank(1, 3))
    done(mesh, SetPlacement, None, Placement(8, {8: tuple(range(8))}))
    set_ranks(mesh, a, rank(0, 3, mode=RankMode.SERVE, experts=[linear(4)]), rank(1, 3))
    assert a.errors == {}
    assert mesh.view.ranks[0].mode is RankMode.SERVE
