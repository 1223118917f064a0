"""Who may read ``/metrics`` of a secured service: whoever may look at its mesh, by TLS and a certificate."""

from __future__ import annotations

import logging
import math
import ssl
import time

from cryptography import x509

from epmesh.errors import InvalidRequest
from epmesh.tls import TlsFiles
from epmesh_server.access import Role, authorize, name_of
from epmesh_server.certificates import certified
from epmesh_server.revocation import CertificateId, Revocations

_log = logging.getLogger(__name__)
_RETRY_S = 1.0  # reading files that do not fit together takes a moment, and whoever connects has it done
_ACCESS = {"/metrics": frozenset(Role)}


class MetricsGuard:
    """TLS for the port of ``/metrics``. Used on one event loop.

    Attributes:
        context: for the port; it reads the files anew for a connection once they were replaced.
    """

    def __init__(self, tls: TlsFiles, revocations: Revocations) -> None:
        """Reads the files.

        Raises:
            InvalidRequest: they cannot be used.
        """
        self._tls = tls
        self._revocations = revocations
        self._stamp = tls.stamp
        self._failed_at = -math.inf
        self._current = self.context = self._make()

    def check(self, connection: ssl.SSLObject) -> None:
        """Refuses whoever is at the other end of a connection, if it may not read.

        Raises:
            Unauthenticated: its certificate is of no role of a mesh, or was revoked.
        """
        certificate = x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")
        owner = certified(certificate)
        authorize(_ACCESS, "/metrics", owner)
        self._revocations.check(CertificateId.of(certificate), name_of(owner))

    def _make(self) -> ssl.SSLContext:
        self._tls.read()  # says what is wrong with them
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.options |= ssl.OP_NO_TICKET  # a resumed session would show no certificate
        context.num_tickets = 0
        try:
            context.load_verify_locations(self._tls.ca)
            context.load_cert_chain(self._tls.certificate, self._tls.private_key, lambda: "")
        except (ssl.SSLError, OSError) as exc:
            raise InvalidRequest(f"{self._tls.certificate} cannot be used for metrics: {exc}") from exc
        context.sni_callback = self._renew
        return context

    def _renew(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Gives a new connection the files of now; called at the first message of each."""
        stamp, now = self._tls.stamp, time.monotonic()
        if stamp != self._stamp and now - self._failed_at >= _RETRY_S:
            try:
                self._current = self._make()
                self._stamp = stamp
            except InvalidRequest as exc:
                self._failed_at = now
                _log.warning("tls.failed: %s; metrics go on with the certificate from before", exc)
        connection.context = self._current
