"""`epmesh health`: whether a service answers and is ready, for health checks of containers. Prints one word."""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from epmesh.addresses import split_address
from epmesh.channels import open_channel
from epmesh.errors import NotReady, Unauthenticated, from_rpc_error
from epmesh.tls import TlsFiles
from epmesh.tls_refusals import explained

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


def check(address: str, tls: TlsFiles | None) -> None:
    """Returns where the service at `address` is ready: a coordinator that decides, a node that is registered.

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
        except grpc.RpcError as exc:
            raise explained(from_rpc_error(exc, address), address, tls) from exc
    if answer.status != _Response.SERVING:
        raise NotReady(f"{address} says {_Response.ServingStatus.Name(answer.status)}")
