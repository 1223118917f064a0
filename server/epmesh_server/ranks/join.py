"""``epmesh.join``: this process becomes a rank."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from epmesh.addresses import split_address
from epmesh.channels import UNIX_PREFIX
from epmesh.errors import InvalidRequest
from epmesh.tls import Tls, TlsFiles, tls_files
from epmesh.v1 import membership_service_pb2, rank_service_pb2, view_pb2
from epmesh.view import RankMode, View
from epmesh_server.ranks.checked_communicator import Load
from epmesh_server.ranks.communicator import JoinedCommunicator
from epmesh_server.ranks.curve_door import CurveDoor
from epmesh_server.ranks.link_watcher import Peer
from epmesh_server.ranks.links import LinkHub
from epmesh_server.ranks.rank import RankProcess
from epmesh_server.ranks.session import RankSession, describe_node

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What a process says when it becomes a rank; the arguments of `join`, checked."""

    address: str
    mode: RankMode = RankMode.EXCHANGE
    world_size: int = 1
    local_rank: int | None = None
    device: str = "cpu"
    num_experts: int | None = None
    experts: tuple[int, ...] | None = None
    layer: int | None = None
    tensor_parallel_size: int = 1
    max_tokens_per_rank: int | None = None
    exchange_timeout_s: float = 30.0
    timeout_s: float = 60.0
    load: Load | None = None
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        if not self.address.startswith(UNIX_PREFIX):
            split_address(self.address, "the node service's address")
        _check_device(self.device, self.mode)
        self._check_numbers()
        limits = self.exchange_timeout_s, self.timeout_s
        if not all(math.isfinite(limit) and limit > 0 for limit in limits):
            raise InvalidRequest(f"exchange_timeout_s={limits[0]}, timeout_s={limits[1]}; both must be above 0")
        if self.experts is not None and self.num_experts is None:
            raise InvalidRequest("experts were given without num_experts")
        for expert in self.experts or ():
            if not 0 <= expert < (self.num_experts or 0):
                raise InvalidRequest(f"experts has {expert}; ids are 0 to {(self.num_experts or 0) - 1}")

    def _check_numbers(self) -> None:
        """All of them go into messages as unsigned numbers of 32 bits."""
        least = {"world_size": 1, "local_rank": 0, "num_experts": 1, "layer": 0, "tensor_parallel_size": 1}
        for name, low in (*least.items(), ("max_tokens_per_rank", 1)):
            value = getattr(self, name)
            if value is not None and not low <= value < 1 << 31:
                raise InvalidRequest(f"{name} is {value}; it must be {low} or more, and below 2**31")

    def declaration(
        self, incarnation: int, link_endpoint: str, front_endpoint: str, curve_key: bytes = b""
    ) -> membership_service_pb2.RankDeclaration:
        """What the node service and the coordinator hear of the rank."""
        rank = view_pb2.Rank(
            incarnation=incarnation,
            device=self.device,
            mode=self.mode.value,
            link_endpoint=link_endpoint,
            front_endpoint=front_endpoint,
            curve_key=curve_key,
        )
        declaration = membership_service_pb2.RankDeclaration(
            rank=rank,
            world_size=self.world_size,
            tensor_parallel_size=self.tensor_parallel_size,
            exchange_timeout_s=self.exchange_timeout_s,
        )
        if self.num_experts is not None:
            declaration.experts.add(
                layer=self.layer,
                num_experts=self.num_experts,
                experts=sorted(set(self.experts or ())),
                linear=self.experts is None,
            )
        return declaration

    def satisfied_by(self, view: View, rank: int) -> bool:
        """Whether `view`, which has global rank `rank`, is one in which it can begin.

        A rank that serves needs the others only for the linear default: once it has experts, it can answer.
        """
        if self.mode is RankMode.EXCHANGE:
            return len(view.group("ep").ranks) >= self.world_size
        placement = view.placement(self.layer)
        serving = sum(info.mode is RankMode.SERVE for info in view.ranks.values())
        return serving >= self.world_size or (placement is not None and rank in placement.experts_of)


