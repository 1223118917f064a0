"""Nobody gets in who should not: every refusal of the gRPC plane, typed, and with a text that says what to do.

What was refused, and with what, is printed as a table after the last test (see `security_matrix`).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import epmesh
from epmesh.channels import open_channel
from epmesh.errors import EpmeshError, InvalidRequest, MeshUnavailable, Unauthenticated, from_rpc_error
from epmesh.testing import LocalMesh
from epmesh.tls import COORDINATOR_NAME, SERVICE_NAME, TlsFiles, node_name
from epmesh.tls_refusals import explained
from epmesh.v1 import (
    discovery_service_pb2,
    discovery_service_pb2_grpc,
    group_service_pb2,
    group_service_pb2_grpc,
    membership_service_pb2,
    membership_service_pb2_grpc,
    rank_service_pb2,
    rank_service_pb2_grpc,
)
from epmesh.version import VERSION
from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority
from epmesh_server.coordinator import CoordinatorSettings
from epmesh_server.node import NodeSettings
from epmesh_server.node.runtime_dir import DESCRIPTOR_SOCKET, GRPC_SOCKET
from tests.integration.node_under_test import node_service
from tests.integration.raw_node import coordinator
from tests.integration.security_matrix import record
from tests.integration.waiting import on_event_loop, soon

GRPC, FILES, START, UNIX = "gRPC", "files", "start", "unix socket"
TIMEOUT_S = 5.0
ROUTER, DRIVER, OBSERVER = (Identity(role, "x") for role in (Role.ROUTER, Role.DRIVER, Role.OBSERVER))
NODE, STRANGER = Identity(Role.NODE, "node-0"), Identity(Role.NODE, "stranger")
COORDINATOR = Identity(Role.COORDINATOR)

Issue = Callable[..., TlsFiles]


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    with LocalMesh(2, 1, num_experts=4, tls=True) as made:
        yield made


@pytest.fixture(scope="module")
def plain() -> Iterator[LocalMesh]:
    with LocalMesh(1, 1) as made:
        yield made


@pytest.fixture
def issue(mesh: LocalMesh, tmp_path: Path) -> Issue:
    """Makes certificates; of the mesh's own authority unless told otherwise."""
    numbers = itertools.count()

    def issue(*identities: Identity, authority: Authority | None = None, **options: Any) -> TlsFiles:
        made_by = authority or mesh.authority
        assert made_by is not None
        return made_by.issue(tmp_path / f"certificate-{next(numbers)}", identities, **options)

    return issue


def expect(
    attempt: str, call: Callable[[], Any], error: type[EpmeshError], *words: str, plane: str = GRPC
) -> EpmeshError:
    """Makes a call that must be refused with `error`, in a text that has all `words`; notes it in the table."""
    with pytest.raises(EpmeshError) as caught:
        call()
    found = caught.value
    assert type(found) is error, f"{type(found).__name__}: {found}"
    missing = [word for word in words if word not in str(found)]
    assert not missing, str(found)
    record(attempt, plane, f"{type(found).__name__}: {found}")
    return found


def look(address: str, tls: TlsFiles | None) -> None:
    """Connects, as somebody who looks on."""
    epmesh.connect(address, timeout_s=TIMEOUT_S, tls=tls).close()


def ask(address: str, tls: TlsFiles | None, call: Callable[[grpc.Channel], Any], server: str = SERVICE_NAME) -> Any:
    """Makes a bare call; raises its refusal as an `EpmeshError`."""
    with open_channel(address, tls=tls, server=server) as channel:
        try:
            return call(channel)
        except grpc.RpcError as exc:
            raise explained(from_rpc_error(exc, "call"), address, tls, server) from exc


def get_view(channel: grpc.Channel) -> Any:
    stub = discovery_service_pb2_grpc.DiscoveryServiceStub(channel)
    return stub.GetView(discovery_service_pb2.GetViewRequest(), timeout=TIMEOUT_S)


def register(node_id: str) -> Callable[[grpc.Channel], Any]:
    request = membership_service_pb2.RegisterNodeRequest(
        node_id=node_id, incarnation=7, address="127.0.0.1:9", version=VERSION
    )

    def call(channel: grpc.Channel) -> Any:
        return membership_service_pb2_grpc.MembershipServiceStub(channel).RegisterNode(request, timeout=TIMEOUT_S)

    return call


