"""What a model's modules say of their experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from epmesh.errors import InvalidRequest
from epmesh.moe_modules import HeldExperts, held_experts, moe_modules


def module(name: str = "FusedMoE", **attributes: Any) -> Any:
    return type(name, (SimpleNamespace,), {})(**attributes)


def mapped(*local: int, **attributes: Any) -> Any:
    return module(global_num_experts=len(local), expert_map=np.array(local, np.int32), **attributes)


def test_only_modules_of_the_two_names_count() -> None:
    modules = [module("Linear"), module("FusedMoE"), module("MyFusedMoE"), module("SharedFusedMoE")]
    model = SimpleNamespace(modules=lambda: iter(modules))
    assert moe_modules(model) == [modules[1], modules[3]]


def test_layers_that_agree_are_one_declaration() -> None:
    assert held_experts([mapped(-1, 0, -1, 1), mapped(-1, 0, -1, 1)]) == {None: HeldExperts(4, (1, 3))}


def test_layers_that_differ_are_declared_by_number() -> None:
    modules = [mapped(0, -1), mapped(-1, 0, layer_id=7), mapped(0, 1)]
    assert held_experts(modules) == {0: HeldExperts(2, (0,)), 7: HeldExperts(2, (1,)), 2: HeldExperts(2, (0, 1))}


@pytest.mark.parametrize(
    "silent", [module(), module(global_num_experts=4), module(global_num_experts=4, expert_map=None)], ids=str
)
def test_a_module_without_a_map_says_nothing(silent: Any) -> None:
    assert held_experts([silent]) == {}
    assert held_experts([silent, mapped(0, -1)]) == {None: HeldExperts(2, (0,))}


def test_a_map_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="8 experts and an expert_map of 2"):
        held_experts([module(global_num_experts=8, expert_map=[0, -1])])