def join(
    address: str,
    *,
    mode: RankMode | str = RankMode.EXCHANGE,
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
    tls: Tls | None = None,
) -> JoinedCommunicator:
    """Joins the mesh through the node service of this host; returns in the first view with `world_size` ranks.

    Never touches torch's default process group. Leave with ``destroy()``, or use the result as a context manager.

    Args:
        address: host:port of this host's node service, or ``unix:PATH`` of the socket ``grpc.sock`` in its
            ``--runtime-dir``, which needs no certificate.
        mode: ``exchange``, or ``serve`` for a rank that answers routers from the start (see ``serve()``).
        world_size: ranks in the same mode to wait for; the linear default placement is computed over them.
        local_rank: index on the node; default the lowest free one.
        device: where tensors live: ``cpu``, or ``cuda:N``, on a node whose ranks all have GPUs.
        num_experts: logical experts of the model; `None`: every row goes to every rank.
        experts: those this rank holds; `None`: the linear default.
        layer: the declaration is for this layer only; `None`: for all without one of their own.
        tensor_parallel_size: ranks of one node that hold the same tokens; groups ``tp:k``.
        max_tokens_per_rank: most tokens a rank may dispatch in static mode.
        exchange_timeout_s: how long a call waits for other ranks.
        timeout_s: how long joining, `wait_ready` and changes of groups may take.
        load: ``load(added, removed)`` is called with expert ids when a placement changes what this rank holds.
        tls: what this process shows itself with, where the mesh is secured and `address` is host:port; see `connect`.

    Returns:
        The communicator of the group ``ep``. Ranks that serve are not in it: they get that of ``world``, in which they
        may serve, see the view and wait for later ones, but make no collective call.

    Raises:
        MeshUnavailable: the node service or its coordinator did not answer, or too few ranks came, in time.
        Unauthenticated: the node service refuses this process's certificate, or its own cannot be believed.
        InvalidRequest: an argument is wrong, or the local rank is taken.
    """
    options = RankOptions(
        address=address,
        mode=_mode(mode),
        world_size=world_size,
        local_rank=local_rank,
        device=str(device),
        num_experts=num_experts,
        experts=None if experts is None else tuple(experts),
        layer=layer,
        tensor_parallel_size=tensor_parallel_size,
        max_tokens_per_rank=max_tokens_per_rank,
        exchange_timeout_s=exchange_timeout_s,
        timeout_s=timeout_s,
        load=load,
        tls=tls_files(tls),
    )
    return become_rank(options)


def become_rank(
    options: RankOptions,
    front_endpoint: str = "",
    *,
    door: CurveDoor | None = None,
    within_s: float | None = None,
) -> JoinedCommunicator:
    """What `join` does.

    Args:
        front_endpoint: where the rank takes FrontRequest messages already.
        door: that the front has; `None`: one is made where the node uses CURVE.
        within_s: how long joining may take; `None`: ``options.timeout_s``.
    """
    timeout_s = options.timeout_s if within_s is None else within_s
    deadline = time.monotonic() + timeout_s
    node = describe_node(options.address, timeout_s, options.tls)
    incarnation = secrets.randbits(63) | 1
    sessions: list[RankSession] = []

    def report(peers: frozenset[Peer]) -> None:
        for session in sessions:
            session.report_unreachable(peers)

    if door is None and node.curve:
        door = CurveDoor(node.zap_socket)
    hub = LinkHub(node.link_host, incarnation, report, door)
    key = door.pair.public if door is not None else b""
    declaration = options.declaration(incarnation, hub.endpoint, front_endpoint, key)
    request = rank_service_pb2.OpenRank(local_rank=options.local_rank, pid=os.getpid(), declaration=declaration)
    try:
        session = RankSession(node, request, max(0.1, deadline - time.monotonic()), door)
    except BaseException:
        hub.close(linger_s=0)
        raise
    sessions.append(session)
    hub.identify(node.mesh_id, session.rank, session.standing)
    rank = RankProcess(
        session=session,
        hub=hub,
        incarnation=incarnation,
        device=torch.device(options.device),
        exchange_timeout_s=options.exchange_timeout_s,
        timeout_s=options.timeout_s,
        max_tokens_per_rank=options.max_tokens_per_rank,
        load=options.load,
        mode=options.mode,
        front_endpoint=front_endpoint,
        door=door,
    )
    try:
        return _enter(rank, options, deadline)
    except BaseException:
        rank.abandon()
        raise


def _enter(rank: RankProcess, options: RankOptions, deadline: float) -> JoinedCommunicator:
    number = rank.session.rank

    def ready(view: View) -> bool:
        return rank.is_in(view) and options.satisfied_by(view, number)

    what = f"a view with rank {number} and {options.world_size} ranks in mode {options.mode.name.lower()}"
    view = rank.session.wait_view(ready, max(0.0, deadline - time.monotonic()), what)
    _log.info("rank=%d epoch=%d join.complete: %d ranks", number, view.epoch, len(view.ranks))
    return rank.communicator(rank.home)


def _mode(mode: RankMode | str) -> RankMode:
    if isinstance(mode, RankMode):
        return mode
    try:
        return RankMode[mode.upper()]
    except KeyError:
        raise InvalidRequest(f"mode is {mode!r}; it must be 'exchange' or 'serve'") from None


def _check_device(device: str, mode: RankMode) -> None:
    """Refuses devices that are not there, and what GPUs cannot do yet."""
    kind = _device_type(device)
    if kind == "cpu":
        return
    if kind != "cuda":
        raise InvalidRequest(f"device {device}: use 'cpu', or 'cuda:N' for a GPU")
    found, index = torch.cuda.device_count(), torch.device(device).index
    if not found:
        raise InvalidRequest(f"device {device}: there is no CUDA device here; use device='cpu'")
    if index not in range(found):
        raise InvalidRequest(f"device {device}: name one of cuda:0 to cuda:{found - 1}")
    if mode is RankMode.SERVE:
        raise InvalidRequest(f"device {device}: ranks in mode 'serve' exchange CPU tensors only; use device='cpu'")
    if importlib.util.find_spec("triton") is None:
        raise InvalidRequest(f"device {device}: the kernels need Triton, which is not installed; pip install triton")


def _device_type(device: str) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as exc:
        raise InvalidRequest(f"device {device!r} is none: {exc}") from exc
