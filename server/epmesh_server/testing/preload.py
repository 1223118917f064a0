"""What the children of a local mesh need, imported once for all."""

from __future__ import annotations

from epmesh_server.processes.fork_server import start_fork_server

_MODULES = (
    "epmesh_server.coordinator",
    "epmesh_server.hosted.rank_main",
    "epmesh_server.node",
    "epmesh_server.ranks.driven",
    "epmesh_server.testing.rank_runner",
    "epmesh_server.testing.services",
)


def start_mesh_fork_server() -> bool:
    """Starts the fork server if there is none; says whether there was none."""
    return start_fork_server(_MODULES)
