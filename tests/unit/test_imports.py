"""Imports go one way, and what decides does no I/O."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "client" / "epmesh"
SERVER = ROOT / "server" / "epmesh_server"
WITHOUT_IO = [
    *sorted((SERVER / "membership").glob("*.py")),
    *sorted((SERVER / "doctor" / "checks").glob("*.py")),
    *(CLIENT / f"{name}.py" for name in ("layout", "placement", "rotation")),
]
IO = {
    "asyncio",
    "epmesh_server.node",
    "grpc",
    "multiprocessing",
    "os",
    "selectors",
    "socket",
    "threading",
    "time",
    "zmq",
}


def imported(path: Path, *, lazily: bool) -> Iterator[str]:
    """Names of the modules that the module at `path` imports; with `lazily` those inside functions too."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
        elif lazily or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo.extend(ast.iter_child_nodes(node))


def under(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("path", sorted(CLIENT.glob("*.py")), ids=lambda path: path.stem)
def test_client_imports_neither_server_nor_torch_when_it_is_imported(path: Path) -> None:
    assert [name for name in imported(path, lazily=False) if under(name, {"epmesh_server", "torch"})] == []


@pytest.mark.parametrize("path", WITHOUT_IO, ids=lambda path: path.stem)
def test_what_decides_does_no_io(path: Path) -> None:
    assert [name for name in imported(path, lazily=True) if under(name, IO)] == []


@pytest.mark.parametrize("package", ["epmesh_server.coordinator", "epmesh_server.node", "epmesh_server.cli"])
def test_processes_that_hold_no_data_plane_import_no_torch(package: str, tmp_path: Path) -> None:
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=200, check=False).returncode == 0
