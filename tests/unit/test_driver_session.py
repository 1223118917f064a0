"""A driver goes on with the certificate that its files have now: its hold on the rank, and its calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from epmesh import driver_session
from epmesh.channels import _MAX_BEFORE, NodeAddress
from epmesh.communicator_methods import METHODS, SERVICE
from epmesh.driver_session import DriverSession
from epmesh.driver_transports import GrpcTransport
from epmesh.errors import MeshUnavailable
from epmesh.tls import TlsFiles
from epmesh.v1 import communicator_service_pb2 as wire
from epmesh.v1 import front_pb2
from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority
from tests.processes import eventually

PATIENCE_S = 20.0
DRIVER, NODE = Identity(Role.DRIVER, "d"), Identity(Role.NODE, "n")
CHECK = METHODS["check"]


class NodeService:
    """Grants a rank as a node service does, and notes which certificate each call showed."""

    def __init__(self, tls: TlsFiles) -> None:
        self.shown: list[tuple[str, bytes]] = []
        self.detached = threading.Event()
        self.refuses = False
        self.answers_after = threading.Event()  # the service has moved the hold by then
        self.answers_after.set()
        self._changed = threading.Condition()  # guards what follows, and `shown`
        self._holds: list[threading.Event] = []
        self._server = grpc.server(ThreadPoolExecutor(8))
        handlers: dict[str, Any] = {
            "AttachRank": grpc.unary_stream_rpc_method_handler(
                self._attach, wire.AttachRankRequest.FromString, wire.AttachRankResponse.SerializeToString
            ),
            "DetachRank": grpc.unary_unary_rpc_method_handler(
                self._detach, wire.DetachRankRequest.FromString, wire.DetachRankResponse.SerializeToString
            ),
            CHECK.name: grpc.stream_stream_rpc_method_handler(
                self._check, CHECK.request.FromString, CHECK.response.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        contents = tls.read()
        credentials = grpc.ssl_server_credentials(
            [(contents.private_key, contents.certificate)], contents.ca, require_client_auth=True
        )
        self.address = f"127.0.0.1:{self._server.add_secure_port('127.0.0.1:0', credentials)}"
        self._server.start()

    def _note(self, what: str, context: Any) -> None:
        with self._changed:
            self.shown.append((what, context.auth_context()["x509_pem_cert"][0]))
            self._changed.notify_all()

    def _attach(self, request: wire.AttachRankRequest, context: Any) -> Iterator[Any]:
        if request.token and self.refuses:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        over = threading.Event()
        context.add_callback(over.set)
        before, self._holds = self._holds, [over]
        assert bool(before) == (request.token == b"token")
        for each in before:
            each.set()
        assert self.answers_after.wait(PATIENCE_S)
        yield wire.AttachRankResponse(token=b"token")
        self._note("hold", context)
        over.wait(PATIENCE_S)

    def _detach(self, request: wire.DetachRankRequest, context: Any) -> wire.DetachRankResponse:
        self._note("detach", context)
        for each in self._holds:
            each.set()
        return wire.DetachRankResponse()

    def _check(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for _ in requests:
            pass
        self._note("call", context)
        yield CHECK.response(result=wire.CallResult())

    def wait_for(self, what: str, certificate: bytes) -> None:
        """Returns once such a call showed `certificate`."""
        with self._changed:
            assert self._changed.wait_for(lambda: (what, certificate) in self.shown, PATIENCE_S), what

    def close(self) -> None:
        for each in self._holds:
            each.set()
        self._server.stop(0).wait()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.make(tmp_path / "authority")


@pytest.fixture
def service(authority: Authority, tmp_path: Path) -> Iterator[NodeService]:
    made = NodeService(authority.issue(tmp_path / "node", [NODE]))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def tls(authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TlsFiles:
    monkeypatch.setattr(driver_session, "_RENEW_S", 0.01)
    return authority.issue(tmp_path / "driver", [DRIVER])


def drive(service: NodeService, tls: TlsFiles) -> DriverSession:
    return DriverSession(NodeAddress(service.address), 0, "test", PATIENCE_S, tls)


def call(transport: GrpcTransport) -> None:
    request = front_pb2.DriverCall(group="ep")
    request.arguments.check.SetInParent()
    transport.call(request, (), (), PATIENCE_S)


def replaced(authority: Authority, tls: TlsFiles) -> bytes:
    """Replaces the certificate; returns the new one."""
    authority.issue(tls.certificate.parent, [DRIVER], replace=True)
    return tls.certificate.read_bytes()


def test_hold_and_calls_go_over_to_a_new_certificate(service: NodeService, authority: Authority, tls: TlsFiles) -> None:
    first = tls.certificate.read_bytes()
    session = drive(service, tls)
    transport = GrpcTransport(session)
    call(transport)
    assert {shown for _, shown in service.shown} == {first}
    for _ in range(3):
        new = replaced(authority, tls)
        service.wait_for("hold", new)
        call(transport)
        assert ("call", new) in service.shown
    assert session.error is None
    session.detach()
    assert ("detach", new) in service.shown


def test_a_hold_that_cannot_be_moved_stays_and_is_tried_again(
    service: NodeService, authority: Authority, tls: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    session = drive(service, tls)
    service.refuses = True
    new = replaced(authority, tls)

    def said() -> list[str]:
        return [each for each in caplog.messages if "renew.failed" in each]

    assert eventually(lambda: bool(said()))
    assert session.end_within(0.5) is None
    assert len(said()) == 1  # not with every try
    service.refuses = False
    service.wait_for("hold", new)
    session.detach()
    assert not [each for each in caplog.messages if "driver.ended" in each]


def test_a_rank_is_not_given_up_because_the_answer_comes_late(
    service: NodeService, authority: Authority, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = drive(service, tls)
    service.answers_after.clear()
    new = replaced(authority, tls)
    with monkeypatch.context() as hasty:
        hasty.setattr(driver_session, "RPC_TIMEOUT_S", 0.05)
        assert session.end_within(0.5) is None
    service.answers_after.set()
    service.wait_for("hold", new)
    assert session.error is None
    session.detach()


def test_a_hold_that_cannot_be_moved_outlives_many_replacements(
    service: NodeService, authority: Authority, tls: TlsFiles
) -> None:
    session = drive(service, tls)
    service.refuses = True
    for _ in range(2 * _MAX_BEFORE):
        replaced(authority, tls)
        assert session.channel is not session._held_on
    assert session.end_within(0.5) is None
    service.refuses = False
    service.wait_for("hold", replaced(authority, tls))
    session.detach()


def test_a_rank_may_be_given_back_while_its_hold_is_being_moved(
    service: NodeService, authority: Authority, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = drive(service, tls)
    moving, start = threading.Event(), threading.Thread.start

    def start_late(thread: threading.Thread) -> None:
        if threading.current_thread() is session._renewing:
            moving.set()
            time.sleep(0.2)  # the stream is there, its thread is not
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_late)
    replaced(authority, tls)
    assert moving.wait(PATIENCE_S)
    session.detach()
    assert not [each for each in (*session._streams.values(), session._renewing) if each and each.is_alive()]


def test_a_session_is_over_with_the_stream_that_holds_the_rank(
    service: NodeService, authority: Authority, tls: TlsFiles
) -> None:
    session = drive(service, tls)
    service.wait_for("hold", replaced(authority, tls))
    service.close()
    assert isinstance(session.end_within(PATIENCE_S), MeshUnavailable)
    session.detach()
