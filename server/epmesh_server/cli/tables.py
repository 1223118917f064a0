"""A view as a person reads it, and as a program does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from epmesh.addresses import is_loopback, split_address
from epmesh.placement import Placement
from epmesh.v1 import rank_service_pb2
from epmesh.view import NodeInfo, RankInfo, RankMode, View
from epmesh_server.cli.waits import Waits

_MAX_LAYERS_SHOWN = 4
_MAX_NODES_NAMED = 8
_NOTHING = "-"


def view_as_dict(view: View) -> dict[str, Any]:
    """The view for `--json`; layers of placements are `null` for "every layer without its own"."""
    return {
        "mesh_id": view.mesh_id,
        "epoch": view.epoch,
        "membership_epoch": view.membership_epoch,
        "stride": view.stride,
        "tensor_parallel_size": view.tensor_parallel_size,
        "nodes": [_node_as_dict(view, node) for node in view.nodes],
        "groups": [
            {
                "name": group.name,
                "id": group.group_id,
                "ranks": list(group.ranks),
                "declared_ranks": list(group.declared_ranks),
                "sequence": group.sequence,
                "completed": group.completed,
            }
            for group in view.groups
        ],
        "placements": [
            {
                "layer": layer,
                "num_experts": placement.num_experts,
                "experts_without_holder": orphans(view, placement),
            }
            for layer, placement in _by_layer(view)
        ],
    }


def view_as_tables(
    view: View,
    node: rank_service_pb2.DescribeNodeResponse | None = None,
    waits: Waits | None = None,
    *,
    authenticated: bool = True,
) -> RenderableType:
    """The view for a terminal.

    Args:
        node: the node service that was asked, where it was one.
        waits: who is slow.
        authenticated: whether the service that was asked wants to know who calls.
    """
    head = Text.assemble(
        ("epoch ", "dim"), str(view.epoch), ("   nodes ", "dim"), str(len(view.nodes)), ("   ranks ", "dim"),
        str(len(view.ranks)), ("   stride ", "dim"), str(view.stride), ("   mesh ", "dim"), view.mesh_id,
    )  # fmt: skip
    parts: list[RenderableType] = [head, _NoNarrower(_rank_table(view, waits)), _group_table(view)]
    parts += [Text(line, style="bold red") for line in _warnings(view, node)]
    if waits is not None and waits.silent:
        names = ", ".join(waits.silent[:_MAX_NODES_NAMED]) + (", ..." if len(waits.silent) > _MAX_NODES_NAMED else "")
        parts.append(Text(f"did not answer for whom their ranks wait: {names}", "yellow"))
    if not authenticated and (open_to_all := exposed(view)):
        parts.append(
            Text(f"nothing authenticates callers at {', '.join(open_to_all)} (--insecure): anybody may join", "yellow")
        )
    return Group(*parts)


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 8`` for 0, 1, 2, 3 and 8; ascending input."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans) or _NOTHING


def orphans(view: View, placement: Placement, mode: RankMode | None = None) -> list[int]:
    """Experts that no living rank holds; of those in `mode`, where one is given."""
    living = {rank for rank, info in view.ranks.items() if mode in (None, info.mode)}
    return [expert for expert, ranks in enumerate(placement.holders) if not any(rank in living for rank in ranks)]


def exposed(view: View) -> list[str]:
    """Addresses of nodes that other hosts may reach."""
    return [node.address for node in view.nodes if not is_loopback(split_address(node.address, "address")[0])]


class _NoNarrower:
    """A table whose columns keep their least widths: on a terminal that is too narrow, `rich` would drop some."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = self._table.columns
        least = sum(column.min_width or 0 for column in columns) + 2 * len(columns)  # a space and a border between
        yield from console.render(self._table, options.update(width=max(options.max_width, least)))


