"""Versions, environment, and what kind of place this is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from epmesh.channels import CHANNEL_OPTIONS
from epmesh.version import VERSION
from epmesh_server.doctor.facts import HostFacts

_PACKAGES = ("torch", "grpcio", "protobuf", "pyzmq", "numpy")
_PREFIXES = ("NCCL_", "GLOO_", "GRPC_", "TORCH_NCCL_")
_VARIABLES = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TMPDIR",
    "EPMESH_SERVICE_HOST",
    "EPMESH_COORDINATOR_SERVICE_HOST",
    *(name for proxy in ("http_proxy", "https_proxy", "grpc_proxy", "no_proxy") for name in (proxy, proxy.upper())),
)


def look_at_host(root: Path = Path("/")) -> HostFacts:
    """Looks around without importing torch."""
    environment = {
        name: _without_password(value)
        for name, value in os.environ.items()
        if name in _VARIABLES or name.startswith(_PREFIXES)
    }
    first = (root / "proc/1/cmdline").read_bytes().split(b"\0") if (root / "proc/1/cmdline").exists() else []
    return HostFacts(
        versions={
            "epmesh": VERSION,
            "python": platform.python_version(),
            "kernel": platform.release(),
            "libc": " ".join(platform.libc_ver()),
            **{name: installed(name) for name in _PACKAGES},
        },
        environment=environment,
        container=_container(root),
        first_process=tuple(word.decode(errors="replace") for word in first if word),
        zombies=_zombies(root),
        user=os.geteuid(),
        proxy_used=dict(CHANNEL_OPTIONS).get("grpc.enable_http_proxy", 1) != 0,
    )


def installed(package: str) -> str:
    """Version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _without_password(value: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", value)


def _container(root: Path) -> str:
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    return "container" if os.environ.get("container") else ""  # noqa: SIM112 - systemd spells it so


def _zombies(root: Path) -> int:
    count = 0
    for path in (root / "proc").glob("[0-9]*/stat"):
        try:
            count += path.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:  # it ended
            continue
    return count
