"""`epmesh status`: asks a node service or coordinator for the view, and shows it."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import grpc
from rich.console import Console, Group, RenderableType
from rich.live import Live

from epmesh.addresses import split_address
from epmesh.channels import open_channel
from epmesh.discovery import Mesh, connect
from epmesh.errors import DeadlineExceeded, EpmeshError, MeshUnavailable, from_rpc_error
from epmesh.tls import TlsFiles
from epmesh.tls_refusals import explained
from epmesh.v1 import discovery_service_pb2, discovery_service_pb2_grpc, rank_service_pb2, rank_service_pb2_grpc
from epmesh.view import View
from epmesh_server.cli.tables import view_as_dict, view_as_tables
from epmesh_server.cli.waits import read_waits

_TIMEOUT_S = 1.5
_NO_LIMIT = 1_000_000  # columns


def show(address: str, *, as_json: bool, watch: bool, tls: TlsFiles | None = None) -> None:
    """Prints the view that the service at `address` knows; with `watch` every later one too.

    Raises:
        InvalidRequest: `address` is no host:port.
        MeshUnavailable: nobody answers there.
        Unauthenticated: it wants another certificate, or one at all.
        NotReady: there is no view yet.
    """
    split_address(address, "address")
    with contextlib.suppress(KeyboardInterrupt):
        if watch:
            with connect(address, timeout_s=_TIMEOUT_S, tls=tls) as mesh:
                _show_all(mesh, authenticated=tls is not None, as_json=as_json)
        else:
            with open_channel(address, tls=tls) as channel:
                _show_one(channel, address, tls, as_json=as_json)


def _show_one(channel: grpc.Channel, address: str, tls: TlsFiles | None, *, as_json: bool) -> None:
    view = _get_view(discovery_service_pb2_grpc.DiscoveryServiceStub(channel), address, tls)
    waits = read_waits(view, partial(open_channel, tls=tls), _TIMEOUT_S)
    if as_json:
        _print_json([view], tls is not None, waits=waits.as_dict())
    else:
        # A line that is wider than the terminal is the terminal's to wrap: then it is still one when it is copied.
        _console().print(view_as_tables(view, _describe(channel), waits, authenticated=tls is not None), crop=False)


def _show_all(mesh: Mesh, *, authenticated: bool, as_json: bool) -> None:
    first = mesh.view  # of epoch 0 perhaps, which `watch` would leave out
    views = itertools.chain([first], mesh.watch(after_epoch=first.epoch))
    if as_json:
        _print_json(views, authenticated)
    else:
        _live(views, authenticated)


def _describe(channel: grpc.Channel) -> rank_service_pb2.DescribeNodeResponse | None:
    """What a node service says of itself; `None` where the address is a coordinator's."""
    stub = rank_service_pb2_grpc.RankServiceStub(channel)
    try:
        return stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError:
        return None


def _get_view(stub: discovery_service_pb2_grpc.DiscoveryServiceStub, address: str, tls: TlsFiles | None) -> View:
    try:
        answer = stub.GetView(discovery_service_pb2.GetViewRequest(), timeout=_TIMEOUT_S)
    except grpc.RpcError as exc:
        raise _typed(exc, address, tls) from exc
    return View.from_proto(answer.view)


def _typed(error: grpc.RpcError, address: str, tls: TlsFiles | None) -> EpmeshError:
    typed = explained(from_rpc_error(error, address), address, tls)
    if isinstance(typed, MeshUnavailable | DeadlineExceeded):
        reason = str(typed).rpartition("remote host: ")[2].removesuffix(" (UNAVAILABLE)")
        return MeshUnavailable(f"nobody answers at {address} ({reason}); is `epmesh serve` running there?")
    return typed


def _print_json(views: Iterable[View], authenticated: bool, **more: Any) -> None:
    for view in views:
        print(json.dumps({**view_as_dict(view), "authenticated": authenticated, **more}), flush=True)


def _live(views: Iterable[View], authenticated: bool) -> None:
    with Live(console=_console(), auto_refresh=False) as live:
        for view in views:
            live.update(_framed(view, authenticated), refresh=True)


def _console() -> Console:
    """As wide as the terminal; without one there is no width to keep to."""
    return Console(width=None if sys.stdout.isatty() else _NO_LIMIT)


def _framed(view: View, authenticated: bool) -> RenderableType:
    return Group(view_as_tables(view, authenticated=authenticated), "watching; Ctrl-C ends it")
