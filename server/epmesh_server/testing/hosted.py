"""Hosted ranks as children of a local mesh: the same processes that a node service would keep."""

from __future__ import annotations

import sys
import time

from epmesh.errors import MeshUnavailable
from epmesh_server.hosted.messages import Joined
from epmesh_server.hosted.options import HostedRank
from epmesh_server.hosted.rank_main import rank_main
from epmesh_server.processes.child import Child
from epmesh_server.processes.raised import Raised
from epmesh_server.testing.rank_runner import RankSettings

_DRAIN_S = 0.3  # a mesh that is over is over


def start_hosted(rank: int, settings: RankSettings, address: str, world_size: int, factory: str) -> Child:
    """Starts the process of global rank `rank`, which joins at `address` by itself; `factory` makes its experts."""
    hosted = HostedRank(
        address=address,
        local_rank=settings.local_rank,
        experts=factory,
        num_experts=settings.num_experts,
        held=settings.experts,
        world_size=world_size,
        tensor_parallel_size=settings.tensor_parallel_size,
        max_tokens_per_rank=settings.max_tokens_per_rank,
        exchange_timeout_s=settings.exchange_timeout_s,
        device=settings.device,
        drain_s=_DRAIN_S,
        path=tuple(sys.path),
    )
    return Child(f"rank-{rank}", rank_main, hosted)


def await_joined(child: Child, deadline: float) -> int:
    """The epoch in which a hosted rank joined; raises why it did not."""
    if not child.pipe.poll(max(0.0, deadline - time.monotonic())):
        raise MeshUnavailable(f"{child.name} did not join in time")
    try:
        message = child.receive()
    except EOFError:
        raise MeshUnavailable(f"{child.name} ended while it was starting") from None
    if isinstance(message, Raised):
        raise message.error(child.name)
    assert isinstance(message, Joined)
    return message.epoch
