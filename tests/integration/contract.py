"""What the contract suite runs in every rank, and the inputs it makes up for them.

Works take any `Communicator`, however it was got hold of; inputs depend on a case and the rank's position alone, so
that the test makes the same ones and holds the outputs against `tests.reference`.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed

from epmesh import Communicator, Handle, InvalidRequest, Placement, linear_placement
from tests import reference

UNDECLARED = 99
MAX_TOKENS = 16  # ``max_tokens_per_rank`` of every rank


class Feature(enum.Enum):
    """What an implementation of the contract may lack."""

    GROUPS = "groups besides its own: `world`, `tp:k`, and those that `create_group` makes"
    NODES = "nodes: sums are formed on each node first, and replicas on the row's node are preferred"
    PROCESS_GROUPS = "torch process groups of its own, as `cpu_group` and `device_group`"
    VIEWS = "views that show nodes and are numbered by epochs"


@dataclass(frozen=True)
class Shape:
    """A mesh: nodes, ranks on each, and how many of them are one tensor-parallel group."""

    nodes: int
    ranks_per_node: int
    tensor_parallel_size: int = 1

    @property
    def name(self) -> str:
        """As in test ids: "2x2", "2x2-tp2"."""
        tensor_parallel = f"-tp{self.tensor_parallel_size}" if self.tensor_parallel_size > 1 else ""
        return f"{self.nodes}x{self.ranks_per_node}{tensor_parallel}"

    @property
    def world_size(self) -> int:
        """All ranks; a mesh whose nodes are full has no holes in its numbers."""
        return self.nodes * self.ranks_per_node

    def on_one_node(self) -> Shape:
        """As many ranks on one node."""
        return Shape(1, self.world_size, self.tensor_parallel_size)

    def group(self, ranks: Sequence[int] | None = None) -> reference.Group:
        """The group of global `ranks`, or of all."""
        members = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        return reference.Group(members, self.ranks_per_node, self.tensor_parallel_size)

    def user_groups(self) -> dict[str, tuple[int, ...]]:
        """Subsets: uneven over the nodes, one rank of each of two nodes, and one node's alone."""
        world = self.world_size
        groups = {"uneven": (0, 1, 3), "across": (1, 2), "pair": (0, 1), "wide": (0, 1, 3, 6, 7), "rail": (1, 3, 5, 7)}
        return {name: ranks for name, ranks in groups.items() if max(ranks) < world and len(ranks) < world}

    def placements(self) -> dict[int, Placement]:
        """What `declare` declares, by layer."""
        world = self.world_size
        ranks = range(world)
        num_experts = 2 * world + 1
        return {
            0: linear_placement(num_experts, list(ranks)),
            1: Placement(num_experts, {rank: _strided(rank, world, num_experts) for rank in ranks}),
            2: Placement(world, {rank: tuple(sorted({rank, (rank + 1) % world})) for rank in ranks}),
            3: Placement(4, {rank: tuple(range(4)) for rank in ranks}),
        }

    def placement(self, layer: int | None) -> Placement | None:
        """The placement of `layer`, `None` where nothing is declared."""
        return None if layer is None else self.placements().get(layer)


def _strided(rank: int, world: int, num_experts: int) -> tuple[int, ...]:
    """Rank 0 holds nothing, the others every (world - 1)th expert; a rank alone holds all."""
    if world == 1:
        return tuple(range(num_experts))
    return tuple(range(rank - 1, num_experts, world - 1)) if rank else ()


def declare(comm: Communicator, shape: Shape, groups: Mapping[str, Sequence[int]]) -> None:
    """Makes `groups`, and the placements of `shape`; everything else stays undeclared."""
    for name, ranks in groups.items():
        comm.create_group(name, ranks)
    for layer, placement in shape.placements().items():
        mine = None if layer == 0 else placement.experts_of[comm.global_rank]
        comm.set_expert_placement(placement.num_experts, mine, layer=layer)


