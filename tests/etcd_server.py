"""A real etcd of one member, on loopback, for tests that need one."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from epmesh.errors import MeshUnavailable
from epmesh_server.coordinator.etcd_client import EtcdClient
from epmesh_server.testing.ports import Port

needs_etcd = pytest.mark.skipif(shutil.which("etcd") is None, reason="no etcd command here (Debian: etcd-server)")


class EtcdServer:
    """One etcd process; `pause` keeps its connections open and says nothing."""

    def __init__(self, folder: Path, client: Port, peer: Port) -> None:
        self.address = client.address
        at, peers = f"http://{client.address}", f"http://{peer.address}"
        command = ["etcd", "--name", "one", "--data-dir", str(folder / "etcd"), "--log-level", "error"]
        command += ["--listen-client-urls", at, "--advertise-client-urls", at]
        command += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]
        command += ["--initial-cluster", f"one={peers}"]
        with (folder / "etcd.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def store(self, prefix: str = "/mesh") -> str:
        return f"etcd://{self.address}{prefix}"

    def await_answer(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                EtcdClient((self.address,)).call("kv/range", {"key": "eA=="})
                return
            except MeshUnavailable:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.05)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running_etcd(folder: Path) -> Iterator[EtcdServer]:
    """An etcd that answers, until the end of the block."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(contextlib.closing(Port())) for _ in range(2)]
        server = stack.enter_context(contextlib.closing(EtcdServer(folder, *ports)))
        server.await_answer()
        yield server
