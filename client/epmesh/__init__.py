"""epmesh: expert-parallel all-to-all as a service.

``epmesh.join`` makes this process a rank of a mesh; the `Communicator` it returns dispatches tokens to the ranks that
hold their experts and combines the results. `DeviceCommunicator` does so over process groups of the caller's. Importing
this package needs no torch; those two do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from epmesh.attach import attach
from epmesh.communicator import Communicator, Handle
from epmesh.discovery import Mesh, connect
from epmesh.errors import (
    DeadlineExceeded,
    EpmeshError,
    ExpertUnavailable,
    InvalidRequest,
    MeshUnavailable,
    NotReady,
    Overloaded,
    PeerLost,
    StaleEpoch,
    Unauthenticated,
)
from epmesh.expert_major import ExpertMajor, group_by_expert
from epmesh.placement import Placement, linear_placement
from epmesh.router import AsyncRouter, Router
from epmesh.router_stats import NodeLatency, RouterStats
from epmesh.tls import TlsFiles
from epmesh.version import VERSION
from epmesh.view import GroupInfo, NodeInfo, RankInfo, RankMode, View

if TYPE_CHECKING:
    from epmesh_server.ranks.device_communicator import DeviceCommunicator
    from epmesh_server.ranks.join import join

__version__ = VERSION

__all__ = [
    "AsyncRouter",
    "Communicator",
    "DeadlineExceeded",
    "DeviceCommunicator",
    "EpmeshError",
    "ExpertMajor",
    "ExpertUnavailable",
    "GroupInfo",
    "Handle",
    "InvalidRequest",
    "Mesh",
    "MeshUnavailable",
    "NodeInfo",
    "NodeLatency",
    "NotReady",
    "Overloaded",
    "PeerLost",
    "Placement",
    "RankInfo",
    "RankMode",
    "Router",
    "RouterStats",
    "StaleEpoch",
    "TlsFiles",
    "Unauthenticated",
    "View",
    "attach",
    "connect",
    "group_by_expert",
    "join",
    "linear_placement",
]


_WITH_TORCH = {
    "DeviceCommunicator": "epmesh_server.ranks.device_communicator",
    "join": "epmesh_server.ranks.join",
}


def __getattr__(name: str) -> Any:
    """Reaches the server package for what needs torch."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'epmesh' has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(_WITH_TORCH[name]), name)
    except ModuleNotFoundError as exc:
        if exc.name in {"torch", "epmesh_server"}:
            raise ImportError(f"epmesh.{name} needs torch; install it with: pip install 'epmesh[server]'") from exc
        raise
    globals()[name] = found
    return found
