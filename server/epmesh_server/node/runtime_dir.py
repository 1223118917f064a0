"""The directory of the node's unix sockets: mode 0700, ours alone, gone at the end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from epmesh.errors import InvalidRequest

GRPC_SOCKET, DESCRIPTOR_SOCKET, ZAP_SOCKET, LOCK = "grpc.sock", "descriptors.sock", "zap.sock", "lock"
PREFIX = "epmesh-node-"
_ABANDONED_S = 60.0  # younger ones may be about to take their lock
MAX_SOCKET_PATH_BYTES = 107


@contextlib.contextmanager
def runtime_directory(wanted: Path | None) -> Iterator[Path]:
    """The directory as given, or a fresh one that is removed at the end. Sockets are removed from either.

    Raises:
        InvalidRequest: the directory is somebody else's, open to others, or its path is too long for a socket.
    """
    path = _fresh() if wanted is None else _given(wanted)
    with contextlib.ExitStack() as exit_stack:
        if wanted is None:
            exit_stack.callback(shutil.rmtree, path, ignore_errors=True)
        _check_length(path)
        exit_stack.enter_context(_locked(path))
        for name in (GRPC_SOCKET, DESCRIPTOR_SOCKET, ZAP_SOCKET, LOCK):
            exit_stack.callback((path / name).unlink, missing_ok=True)
        yield path


def _fresh() -> Path:
    path = Path(tempfile.mkdtemp(prefix=PREFIX))  # mkdtemp makes it 0700
    _sweep(path.parent)
    return path


def _sweep(parent: Path) -> None:
    """Removes what node services that were killed have left: our directories that nobody holds the lock of."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, InvalidRequest):
            status = path.stat()
            abandoned = status.st_uid == os.geteuid() and time.time() - status.st_mtime > _ABANDONED_S
            if abandoned and (path / LOCK).exists():
                with _locked(path):
                    shutil.rmtree(path)


def _given(path: Path) -> Path:
    path = path.absolute()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as exc:
        raise InvalidRequest(f"runtime directory {path} cannot be made: {exc}") from exc
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise InvalidRequest(f"runtime directory {path} must belong to this user alone; chmod 700 it")
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the directory's lock, which the kernel frees however the process ends."""
    with (path / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(f"runtime directory {path} is in use by another node service") from None
        yield


def longest_socket_path(path: Path) -> bytes:
    """The longest path of a socket in a runtime directory, as the kernel takes it."""
    return os.fsencode(path / DESCRIPTOR_SOCKET)


def _check_length(path: Path) -> None:
    if len(longest_socket_path(path)) > MAX_SOCKET_PATH_BYTES:
        raise InvalidRequest(
            f"runtime directory {path} is too long: a unix socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes"
        )
