"""What the contract suite runs on: anything that calls a work in every rank, and says what it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pytest
import torch

from tests import reference
from tests.integration import contract
from tests.integration.contract import Exchange, Feature, Outcome


class Runner(Protocol):
    """Calls ``work(comm, *args)`` in every rank and returns a list by global rank."""

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]: ...


class Target:
    """Ranks of some shape, with the shape's groups and placements declared."""

    def __init__(self, shape: contract.Shape, run: Runner, lacks: Mapping[Feature, str] | None = None) -> None:
        self._run = run
        self._lacks = lacks or {}
        # Without nodes all ranks count as neighbours, so the reference is that of one node.
        self.shape = shape if self.has(Feature.NODES) else shape.on_one_node()
        groups = self.shape.user_groups() if self.has(Feature.GROUPS) else {}
        run(contract.declare, self.shape, groups)
        self.groups = {"ep": self.shape.group(), **{name: self.shape.group(r) for name, r in groups.items()}}

    def has(self, feature: Feature) -> bool:
        """Whether the implementation has `feature`."""
        return feature not in self._lacks

    def needs(self, feature: Feature) -> None:
        """Skips the test, with the implementation's reason, where `feature` is missing."""
        if not self.has(feature):
            pytest.skip(f"no {feature.name.lower()}: {self._lacks[feature]}")

    def run(self, group: str, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What `work` returned on the members of `group`, by position; it gets the group's communicator."""
        results = self._run(contract.in_group, group, work, *args)
        return [results[rank] for rank in self.groups[group].ranks]

    def experts(self, group: str, layer: int | None) -> tuple[int, ...]:
        """Ids that have a holder among the group's members."""
        placement = self.shape.placement(layer)
        if placement is None:
            return tuple(range(8))
        return tuple(sorted({e for rank in self.groups[group].ranks for e in placement.experts_of[rank]}))


def assert_same(actual: object, expected: torch.Tensor, what: str) -> None:
    """Dtype, shape and every byte are equal."""
    assert isinstance(actual, torch.Tensor), f"{what}: {actual!r} is no tensor"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.device == expected.device, f"{what}: on {actual.device}"
    differ = reference.as_bytes(actual) != reference.as_bytes(expected)
    assert not differ.any(), f"{what}: {int(differ.any(-1).sum())} of {actual.numel()} elements differ"


def assert_sums(actual: object, expected: torch.Tensor, what: str) -> None:
    """As `assert_same`, but for the sign of zeros."""
    assert isinstance(actual, torch.Tensor), f"{what}: {actual!r} is no tensor"
    assert_same(actual + torch.zeros_like(actual), expected + torch.zeros_like(expected), what)


def check_exchanges(
    target: Target, group: str, cases: Sequence[Exchange], positions: Sequence[int] | None = None
) -> None:
    """Runs the exchanges in every rank of `group` and compares everything each rank got with the reference.

    Args:
        positions: whose input each rank takes, by default its own.
    """
    compare_exchanges(target, group, cases, target.run(group, contract.exchange, cases, positions), positions)


def compare_exchanges(
    target: Target,
    group: str,
    cases: Sequence[Exchange],
    outcomes: Sequence[list[Outcome]],
    positions: Sequence[int] | None = None,
) -> None:
    """Compares what each rank got of each exchange with the reference."""
    for number, case in enumerate(cases):
        _compare(target, group, case, [of_rank[number] for of_rank in outcomes], positions or range(len(outcomes)))


def _compare(target: Target, group: str, case: Exchange, outcomes: list[Outcome], positions: Sequence[int]) -> None:
    members = target.groups[group]
    rows = [case.rows(position) for position in positions]
    placement = None if case.router_logits else target.shape.placement(case.layer)
    received = reference.dispatch(members, rows, placement, case.is_sequence_parallel)
    for position, (outcome, expected) in enumerate(zip(outcomes, received, strict=True)):
        _compare_received(outcome.parts, expected, case, f"{case} in group {group} on position {position}")
    if case.combine_dtype is not None:
        results = [case.results(got.hidden_states, rank) for got, rank in zip(received, members.ranks, strict=True)]
        sums = reference.combine(
            members, [len(source.topk_ids) for source in rows], [got.origins for got in received], results
        )
        for position, (outcome, wanted) in enumerate(zip(outcomes, sums, strict=True)):
            assert_sums(outcome.combined, wanted, f"combined {case} in group {group} on position {position}")


def _compare_received(parts: tuple[Any, ...], expected: reference.Received, case: Exchange, what: str) -> None:
    wanted = [expected.hidden_states, expected.topk_weights]
    wanted += [] if case.router_logits else [expected.topk_ids]
    assert len(parts) == len(wanted) + (case.extras is not None), f"{what}: {len(parts)} elements"
    if case.static:
        parts = _compact(parts, expected.origins, case, what)
    for name, part, tensor in zip(("rows", "weights", "ids"), parts, wanted, strict=False):
        assert_same(part, tensor, f"{name} of {what}")
    if case.extras is not None:
        assert isinstance(parts[-1], list)
        assert expected.extra_tensors is not None
        for part, tensor in zip(parts[-1], expected.extra_tensors, strict=True):
            assert_same(part, tensor, f"extra tensor of {what}")


def _compact(parts: tuple[Any, ...], origins: list[tuple[int, int]], case: Exchange, what: str) -> tuple[Any, ...]:
    """What a static dispatch gave, without the unused rows, which must say that they are."""
    named = 2 if case.router_logits else 3
    extras = parts[named] if case.extras is not None else []
    used = [source * contract.MAX_TOKENS + row for source, row in origins]
    unused = sorted(set(range(len(case.tokens) * contract.MAX_TOKENS)) - set(used))
    for tensor in (*parts[:named], *extras):
        assert len(tensor) == len(used) + len(unused), f"{what}: {len(tensor)} rows"
    assert not parts[1][unused].any(), f"{what}: an unused row has a weight"
    assert case.router_logits or (parts[2][unused] == -1).all(), f"{what}: an unused row has an id"
    compact = tuple(_rows(tensor, used) for tensor in parts[:named])
    return compact if case.extras is None else (*compact, [_rows(tensor, used) for tensor in extras])


def _rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Rows by number, of a dtype that need not know how to be indexed."""
    raw = reference.as_bytes(tensor)[rows]
    return raw.view(tensor.dtype).squeeze(-1)