def _rank_table(view: View, waits: Waits | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("slot", justify="right", no_wrap=True, min_width=len("slot"))
    table.add_column("node", overflow="fold", min_width=6)
    _add_whole_column(table, "address", [node.address for node in view.nodes])
    table.add_column("rank", justify="right", no_wrap=True, min_width=len("rank"))
    table.add_column("device", overflow="fold", min_width=len("device"))
    table.add_column("mode", overflow="fold", min_width=len("exchange"))
    _add_whole_column(table, "front", map(_front, view.ranks.values()))
    if waits is not None:
        table.add_column("waited for", justify="right", no_wrap=True, min_width=len("waited for"))
    table.add_column("experts", overflow="fold", min_width=len("experts"))
    for node in view.nodes:
        first = [str(node.slot), node.node_id, node.address]
        for info in node.ranks:
            told = [] if waits is None else [_share(waits, info.rank)]
            cells = str(info.rank), info.device, _mode(info), _front(info), *told, _experts(view, info.rank)
            table.add_row(*first, *cells)
            first = ["", "", ""]
        if not node.ranks:
            table.add_row(*first, *[_NOTHING] * (len(table.columns) - len(first)))
    return table


def _add_whole_column(table: Table, name: str, values: Iterable[str]) -> None:
    """A column whose values can be copied at any width: none is cut or broken across lines."""
    table.add_column(name, no_wrap=True, min_width=max(map(cell_len, values), default=0))


def _group_table(view: View) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("group")
    table.add_column("id", justify="right")
    table.add_column("ranks", overflow="fold")
    table.add_column("missing", overflow="fold")
    table.add_column("exchanges", justify="right")
    for group in view.groups:
        missing = ranges(sorted(set(group.declared_ranks) - set(group.ranks)))
        ranks = ranges(group.ranks)
        table.add_row(group.name, str(group.group_id), ranks, missing, str(group.sequence))
    return table


def _front(info: RankInfo) -> str:
    return info.front_endpoint.removeprefix("tcp://") or _NOTHING


def _share(waits: Waits, rank: int) -> str:
    """The part of their time that the others waited for a rank; what rounds to nothing is nothing."""
    percent = round(100 * waits.shares.get(rank, 0.0))
    return f"{percent} %" if percent else _NOTHING


def _mode(info: RankInfo) -> str:
    """The mode; a rank that serves and has no front is getting ready, or leaving."""
    idle = info.mode is RankMode.SERVE and not info.front_endpoint
    return info.mode.name.lower() + (" (no rows yet)" if idle else "")


def _experts(view: View, rank: int) -> str:
    shown = [
        ranges(placement.experts_of.get(rank, ())) + (f" of layer {layer}" if layer is not None else "")
        for layer, placement in _by_layer(view)
    ]
    more = len(shown) - _MAX_LAYERS_SHOWN
    return "; ".join([*shown[:_MAX_LAYERS_SHOWN], *([f"{more} more layers"] if more > 0 else [])]) or _NOTHING


def _warnings(view: View, node: rank_service_pb2.DescribeNodeResponse | None) -> list[str]:
    lines = [] if view.epoch else ["no view yet: no coordinator has committed one"]
    if node is not None and not node.coordinator_reachable:
        who = f"the coordinator at {node.coordinator_address} is out of reach of {node.node_id}"
        lines.append(f"{who}: nobody can join or leave, exchanges go on")
    for layer, placement in _by_layer(view):
        where = "" if layer is None else f" of layer {layer}"
        missing = orphans(view, placement)
        if missing:
            lines.append(f"no living rank holds experts {ranges(missing)}{where}")
        for mode, who in ((RankMode.EXCHANGE, "exchanges"), (RankMode.SERVE, "serves")):
            lacking = sorted(set(orphans(view, placement, mode)) - set(missing))
            if lacking and len(orphans(view, placement, mode)) < placement.num_experts:
                lines.append(f"no rank that {who} holds experts {ranges(lacking)}{where}")
    return lines


def _node_as_dict(view: View, node: NodeInfo) -> dict[str, Any]:
    return {
        "slot": node.slot,
        "node_id": node.node_id,
        "address": node.address,
        "ranks": [
            {
                "rank": info.rank,
                "device": info.device,
                "mode": info.mode.name.lower(),
                "link_endpoint": info.link_endpoint,
                "front_endpoint": info.front_endpoint,
                "experts": [
                    {"layer": layer, "experts": list(placement.experts_of[info.rank])}
                    for layer, placement in _by_layer(view)
                    if info.rank in placement.experts_of
                ],
            }
            for info in node.ranks
        ],
    }


def _by_layer(view: View) -> list[tuple[int | None, Placement]]:
    """Placements, the one for all layers first."""
    return sorted(view.placements.items(), key=lambda item: -1 if item[0] is None else item[0])