def in_group(comm: Communicator, group: str, work: Callable[..., Any], *args: Any) -> Any:
    """`work` with the group's communicator; `None` on ranks that are not in it."""
    if comm.global_rank not in comm.view.group(group).ranks:
        return None
    return work(comm.group(group), *args)


# Inputs ---------------------------------------------------------------------------------------------------------


def generator(seed: int, position: int) -> torch.Generator:
    """The source of everything random about one rank's input."""
    return torch.Generator().manual_seed(seed * 1009 + position)


def whole_numbers(shape: Sequence[int], dtype: torch.dtype, source: torch.Generator) -> torch.Tensor:
    """Small whole numbers, whose sums over 8 ranks are exact in every dtype that can be summed."""
    low = 0 if dtype in (torch.uint8, torch.bool) else -4
    high = 2 if dtype == torch.bool else 5
    return torch.randint(low, high, tuple(shape), generator=source).to(dtype)


def any_bytes(shape: Sequence[int], dtype: torch.dtype, source: torch.Generator) -> torch.Tensor:
    """Any bit pattern of the dtype, NaNs among them: what is only moved must arrive as it was."""
    if dtype == torch.bool:
        return whole_numbers(shape, dtype, source)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=source, dtype=torch.uint8)
    return raw.view(dtype).squeeze(-1)


