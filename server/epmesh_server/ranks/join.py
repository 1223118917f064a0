"""``epmesh.join``: this process becomes a rank."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterable

import torch

from epmesh.addresses import split_address
from epmesh.errors import InvalidRequest
from epmesh.v1 import membership_service_pb2, rank_service_pb2, view_pb2
from epmesh.view import RankMode, View
from epmesh_server.ranks.communicator import JoinedCommunicator
from epmesh_server.ranks.links import LinkHub, Peer
from epmesh_server.ranks.rank import Load, RankProcess
from epmesh_server.ranks.session import RankSession, describe_node

_log = logging.getLogger(__name__)


def join(
    address: str,
    *,
    world_size: int = 1,
    local_rank: int | None = None,
    device: str | torch.device = "cpu",
    num_experts: int | None = None,
    experts: Iterable[int] | None = None,
    layer: int | None = None,
    tensor_parallel_size: int = 1,
    max_tokens_per_rank: int | None = None,
    exchange_timeout_s: float = 30.0,
    timeout_s: float = 60.0,
    load: Load | None = None,
) -> JoinedCommunicator:
    """Joins the mesh through the node service of this host; returns in the first view with `world_size` ranks.

    Never touches torch's default process group. Leave with ``destroy()``, or use the result as a context manager.

    Args:
        address: host:port of this host's node service.
        world_size: ranks to wait for; the linear default placement is computed over them.
        local_rank: index on the node; default the lowest free one.
        device: where tensors live; ``cpu``.
        num_experts: logical experts of the model; `None`: every row goes to every rank.
        experts: those this rank holds; `None`: the linear default.
        layer: the declaration is for this layer only; `None`: for all without one of their own.
        tensor_parallel_size: ranks of one node that hold the same tokens; groups ``tp:k``.
        max_tokens_per_rank: most tokens a rank may dispatch in static mode.
        exchange_timeout_s: how long a call waits for other ranks.
        timeout_s: how long joining, `wait_ready` and changes of groups may take.
        load: ``load(added, removed)`` is called with expert ids when a placement changes what this rank holds.

    Returns:
        The communicator of the group ``ep``.

    Raises:
        MeshUnavailable: the node service or its coordinator did not answer, or too few ranks came, in time.
        InvalidRequest: an argument is wrong, or the local rank is taken.
    """
    split_address(address, "the node service's address")
    _check(world_size, device, num_experts, experts, tensor_parallel_size, exchange_timeout_s, timeout_s)
    deadline = time.monotonic() + timeout_s
    node = describe_node(address, timeout_s)
    incarnation = secrets.randbits(63) | 1
    sessions: list[RankSession] = []

    def report(peers: frozenset[Peer]) -> None:
        for session in sessions:
            session.report_unreachable(peers)

    hub = LinkHub(node.link_host, incarnation, report)
    declaration = membership_service_pb2.RankDeclaration(
        rank=view_pb2.Rank(
            incarnation=incarnation,
            device=str(device),
            mode=RankMode.EXCHANGE.value,
            link_endpoint=hub.endpoint,
        ),
        world_size=world_size,
        tensor_parallel_size=tensor_parallel_size,
        exchange_timeout_s=exchange_timeout_s,
    )
    if num_experts is not None:
        declaration.experts.add(
            layer=layer, num_experts=num_experts, experts=sorted(set(experts or ())), linear=experts is None
        )
    request = rank_service_pb2.OpenRank(local_rank=local_rank, pid=os.getpid(), declaration=declaration)
    try:
        session = RankSession(node, request, max(0.1, deadline - time.monotonic()))
    except BaseException:
        hub.close(linger_s=0)
        raise
    sessions.append(session)
    hub.identify(node.mesh_id, session.rank)
    rank = RankProcess(
        session, hub, incarnation, torch.device(device), exchange_timeout_s, timeout_s, max_tokens_per_rank, load
    )
    try:
        return _enter(rank, world_size, deadline)
    except BaseException:
        rank.abandon()
        raise


def _enter(rank: RankProcess, world_size: int, deadline: float) -> JoinedCommunicator:
    def ready(view: View) -> bool:
        return rank.is_in(view) and len(view.group("ep").ranks) >= world_size

    what = f"a view with rank {rank.session.rank} and {world_size} ranks in all"
    view = rank.session.wait_view(ready, max(0.0, deadline - time.monotonic()), what)
    _log.info("rank=%d epoch=%d join.complete: %d ranks", rank.session.rank, view.epoch, len(view.ranks))
    return rank.communicator("ep")


def _check(
    world_size: int,
    device: str | torch.device,
    num_experts: int | None,
    experts: Iterable[int] | None,
    tensor_parallel_size: int,
    exchange_timeout_s: float,
    timeout_s: float,
) -> None:
    if world_size < 1:
        raise InvalidRequest(f"world_size is {world_size}; it must be 1 or more")
    if _device_type(device) != "cpu":
        raise InvalidRequest(f"device {device}: this version exchanges CPU tensors only; use device='cpu'")
    if tensor_parallel_size < 1:
        raise InvalidRequest(f"tensor_parallel_size is {tensor_parallel_size}; it must be 1 or more")
    if exchange_timeout_s <= 0 or timeout_s <= 0:
        raise InvalidRequest(f"exchange_timeout_s={exchange_timeout_s}, timeout_s={timeout_s}; both must be above 0")
    if experts is not None and num_experts is None:
        raise InvalidRequest("experts were given without num_experts")
    if num_experts is not None and num_experts < 1:
        raise InvalidRequest(f"num_experts is {num_experts}; it must be 1 or more")


def _device_type(device: str | torch.device) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as exc:
        raise InvalidRequest(f"device {device!r} is none: {exc}") from exc
