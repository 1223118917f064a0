"""Directories that services write to. What is tried there is removed again."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from pathlib import Path

from epmesh_server.doctor.facts import Asked, Directory
from epmesh_server.node.runtime_dir import LOCK, MAX_SOCKET_PATH_BYTES, PREFIX, longest_socket_path

_MOUNTS, _LOCKS = Path("/proc/self/mountinfo"), Path("/proc/locks")


def look_at_directories(asked: Asked) -> tuple[Directory, ...]:
    """The runtime directory, where temporary files go, and the data directory of a coordinator beside the node."""
    temporary = temporary_parent()
    runtime = asked.runtime_dir or temporary / f"{PREFIX}12345678"
    found = [look_at_directory("runtime directory", runtime, sockets=True)]
    if asked.runtime_dir is not None:
        found.append(look_at_directory("temporary directory", temporary))
    if asked.data_dir is not None:
        found.append(look_at_directory("data directory", asked.data_dir))
    return tuple(found)


def temporary_parent() -> Path:
    """Where Python makes temporary files; where it finds no place, the one that the environment names."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path(os.environ.get("TMPDIR", "/tmp"))  # the text of a finding, nothing is made there


def look_at_directory(what: str, path: Path, *, sockets: bool = False) -> Directory:
    """What can be done in a directory, or, where it is missing, in its nearest parent that exists."""
    path = path.absolute()
    place = next(parent for parent in (path, *path.parents) if _exists(parent))
    status, space = place.stat(), os.statvfs(place)
    return Directory(
        what=what,
        path=path,
        exists=place == path,
        owner=status.st_uid,
        mode=status.st_mode & 0o7777,
        file_system=_file_system(place),
        free_bytes=space.f_bavail * space.f_frsize,
        write_problem=_write_problem(place),
        socket_problem=_socket_problem(place) if sockets else "",
        socket_path_bytes=len(longest_socket_path(path)) if sockets else 0,
        socket_path_most=MAX_SOCKET_PATH_BYTES,
        in_use=sockets and _is_locked(path / LOCK),
    )


def _exists(path: Path) -> bool:
    """Whether it is there, as far as this user may see that."""
    try:
        return path.exists()
    except OSError:
        return False


def _write_problem(place: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".epmesh-doctor-") as made:
            made.write(b"x")
            made.flush()
    except OSError as exc:
        return os.strerror(exc.errno) if exc.errno else str(exc)
    return ""


def _socket_problem(place: Path) -> str:
    """Why no unix socket can be made there. Bound by way of /proc/self/fd, for the path may be too long: that is judged
    by itself."""
    name = f".epmesh-doctor-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, directory)
            made = stack.enter_context(socket.socket(socket.AF_UNIX))
            made.bind(f"/proc/self/fd/{directory}/{name}")
            os.unlink(name, dir_fd=directory)
        except OSError as exc:
            return os.strerror(exc.errno) if exc.errno else str(exc)
    return ""


def _is_locked(lock: Path) -> bool:
    """Whether a process of this kernel holds the lock. It is not tried: a service that starts just now may want it."""
    if not (_exists(lock) and _LOCKS.exists()):
        return False
    inode = lock.stat().st_ino
    rows = [line.split() for line in _LOCKS.read_text().splitlines()]
    return any("FLOCK" in row and any(word.endswith(f":{inode}") for word in row) for row in rows)


def _file_system(place: Path) -> str:
    """Type of the file system that is mounted nearest above `place`."""
    place = place.resolve()
    best, kind = -1, ""
    for line in _MOUNTS.read_text().splitlines() if _MOUNTS.exists() else []:
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace("\\040", " "))
        if (place == mount or mount in place.parents) and len(mount.parts) >= best:
            best, kind = len(mount.parts), after.split()[0]
    return kind