def spaced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after each: not contiguous."""
    if tensor.dim() == 0:
        return tensor
    wide = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


@dataclass(frozen=True)
class Exchange:
    """One dispatch with its combine, for all ranks of a group.

    Attributes:
        tokens: rows of each rank.
        experts: ids that rows may want.
        ids: "random" (distinct), "holes" (some -1), "none" (all -1), "skewed" (the same experts), "repeated".
        extras: dtype and trailing shape of each extra tensor; `None` for no list at all.
        combine_dtype: `None`: the exchange is never combined.
        combine_hidden: columns of the results; 0: as many as the rows have.
        delay_ms: most milliseconds that a rank is late, at each of the two calls.
        router_logits: ``dispatch_router_logits``, with as many logits as `experts`.
        into_output: ``combine_into_output``, from ``allocate_combine_input`` where that gives a buffer.
        static: the output has `MAX_TOKENS` rows of every rank.
    """

    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    layer: int | None = UNDECLARED
    hidden: int = 16
    topk: int = 2
    ids: str = "random"
    dtype: torch.dtype = torch.bfloat16
    weights_dtype: torch.dtype = torch.float32
    ids_dtype: torch.dtype = torch.int64
    extras: tuple[tuple[torch.dtype, tuple[int, ...]], ...] | None = None
    combine_dtype: torch.dtype | None = torch.bfloat16
    combine_hidden: int = 0
    is_sequence_parallel: bool = True
    contiguous: bool = True
    delay_ms: int = 0
    router_logits: bool = False
    into_output: bool = False
    static: bool = False
    seed: int = 1

    def rows(self, position: int) -> reference.Rows:
        """The input of the rank at `position`; ranks of one tensor-parallel group share theirs by equal seeds."""
        source = generator(self.seed, position)
        tokens = self.tokens[position]
        shape = spaced if not self.contiguous else torch.Tensor.contiguous
        ids = self._ids(tokens, source)
        weights_shape = (tokens, len(self.experts)) if self.router_logits else ids.shape
        extras = None
        if self.extras is not None:
            extras = [shape(any_bytes((tokens, *trailing), dtype, source)) for dtype, trailing in self.extras]
        return reference.Rows(
            shape(any_bytes((tokens, self.hidden), self.dtype, source)),
            shape(any_bytes(weights_shape, self.weights_dtype, source)),
            shape(ids),
            extras,
        )

    def _ids(self, tokens: int, source: torch.Generator) -> torch.Tensor:
        scores = torch.rand(tokens, len(self.experts), generator=source)
        chosen = torch.tensor(self.experts, dtype=self.ids_dtype)[scores.argsort(dim=1)[:, : self.topk]]
        if self.ids == "holes":
            chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=source) < 0.4, -1)
        elif self.ids == "none":
            chosen = torch.full_like(chosen, -1)
        elif self.ids == "skewed":
            chosen = torch.tensor(self.experts[: self.topk], dtype=self.ids_dtype).repeat(tokens, 1)
        elif self.ids == "repeated":
            chosen = chosen[:, :1].repeat(1, self.topk)
        return chosen

    def results(self, hidden_states: torch.Tensor, global_rank: int) -> torch.Tensor:
        """What this rank's experts are taken to give: a value for each (row, column, rank), in the combine's dtype."""
        assert self.combine_dtype is not None
        raw = reference.as_bytes(hidden_states).flatten(1).to(torch.int64)
        digest = (raw * torch.arange(1, raw.shape[1] + 1)).sum(1, keepdim=True)
        columns = torch.arange(self.combine_hidden or self.hidden) * 40_503
        number = (digest * 2_654_435_761 + columns + global_rank * 7_919_000_003) % (1 << 24)
        if not self.combine_dtype.is_floating_point:
            return (number % 7 - (0 if self.combine_dtype == torch.uint8 else 3)).to(self.combine_dtype)
        return ((number - (1 << 23)) * torch.exp2((number % 7 - 25).to(torch.float64))).to(self.combine_dtype)


@dataclass
class Outcome:
    """What one rank got of one exchange."""

    parts: tuple[Any, ...]
    combined: torch.Tensor | None = None


def exchange(comm: Communicator, cases: Sequence[Exchange], positions: Sequence[int] | None = None) -> list[Outcome]:
    """Runs the exchanges one after the other; `positions` says whose input a rank takes, by default its own."""
    position = comm.rank if positions is None else positions[comm.rank]
    return [_exchange(comm, case, position) for case in cases]


def _exchange(comm: Communicator, case: Exchange, position: int) -> Outcome:
    lateness = torch.rand(2, generator=generator(time.monotonic_ns() % (1 << 31), position)) * case.delay_ms / 1000
    rows = case.rows(position)
    time.sleep(float(lateness[0]))  # another order of arrival every time
    outcome = Outcome(_dispatch(comm, case, rows))
    if case.combine_dtype is None:
        return outcome
    results = case.results(outcome.parts[0], comm.global_rank)
    time.sleep(float(lateness[1]))
    outcome.combined = _combine(comm, case, results, len(rows.topk_ids))
    return outcome


def _dispatch(comm: Communicator, case: Exchange, rows: reference.Rows) -> tuple[Any, ...]:
    hidden, weights, ids, extras = rows.hidden_states, rows.topk_weights, rows.topk_ids, rows.extra_tensors
    parallel = case.is_sequence_parallel
    if case.router_logits:
        return comm.dispatch_router_logits(hidden, weights, parallel, extras, layer=case.layer, static=case.static)
    return comm.dispatch(hidden, weights, ids, parallel, extra_tensors=extras, layer=case.layer, static=case.static)


def _combine(comm: Communicator, case: Exchange, results: torch.Tensor, tokens: int) -> torch.Tensor:
    if not case.into_output:
        return comm.combine(results if case.contiguous else spaced(results), case.is_sequence_parallel)
    buffer = comm.allocate_combine_input(results.shape, results.dtype, comm.device, case.is_sequence_parallel)
    if buffer is not None:
        results = buffer.copy_(results)
    output = torch.empty(tokens, results.shape[1], dtype=results.dtype)
    returned = comm.combine_into_output(results, output, case.is_sequence_parallel)
    assert returned is output
    return output


def quantized(comm: Communicator, case: Exchange, static: bool) -> tuple[list[Any], list[Any]]:
    """What a dispatch gives of rows as they are, and quantized, with an extra tensor."""
    rows = case.rows(comm.rank)
    source = generator(case.seed, comm.rank)
    values = torch.randn(rows.hidden_states.shape, generator=source) * torch.logspace(-6, 4, case.hidden)
    given = values.to(case.dtype), rows.topk_weights, rows.topk_ids
    marks = [torch.arange(len(rows.hidden_states), dtype=torch.int32)]
    plain = comm.dispatch(*given, True, marks, layer=case.layer, static=static)
    narrow = comm.dispatch(*given, True, marks, layer=case.layer, static=static, quantize="fp8")
    return [*plain[:3], *plain[3]], [*narrow[:3], *narrow[3]]


def quantize_wrongly(comm: Communicator, columns: int, quantize: str) -> str:
    """The error of a dispatch whose rows cannot be quantized so on rank 0."""
    rows = torch.ones(2, columns if comm.rank == 0 else 128)
    try:
        comm.dispatch(rows, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), quantize=quantize)
    except InvalidRequest as exc:
        return str(exc)
    return ""


def overlapped(comm: Communicator, cases: Sequence[Exchange]) -> list[Outcome]:
    """Runs the exchanges so that two are open at a time, each combined after the next one's dispatch."""
    outcomes: list[Outcome] = []
    open_ones: list[tuple[Exchange, Handle]] = []
    for case in cases:
        rows = case.rows(comm.rank)
        handle = comm.dispatch_async(
            rows.hidden_states,
            rows.topk_weights,
            rows.topk_ids,
            case.is_sequence_parallel,
            rows.extra_tensors,
            layer=case.layer,
            static=case.static,
        )
        open_ones.append((case, handle))
        if len(open_ones) == 2:
            outcomes.append(_finish(comm, *open_ones.pop(0)))
    return outcomes + [_finish(comm, *each) for each in open_ones]


