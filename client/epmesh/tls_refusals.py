"""Why a connection was refused: gRPC says "socket closed", so TLS is tried once more here, where it says more."""

from __future__ import annotations

import contextlib
import socket
import ssl

from epmesh.addresses import split_address
from epmesh.channels import UNIX_PREFIX
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, Unauthenticated
from epmesh.tls import SERVICE_NAME, TlsFiles

_TIMEOUT_S = 1.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # and empty SETTINGS, as gRPC begins
_ALERT = b"\x15\x03"


def explained(error: EpmeshError, address: str, tls: TlsFiles | None, server: str = SERVICE_NAME) -> EpmeshError:
    """`error` of a first call at `address`, or `Unauthenticated` with the reason where TLS is behind it; takes up to
    some seconds."""
    if not isinstance(error, MeshUnavailable | DeadlineExceeded) or address.startswith(UNIX_PREFIX):
        return error
    reason = why_refused(address, tls, server)
    return error if reason is None else Unauthenticated(f"{address}: {reason}")


def why_refused(address: str, tls: TlsFiles | None, server: str = SERVICE_NAME) -> str | None:
    """What TLS minds about a connection to `address`; `None` where it minds nothing, or nobody listens there."""
    try:
        host, port = split_address(address, "address")
        with socket.create_connection((host.strip("[]"), port), _TIMEOUT_S) as connection:
            connection.settimeout(_TIMEOUT_S)
            return _plain(connection) if tls is None else _secured(connection, tls, server)
    except (OSError, InvalidRequest):
        return None


def _plain(connection: socket.socket) -> str | None:
    connection.sendall(_PREFACE)
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        answer = connection.recv(2)
    if answer in (b"", _ALERT):  # a service without TLS answers with its own settings
        return "the service wants TLS; give tls= (--tls-dir, EPMESH_TLS_DIR) a directory of certificates"
    return None


def _secured(connection: socket.socket, tls: TlsFiles, server: str) -> str | None:
    try:
        context = _context(tls)
    except ssl.SSLError as exc:
        return f"{tls.ca} cannot be used: {exc.reason or exc}"
    try:
        with context.wrap_socket(connection, server_hostname=server) as secured:
            # A service looks at the caller's certificate after the handshake is over for the caller.
            return None if secured.recv(1) else _closed(tls)
    except ssl.SSLCertVerificationError as exc:
        return f"the service's certificate is refused here: {exc.verify_message}"
    except TimeoutError:
        return None
    except ssl.SSLError as exc:
        return _reason(exc, tls)
    except ConnectionResetError:
        return _closed(tls)


def _closed(tls: TlsFiles) -> str:
    return (
        f"the service refused {tls.certificate}: it is over, of an authority that the service does not "
        "believe, or not made for clients"
    )


def _context(tls: TlsFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.certificate, tls.private_key)
    context.set_alpn_protocols(["h2"])
    return context


def _reason(error: ssl.SSLError, tls: TlsFiles) -> str | None:
    reason = error.reason or str(error)
    if "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER" in reason:
        return "the service speaks no TLS; leave tls= (--tls-dir) out, or secure the service"
    if "ALERT" in reason:
        what = reason.partition("ALERT_")[2].replace("_", " ").lower()
        return f"the service refused the certificate {tls.certificate}: {what}"
    return f"TLS failed: {reason}"
