"""Directories that services write to."""

from __future__ import annotations

from collections.abc import Iterator

from epmesh_server.doctor.checks.limits import size
from epmesh_server.doctor.facts import Asked, Directory, Facts
from epmesh_server.doctor.findings import Finding, error, ok, warning

_LEAST_FREE_BYTES = 64 << 20
_FORGETFUL = {"tmpfs", "ramfs", "overlay", "aufs"}
_OPTIONS = {
    "runtime directory": "--runtime-dir (EPMESH_RUNTIME_DIR)",
    "data directory": "--data-dir (EPMESH_DATA_DIR)",
    "temporary directory": "TMPDIR",
}


def check_directories(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module."""
    user = facts.host.user if facts.host else None
    for directory in facts.directories or ():
        found = list(_judged(directory, user, given=asked.runtime_dir is not None))
        yield from found or [
            ok("directory", f"{directory.what} {directory.path} can be used ({directory.file_system})")
        ]


def _judged(directory: Directory, user: int | None, *, given: bool) -> Iterator[Finding]:
    yield from _writable(directory, user)
    if directory.socket_path_bytes:
        yield from _sockets(directory)
        if given and directory.exists and not directory.write_problem:
            yield from _private(directory, user)
    forgetful = directory.file_system in _FORGETFUL and not directory.write_problem
    if directory.what == "data directory" and forgetful:
        yield warning(
            "log-forgotten",
            f"{directory.what} {directory.path} is on {directory.file_system}, which ends with the container or host",
            "After a new start the coordinator knows nobody: a new mesh, new slots, and ranks have to join again.",
            "a volume: compose `volumes: [epmesh-data:/data]` with EPMESH_DATA_DIR=/data, in Kubernetes "
            "`volumeClaimTemplates:`",
        )


def _writable(directory: Directory, user: int | None) -> Iterator[Finding]:
    seen = f"{directory.what} {directory.path}"
    option = _OPTIONS[directory.what]
    if directory.write_problem == "Read-only file system":
        yield error(
            "read-only",
            f"{seen} is on a read-only file system",
            "The service cannot start.",
            f"{option} on a file system of its own: compose `tmpfs: [/tmp, /run/epmesh]` beside `read_only: true`, "
            "in a pod an emptyDir beside `readOnlyRootFilesystem: true`",
        )
    elif directory.write_problem == "No space left on device" or (
        not directory.write_problem and directory.free_bytes < _LEAST_FREE_BYTES
    ):
        yield error(
            "disk-full",
            f"{seen} has {size(directory.free_bytes)} left",
            "A log that cannot be written stops the coordinator, and sockets cannot be made.",
            f"free some, or {option} elsewhere",
        )
    elif directory.write_problem:
        who = "" if user is None else f" by user {user}"
        yield error(
            "not-writable",
            f"{seen} cannot be written{who} (owner {directory.owner}, mode {directory.mode:04o}): "
            f"{directory.write_problem}",
            "The service cannot start.",
            f"`chown {'USER' if user is None else user}` it, {option} elsewhere; in a pod `securityContext.fsGroup`, "
            "in compose `user:` as the volume's owner",
        )


def _private(directory: Directory, user: int | None) -> Iterator[Finding]:
    if (user is not None and directory.owner != user) or directory.mode & 0o077:
        yield error(
            "runtime-dir-open",
            f"runtime directory {directory.path} has owner {directory.owner} and mode {directory.mode:04o}",
            "Whoever may open the sockets in it could join as a rank: the node service refuses it.",
            f"`chmod 700 {directory.path}` and `chown` to the user of the service; or a directory below it. If "
            "the service has another user than the doctor, run that as the same: `runuser -u USER -- epmesh doctor`",
        )


def _sockets(directory: Directory) -> Iterator[Finding]:
    if directory.socket_path_bytes > directory.socket_path_most:
        yield error(
            "socket-path-long",
            f"sockets in {directory.path} would have paths of {directory.socket_path_bytes} bytes",
            f"The kernel takes {directory.socket_path_most} at most.",
            "--runtime-dir (EPMESH_RUNTIME_DIR) with a short path, such as /run/epmesh, or a shorter TMPDIR",
        )
    if directory.socket_problem and not directory.write_problem:
        yield error(
            "no-unix-sockets",
            f"{directory.path} ({directory.file_system}) takes no unix sockets: {directory.socket_problem}",
            "Ranks talk to their node service over them.",
            "--runtime-dir (EPMESH_RUNTIME_DIR) on a local file system or tmpfs; not on a share of the host or the "
            "network",
        )
    if directory.in_use:
        yield ok("directory", f"runtime directory {directory.path} is in use by a node service that runs")
