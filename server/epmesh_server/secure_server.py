"""gRPC servers of TCP ports: with mutual TLS and a table of who may call what, or plain where nothing is configured."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import grpc
from cryptography import x509

from epmesh.errors import EpmeshError, InvalidRequest, Overloaded, Unauthenticated
from epmesh.grpc_errors import abort
from epmesh.tls import TlsContents, TlsFiles
from epmesh_server.access import Access, Identity, Role, authorize, identities, name_of
from epmesh_server.certificates import certified
from epmesh_server.fair_budget import FairBudget
from epmesh_server.refusals import RefusalLog
from epmesh_server.revocation import CertificateId, Revocations, certificate_id, refusal

_log = logging.getLogger(__name__)
_SAN_KEY, _PEM_KEY = "x509_subject_alternative_name", "x509_pem_cert"
_ABORT_S = 1.0  # what sending an error may take

Context = grpc.aio.ServicerContext[Any, Any]
_Shown: TypeAlias = "dict[str, list[bytes]]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

MAX_CALLS = 16_384
"""Calls that one TCP port has open at once, streams included; a client its part of them. Beyond: `Overloaded`."""
_RETRY_AFTER_S = 1.0

_BOUNDS = (
    ("grpc.max_concurrent_streams", 4096),  # of one connection; more wait at the client
    # Who connects and says nothing is cut off; by default after two minutes.
    ("grpc.server_handshake_timeout_ms", 5000),
    ("grpc.max_connection_idle_ms", 600_000),
)
_ENDLESS = frozenset(
    {
        "/epmesh.v1.CommunicatorService/AttachRank",
        "/epmesh.v1.DiscoveryService/WatchViews",
        "/epmesh.v1.MembershipService/NodeSession",
        "/epmesh.v1.RankService/RankSession",
        "/grpc.health.v1.Health/Check",  # for tools that are not ours, and answered at once
        "/grpc.health.v1.Health/Watch",
    }
)


def make_server(options: Sequence[tuple[str, int]], access: Access, revocations: Revocations | None) -> grpc.aio.Server:
    """A server for a TCP port: calls need a deadline, but for those that tell of something for as long as they are
    open. With `revocations`, which a secured service has, each is checked against `access`, too, and refused, or ended
    where it is open, if its certificate was revoked."""
    gate = _Gate(access if revocations is not None else None, revocations)
    return grpc.aio.server(options=(*options, *_BOUNDS), interceptors=[gate], maximum_concurrent_rpcs=MAX_CALLS)


def add_port(server: grpc.aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Binds `address`; returns the port.

    Raises:
        RuntimeError: it cannot be bound.
        InvalidRequest: the files of `tls` cannot be read.
    """
    if tls is None:
        return server.add_insecure_port(address)
    configurations = _Configurations(tls)
    credentials = grpc.dynamic_ssl_server_credentials(
        configurations.current,
        configurations.newer,  # type: ignore[arg-type]  # None, says gRPC, where nothing changed
        require_client_authentication=True,
    )
    return server.add_secure_port(address, credentials)


def check_own_certificate(tls: TlsFiles, role: Role, name: str | None = None) -> str:
    """Refuses to start with a certificate that others would refuse; returns the name it is for.

    Args:
        role: what this process is.
        name: its node id; `None`: whichever the certificate has.

    Raises:
        InvalidRequest: it is of another role or name, or not valid now.
    """
    certificate = _parse(tls)
    now = dt.datetime.now(dt.UTC)
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= now <= last:
        raise InvalidRequest(
            f"{tls.certificate} is valid from {first} to {last}, and it is {now:%Y-%m-%d %H:%M:%S} UTC"
        )
    shown = certified(certificate)
    if CertificateId.of(certificate) in Revocations(tls):
        raise InvalidRequest(f"{tls.certificate} was revoked; `epmesh certs add --replace` makes another one")
    names = [identity.name for identity in shown if identity.role is role]
    if not names or (name is not None and name not in names):
        wanted = Identity(role, name or "")
        has = ", ".join(map(str, shown)) or "no role of a mesh"
        raise InvalidRequest(f"{tls.certificate} is of {has}, and this is {wanted}; `epmesh certs` makes one")
    return name or names[0]


def caller_of(context: Context) -> tuple[Identity, ...] | None:
    """Who calls, by its certificate; `None` where nothing authenticates callers: without TLS."""
    shown = _shown(context)
    return None if shown is None else _identities(shown)


def certificate_of(context: Context) -> CertificateId | None:
    """The certificate that a caller shows; `None` where nothing authenticates callers: without TLS.

    Raises:
        Unauthenticated: it cannot be read.
    """
    shown = _shown(context)
    return None if shown is None else _certificate(shown)


def client_of(context: Context) -> str:
    """For whom a call is made: the owner of its certificate; without TLS, its connection."""
    return _client(caller_of(context), context)


