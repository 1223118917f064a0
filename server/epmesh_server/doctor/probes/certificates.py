"""Certificates in this node's TLS directory: whether they fit together, and whether peers would believe them."""

from __future__ import annotations

import contextlib
import ssl
import time
from pathlib import Path
from typing import Any

from epmesh.errors import InvalidRequest
from epmesh.tls import TlsFiles
from epmesh_server.doctor.facts import CertificateFacts

_DOUBTS = {10: "expired", 9: "early"}  # X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID
_OTHER_PURPOSE = 26  # X509_V_ERR_INVALID_PURPOSE


def look_at_certificates(directory: Path) -> CertificateFacts:
    """Reads the files, and has their owner shake hands in memory with somebody who has the same authority."""
    try:
        files = TlsFiles.from_directory(directory)
        context = _context(ssl.PROTOCOL_TLS_SERVER, files)
        context.load_verify_locations(files.ca)
    except InvalidRequest as exc:
        return CertificateFacts(directory=directory, problem=str(exc))
    except (ssl.SSLError, OSError, ValueError) as exc:
        return CertificateFacts(directory=directory, problem=f"they do not fit together: {exc}")
    try:
        certificate = _believed(files)
    except ssl.SSLCertVerificationError as exc:
        doubt = _DOUBTS.get(exc.verify_code, "untrusted")
        return CertificateFacts(directory=directory, doubt=doubt, doubt_text=exc.verify_message)
    return CertificateFacts(
        directory=directory,
        seconds_left=ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time(),
        names=tuple(str(value) for _, value in certificate.get("subjectAltName", ())),
    )


def _believed(files: TlsFiles) -> dict[str, Any]:
    """The certificate as a peer takes it: a service's as its callers do, one that is for callers alone as services do.

    Raises:
        ssl.SSLCertVerificationError: it does not.
    """
    try:
        return _shake_hands(files, verifier=ssl.PROTOCOL_TLS_CLIENT)
    except ssl.SSLCertVerificationError as exc:
        if exc.verify_code != _OTHER_PURPOSE:
            raise
    return _shake_hands(files, verifier=ssl.PROTOCOL_TLS_SERVER)


def _shake_hands(files: TlsFiles, verifier: ssl._SSLMethod) -> dict[str, Any]:
    client, server = (_context(kind, files) for kind in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER))
    careful = client if verifier is ssl.PROTOCOL_TLS_CLIENT else server
    careful.verify_mode = ssl.CERT_REQUIRED
    careful.load_verify_locations(files.ca)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    calling = client.wrap_bio(back, there)
    serving = server.wrap_bio(there, back, server_side=True)
    for side in (calling, serving, calling, serving):  # hello, answer, the caller's certificate, its end
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return (calling if careful is client else serving).getpeercert() or {}


def _context(kind: ssl._SSLMethod, files: TlsFiles) -> ssl.SSLContext:
    """Shows the certificate and doubts nobody's."""
    context = ssl.SSLContext(kind)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(files.certificate, files.private_key)
    return context
