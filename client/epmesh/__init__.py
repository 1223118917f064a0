"""epmesh: expert-parallel all-to-all as a service.

``epmesh.join`` makes this process a rank of a mesh; the `Communicator` it returns dispatches tokens to the ranks that
hold their experts and combines the results. Importing this package needs no torch; `join` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from epmesh.placement import Placement, linear_placement
from epmesh.router import AsyncRouter, Router
from epmesh.version import VERSION
from epmesh.view import GroupInfo, NodeInfo, RankInfo, RankMode, View

if TYPE_CHECKING:
    from epmesh_server.ranks.join import join

__version__ = VERSION

__all__ = [
    "AsyncRouter",
    "Communicator",
    "DeadlineExceeded",
    "EpmeshError",
    "ExpertUnavailable",
    "GroupInfo",
    "Handle",
    "InvalidRequest",
    "Mesh",
    "MeshUnavailable",
    "NodeInfo",
    "NotReady",
    "Overloaded",
    "PeerLost",
    "Placement",
    "RankInfo",
    "RankMode",
    "Router",
    "StaleEpoch",
    "Unauthenticated",
    "View",
    "connect",
    "join",
    "linear_placement",
]


def __getattr__(name: str) -> Any:
    """Reaches the server package for what needs torch: ``join``."""
    if name != "join":
        raise AttributeError(f"module 'epmesh' has no attribute {name!r}")
    try:
        from epmesh_server.ranks.join import join
    except ModuleNotFoundError as exc:
        if exc.name in {"torch", "epmesh_server"}:
            raise ImportError("epmesh.join needs torch; install it with: pip install 'epmesh[server]'") from exc
        raise
    globals()["join"] = join
    return join
