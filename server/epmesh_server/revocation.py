"""Certificates that are good no more: those in ``crl.pem`` of a service's TLS directory, read again when it changes."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from epmesh.errors import InvalidRequest, Unauthenticated
from epmesh.tls import TlsFiles, file_stamp

LOOK_EVERY_S = 1.0
_MAX_FILE_BYTES = 16 << 20
_MAX_REMEMBERED = 4096
_BEGIN = b"-----BEGIN X509 CRL-----"
_LIST = re.compile(_BEGIN + rb".*?-----END X509 CRL-----", re.DOTALL)
_KEYS = (ec.EllipticCurvePublicKey, rsa.RSAPublicKey, ed25519.Ed25519PublicKey, ed448.Ed448PublicKey)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CertificateId:
    """What tells a certificate from every other: its authority's name, and the number that this gave it."""

    issuer: bytes
    serial: int

    def __str__(self) -> str:
        return f"{self.serial:X}"

    @classmethod
    def of(cls, certificate: x509.Certificate) -> CertificateId:
        """That of `certificate`."""
        return cls(certificate.issuer.public_bytes(), certificate.serial_number)


@functools.lru_cache(_MAX_REMEMBERED)
def certificate_id(pem: bytes) -> CertificateId:
    """Of a certificate as a caller showed it.

    Raises:
        Unauthenticated: it cannot be read, so nobody can say whether it was revoked.
    """
    try:
        return CertificateId.of(x509.load_pem_x509_certificate(pem))
    except ValueError as exc:
        raise Unauthenticated(f"the caller's certificate cannot be read: {exc}") from exc


def revoked_by(lists: bytes, authorities: bytes) -> frozenset[CertificateId]:
    """The certificates in revocation lists, of those lists that one of `authorities` signed. Pure.

    Args:
        lists: one or several, PEM.
        authorities: certificates, PEM; a list of another one's says nothing about who gets in here, and is left out.

    Raises:
        InvalidRequest: there is no list, one cannot be read or was cut off, or its signature is wrong.
    """
    if any(line and line == _BEGIN[: len(line)] for line in map(bytes.strip, _LIST.sub(b"", lists).splitlines())):
        raise InvalidRequest("the last list was cut off; copy it to another name first, and rename that")
    found: set[CertificateId] = set()
    try:
        known = x509.load_pem_x509_certificates(authorities)
        parsed = [x509.load_pem_x509_crl(text) for text in _LIST.findall(lists)]
    except ValueError as exc:
        raise InvalidRequest(f"no revocation list can be read: {exc}") from exc
    if not parsed:
        raise InvalidRequest("it has no revocation list; `epmesh certs revoke` makes one")
    for each in parsed:
        signers = [authority for authority in known if _may_have_signed(authority, each)]
        if not signers:
            _log.warning("revocation list of %s: it is no authority here; left out", each.issuer.rfc4514_string())
            continue
        if not any(_signed(each, signer) for signer in signers):
            raise InvalidRequest(f"the list of {each.issuer.rfc4514_string()} is not signed by that authority")
        issuer = each.issuer.public_bytes()
        found.update(CertificateId(issuer, entry.serial_number) for entry in each)
    return frozenset(found)


def _may_have_signed(authority: x509.Certificate, revoked: x509.CertificateRevocationList) -> bool:
    """Several may have one name, as in a rotation; the key that a list says it was signed with tells them apart."""
    return authority.subject == revoked.issuer and _key_of(revoked) in (None, _key_id(authority))


def _key_of(revoked: x509.CertificateRevocationList) -> bytes | None:
    try:
        return revoked.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return None


def _key_id(authority: x509.Certificate) -> bytes:
    try:
        return authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        return x509.SubjectKeyIdentifier.from_public_key(authority.public_key()).digest


def _signed(revoked: x509.CertificateRevocationList, signer: x509.Certificate) -> bool:
    key = signer.public_key()
    return isinstance(key, _KEYS) and revoked.is_signature_valid(key)


class Revocations:
    """What a service's ``crl.pem`` says. Used on one event loop; `watch` keeps it up to date.

    What was revoked stays so as long as the service runs: also where the list is missing or cannot be used, and where
    its authority is believed no more, for connections that were opened before that stand for as long as they like.
    """

    def __init__(self, tls: TlsFiles) -> None:
        """Reads the file, which need not be there.

        Raises:
            InvalidRequest: it cannot be used.
        """
        self._tls = tls
        self._path: Path = tls.revoked
        self._stamps = self._both()
        self._revoked = self._read() if self._stamps[0] is not None else frozenset()
        self._listeners: list[Callable[[], None]] = []

    def __contains__(self, certificate: object) -> bool:
        return certificate in self._revoked

    def check(self, certificate: CertificateId, owner: str) -> None:
        """Refuses a certificate that was revoked.

        Raises:
            Unauthenticated: it was; the text has its serial number.
        """
        if certificate in self._revoked:
            raise refusal(certificate, owner)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Has `listener` called, on the event loop, whenever there are more."""
        self._listeners.append(listener)

    def look(self) -> None:
        """Reads the file again if it changed, or the authorities did, which say whose lists count."""
        stamps, before = self._both(), self._stamps
        if stamps == before:
            return
        self._stamps = stamps
        if stamps[0] is None:
            if before[0] is not None:
                _log.warning("revoke.failed: %s is gone; %d certificates stay revoked", self._path, len(self._revoked))
            return
        try:
            revoked = self._read()
        except InvalidRequest as exc:
            _log.error("revoke.failed: %s; %d certificates stay revoked", exc, len(self._revoked))
            return
        self._revoked |= revoked
        _log.info("revoke.complete: %s revokes %d certificates, %d are", self._path, len(revoked), len(self._revoked))
        for listener in self._listeners:
            listener()

    async def watch(self) -> None:
        """Looks again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                self.look()
            except Exception:  # noqa: BLE001 - if this ended, revocations would stop without a word
                _log.exception("revoke.failed")

    def _both(self) -> tuple[object, object]:
        return file_stamp(self._path), file_stamp(self._tls.ca)

    def _read(self) -> frozenset[CertificateId]:
        try:
            with self._path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
            if len(data) > _MAX_FILE_BYTES:
                raise InvalidRequest(f"it has more than {_MAX_FILE_BYTES} bytes")
            return revoked_by(data, self._tls.ca.read_bytes())
        except OSError as exc:
            raise InvalidRequest(f"cannot read {exc.filename}: {exc.strerror}") from exc
        except InvalidRequest as exc:
            raise InvalidRequest(f"{self._path}: {exc}") from exc


def refusal(certificate: CertificateId, owner: str) -> Unauthenticated:
    """What whoever shows a revoked certificate is told."""
    return Unauthenticated(f"certificate {certificate} of {owner} was revoked; use the one that replaced it")
