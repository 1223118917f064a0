"""A test kit: `LocalMesh` runs a whole mesh of real processes on this machine. It needs ``epmesh[server]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epmesh_server.testing.local_mesh import LocalMesh

__all__ = ["LocalMesh"]


def __getattr__(name: str) -> Any:
    """Reaches the server package, which needs torch."""
    if name != "LocalMesh":
        raise AttributeError(f"module 'epmesh.testing' has no attribute {name!r}")
    try:
        from epmesh_server.testing.local_mesh import LocalMesh
    except ModuleNotFoundError as exc:
        if exc.name in {"torch", "epmesh_server"}:
            raise ImportError(
                "epmesh.testing needs the server package and torch; install them with: pip install 'epmesh[server]'"
            ) from exc
        raise
    globals()["LocalMesh"] = LocalMesh
    return LocalMesh
