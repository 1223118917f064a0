"""What each act showed: the figures, and whether it computed what one process computes. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from epmesh.view import RankMode, View
from epmesh_server.cli.demo.rank_work import RankReport
from epmesh_server.cli.demo.router_work import RouterReport

_MS_PER_S = 1e3


class ModelShape(Protocol):
    """What of the model's configuration the verdict needs; sizes are numbers of elements."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def expert_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def num_topk(self) -> int: ...


@dataclass(frozen=True)
class Reference:
    """What one process with all experts generated from all prompts.

    Attributes:
        tokens: int64 ``[num_prompts, num_steps]``, -1 after a text's end.
        logits: fp32 ``[num_prompts, num_steps, vocab_size]``.
        length: tokens of the longest text, its prompt included.
        elapsed_s: how long it took.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    length: int
    elapsed_s: float


@dataclass(frozen=True)
class Latency:
    """Durations of calls, milliseconds."""

    median_ms: float
    p99_ms: float
    num_calls: int

    @classmethod
    def of(cls, durations_s: Iterable[float]) -> Latency:
        """Of all calls of all ranks; zeros where there were none."""
        durations_ms = np.array([*durations_s], float) * _MS_PER_S
        if not durations_ms.size:
            return cls(0.0, 0.0, 0)
        median, p99 = np.percentile(durations_ms, [50, 99])
        return cls(float(median), float(p99), durations_ms.size)


@dataclass(frozen=True)
class Agreement:
    """How two generations compare.

    Attributes:
        num_texts, num_same: texts, and how many of them have the same tokens in both.
        first_difference: (prompt, step) of the earliest token that differs, or `None`.
        num_compared: logits compared: those of tokens up to the first that differs; behind it the inputs differ.
        largest_difference: of two logits; not a number where one of them is none.
        largest_logit: of the reference, by magnitude.
    """

    num_texts: int
    num_same: int
    first_difference: tuple[int, int] | None
    num_compared: int
    largest_difference: float
    largest_logit: float


@dataclass(frozen=True)
class Tolerance:
    """How far two right results may be apart.

    In fp32 every operation rounds to within ``2 ** -24``, relatively. The errors of a chain of n operations add up like
    a random walk, to about ``sqrt(n)`` of them (Higham and Mary, 2019); two results differ by at most twice that. The
    chain behind a logit is that of the model's inner products. What is wrong shows: rows rounded to bf16 on the way
    move logits by more than ten times as much, and an expert left out of one layer by more than a hundred times.

    Attributes:
        num_roundings: n.
        largest_logit: the scale, as rounding errors are relative.
    """

    num_roundings: int
    largest_logit: float

    @property
    def value(self) -> float:
        """The largest difference that passes."""
        return math.sqrt(self.num_roundings) * 2.0**-23 * self.largest_logit


@dataclass(frozen=True)
class Summary:
    """What is shown of one act at the end.

    Attributes:
        latencies: of each kind of call that a layer makes, by name.
        callers: who made the calls.
        bytes_name: which bytes were counted.
        bytes_sent, floor_bytes: to nodes and back, of all callers together, and least possible (see `NeededBytes`).
        tokens_per_s, reference_tokens_per_s: generated tokens per second, over the mesh and in one process.
        failures: what was to be shown and was not; empty where all was.
    """

    latencies: tuple[tuple[str, Latency], ...]
    callers: str
    bytes_name: str
    bytes_sent: int
    floor_bytes: int
    num_tokens: int
    tokens_per_s: float
    reference_tokens_per_s: float
    agreement: Agreement
    tolerance: float
    num_roundings: int
    proven: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether everything was shown."""
        return not self.failures


def longest_chain(shape: ModelShape, length: int) -> int:
    """Operations in a row behind one logit of a text of `length` tokens.

    Per layer: queries, scores, mixing over time and output of the attention, both matrices of an expert, the sum over
    the experts, two norms and two residual sums; then the last norm and the logits.
    """
    attention = 2 * shape.hidden_size + shape.hidden_size // shape.num_heads + length
    experts = shape.hidden_size + shape.expert_size + shape.num_topk
    return shape.num_layers * (attention + experts + 2 * shape.hidden_size + 2) + 2 * shape.hidden_size


