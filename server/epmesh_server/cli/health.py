"""`epmesh health`: whether a service answers and is ready, for health checks of containers. Prints one word."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from epmesh.addresses import split_address
from epmesh.channels import open_channel
from epmesh.discovery import connect
from epmesh.errors import NotReady, Unauthenticated, from_rpc_error
from epmesh.tls import TlsFiles
from epmesh.tls_refusals import explained
from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from epmesh.view import RankMode, View

_TIMEOUT_S = 2.0
_Response = health_pb2.HealthCheckResponse


def check_alive(address: str, tls: TlsFiles | None) -> None:
    """Returns where something answers at `address`, ready or not: what starting it anew could not better.

    Raises:
        InvalidRequest: `address` is no host:port.
        MeshUnavailable: nobody answers there, or what listens there stands still.
        DeadlineExceeded: it takes connections and answers no call.
    """
    with contextlib.suppress(NotReady, Unauthenticated):
        check(address, tls)


def check(address: str, tls: TlsFiles | None, ranks: int = 0) -> None:
    """Returns where the service at `address` is ready: a coordinator that decides, a node that is registered.

    Args:
        ranks: so many of the node's ranks must be in the view besides, and answer routers if that is their mode.

    Raises:
        InvalidRequest: `address` is no host:port.
        NotReady: it answers, and is not ready yet.
        MeshUnavailable: nobody answers there, or what listens there stands still.
        DeadlineExceeded: it takes connections and answers no call.
        Unauthenticated: it wants another certificate, or one at all.
    """
    split_address(address, "address")
    with open_channel(address, tls=tls) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are unknown to the stubs
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
            if answer.status == _Response.SERVING and ranks:
                node = rank_service_pb2_grpc.RankServiceStub(channel).DescribeNode(
                    rank_service_pb2.DescribeNodeRequest(), timeout=_TIMEOUT_S
                )
        except grpc.RpcError as exc:
            raise explained(from_rpc_error(exc, address), address, tls) from exc
    if answer.status != _Response.SERVING:
        raise NotReady(f"{address} says {_Response.ServingStatus.Name(answer.status)}")
    if ranks:
        with connect(address, timeout_s=_TIMEOUT_S, tls=tls) as mesh:
            found = ready_ranks(mesh.view, node.incarnation)
        if found < ranks:
            raise NotReady(f"{address} has {found} of {ranks} ranks")


def ready_ranks(view: View, incarnation: int) -> int:
    """How many ranks of the node with that incarnation do what they are there for."""
    ranks = [rank for node in view.nodes if node.incarnation == incarnation for rank in node.ranks]
    return sum(rank.mode is not RankMode.SERVE or bool(rank.front_endpoint) for rank in ranks)