def _finish(comm: Communicator, case: Exchange, handle: Handle) -> Outcome:
    received = handle.wait()
    results = case.results(received[0], comm.global_rank)
    return Outcome(received, comm.combine(results, case.is_sequence_parallel, handle=handle))


def repeated(case: Exchange, times: int) -> list[Exchange]:
    """The same case several times."""
    return [replace(case) for _ in range(times)]


# Collectives ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One collective call, the same on all ranks but for their inputs.

    Attributes:
        method: of the communicator.
        shapes: each rank's input; one for all, or one a rank.
        keywords: as they are passed on.
        whole: small whole numbers (for sums) rather than any bit pattern.
    """

    method: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    keywords: dict[str, Any] = field(default_factory=dict)
    whole: bool = False
    contiguous: bool = True
    seed: int = 1

    def input(self, position: int) -> torch.Tensor:
        """The input of the rank at `position`."""
        make = whole_numbers if self.whole else any_bytes
        tensor = make(self.shapes[position % len(self.shapes)], self.dtype, generator(self.seed, position))
        return tensor if self.contiguous else spaced(tensor)


def collective(comm: Communicator, calls: Sequence[Call]) -> list[Any]:
    """Makes the calls one after the other; the results, and whether each was the input itself."""
    outcomes = []
    for call in calls:
        tensor = call.input(comm.rank)
        result = getattr(comm, call.method)(tensor, **call.keywords)
        outcomes.append((result, result is tensor))
    return outcomes


def noise(position: int, numel: int = 1000, seed: int = 5) -> torch.Tensor:
    """Floats whose sum depends on the order of adding."""
    return torch.randn(numel, generator=generator(seed, position))


def late_sums(comm: Communicator, times: int, delay_ms: int) -> list[torch.Tensor]:
    """Sums the same noise again and again, each rank late by another time."""
    sums = []
    for _ in range(times):
        lateness = torch.rand(1, generator=generator(time.monotonic_ns() % (1 << 31), comm.rank))
        time.sleep(float(lateness) * delay_ms / 1000)
        sums.append(comm.all_reduce(noise(comm.rank)))
    return sums


def gather_list(comm: Communicator, sizes: list[int] | None, tensors: list[Call]) -> Any:
    return comm.all_gatherv([call.input(comm.rank) for call in tensors], sizes=sizes)


def scatter_into_output(comm: Communicator, call: Call, sizes: list[int]) -> tuple[Any, bool]:
    tensor = call.input(comm.rank)
    output = torch.full((sizes[comm.rank], 3), 77, dtype=tensor.dtype)
    returned = comm.reduce_scatterv_into_output(tensor, output, dim=0, sizes=sizes)
    return output, returned is output


def ring(comm: Communicator, calls: list[Call]) -> list[torch.Tensor]:
    received = []
    for call in calls:
        tensor = call.input(comm.rank)
        comm.send(tensor)
        received.append(comm.recv(tensor.shape, tensor.dtype))
    return received


def everyone_to_everyone(comm: Communicator, size: int, times: int) -> list[list[torch.Tensor]]:
    others = [position for position in range(comm.world_size) if position != comm.rank]
    for number in range(times):
        for dst in others:
            comm.send(torch.full((size,), comm.rank * 1000 + dst * 10 + number, dtype=torch.int32), dst)
    return [[comm.recv(size, torch.int32, src) for src in reversed(others)] for _ in range(times)]


def neighbours(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
    following, previous = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
    mine = torch.full((4,), comm.rank + 1)
    from_previous, from_following = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    works = comm.batch_isend_irecv(
        [
            SimpleNamespace(op=torch.distributed.irecv, tensor=from_previous, group_peer=previous),
            SimpleNamespace(op=torch.distributed.irecv, tensor=from_following, peer=comm.ranks[following]),
            SimpleNamespace(op=torch.distributed.isend, tensor=mine, group_peer=following),
            SimpleNamespace(op=torch.distributed.isend, tensor=mine * 100, peer=comm.ranks[previous]),
        ]
    )
    for work in works:
        work.wait()
    assert len(works) == 4
    return from_previous, from_following


def mixed(comm: Communicator) -> list[torch.Tensor]:
    """Collectives, point to point and exchanges, one after the other, without a barrier between."""
    values = []
    for number in range(5):
        one = torch.full((3,), float(comm.rank + number))
        values.append(comm.all_reduce(one.clone()))
        comm.send(one)
        values.append(comm.all_gather(one))
        ids = torch.full((2, 1), -1)
        comm.dispatch(torch.ones(2, 4), torch.ones(2, 1), ids, True, layer=UNDECLARED)
        values.append(comm.broadcast(one.clone(), src=comm.world_size - 1))
        values.append(comm.combine(torch.ones(2 * comm.world_size, 4), True))
        values.append(comm.recv(3, torch.float32))
    return values


def mixture(
    comm: Communicator,
    tokens: Sequence[int],
    experts: Sequence[int],
    layer: int,
    placement: Placement,
    is_sequence_parallel: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer of experts over the group, and the same layer in this process alone, for this rank's tokens."""
    sharing = 1 if is_sequence_parallel else comm.view.tensor_parallel_size
    source = generator(3, comm.rank // sharing)
    hidden_states = torch.randn(tokens[comm.rank], 24, generator=source)
    scores = torch.rand(tokens[comm.rank], len(experts), generator=source).softmax(-1)
    weights, chosen = scores.topk(min(2, len(experts)), dim=-1)
    ids = torch.tensor(experts)[chosen]
    received, received_weights, received_ids = comm.dispatch(
        hidden_states, weights, ids, is_sequence_parallel, layer=layer
    )
    mine = placement.experts_of[comm.global_rank]
    output = comm.combine(_experts(received, received_weights, received_ids, mine), is_sequence_parallel)
    return output, _experts(hidden_states, weights, ids, experts)


def _experts(
    hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, mine: Sequence[int]
) -> torch.Tensor:
    """The weighted sum of those experts of each row that are in `mine`."""
    output = torch.zeros_like(hidden_states)
    for expert in mine:
        matrix = torch.randn(24, 24, generator=generator(4, expert)) / 5
        weight = torch.where(ids == expert, weights, 0.0).sum(-1, keepdim=True)
        output += weight * torch.tanh(hidden_states @ matrix)
    return output
