"""What one client may have open at a TCP port, and what a port writes about whom it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from epmesh.channels import open_aio_channel
from epmesh.errors import EpmeshError, Overloaded, Unauthenticated, from_rpc_error
from epmesh.tls import CA_NAME, REVOKED_NAME, TlsFiles
from epmesh_server import secure_server
from epmesh_server.access import NODE_ACCESS, Identity, Role
from epmesh_server.certificates import Authority
from epmesh_server.node.rpc import TCP_SERVER_OPTIONS
from epmesh_server.revocation import LOOK_EVERY_S, Revocations, certificate_id

SERVICE, WATCH, VIEW = "epmesh.v1.DiscoveryService", "WatchViews", "GetView"
FLOOD, HOLD = "Flood", "Hold"  # streams whose client does not read, and whose handler is no generator
DRIVERS_CALL = "/epmesh.v1.GroupService/CreateGroup"
PATIENCE_S = 20.0
MAX_CALLS = 10  # so one client alone gets eight


class Port:
    """A secured port, and clients of it."""

    def __init__(self, authority: Authority, folder: Path, port: int) -> None:
        self._authority, self._folder, self._port = authority, folder, port
        self._channels: list[grpc.aio.Channel] = []
        self._serials: dict[str, int] = {}

    def client(self, name: str) -> grpc.aio.Channel:
        """Another connection of the router `name`."""
        tls = self._authority.issue(self._folder / f"{name}-{len(self._channels)}", [Identity(Role.ROUTER, name)])
        self._serials[name] = certificate_id(tls.certificate.read_bytes()).serial
        self._channels.append(open_aio_channel(f"127.0.0.1:{self._port}", tls=tls))
        return self._channels[-1]

    def revoke(self, name: str) -> None:
        """Puts the certificate that `client` made last for `name` into the list of the port."""
        self._authority.revoke([self._serials[name]])
        replaced = self._folder / "replaced.pem"
        replaced.write_bytes(self._authority.list_path.read_bytes())
        replaced.rename(self._folder / "node" / REVOKED_NAME)

    def replace_authority(self) -> None:
        """Has the port believe another authority, and no more the one before; connections that stand are left alone."""
        other = Authority.make(self._folder / "other")
        replaced = self._folder / "replaced.crt"
        replaced.write_bytes((other.directory / CA_NAME).read_bytes())
        replaced.rename(self._folder / "node" / CA_NAME)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


async def _view(_request: bytes, _context: Any) -> bytes:
    return b"view"


async def _watch(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
    yield b"first"
    await asyncio.Event().wait()


async def _flood(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
    while True:
        yield bytes(1 << 20)


async def _hold(_request: bytes, context: Any) -> None:
    await context.write(b"first")
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def secured(folder: Path) -> AsyncIterator[Port]:
    authority = Authority.make(folder / "authority")
    tls: TlsFiles = authority.issue(folder / "node", [Identity(Role.NODE, "node-0")])
    revocations = Revocations(tls)
    server = secure_server.make_server(TCP_SERVER_OPTIONS, NODE_ACCESS, revocations)
    methods: dict[str, Any] = {
        VIEW: grpc.unary_unary_rpc_method_handler(_view),
        WATCH: grpc.unary_stream_rpc_method_handler(_watch),
        FLOOD: grpc.unary_stream_rpc_method_handler(_flood),
        HOLD: grpc.unary_stream_rpc_method_handler(_hold),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    groups: dict[str, Any] = {"CreateGroup": grpc.unary_unary_rpc_method_handler(_view)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("epmesh.v1.GroupService", groups),))
    port = Port(authority, folder, secure_server.add_port(server, "127.0.0.1:0", tls))
    await server.start()
    watching = asyncio.create_task(revocations.watch())
    try:
        yield port
    finally:
        watching.cancel()
        await port.close()
        await server.stop(0)


async def watching(channel: Any, method: str = WATCH) -> Any:
    """An open stream, or the error that it ended with."""
    call = channel.unary_stream(f"/{SERVICE}/{method}")(b"", timeout=None if method == WATCH else 10 * PATIENCE_S)
    try:
        assert await asyncio.wait_for(call.read(), PATIENCE_S)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, "the port")
    return call


async def ask(channel: Any, method: str = f"/{SERVICE}/{VIEW}") -> EpmeshError | None:
    try:
        await channel.unary_unary(method)(b"", timeout=PATIENCE_S)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error, "the port")
    return None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Port], Any]], None]:
    monkeypatch.setattr(secure_server, "MAX_CALLS", MAX_CALLS)

    async def session(test: Callable[[Port], Any]) -> None:
        async with secured(tmp_path) as port:
            await test(port)

    return lambda test: asyncio.run(session(test))


def test_streams_of_one_client_over_several_connections_leave_room_for_others(run: Callable[..., None]) -> None:
    async def test(port: Port) -> None:
        greedy = [port.client("greedy") for _ in range(4)]
        calls = [await watching(greedy[number % 4]) for number in range(MAX_CALLS - 2)]
        assert not [call for call in calls if isinstance(call, EpmeshError)]
        refused = await watching(greedy[0])
        assert isinstance(refused, Overloaded)
        assert "8 of 8 open calls are this client's" in str(refused)
        assert isinstance(await ask(greedy[1]), Overloaded)
        modest = port.client("modest")
        assert await ask(modest) is None
        assert not isinstance(await watching(modest), EpmeshError)

    run(test)


async def watching_in_time(channel: Any) -> Any:
    """An open stream, once the port has heard which ended."""
    async with asyncio.timeout(PATIENCE_S):
        while isinstance(call := await watching(channel), Overloaded):
            pass
    assert not isinstance(call, EpmeshError)
    return call


def test_calls_that_ended_make_room_again(run: Callable[..., None]) -> None:
    async def test(port: Port) -> None:
        channel = port.client("a")
        for _ in range(3):
            calls = [await watching_in_time(channel) for _ in range(MAX_CALLS - 2)]
            assert isinstance(await watching(channel), Overloaded)
            for call in calls:
                call.cancel()

    run(test)


def test_a_client_that_is_refused_again_and_again_does_not_fill_the_log(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(port: Port) -> None:
        for name in ("a", "b"):
            channel = port.client(name)
            errors = [await ask(channel, DRIVERS_CALL) for _ in range(20)]
            assert {type(error) for error in errors} == {Unauthenticated}

    with caplog.at_level(logging.WARNING, "epmesh_server.secure_server"):
        run(test)
    said = [record.getMessage() for record in caplog.records if "access.refused" in record.getMessage()]
    assert len(said) == 2
    assert "router 'a'" in said[0]
    assert "router 'b'" in said[1]


async def ended(call: Any) -> EpmeshError:
    """What an open stream ends with."""

    async def read() -> None:
        while await call.read() != grpc.aio.EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read(), PATIENCE_S)
    return from_rpc_error(caught.value, "the port")


@pytest.mark.parametrize("method", [WATCH, HOLD, FLOOD])
def test_a_revoked_certificate_is_refused_and_its_open_streams_are_cut(run: Callable[..., None], method: str) -> None:
    async def test(port: Port) -> None:
        good, stolen = port.client("good"), port.client("stolen")
        stays, ends = await watching(good), [await watching(stolen, method) for _ in range(3)]
        port.revoke("stolen")
        for call in ends:
            error = await ended(call)
            assert isinstance(error, Unauthenticated), error
            assert "router 'stolen' was revoked" in str(error)
        refused = await ask(stolen)
        assert isinstance(refused, Unauthenticated)
        assert "was revoked" in str(refused)
        assert await ask(good) is None
        assert not stays.done()
        assert not isinstance(await watching(port.client("stolen")), EpmeshError)  # another certificate, same name

    run(test)


def test_a_connection_stays_refused_when_the_authority_of_its_certificate_is_gone(run: Callable[..., None]) -> None:
    async def test(port: Port) -> None:
        stolen = port.client("stolen")
        call = await watching(stolen)
        port.revoke("stolen")
        assert isinstance(await ended(call), Unauthenticated)
        port.replace_authority()
        last = time.monotonic() + 3 * LOOK_EVERY_S
        while time.monotonic() < last:  # it has read the new authorities by then, and the connection still stands
            assert await ask(stolen) is not None
            await asyncio.sleep(0.05)

    run(test)


def test_cut_streams_make_room_again(run: Callable[..., None]) -> None:
    async def test(port: Port) -> None:
        stolen = port.client("stolen")
        for _ in range(MAX_CALLS - 2):
            assert not isinstance(await watching(stolen), EpmeshError)
        port.revoke("stolen")
        fresh = port.client("stolen")
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(await ask(fresh), Overloaded):
                pass
        for _ in range(MAX_CALLS - 2):
            await watching_in_time(fresh)

    run(test)