def hello(slot: int) -> Callable[[grpc.Channel], Any]:
    """Opens the control stream of the node in `slot`."""
    first = membership_service_pb2.NodeSessionRequest(hello=membership_service_pb2.Hello(slot=slot, incarnation=1))

    def call(channel: grpc.Channel) -> Any:
        stub = membership_service_pb2_grpc.MembershipServiceStub(channel)
        return next(stub.NodeSession(iter([first]), timeout=TIMEOUT_S))

    return call


def create_group(channel: grpc.Channel) -> Any:
    request = group_service_pb2.CreateGroupRequest(request_id="1", name="g", ranks=[0])
    return group_service_pb2_grpc.GroupServiceStub(channel).CreateGroup(request, timeout=TIMEOUT_S)


# Certificates ----------------------------------------------------------------------------------------------------


def test_the_health_of_a_service_is_asked_with_its_own_certificate(mesh: LocalMesh, issue: Issue) -> None:
    def check(channel: grpc.Channel) -> Any:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)

    serving = health_pb2.HealthCheckResponse.SERVING
    assert ask(mesh.coordinator_address, issue(COORDINATOR), check).status == serving
    assert ask(mesh.address, issue(NODE), check).status == serving


def test_whoever_has_a_certificate_gets_in(mesh: LocalMesh, issue: Issue) -> None:
    for address in (mesh.address, mesh.coordinator_address):
        with epmesh.connect(address, tls=issue(OBSERVER)) as seen:
            assert len(seen.wait_view(lambda view: len(view.ranks) == 2).nodes) == 2


@pytest.mark.parametrize("service", ["address", "coordinator_address"])
def test_without_a_certificate_nobody_gets_in(mesh: LocalMesh, service: str) -> None:
    address = getattr(mesh, service)
    what = "coordinator" if "coordinator" in service else "node"
    expect(
        f"plain client to the TLS port of a {what}",
        lambda: look(address, None),
        Unauthenticated,
        "wants TLS",
        "--tls-dir",
        address,
    )


def test_trust_in_the_service_alone_is_not_enough(mesh: LocalMesh) -> None:
    """A client that checks the service but shows nothing: no way of the product does that."""
    assert mesh.tls is not None
    credentials = grpc.ssl_channel_credentials(mesh.tls.ca.read_bytes())
    options = (("grpc.ssl_target_name_override", SERVICE_NAME),)
    with grpc.secure_channel(mesh.address, credentials, options) as channel, pytest.raises(grpc.RpcError) as caught:
        get_view(channel)
    refusal = from_rpc_error(caught.value, "GetView")
    assert isinstance(refusal, MeshUnavailable)
    record("TLS client that shows no certificate", GRPC, f"MeshUnavailable: {refusal}")


def test_another_authority_is_not_believed(mesh: LocalMesh, issue: Issue, tmp_path: Path) -> None:
    stranger = Authority.make(tmp_path / "other")
    theirs = issue(ROUTER, authority=stranger)
    expect(
        "client that believes another authority",
        lambda: look(mesh.address, theirs),
        Unauthenticated,
        "service's certificate is refused here",
    )
    assert mesh.tls is not None
    mixed = TlsFiles(ca=mesh.tls.ca, certificate=theirs.certificate, private_key=theirs.private_key)
    expect(
        "client with a certificate of another authority",
        lambda: look(mesh.address, mixed),
        Unauthenticated,
        "the service refused",
        str(theirs.certificate),
        "does not believe",
    )


def test_a_certificate_that_is_over_is_refused(mesh: LocalMesh, issue: Issue) -> None:
    over = issue(ROUTER, days=-1)
    expect(
        "client with an expired certificate",
        lambda: look(mesh.address, over),
        Unauthenticated,
        str(over.certificate),
        "over",
    )
    expect(
        "node that starts with an expired certificate",
        lambda: start(mesh, tls=issue(STRANGER, days=-1)),
        InvalidRequest,
        "is valid from",
        plane=START,
    )


def test_a_key_of_another_certificate_is_named(mesh: LocalMesh, issue: Issue) -> None:
    one, other = issue(ROUTER), issue(ROUTER)
    mixed = TlsFiles(ca=one.ca, certificate=one.certificate, private_key=other.private_key)
    expect(
        "private key that is not the certificate's",
        lambda: look(mesh.address, mixed),
        InvalidRequest,
        "do not fit together",
        plane=FILES,
    )


