"""The node service: one small daemon on every serving node. No torch here."""

from epmesh_server.node.service import run_node
from epmesh_server.node.settings import NodeSettings

__all__ = ["NodeSettings", "run_node"]
