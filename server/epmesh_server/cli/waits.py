"""Who is slow: for whom the ranks of a mesh waited lately, asked of every node service."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import grpc

from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from epmesh.view import View

_MAX_NODES = 256
_AT_ONCE = 16


@dataclass(frozen=True)
class Waits:
    """How much ranks waited for each other in the last seconds.

    Attributes:
        window_s: how far back this looks, at most.
        shares: by global rank, the part of their time that the other ranks of the mesh waited for it, 0 to 1.
        silent: node ids of nodes that did not answer.
    """

    window_s: float
    shares: dict[int, float]
    silent: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: the most waited for first."""
        ordered = sorted(self.shares.items(), key=lambda item: (-item[1], item[0]))
        return {
            "window_s": round(self.window_s, 3),
            "waited_for": [{"rank": rank, "share": round(share, 4)} for rank, share in ordered],
            "silent_nodes": list(self.silent),
        }


def read_waits(view: View, open_channel: Callable[[str], grpc.Channel], timeout_s: float) -> Waits:
    """Asks the node services of a view, the first 256 of them; those that do not answer are named."""
    nodes = view.nodes[:_MAX_NODES]

    def ask(address: str) -> list[rank_service_pb2.RecentWaits] | None:
        with open_channel(address) as channel:
            try:
                stub = rank_service_pb2_grpc.RankServiceStub(channel)
                return list(stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=timeout_s).recent_waits)
            except grpc.RpcError:
                return None

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(ask, [node.address for node in nodes]))
    silent = tuple(node.node_id for node, answer in zip(nodes, answers, strict=True) if answer is None)
    return replace(summed(one for answer in answers for one in answer or ()), silent=silent)


def summed(reports: Iterable[rank_service_pb2.RecentWaits]) -> Waits:
    """What the reports of all ranks say together."""
    known = [report for report in reports if report.window_s > 0]
    waited: dict[int, float] = defaultdict(float)
    for report in known:
        for one in report.waited_for:
            waited[one.rank] += one.seconds
    total_s = sum(report.window_s for report in known)
    own_s = {report.rank: report.window_s for report in known}
    shares = {
        rank: min(1.0, seconds / (total_s - own_s.get(rank, 0.0)))
        for rank, seconds in waited.items()
        if total_s > own_s.get(rank, 0.0)
    }
    return Waits(max(own_s.values(), default=0.0), shares)
