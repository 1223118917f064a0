"""Certificates, and their authority, are replaced under load: no call fails, and new connections show the new ones."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509

import epmesh
from epmesh.channels import open_channel
from epmesh.testing import LocalMesh
from epmesh.tls import CA_NAME, CERTIFICATE_NAME, KEY_NAME, SERVICE_NAME, TlsFiles
from epmesh.v1 import rank_service_pb2, rank_service_pb2_grpc
from epmesh_server.access import Identity, Role, identities
from epmesh_server.certificates import Authority
from tests.integration.security_matrix import record

PATIENCE_S = 20.0
ROUNDS = 5  # calls of every kind that must succeed after a step


class Load:
    """Makes one kind of call again and again on a thread of its own, and stops at the first error."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._changed = threading.Condition()  # guards what follows
        self._count = 0
        self._error: Exception | None = None
        self._end = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._end:
            error = None
            try:
                self._call()
            except Exception as exc:  # noqa: BLE001 - the test raises it
                error = exc
            with self._changed:
                self._count, self._error = self._count + 1, error
                self._changed.notify_all()
            if error is not None:
                return

    def goes_on(self) -> None:
        """Returns once some more calls succeeded; raises what failed."""
        with self._changed:
            wanted = self._count + ROUNDS
            self._changed.wait_for(lambda: self._count >= wanted or self._error is not None, PATIENCE_S)
            if self._error is not None:
                raise self._error
            assert self._count >= wanted

    def close(self) -> None:
        self._end = True
        self._thread.join(PATIENCE_S)


@pytest.fixture
def mesh() -> Iterator[LocalMesh]:
    """Two nodes with a rank each that serves; rank r holds expert r."""
    with LocalMesh(2, 1, num_experts=2, experts="tests.integration.hosted_experts:plus_id", tls=True) as made:
        yield made


@contextlib.contextmanager
def under_load(mesh: LocalMesh) -> Iterator[Callable[[], None]]:
    """Routers over both transports and clients that come and go; gives what returns once all of them went on."""
    rows, weights, ids = np.ones((2, 4), np.float32), np.ones((2, 1), np.float32), np.array([[0], [1]])
    with contextlib.ExitStack() as stack:
        calls: list[Callable[[], object]] = []
        for transport in ("zmq", "grpc"):
            router = stack.enter_context(epmesh.Router(mesh.addresses, transport=transport, tls=mesh.tls))

            def forward(router: epmesh.Router = router) -> None:
                sums = router.forward(rows, weights, ids, timeout=PATIENCE_S)
                np.testing.assert_array_equal(sums[:, 0], [1.0, 2.0])

            calls.append(forward)
        calls.append(lambda: epmesh.connect(mesh.address, tls=mesh.tls).close())
        loads = [Load(call) for call in calls]
        for load in loads:
            stack.callback(load.close)

        def all_go_on() -> None:
            for load in loads:
                load.goes_on()

        yield all_go_on


def total(comm: epmesh.Communicator) -> float:
    tensor: Any = np.ones(2, np.float32)
    return float(comm.all_reduce(tensor)[0])


def test_attached_drivers_go_on_with_new_certificates(tmp_path: Path) -> None:
    with LocalMesh(2, 1, hosted=True, transport="grpc", tls=True) as mesh:
        authority = mesh.authority
        assert authority is not None
        load = Load(lambda: mesh.run(total))
        try:
            load.goes_on()
            for number in range(2):
                for directory in directories(mesh):
                    issue_in_place(authority, directory, tmp_path / f"{number}")
                    load.goes_on()
        finally:
            load.close()


def directories(mesh: LocalMesh) -> list[Path]:
    """Where the certificates of the services and clients of a mesh are."""
    assert mesh.authority is not None
    return sorted(path.parent for path in mesh.authority.directory.glob(f"*/{CERTIFICATE_NAME}"))


def replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}")
    part.touch(0o600)
    part.write_bytes(data)
    part.rename(path)


