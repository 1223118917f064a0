"""The base install is light: routers need no torch. The distribution carries what it must, and says one version."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from epmesh.testing import LocalMesh
from tests.integration import serve_works
from tests.integration.hosted_mesh import HostedMesh

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_EVERY_CLIENT_MODULE = """
import importlib, importlib.util, pkgutil, sys
import epmesh
for module in pkgutil.walk_packages(epmesh.__path__, "epmesh."):
    importlib.import_module(module.name)
assert "torch" not in sys.modules, "some client module imports torch"
"""


@pytest.fixture(scope="module")
def light_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the base install and nothing else."""
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", ROOT])
    return python


def run(command: Sequence[str | Path], cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(400)  # fetches the base dependencies where pip has not cached them
def test_base_install_imports_without_torch(light_python: Path, tmp_path: Path) -> None:
    code = IMPORT_EVERY_CLIENT_MODULE + "assert importlib.util.find_spec('torch') is None, 'torch came along'\n"
    run([light_python, "-W", "error", "-c", code], cwd=tmp_path)


@pytest.mark.timeout(400)
def test_join_in_a_base_install_names_the_extra_to_install(light_python: Path, tmp_path: Path) -> None:
    code = """
import epmesh
try:
    epmesh.join("127.0.0.1:7400")
except ImportError as error:
    print(error)
"""
    assert "pip install 'epmesh[server]'" in run([light_python, "-c", code], cwd=tmp_path)


@pytest.mark.timeout(400)
def test_connect_works_in_a_base_install_and_says_why_nobody_answers(light_python: Path, tmp_path: Path) -> None:
    code = """
import socket, sys, epmesh
with socket.socket() as bound:  # and nobody listens there
    bound.bind(("127.0.0.1", 0))
    try:
        epmesh.connect("127.0.0.1:%d" % bound.getsockname()[1], timeout_s=0.5)
    except epmesh.MeshUnavailable as error:
        print(error)
assert "torch" not in sys.modules
"""
    assert "(Connection refused)" in run([light_python, "-W", "error", "-c", code], cwd=tmp_path)


@pytest.mark.timeout(400)
def test_a_router_works_in_a_base_install(light_python: Path, tmp_path: Path) -> None:
    code = """
import sys, epmesh, numpy as np
hidden = np.arange(12, dtype=np.float32).reshape(3, 4)
ids = np.array([[0, 3], [1, -1], [2, 0]])
scale = ((ids + 1) * 0.5).sum(1, keepdims=True)
for transport in ("zmq", "grpc"):
    with epmesh.Router(sys.argv[1], transport=transport) as router:
        out = router.forward(hidden, np.full((3, 2), 0.5, np.float32), ids)
    assert out.dtype == np.float32 and np.allclose(out, hidden * scale), out
assert "torch" not in sys.modules
print("right")
"""
    with LocalMesh(1, 2, num_experts=4) as mesh:
        done = mesh.start(serve_works.serve, tmp_path / "stop")
        serve_works.wait_serving(mesh.view, [0, 1])
        assert run([light_python, "-W", "error", "-c", code, mesh.address], cwd=tmp_path) == "right\n"
        (tmp_path / "stop").touch()
        done.result(30)


@pytest.mark.timeout(400)
def test_a_base_install_drives_ranks_with_numpy(light_python: Path, tmp_path: Path) -> None:
    code = """
import sys, epmesh, numpy as np
for transport in ("shm", "zmq", "grpc"):
    with epmesh.attach(sys.argv[1], rank=0, transport=transport) as comm:
        rows = np.arange(6, dtype=np.float32).reshape(3, 2)
        received, weights, ids = comm.dispatch(rows, np.ones((3, 1), np.float32), np.zeros((3, 1), np.int64), True)
        assert np.array_equal(comm.combine(received * 2, True), rows * 2)
        total = np.ones(2, np.float16)
        assert comm.all_reduce(total) is total and comm.device == "cpu"
assert "torch" not in sys.modules
print("right")
"""
    with HostedMesh(1, 1) as mesh:
        assert run([light_python, "-W", "error", "-c", code, mesh.addresses[0]], cwd=tmp_path) == "right\n"


@pytest.mark.timeout(400)
def test_the_command_of_a_base_install_names_the_extra_to_install(light_python: Path, tmp_path: Path) -> None:
    command = [str(light_python.with_name("epmesh")), "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install 'epmesh[server]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_client_does_not_import_torch_where_it_is_installed(tmp_path: Path) -> None:
    run([sys.executable, "-c", IMPORT_EVERY_CLIENT_MODULE], cwd=tmp_path)


@pytest.mark.timeout(400)
def test_wheel_carries_both_packages_with_types_and_licence(tmp_path: Path) -> None:
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT])
    (wheel,) = tmp_path.glob("epmesh-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"epmesh/__init__.py", "epmesh/py.typed", "epmesh_server/__init__.py", "epmesh_server/py.typed"} <= names
    assert {"epmesh/v1/frame_pb2.py", "epmesh/v1/frame_pb2.pyi", "epmesh/v1/rank_service_pb2_grpc.pyi"} <= names
    assert f"epmesh-{PROJECT['version']}.dist-info/licenses/LICENSE" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"epmesh", "epmesh_server"}


def test_namespace_folders_hold_no_package_of_their_own() -> None:
    assert not [folder for folder in ("client", "server", "proto") if (ROOT / folder / "__init__.py").exists()]


def test_version_is_the_same_everywhere() -> None:
    import epmesh

    assert epmesh.__version__ == PROJECT["version"] == importlib.metadata.version("epmesh")


def test_base_dependencies_stay_few() -> None:
    assert {requirement.split(">")[0] for requirement in PROJECT["dependencies"]} == {
        "grpcio",
        "numpy",
        "protobuf",
        "pyzmq",
    }
