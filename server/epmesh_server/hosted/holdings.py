"""What a local rank holds by the newest view: what its next process declares."""

from __future__ import annotations

import grpc

from epmesh.channels import open_channel
from epmesh.v1 import discovery_service_pb2, discovery_service_pb2_grpc, rank_service_pb2, rank_service_pb2_grpc
from epmesh.view import View

_TIMEOUT_S = 2.0


def held_in_view(address: str, local_rank: int, num_experts: int | None) -> tuple[int, ...] | None:
    """The experts of `local_rank` of the node service at `address`; `None` where no view says, or nobody answers."""
    with open_channel(address) as channel:
        ranks = rank_service_pb2_grpc.RankServiceStub(channel)
        views = discovery_service_pb2_grpc.DiscoveryServiceStub(channel)
        try:
            node = ranks.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=_TIMEOUT_S)
            answer = views.GetView(discovery_service_pb2.GetViewRequest(), timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return None
    view = View.from_proto(answer.view)
    return entry(view, node.slot * view.stride + local_rank, num_experts) if node.registered else None


def entry(view: View, rank: int, num_experts: int | None) -> tuple[int, ...] | None:
    """The experts of global rank `rank` by the placement of `view`, if that is one of `num_experts`."""
    placement = view.placement(None)
    if placement is None or placement.num_experts != num_experts:
        return None
    return placement.experts_of.get(rank)
