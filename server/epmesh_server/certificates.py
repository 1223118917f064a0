"""Makes the certificates of a mesh: an authority, and one certificate for every coordinator, node and client."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from epmesh.errors import InvalidRequest
from epmesh.tls import (
    CA_NAME,
    CERTIFICATE_NAME,
    COORDINATOR_NAME,
    KEY_NAME,
    NODE_NAME,
    REVOKED_NAME,
    SERVICE_NAME,
    TlsFiles,
    node_name,
)
from epmesh_server.access import Identity, Role, identities
from epmesh_server.revocation import CertificateId

CA_KEY_NAME = "ca.key"
DEFAULT_DAYS = 365
_BACKDATED = dt.timedelta(minutes=5)  # clocks differ
_MAX_DAYS = 36_500
_SERVICES = frozenset({Role.COORDINATOR, Role.NODE})


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory: ``ca.crt``, and ``ca.key``, which need not be where services run."""

    directory: Path
    certificate: x509.Certificate
    private_key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, directory: Path, *, days: int = 10 * DEFAULT_DAYS) -> Authority:
        """A new authority.

        Raises:
            InvalidRequest: the directory has one already, or cannot be written.
        """
        private_key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "epmesh authority")])
        certificate = (
            _builder(name, name, private_key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(private_key.public_key()), critical=False)
            .sign(private_key, hashes.SHA256())
        )
        _make_directory(directory)
        _write(directory / CA_KEY_NAME, _private_pem(private_key), secret=True)
        _write(directory / CA_NAME, certificate.public_bytes(serialization.Encoding.PEM))
        return cls(directory, certificate, private_key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """The authority that `make` left in a directory.

        Raises:
            InvalidRequest: there is none.
        """
        try:
            certificate = x509.load_pem_x509_certificate((directory / CA_NAME).read_bytes())
            private_key = serialization.load_pem_private_key((directory / CA_KEY_NAME).read_bytes(), None)
        except (OSError, ValueError, TypeError) as exc:
            raise InvalidRequest(f"{directory} has no authority ({exc}); make one with `epmesh certs init`") from exc
        if not isinstance(private_key, ec.EllipticCurvePrivateKey):
            raise InvalidRequest(f"{directory / CA_KEY_NAME} is of another kind than `epmesh certs init` makes")
        return cls(directory, certificate, private_key)

    def issue(
        self, directory: Path, identities: Sequence[Identity], *, days: float = DEFAULT_DAYS, replace: bool = False
    ) -> TlsFiles:
        """A certificate with these identities, in a directory of its own: ``ca.crt``, ``tls.crt``, ``tls.key``.

        Args:
            days: for which it is valid from now on; 0 or less makes one that is over already.
            replace: whether files that are there may be replaced, as rotation does; each at once, never half.

        Raises:
            InvalidRequest: the directory has one already, or cannot be written.
        """
        private_key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(identities[0])[:64])])
        certificate = (
            _builder(subject, self.certificate.subject, private_key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_purposes(identities)), critical=False)
            .add_extension(x509.SubjectAlternativeName(_names(identities)), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.private_key.public_key()), critical=False
            )
            .sign(self.private_key, hashes.SHA256())
        )
        _make_directory(directory)
        if not replace:
            _refuse_existing(directory / KEY_NAME, "`epmesh certs add --replace` rotates it")
        _write(directory / KEY_NAME, _private_pem(private_key), secret=True, replace=replace)
        _write(directory / CERTIFICATE_NAME, certificate.public_bytes(serialization.Encoding.PEM), replace=replace)
        authority = self.certificate.public_bytes(serialization.Encoding.PEM)
        _write(directory / CA_NAME, authority, replace=replace)
        files = TlsFiles.from_directory(directory)
        _make_directory(self._issued)
        _write(
            self._issued / f"{CertificateId.of(certificate)}.crt", certificate.public_bytes(serialization.Encoding.PEM)
        )
        if self.list_path.exists() and _serves(certificate):
            _write(files.revoked, self.list_path.read_bytes(), replace=True)
        return files

    @property
    def list_path(self) -> Path:
        """``crl.pem``: the list of what `revoke` revoked; not there before."""
        return self.directory / REVOKED_NAME

    @property
    def _issued(self) -> Path:
        return self.directory / "issued"

    def issued_to(self, identity: Identity, *, replaced: bool = False) -> list[x509.Certificate]:
        """Its certificates that this authority made and that are not over; with `replaced`, without the one that its
        directory has now."""
        current = _certificate(self.directory / directory_name(identity) / CERTIFICATE_NAME)
        found = [_certificate(path) for path in sorted(self._issued.glob("*.crt"))]
        if current is not None and not replaced and current not in found:
            found.append(current)  # made by a version that kept no copies
        now = dt.datetime.now(dt.UTC)
        return [
            each
            for each in found
            if each is not None
            and identity in certified(each)
            and each.not_valid_after_utc > now
            and not (replaced and each == current)
        ]

    def revoke(self, serials: Iterable[int]) -> list[Path]:
        """Adds certificates of this authority to its list, which is never shortened.

        Returns:
            Where the list is now: in the directory of the authority, and in those of its set that are for services.

        Raises:
            InvalidRequest: the list cannot be read or written.
        """
        now = dt.datetime.now(dt.UTC)
        entries = {entry.serial_number: entry for entry in self._revoked()}
        for serial in serials:
            made = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now)
            entries.setdefault(serial, made.build())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - _BACKDATED)
            .next_update(now + dt.timedelta(days=_MAX_DAYS))  # it is pushed to services, not fetched
        )
        key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.certificate.public_key())  # type: ignore[arg-type]
        builder = builder.add_extension(key, critical=False)
        for entry in entries.values():
            builder = builder.add_revoked_certificate(entry)
        data = builder.sign(self.private_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        served = [path.parent for path in self.directory.glob(f"*/{CERTIFICATE_NAME}")]
        places = [self.list_path]
        for directory in sorted(served):
            certificate = _certificate(directory / CERTIFICATE_NAME)
            if certificate is not None and _serves(certificate):
                places.append(directory / REVOKED_NAME)
        for place in places:
            _write(place, data, replace=True)
        return places

    def _revoked(self) -> list[x509.RevokedCertificate]:
        if not self.list_path.exists():
            return []
        try:
            return list(x509.load_pem_x509_crl(self.list_path.read_bytes()))
        except (OSError, ValueError) as exc:
            raise InvalidRequest(f"cannot read {self.list_path}: {exc}") from exc


def certified(certificate: x509.Certificate) -> tuple[Identity, ...]:
    """Whose certificate it is."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return identities(names.value.get_values_for_type(x509.UniformResourceIdentifier))


def _certificate(path: Path) -> x509.Certificate | None:
    """The certificate in a file; `None` where there is none.

    Raises:
        InvalidRequest: it is something else.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise InvalidRequest(f"cannot read {path}: {exc}") from exc


def _serves(certificate: x509.Certificate) -> bool:
    return any(identity.role in _SERVICES for identity in certified(certificate))


def directory_name(identity: Identity) -> str:
    """Where a set keeps the certificate of an identity: ``coordinator``, ``node-a``, ``router-web``.

    Raises:
        InvalidRequest: the name cannot be part of a path.
    """
    if not identity.name:
        return identity.role.value
    if identity.name.startswith(".") or any(character in identity.name for character in "/\\\0"):
        raise InvalidRequest(f"{identity.role.value} {identity.name!r} cannot name a directory; choose another")
    return f"{identity.role.value}-{identity.name}"


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    if days > _MAX_DAYS:
        raise InvalidRequest(f"{days} days; a certificate may be valid for {_MAX_DAYS}")
    now = dt.datetime.now(dt.UTC)
    last = now + dt.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, last) - _BACKDATED)
        .not_valid_after(last)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _purposes(identities: Sequence[Identity]) -> list[x509.ObjectIdentifier]:
    serves = {identity.role for identity in identities} & _SERVICES
    # Every service is asked for its health with its own certificate too, where it runs.
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH] if serves else []
    return [*purposes, ExtendedKeyUsageOID.CLIENT_AUTH]


