"""A certificate that was revoked is good for nothing any more: neither for new calls nor for what it had open."""

from __future__ import annotations

import contextlib
import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

import epmesh
from epmesh.channels import open_channel
from epmesh.errors import EpmeshError, InvalidRequest, Unauthenticated, from_rpc_error
from epmesh.front import FrontClient
from epmesh.testing import LocalMesh
from epmesh.tls import TlsFiles
from epmesh.v1 import discovery_service_pb2, discovery_service_pb2_grpc, front_pb2
from epmesh_server.access import Identity, Role
from epmesh_server.revocation import LOOK_EVERY_S, certificate_id
from tests.integration.security_matrix import record
from tests.integration.test_security import GRPC, ask, get_view
from tests.integration.test_security_curve import FRONT, Lease, front_of
from tests.integration.test_security_rotation import Load, await_control, directories, issue_in_place, total

PATIENCE_S = 20.0
CUT_S = LOOK_EVERY_S + 1.0  # read within the one, ended within the other
LEASE_S = 3.0
STRETCH = 4  # other work on the machine


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    """A node with a rank that serves; every test adds to those whose certificates are revoked."""
    with LocalMesh(1, 1, num_experts=1, experts="tests.integration.hosted_experts:plus_id", tls=True) as made:
        yield made


def issued(mesh: LocalMesh, folder: Path, role: Role) -> TlsFiles:
    assert mesh.authority is not None
    return mesh.authority.issue(folder / role.value, [Identity(role, "stolen")])


def revoke(mesh: LocalMesh, *revoked: TlsFiles) -> float:
    """Puts certificates into the lists of all services; when."""
    assert mesh.authority is not None
    mesh.authority.revoke(certificate_id(files.certificate.read_bytes()).serial for files in revoked)
    return time.monotonic()


def until_refused(call: Callable[[], object]) -> Unauthenticated:
    """Makes a call again and again, until it is refused as it should be."""
    deadline, pause = time.monotonic() + STRETCH * CUT_S, threading.Event()
    while True:
        try:
            call()
        except Unauthenticated as error:
            return error
        assert time.monotonic() < deadline, "it is not refused"
        pause.wait(0.05)


def noted(attempt: str, plane: str, error: EpmeshError) -> None:
    assert isinstance(error, Unauthenticated), repr(error)
    assert "was revoked" in str(error)
    record(attempt, plane, f"Unauthenticated: {error}")


def test_calls_are_refused_by_node_and_coordinator(mesh: LocalMesh, tmp_path: Path) -> None:
    stolen = issued(mesh, tmp_path, Role.OBSERVER)
    for address in (mesh.address, mesh.coordinator_address):
        ask(address, stolen, get_view)
    revoke(mesh, stolen)
    for address in (mesh.address, mesh.coordinator_address):
        noted("client with a revoked certificate", GRPC, until_refused(lambda at=address: ask(at, stolen, get_view)))  # type: ignore[misc]


def test_a_router_that_is_at_work_is_refused_on_both_planes(mesh: LocalMesh, tmp_path: Path) -> None:
    stolen = issued(mesh, tmp_path, Role.ROUTER)
    rows, weights, ids = np.ones((2, 4), np.float32), np.ones((2, 1), np.float32), np.zeros((2, 1), np.int64)
    with contextlib.ExitStack() as stack:
        routers = {
            plane: stack.enter_context(epmesh.Router(mesh.addresses, transport=transport, tls=stolen))
            for plane, transport in ((GRPC, "grpc"), (FRONT, "zmq"))
        }

        def forward(plane: str) -> None:
            routers[plane].forward(rows, weights, ids, timeout=PATIENCE_S)

        for plane in routers:
            forward(plane)
        revoke(mesh, stolen)
        for plane in routers:
            error = until_refused(functools.partial(forward, plane))
            record("router at work, whose certificate is revoked", plane, f"Unauthenticated: {error}")