def test_plain_and_secured_do_not_meet(mesh: LocalMesh, plain: LocalMesh, issue: Issue) -> None:
    expect(
        "TLS client to a plain port",
        lambda: look(plain.address, issue(OBSERVER)),
        Unauthenticated,
        "speaks no TLS",
    )
    expect(
        "TLS node to a plain coordinator",
        lambda: start(mesh, tls=issue(STRANGER), coordinator=plain.coordinator_address),
        Unauthenticated,
        "speaks no TLS",
    )
    expect("plain node to a TLS coordinator", lambda: start(mesh), Unauthenticated, "wants TLS")


# Names -----------------------------------------------------------------------------------------------------------


def test_a_node_is_no_coordinator(mesh: LocalMesh, issue: Issue) -> None:
    expect(
        "node service that poses as the coordinator (wrong SAN)",
        lambda: start(mesh, tls=issue(STRANGER), coordinator=mesh.address),
        Unauthenticated,
        "service's certificate is refused here",
        COORDINATOR_NAME,
    )


def test_a_node_is_not_another_node(mesh: LocalMesh) -> None:
    """Who knows from the view which node it calls asks for that node's name."""
    expect(
        "node service that poses as another node (wrong SAN)",
        lambda: ask(mesh.addresses[0], mesh.tls, get_view, server=node_name("node-1")),
        Unauthenticated,
        "service's certificate is refused here",
        node_name("node-1"),
    )


def test_a_service_must_have_a_certificate_of_its_role(mesh: LocalMesh, issue: Issue) -> None:
    expect(
        "node that starts with a router's certificate",
        lambda: start(mesh, tls=issue(ROUTER)),
        InvalidRequest,
        "router 'x'",
        "epmesh certs",
        plane=START,
    )
    expect(
        "node that starts under another id than its certificate's",
        lambda: start(mesh, tls=issue(STRANGER), node_id="node-9"),
        InvalidRequest,
        "'stranger'",
        "'node-9'",
        plane=START,
    )


# Roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identity", [ROUTER, DRIVER, OBSERVER, COORDINATOR], ids=lambda i: i.role.value)
def test_only_a_node_registers_a_node(mesh: LocalMesh, issue: Issue, identity: Identity) -> None:
    expect(
        f"{identity.role.value} that registers a node",
        lambda: ask(mesh.coordinator_address, issue(identity), register("x"), COORDINATOR_NAME),
        Unauthenticated,
        "RegisterNode is for node",
        identity.role.value,
    )


def test_a_node_registers_itself_alone(mesh: LocalMesh, issue: Issue) -> None:
    expect(
        "node that registers under another node's id",
        lambda: ask(mesh.coordinator_address, issue(STRANGER), register("node-0"), COORDINATOR_NAME),
        Unauthenticated,
        "node id is 'node-0'",
        "'stranger'",
    )
    expect(
        "node that opens another node's control stream",
        lambda: ask(mesh.coordinator_address, issue(STRANGER), hello(0), COORDINATOR_NAME),
        Unauthenticated,
        "node id is 'node-0'",
        "'stranger'",
    )


def test_clients_keep_to_their_roles(mesh: LocalMesh, issue: Issue) -> None:
    expect(
        "observer that drives a rank",
        lambda: epmesh.attach(mesh.address, rank=0, tls=issue(OBSERVER), timeout_s=TIMEOUT_S),
        Unauthenticated,
        "AttachRank is for driver",
    )
    expect(
        "router that drives a rank",
        lambda: epmesh.attach(mesh.address, rank=0, tls=issue(ROUTER), timeout_s=TIMEOUT_S),
        Unauthenticated,
        "AttachRank is for driver",
    )
    expect(
        "router that makes a group",
        lambda: ask(mesh.address, issue(ROUTER), create_group),
        Unauthenticated,
        "CreateGroup is for driver",
    )
    expect(
        "driver that makes a group at the coordinator itself",
        lambda: ask(mesh.coordinator_address, issue(DRIVER), create_group, COORDINATOR_NAME),
        Unauthenticated,
        "CreateGroup is for node",
    )


def test_ranks_are_opened_over_the_unix_socket_alone(mesh: LocalMesh, issue: Issue) -> None:
    def open_rank(channel: grpc.Channel) -> Any:
        stub = rank_service_pb2_grpc.RankServiceStub(channel)
        return next(stub.RankSession(iter([rank_service_pb2.RankSessionRequest()]), timeout=TIMEOUT_S))

    expect(
        "node's own certificate that opens a rank over TCP",
        lambda: ask(mesh.address, issue(NODE), open_rank),
        Unauthenticated,
        "nobody over this port",
    )


