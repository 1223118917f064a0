"""The coordinator: the process that decides views. No torch."""

from epmesh_server.coordinator.server import run_coordinator
from epmesh_server.coordinator.settings import CoordinatorSettings

__all__ = ["CoordinatorSettings", "run_coordinator"]
