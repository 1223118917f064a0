"""Mutual TLS: which files a process shows itself with, and under which names services show themselves.

A certificate says who somebody is, not where: addresses change in containers, so a service is checked by a name that
follows from its role or node id, whatever address was dialled.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from epmesh.errors import InvalidRequest

CA_NAME, CERTIFICATE_NAME, KEY_NAME = "ca.crt", "tls.crt", "tls.key"
REVOKED_NAME = "crl.pem"

SERVICE_NAME = "service.epmesh"
"""The DNS name that the certificate of every coordinator and node service has."""
COORDINATOR_NAME = "coordinator.epmesh"
NODE_NAME = "node.epmesh"

_MAX_FILE_BYTES = 1 << 20
_TRIES, _SETTLE_S = 5, 0.02  # three files cannot be replaced in one step
_OTHERS = stat.S_IRWXO


def node_name(node_id: str) -> str:
    """The DNS name that only the certificate of the node `node_id` has; a hash, for ids may hold any character."""
    return f"n-{hashlib.sha256(node_id.encode()).hexdigest()[:32]}.{NODE_NAME}"


@dataclass(frozen=True)
class TlsContents:
    """What the files hold, PEM. `private_key` never shows in a text."""

    ca: bytes
    certificate: bytes
    private_key: bytes

    def __repr__(self) -> str:
        return "TlsContents(...)"


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """The files that a process shows itself with, PEM; read anew for every connection, so that they may be replaced.

    Attributes:
        ca: certificates of the authorities that are believed, one or several.
        certificate: this process's own, followed by what leads to the authority, if anything.
        private_key: of `certificate`; others must not be able to read it.
    """

    ca: Path
    certificate: Path
    private_key: Path

    @property
    def revoked(self) -> Path:
        """Where services look for lists of revoked certificates: ``crl.pem`` beside `ca`; it need not be there."""
        return self.ca.with_name(REVOKED_NAME)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> TlsFiles:
        """``ca.crt``, ``tls.crt`` and ``tls.key`` in `directory`, as `epmesh certs init` and Kubernetes name them.

        Raises:
            InvalidRequest: one is not there.
        """
        files = cls(
            ca=Path(directory, CA_NAME),
            certificate=Path(directory, CERTIFICATE_NAME),
            private_key=Path(directory, KEY_NAME),
        )
        files.read()
        return files

    def read(self) -> TlsContents:
        """What the files hold now; where somebody is just replacing them, what they hold a moment later.

        Raises:
            InvalidRequest: one cannot be read or is no PEM file, the private key is not the certificate's, or everybody
                may read it.
        """
        for _ in range(_TRIES):
            stamp, contents = self.stamp, self._read()
            misfit = self._misfit()
            if misfit is None and stamp == self.stamp:
                return contents
            time.sleep(_SETTLE_S)
        raise InvalidRequest(
            f"{self.certificate} and {self.private_key} do not fit together: {misfit or 'they change'}"
        )

    def _read(self) -> TlsContents:
        mode = _mode(self.private_key)
        if mode & _OTHERS:
            raise InvalidRequest(
                f"private key {self.private_key} has mode {mode:04o}, so every user here may use it; chmod 600 it"
            )
        return TlsContents(*map(_pem, (self.ca, self.certificate, self.private_key)))

    def _misfit(self) -> str | None:
        """Why the private key is not that of the certificate."""
        try:
            # Nobody is there to type the password of a key that has one.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(self.certificate, self.private_key, lambda: "")
        except (ssl.SSLError, OSError) as exc:
            return exc.reason if isinstance(exc, ssl.SSLError) and exc.reason else str(exc)
        return None

    @property
    def stamp(self) -> tuple[FileStamp | None, ...]:
        """Changes when one of the files does."""
        return tuple(file_stamp(path) for path in (self.ca, self.certificate, self.private_key))


Tls = TlsFiles | str | os.PathLike[str]
FileStamp = tuple[int, int, int]


def tls_files(tls: Tls | None) -> TlsFiles | None:
    """The files that a caller's ``tls=`` means: themselves, or those in a directory.

    Raises:
        InvalidRequest: it is something else, or they cannot be read.
    """
    if tls is None or isinstance(tls, TlsFiles):
        return tls
    if not isinstance(tls, str | os.PathLike):
        raise InvalidRequest(
            f"tls is {tls!r}; it must be a directory with {CA_NAME}, {CERTIFICATE_NAME} and {KEY_NAME}"
        )
    return TlsFiles.from_directory(tls)


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _pem(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    if len(data) > _MAX_FILE_BYTES or b"-----BEGIN " not in data:
        raise InvalidRequest(f"{path} is no PEM file")
    return data


def _unreadable(path: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(
        f"cannot read {path}: {error.strerror}; a TLS directory has {CA_NAME}, {CERTIFICATE_NAME} and {KEY_NAME}, "
        "made by `epmesh certs init` for one"
    )


def file_stamp(path: Path) -> FileStamp | None:
    """Changes when the file does; `None` where there is none right now."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError:
        return 0, 0, 0  # reading it says what is wrong
    return found.st_mtime_ns, found.st_ino, found.st_size