# Unix sockets ----------------------------------------------------------------------------------------------------


def test_a_rank_joins_over_a_socket_that_is_its_users_alone(mesh: LocalMesh) -> None:
    directory = runtime_directory_of(mesh, mesh.addresses[1])

    def join() -> None:
        epmesh.join(f"unix:{directory / GRPC_SOCKET}", timeout_s=TIMEOUT_S).destroy()

    directory.chmod(0o755)
    try:
        expect(
            "rank that joins over a socket which others can get at",
            join,
            Unauthenticated,
            "chmod 700",
            plane=UNIX,
        )
    finally:
        directory.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
def test_another_user_gets_at_no_socket_and_no_key(mesh: LocalMesh) -> None:
    directory = runtime_directory_of(mesh, mesh.addresses[1])
    for name in (GRPC_SOCKET, DESCRIPTOR_SOCKET):
        script = "import socket, sys; socket.socket(socket.AF_UNIX, int(sys.argv[2])).connect(sys.argv[1])"
        kind = socket.SOCK_STREAM if name == GRPC_SOCKET else socket.SOCK_SEQPACKET
        python = shutil.which("python3", path="/usr/bin:/bin")
        if python is None:
            pytest.skip("no Python that other users may run")
        command = [python, "-I", "-c", script, str(directory / name), str(int(kind))]
        done = subprocess.run(
            command, check=False, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, cwd="/"
        )
        assert "PermissionError" in done.stderr
        record(f"another user that connects to {name}", UNIX, done.stderr.strip().splitlines()[-1])
    os.chown(directory, 65534, -1)
    try:
        expect(
            "rank that joins over a socket in another user's directory",
            lambda: epmesh.join(f"unix:{directory / GRPC_SOCKET}", timeout_s=TIMEOUT_S),
            Unauthenticated,
            "user 65534",
            plane=UNIX,
        )
    finally:
        os.chown(directory, os.geteuid(), -1)


def runtime_directory_of(mesh: LocalMesh, address: str) -> Path:
    def describe(channel: grpc.Channel) -> Any:
        stub = rank_service_pb2_grpc.RankServiceStub(channel)
        return stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=TIMEOUT_S)

    return Path(ask(address, mesh.tls, describe).grpc_socket).parent


# Start -----------------------------------------------------------------------------------------------------------


def start(mesh: LocalMesh, **settings: Any) -> None:
    """Runs a node service of the test's own until it is registered or refused."""

    @on_event_loop
    async def run() -> None:
        async with node_service(**{"coordinator": mesh.coordinator_address, "node_id": None, **settings}) as node:
            await soon(node.task)

    run()


@pytest.mark.parametrize("settings", [NodeSettings, CoordinatorSettings])
def test_listening_wider_needs_authentication(settings: Any, issue: Issue, tmp_path: Path) -> None:
    what = settings.__name__.removesuffix("Settings").lower()
    more = {"data_dir": tmp_path} if settings is CoordinatorSettings else {}
    expect(
        f"{what} that listens on 0.0.0.0 without certificates",
        lambda: settings(host="0.0.0.0", **more),
        InvalidRequest,
        "epmesh certs init",
        "--tls-dir",
        "--insecure",
        plane=START,
    )
    expect(
        f"{what} that is both secured and --insecure",
        lambda: settings(host="0.0.0.0", insecure=True, tls=issue(NODE, COORDINATOR), **more),
        InvalidRequest,
        "contradict",
        plane=START,
    )


def test_files_that_cannot_be_used_are_named(mesh: LocalMesh, issue: Issue, tmp_path: Path) -> None:
    expect(
        "directory without certificates",
        lambda: TlsFiles.from_directory(tmp_path),
        InvalidRequest,
        "tls.key",
        "epmesh certs init",
        plane=FILES,
    )
    files = issue(ROUTER)
    files.private_key.chmod(0o644)
    expect(
        "private key that everybody may read",
        lambda: look(mesh.address, files),
        InvalidRequest,
        "chmod 600",
        "0644",
        plane=FILES,
    )
    files.private_key.chmod(0o600)
    files.ca.write_text("nothing")
    expect(
        "ca.crt that is no certificate",
        lambda: epmesh.Router(mesh.address, tls=files.ca.parent, timeout_s=1),
        InvalidRequest,
        "ca.crt is no PEM file",
        plane=FILES,
    )


