"""The command line: `epmesh serve`, `coordinator`, `status`, `demo`, `bench`. Only here the environment is read."""

from __future__ import annotations

import os

__all__ = ["main"]

# gRPC writes lines of its own to stderr for what becomes a typed error here, such as every refused handshake.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def main() -> None:
    """Runs the command of `sys.argv`; in an install without the service's packages it says which to add."""
    try:
        from epmesh_server.cli.app import main as run
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("epmesh"):
            raise
        raise SystemExit(f"epmesh: the command line needs {exc.name}; pip install 'epmesh[server]'") from None
    run()
