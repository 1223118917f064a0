"""The join token: a secret that a node must show when a mesh meets it for the first time, besides its certificate."""

from __future__ import annotations

import hmac
import stat
from pathlib import Path

from epmesh.addresses import is_loopback
from epmesh.errors import InvalidRequest, Unauthenticated
from epmesh.tls import TlsFiles

_MIN_BYTES, _MAX_BYTES = 16, 1024
_OPTION = "--join-token-file (EPMESH_JOIN_TOKEN_FILE)"


def read_token(path: Path) -> bytes:
    """The token in a file, without the white space around it.

    Raises:
        InvalidRequest: it cannot be read, everybody may read it, or it is no secret.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        with path.open("rb") as file:
            token = file.read(_MAX_BYTES + 1).strip()
    except OSError as exc:
        raise InvalidRequest(f"cannot read the join token {path}: {exc.strerror}") from exc
    if mode & stat.S_IRWXO:
        raise InvalidRequest(f"join token {path} has mode {mode:04o}, so every user here may use it; chmod 600 it")
    if not _MIN_BYTES <= len(token) <= _MAX_BYTES:
        raise InvalidRequest(
            f"join token {path} has {len(token)} bytes; it must have {_MIN_BYTES} to {_MAX_BYTES}: "
            "`openssl rand -hex 32` makes one"
        )
    return token


def check_token_stays_secret(path: Path | None, host: str, tls: TlsFiles | None) -> None:
    """Refuses a token that others on the way could read.

    Args:
        host: where the coordinator listens, or is called.

    Raises:
        InvalidRequest: it would travel in clear beyond this host.
    """
    if path is not None and tls is None and not is_loopback(host):
        raise InvalidRequest(
            f"join token {path} would travel to or from {host} in clear; secure the mesh with --tls-dir, or leave "
            f"{_OPTION} out"
        )


def check_token(node_id: str, shown: bytes, wanted: bytes) -> None:
    """Refuses a node that is new to the mesh and does not have its token.

    Raises:
        Unauthenticated: it shows none, or another one; neither token stands in the text.
    """
    if hmac.compare_digest(shown, wanted):
        return
    what = "shows another join token than this mesh's" if shown else "shows no join token"
    raise Unauthenticated(
        f"node {node_id!r} is new to this mesh and {what}; give it {_OPTION} with what the coordinator has"
    )