def test_a_leased_key_ends_with_its_certificate(mesh: LocalMesh, tmp_path: Path) -> None:
    stolen, (_, peer) = issued(mesh, tmp_path, Role.ROUTER), front_of(mesh, 0)
    lease, view = Lease(mesh, mesh.address, stolen), mesh.view()
    client = FrontClient(view.mesh_id, pair=lease.pair)
    empty = front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(epoch=view.epoch, ranks=[0]))

    def call() -> None:
        with contextlib.suppress(InvalidRequest):  # says the rank itself, of a request without tensors: the key got in
            client.call(peer, empty, timeout_s=PATIENCE_S).result(PATIENCE_S)

    def renew() -> None:
        try:
            lease.take()
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, "LeaseKey") from exc

    try:
        renew()
        call()
        revoke(mesh, stolen)
        noted("lease of a CURVE key with a revoked certificate", GRPC, until_refused(renew))
        error = until_refused(call)
        assert "is over" in str(error)
        record("CURVE key leased with a certificate that is revoked", FRONT, f"Unauthenticated: {error}")
    finally:
        client.close()
        lease.close()


def test_open_streams_are_cut(mesh: LocalMesh, tmp_path: Path) -> None:
    stolen = issued(mesh, tmp_path, Role.OBSERVER)
    with open_channel(mesh.address, tls=stolen) as channel:
        stream = discovery_service_pb2_grpc.DiscoveryServiceStub(channel).WatchViews(
            discovery_service_pb2.WatchViewsRequest()
        )
        next(stream)
        since = revoke(mesh, stolen)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        took_s = time.monotonic() - since
    noted("client that watches views, whose certificate is revoked", GRPC, from_rpc_error(caught.value, "WatchViews"))
    assert took_s < STRETCH * CUT_S


def test_a_driver_loses_its_rank(tmp_path: Path) -> None:
    with LocalMesh(1, 1, hosted=True, tls=True) as mesh:
        assert mesh.run(total) == [1.0]
        mesh.kill_driver(0)
        stolen = issued(mesh, tmp_path, Role.DRIVER)
        with epmesh.attach(mesh.address, rank=0, tls=stolen, timeout_s=PATIENCE_S) as comm:
            assert total(comm) == 1.0
            since = revoke(mesh, stolen)
            error = until_refused(functools.partial(total, comm))
            assert time.monotonic() - since < STRETCH * CUT_S
        noted("driver of a rank, whose certificate is revoked", GRPC, error)
        assert mesh.run(total) == [1.0]  # the next driver has it


def test_a_node_leaves_the_mesh(tmp_path: Path) -> None:
    with LocalMesh(2, 1, num_experts=2, experts="tests.integration.hosted_experts:plus_id", tls=True) as mesh:
        assert mesh.authority is not None
        taken = TlsFiles.from_directory(mesh.authority.directory / "node-node-1")
        curve_key = mesh.view().ranks[1].curve_key
        with epmesh.connect(mesh.address, tls=mesh.tls) as seen:
            since = revoke(mesh, taken)
            view = seen.wait_view(lambda view: len(view.nodes) == 1, PATIENCE_S)
            took_s = time.monotonic() - since
        assert curve_key not in [info.curve_key for info in view.ranks.values()]
        record("node with a revoked certificate", GRPC, "control stream cut, out of the view, its ranks' keys with it")
        assert took_s < STRETCH * (CUT_S + LEASE_S)


def test_a_rotation_ends_with_revoking_what_was_replaced_and_no_call_fails(tmp_path: Path) -> None:
    with LocalMesh(1, 1, hosted=True, tls=True) as mesh:
        tls, authority = mesh.tls, mesh.authority
        assert tls is not None
        assert authority is not None
        mesh.kill_driver(0)
        before = TlsFiles.from_directory(shutil.copytree(tls.ca.parent, tmp_path / "before"))
        replaced = [TlsFiles.from_directory(directory).certificate.read_bytes() for directory in directories(mesh)]
        with epmesh.attach(mesh.address, rank=0, transport="grpc", tls=tls, timeout_s=PATIENCE_S) as comm:
            load = Load(lambda: total(comm))
            try:
                for directory in directories(mesh):
                    issue_in_place(authority, directory, tmp_path)
                    load.goes_on()
                session, deadline, pause = comm._rank.session, time.monotonic() + PATIENCE_S, threading.Event()
                while session._held_on is not session.channel:
                    assert time.monotonic() < deadline
                    pause.wait(0.02)
                authority.revoke(certificate_id(certificate).serial for certificate in replaced)
                until_refused(lambda: ask(mesh.address, before, get_view))
                await_control(mesh.address, tls)
                load.goes_on()
            finally:
                load.close()