# Join token ------------------------------------------------------------------------------------------------------


def token_file(folder: Path, token: str, mode: int = 0o600) -> Path:
    path = folder / f"token-{token[:4]}"
    path.write_text(f"{token}\n")
    path.chmod(mode)
    return path


async def enter(address: str, **settings: Any) -> None:
    """Runs a node service until it is registered; raises why it is refused."""
    async with node_service(address, **settings) as node:
        registered = asyncio.create_task(node.registered(settings["tls"]))
        await asyncio.wait((registered, node.task), return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
        if not registered.done():
            registered.cancel()
            node.task.result()
        registered.result()


async def expect_kept_out(attempt: str, address: str, words: str, **settings: Any) -> str:
    with pytest.raises(Unauthenticated, match=words) as caught:
        await enter(address, **settings)
    record(attempt, GRPC, f"Unauthenticated: {caught.value}")
    return str(caught.value)


@on_event_loop
async def test_a_node_that_is_new_must_show_the_join_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    authority = Authority.make(tmp_path / "certificates")
    service, node = authority.issue(tmp_path / "c", [COORDINATOR]), authority.issue(tmp_path / "n", [NODE])
    right, wrong = token_file(tmp_path, "right" * 8), token_file(tmp_path, "wrong" * 8)
    async with coordinator(tmp_path / "log", tls=service, join_token_file=right) as running:
        texts = [
            await expect_kept_out("new node without the join token", running.address, "shows no join token", tls=node),
            await expect_kept_out(
                "new node with another join token", running.address, "another", tls=node, join_token_file=wrong
            ),
        ]
        await enter(running.address, tls=node, join_token_file=right)
        await enter(running.address, tls=node)  # known from now on
    said = " ".join([*texts, caplog.text])
    assert "register.refused" in said
    assert "right" * 8 not in said
    assert "wrong" * 8 not in said


@on_event_loop
async def test_a_join_token_is_read_anew_and_a_lost_one_keeps_new_nodes_waiting(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "certificates")
    service, node = authority.issue(tmp_path / "c", [COORDINATOR]), authority.issue(tmp_path / "n", [NODE])
    path = token_file(tmp_path, "first" * 8)
    async with coordinator(tmp_path / "log", tls=service, join_token_file=path) as running:
        path.rename(tmp_path / "elsewhere")
        async with node_service(running.address, tls=node, join_token_file=tmp_path / "elsewhere") as waiting:
            await soon(waiting.describe(node))
            token_file(tmp_path, "first" * 8)
            await soon(waiting.registered(node))


def test_a_join_token_that_is_no_secret_is_refused(tmp_path: Path) -> None:
    good = token_file(tmp_path, "good" * 8)
    expect(
        "coordinator that takes join tokens in clear beyond loopback",
        lambda: CoordinatorSettings(data_dir=tmp_path, join_token_file=good, host="10.0.0.1", insecure=True),
        InvalidRequest,
        "in clear",
        "--tls-dir",
        plane=START,
    )
    expect(
        "node that sends its join token in clear beyond loopback",
        lambda: NodeSettings(coordinator="10.0.0.1:7401", join_token_file=good),
        InvalidRequest,
        "in clear",
        plane=START,
    )
    expect(
        "join token that everybody may read",
        lambda: CoordinatorSettings(data_dir=tmp_path, join_token_file=token_file(tmp_path, "open" * 8, 0o644)),
        InvalidRequest,
        "chmod 600",
        plane=FILES,
    )
    expect(
        "join token of four bytes",
        lambda: CoordinatorSettings(data_dir=tmp_path, join_token_file=token_file(tmp_path, "abcd")),
        InvalidRequest,
        "4 bytes",
        plane=FILES,
    )


# Whole -----------------------------------------------------------------------------------------------------------


def _exchange(comm: epmesh.Communicator) -> float:
    ids = torch.tensor([[0, 3]] * 4)
    rows, _, _ = comm.dispatch(torch.ones(4, 8), torch.full((4, 2), 0.5), ids)
    return float(comm.combine(rows).sum())


def test_the_mesh_goes_on_after_all_of_this(mesh: LocalMesh) -> None:
    assert len(set(mesh.run(_exchange))) == 1
    assert len(mesh.view().nodes) == 2