def compare(tokens: torch.Tensor, logits: torch.Tensor, reference: Reference) -> Agreement:
    """Compares what the ranks generated, in the order of the prompts, with `reference`; shapes as there."""
    differs = tokens != reference.tokens
    comparable = differs.cumsum(dim=1) - differs.long() == 0  # up to and with the first token that differs
    comparable &= (tokens >= 0) | (reference.tokens >= 0)  # an ended text has no logits
    differences = (logits - reference.logits)[comparable].abs()
    places = differs.nonzero().tolist()
    return Agreement(
        num_texts=len(tokens),
        num_same=int((~differs.any(dim=1)).sum()),
        first_difference=min(((row, step) for row, step in places), key=lambda place: place[1], default=None),
        num_compared=differences.numel(),
        largest_difference=differences.max().item() if differences.numel() else 0.0,
        largest_logit=reference.logits.abs().max().item() if reference.logits.numel() else 0.0,
    )


def summarise(reports: Sequence[RankReport], reference: Reference, shape: ModelShape) -> Summary:
    """The first act: `reports` of all ranks, the prompts shared out in rank order."""
    agreement = _compared(reports, reference)
    return _summary(
        reports,
        reference,
        shape,
        agreement,
        latencies=(
            ("dispatch, a layer", Latency.of(duration for report in reports for duration in report.dispatch_s)),
            ("combine, a layer", Latency.of(duration for report in reports for duration in report.combine_s)),
        ),
        callers=f"{len(reports)} ranks",
        bytes_name="bytes between nodes",
        bytes_sent=sum(report.bytes_sent for report in reports),
        proven=_proven(reports, shape, agreement),
        course=_wrong_course(reports, shape, reference.tokens.shape[1]),
    )


def summarise_routed(reports: Sequence[RouterReport], view: View, reference: Reference, shape: ModelShape) -> Summary:
    """The second act: `reports` of all routers, the prompts shared out in their order; `view` of who served."""
    agreement = _compared(reports, reference)
    return _summary(
        reports,
        reference,
        shape,
        agreement,
        latencies=(("forward, a layer", Latency.of(duration for report in reports for duration in report.forward_s)),),
        callers=f"{len(reports)} routers",
        bytes_name="bytes to nodes and back",
        bytes_sent=sum(report.bytes_moved for report in reports),
        proven=_proven_routed(reports, view, shape, agreement),
        course=_wrong_routed_course(reports, view, shape, reference.tokens.shape[1]),
    )


_Reports = Sequence[RankReport] | Sequence[RouterReport]


def _compared(reports: _Reports, reference: Reference) -> Agreement:
    tokens = torch.cat([report.tokens for report in reports])
    return compare(tokens, torch.cat([report.logits for report in reports]), reference)


def _summary(
    reports: _Reports,
    reference: Reference,
    shape: ModelShape,
    agreement: Agreement,
    *,
    latencies: tuple[tuple[str, Latency], ...],
    callers: str,
    bytes_name: str,
    bytes_sent: int,
    proven: str,
    course: list[str],
) -> Summary:
    tolerance = Tolerance(longest_chain(shape, reference.length), agreement.largest_logit)
    elapsed_s = max(r.ended_at for r in reports) - min(r.started_at for r in reports)
    num_tokens = sum(int((report.tokens >= 0).sum()) for report in reports)
    return Summary(
        latencies=latencies,
        callers=callers,
        bytes_name=bytes_name,
        bytes_sent=bytes_sent,
        floor_bytes=sum(report.needed_bytes for report in reports),
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / elapsed_s,
        reference_tokens_per_s=int((reference.tokens >= 0).sum()) / reference.elapsed_s,
        agreement=agreement,
        tolerance=tolerance.value,
        num_roundings=tolerance.num_roundings,
        proven=proven,
        failures=(*_wrong_results(agreement, tolerance.value), *course),
    )