def _names(identities: Sequence[Identity]) -> list[x509.GeneralName]:
    hosts: dict[str, None] = {}
    for identity in identities:
        if identity.role is Role.COORDINATOR:
            hosts |= dict.fromkeys((SERVICE_NAME, COORDINATOR_NAME))
        elif identity.role is Role.NODE:
            hosts |= dict.fromkeys((SERVICE_NAME, NODE_NAME, node_name(identity.name)))
    uris = [x509.UniformResourceIdentifier(identity.uri) for identity in identities]
    return [*map(x509.DNSName, hosts), *uris]


def _private_pem(private_key: ec.EllipticCurvePrivateKey) -> bytes:
    return private_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise InvalidRequest(f"cannot make {directory}: {exc.strerror}") from exc


def _refuse_existing(path: Path, mend: str = "choose another directory, or remove it first") -> None:
    if path.exists():
        raise InvalidRequest(f"{path} is there already; {mend}")


def _write(path: Path, data: bytes, *, secret: bool = False, replace: bool = False) -> None:
    """Writes a file as a whole: who reads it meanwhile gets the old one or the new one."""
    if not replace:
        _refuse_existing(path)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600 if secret else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        part.rename(path)
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise InvalidRequest(f"cannot write {path}: {exc.strerror}") from exc