def owners(directory: Path) -> tuple[Identity, ...]:
    certificate = x509.load_pem_x509_certificate((directory / CERTIFICATE_NAME).read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return identities(names.get_values_for_type(x509.UniformResourceIdentifier))


def shown_by(address: str, tls: TlsFiles) -> bytes:
    """The certificate that a service shows to a new connection."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.private_key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname=SERVICE_NAME) as secured,
    ):
        return ssl.DER_cert_to_PEM_cert(secured.getpeercert(binary_form=True) or b"").encode()


def await_control(address: str, tls: TlsFiles) -> None:
    """Returns once a node has a control stream to its coordinator."""
    deadline, pause = time.monotonic() + PATIENCE_S, threading.Event()
    with open_channel(address, tls=tls) as channel:
        stub = rank_service_pb2_grpc.RankServiceStub(channel)
        while not stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=PATIENCE_S).coordinator_reachable:
            assert time.monotonic() < deadline, f"the node at {address} does not come back"
            pause.wait(0.02)


def issue_in_place(authority: Authority, directory: Path, scratch: Path) -> None:
    """Gives a directory a certificate of `authority` for the same owner; its ``ca.crt`` stays."""
    made = authority.issue(scratch / directory.name, owners(directory))
    replace(directory / KEY_NAME, made.private_key.read_bytes())
    replace(directory / CERTIFICATE_NAME, made.certificate.read_bytes())


def test_a_new_authority_takes_over_and_no_call_fails(mesh: LocalMesh, tmp_path: Path) -> None:
    old, new, tls = mesh.authority, Authority.make(tmp_path / "new"), mesh.tls
    assert old is not None
    assert tls is not None
    stays_old = old.issue(tmp_path / "stays-old", [Identity(Role.ROUTER, "old")])
    old_ca, new_ca = ((each.directory / CA_NAME).read_bytes() for each in (old, new))
    with under_load(mesh) as all_go_on:
        all_go_on()
        for directory in directories(mesh):
            replace(directory / CA_NAME, old_ca + new_ca)
        all_go_on()
        for directory in directories(mesh):
            issue_in_place(new, directory, tmp_path)
            all_go_on()
        for directory in directories(mesh):
            replace(directory / CA_NAME, new_ca)
        all_go_on()
        services = {f"node-node-{slot}": address for slot, address in enumerate(mesh.addresses)}
        for name, address in {**services, "coordinator": mesh.coordinator_address}.items():
            assert shown_by(address, tls) == (old.directory / name / CERTIFICATE_NAME).read_bytes()
        replace(stays_old.ca, old_ca + new_ca)
        with pytest.raises(epmesh.Unauthenticated, match="does not believe") as refused:
            epmesh.connect(mesh.address, timeout_s=PATIENCE_S, tls=stays_old)
        record("client with a certificate of the authority before", "gRPC", f"Unauthenticated: {refused.value}")
        # Nodes connect to their coordinator again with the certificate of now: theirs from before is refused.
        mesh.kill_coordinator()
        mesh.start_coordinator()
        all_go_on()
        for address in mesh.addresses:
            await_control(address, tls)
        all_go_on()


def test_half_a_set_is_not_used(mesh: LocalMesh, tmp_path: Path) -> None:
    """A service goes on with the certificate from before while key and certificate are of two sets."""
    assert mesh.authority is not None
    assert mesh.tls is not None
    directory = mesh.authority.directory / "node-node-0"
    before = (directory / CERTIFICATE_NAME).read_bytes()
    made = mesh.authority.issue(tmp_path / "made", owners(directory))
    replace(directory / KEY_NAME, made.private_key.read_bytes())
    assert shown_by(mesh.addresses[0], mesh.tls) == before
    replace(directory / CERTIFICATE_NAME, made.certificate.read_bytes())
    assert shown_by(mesh.addresses[0], mesh.tls) == made.certificate.read_bytes()