class _Configurations:
    """Certificates for new connections: read anew when a file changed, so that rotation needs no restart."""

    def __init__(self, tls: TlsFiles) -> None:
        self._tls = tls
        self._stamp = tls.stamp
        self.current = _configuration(tls.read())

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration, if the files changed since; a set that cannot be read is left alone, and logged."""
        stamp = self._tls.stamp
        if stamp == self._stamp:
            return None
        try:
            contents = self._tls.read()
        except InvalidRequest as exc:
            _log.warning("tls.failed: %s; connections go on with the certificate from before", exc)
            return None
        self._stamp = stamp
        _log.info("tls.complete: %s was replaced", self._tls.certificate)
        return _configuration(contents)


class _Gate(grpc.aio.ServerInterceptor):
    """Lets a call through to its handler if it has the deadline it needs, and the caller's certificate may make it."""

    def __init__(self, access: Access | None, revocations: Revocations | None) -> None:
        self._access = access
        self._revocations = revocations
        self._open_calls: set[_OpenCall] = set()
        if revocations is not None:
            revocations.on_change(self._cut)
        self._gated: dict[str, _Handler] = {}
        self._calls = FairBudget(MAX_CALLS)
        self._refusals = RefusalLog(_log, "access.refused")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """The handler, with the check before it."""
        method = str(handler_call_details.method)
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        gated = self._gated.get(method)
        if gated is None:
            gated = self._gated[method] = self._gate(method, handler)
        return gated

    def _gate(self, method: str, handler: _Handler) -> _Handler:
        kinds = (
            "stream" if several else "unary" for several in (handler.request_streaming, handler.response_streaming)
        )
        name = "_".join(kinds)
        behaviour = getattr(handler, name)

        async def admit(context: Context) -> _OpenCall:
            try:
                return self._admit(method, context)
            except EpmeshError as error:
                await abort(context, error)

        # A generator that is suspended as its client does not read could not say why its call is cut.
        if inspect.isasyncgenfunction(behaviour):
            behaviour = _writer(behaviour)

        async def call(request: Any, context: Context) -> Any:
            async with self._open(await admit(context), context):
                return await behaviour(request, context)

        make = getattr(grpc, f"{name}_rpc_method_handler")
        return cast("_Handler", make(call, handler.request_deserializer, handler.response_serializer))

    def _admit(self, method: str, context: Context) -> _OpenCall:
        """The call, and whose it is.

        Raises:
            EpmeshError: it may not be made.
        """
        shown = _shown(context)
        caller = None if shown is None else _identities(shown)
        client = _client(caller, context)
        certificate = None
        try:
            if self._access is not None:
                authorize(self._access, method, caller or ())
            if shown is not None and self._revocations is not None:
                certificate = _certificate(shown)
                self._revocations.check(certificate, client)
        except Unauthenticated as error:
            self._refusals.note(client, f"{context.peer()}: {error}")
            raise
        _check_deadline(method, context)
        if not self._calls.fits(client, 1):
            open_calls = f"{self._calls.held_by(client)} of {self._calls.held} open calls are this client's"
            raise Overloaded(_RETRY_AFTER_S, f"{open_calls}; one more does not fit into its part of {MAX_CALLS}")
        return _OpenCall(client, certificate, asyncio.current_task())

    @contextlib.asynccontextmanager
    async def _open(self, call: _OpenCall, context: Context) -> AsyncIterator[None]:
        """Counts a call while it is open, and ends it with the refusal if it is cut; right after `_admit`."""
        self._calls.hold(call.client, 1)
        self._open_calls.add(call)
        try:
            yield
        except asyncio.CancelledError:
            if call.refusal is not None and call.task is not None:
                call.task.uncancel()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_ABORT_S):
                        await abort(context, call.refusal)
            raise
        finally:
            self._open_calls.discard(call)
            self._calls.release(call.client, 1)

    def _cut(self) -> None:
        """Ends the open calls of certificates that are revoked now."""
        assert self._revocations is not None
        for call in list(self._open_calls):
            if call.certificate is None or call.refusal is not None or call.certificate not in self._revocations:
                continue
            call.refusal = refusal(call.certificate, call.client)
            self._refusals.note(call.client, f"an open call is ended: {call.refusal}")
            if call.task is not None:
                call.task.cancel()


def _writer(generate: Callable[[Any, Context], AsyncGenerator[Any, None]]) -> Callable[[Any, Context], Awaitable[None]]:
    """A handler that writes what `generate` yields."""

    async def write(request: Any, context: Context) -> None:
        async with contextlib.aclosing(generate(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return write


@dataclass(eq=False)
class _OpenCall:
    """One call that was let in.

    Attributes:
        refusal: why it is cut, if it is.
    """

    client: str
    certificate: CertificateId | None
    task: asyncio.Task[Any] | None
    refusal: Unauthenticated | None = None


def _shown(context: Context) -> _Shown | None:
    """What gRPC knows of the caller's certificate; `None` without TLS."""
    shown = cast("_Shown", context.auth_context())
    return shown if b"ssl" in shown.get("transport_security_type", ()) else None


def _identities(shown: _Shown) -> tuple[Identity, ...]:
    return identities(uri.decode(errors="replace") for uri in shown.get(_SAN_KEY, ()))


def _certificate(shown: _Shown) -> CertificateId:
    return certificate_id(next(iter(shown.get(_PEM_KEY, ())), b""))


def _client(caller: tuple[Identity, ...] | None, context: Context) -> str:
    return name_of(caller) if caller else str(context.peer())


def _check_deadline(method: str, context: Context) -> None:
    remaining = cast("float | None", context.time_remaining())  # the stubs do not know of calls without a deadline
    if remaining is None and method not in _ENDLESS:
        raise InvalidRequest(f"{method} needs a deadline; give the call a timeout")


def _configuration(contents: TlsContents) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(contents.private_key, contents.certificate)], contents.ca)


def _parse(tls: TlsFiles) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(tls.read().certificate)[0]
    except ValueError as exc:
        raise InvalidRequest(f"{tls.certificate} is no certificate: {exc}") from exc