def _proven(reports: Sequence[RankReport], shape: ModelShape, agreement: Agreement) -> str:
    held = max(len(layer) for report in reports for layer in report.held)
    return (
        f"{len(reports)} ranks on {len({report.slot for report in reports})} nodes, each with {held} of the"
        f" {shape.num_experts} experts of every layer and no others, generated the same {agreement.num_texts} texts as"
        f" one process that holds all {shape.num_experts}, from the same logits up to fp32 rounding."
    )


def _proven_routed(reports: Sequence[RouterReport], view: View, shape: ModelShape, agreement: Agreement) -> str:
    return (
        f"{len(reports)} routers, which are no ranks, hold no expert and know nothing of each other, generated the same"
        f" {agreement.num_texts} texts with the {shape.num_experts} experts of every layer on {len(_serving(view))}"
        f" ranks that {len(view.nodes)} nodes host."
    )


def _serving(view: View) -> list[int]:
    return [info.rank for info in view.ranks.values() if info.mode is RankMode.SERVE]


def _wrong_results(agreement: Agreement, tolerance: float) -> list[str]:
    wrong = []
    if agreement.first_difference is not None:
        prompt, step = agreement.first_difference
        differing = agreement.num_texts - agreement.num_same
        wrong.append(f"{differing} of {agreement.num_texts} texts differ, first that of prompt {prompt + 1} in its"
                     f" token {step + 1}")  # fmt: skip
    if not agreement.largest_difference <= tolerance:  # so that a NaN is wrong too
        wrong.append(f"a logit differs by {agreement.largest_difference:.2g}, more than {tolerance:.2g}")
    if not agreement.largest_logit > 0:
        wrong.append("the reference has no logits but zero")
    return wrong


def _wrong_course(reports: Sequence[RankReport], shape: ModelShape, num_steps: int) -> list[str]:
    """Whether it came about as it says: experts spread, an exchange per layer and step, rows between nodes."""
    wrong = []
    for layer in range(shape.num_layers):
        held = sorted(expert for report in reports for expert in report.held[layer])
        if held != list(range(shape.num_experts)):
            wrong.append(f"layer {layer}: ranks hold experts {held}, not each of {shape.num_experts} once")
    expected = num_steps * shape.num_layers
    for report in reports:
        calls = len(report.dispatch_s), len(report.combine_s)
        if calls != (expected, expected):
            wrong.append(f"rank {report.rank} made {calls[0]} dispatches and {calls[1]} combines, not {expected} each")
    sent, floor, needed = (
        sum(getattr(report, name) for report in reports) for name in ("bytes_sent", "floor_bytes", "needed_bytes")
    )
    if not sent >= needed > 0:
        wrong.append(f"{sent:,} bytes went between the nodes; the rows need {needed:,}")
    if floor != needed:
        wrong.append(f"the communicator counts a floor of {floor:,} bytes between nodes; the rows need {needed:,}")
    return wrong


def _wrong_routed_course(reports: Sequence[RouterReport], view: View, shape: ModelShape, num_steps: int) -> list[str]:
    """Whether it came about as it says: experts on serving ranks alone, a forward per layer and step, rows to nodes."""
    wrong = []
    placement = view.placement(None)
    held = (
        sorted(expert for rank in _serving(view) for expert in placement.experts_of.get(rank, ())) if placement else []
    )
    if held != list(range(shape.num_experts)):
        wrong.append(f"serving ranks hold experts {held}, not each of {shape.num_experts} once")
    expected = num_steps * shape.num_layers
    for report in reports:
        if any(report.held):
            wrong.append(f"router {report.router} loaded experts {report.held}")
        if len(report.forward_s) != expected:
            wrong.append(f"router {report.router} made {len(report.forward_s)} forwards, not {expected}")
    moved, floor, needed = (
        sum(getattr(report, name) for report in reports) for name in ("bytes_moved", "floor_bytes", "needed_bytes")
    )
    if not moved >= needed > 0:
        wrong.append(f"{moved:,} bytes went to the nodes and back; the rows need {needed:,}")
    if floor != needed:
        wrong.append(f"the routers count a floor of {floor:,} bytes; the rows need {needed:,}")
    return wrong
