"""The command line: `epmesh serve`, `coordinator`, `status`, `demo`. The one place that reads the environment."""

from epmesh_server.cli.app import main

__all__ = ["main"]
