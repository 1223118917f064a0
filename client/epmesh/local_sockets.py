"""Unix sockets have no certificates: whose they are, and who else could get at them, says the file system."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def why_not_ours(path: str) -> str | None:
    """Why a unix socket is not to be trusted; `None` where it is this user's, in a directory for this user alone.

    In a directory where others may write, somebody else could have put a socket of the same name.
    """
    directory = Path(path).absolute().parent
    try:
        socket, holder = Path(path).lstat(), directory.stat()
    except OSError as exc:
        return f"{path} is not on this host, or is another user's: {exc.strerror}"
    own = os.geteuid()
    if not stat.S_ISSOCK(socket.st_mode):
        return f"{path} is no socket"
    if socket.st_uid != own or holder.st_uid != own:
        return f"{path} is user {socket.st_uid}'s, in a directory of user {holder.st_uid}; this process is user {own}'s"
    if holder.st_mode & 0o077:
        return f"other users can get at {path}: {directory} has mode {stat.S_IMODE(holder.st_mode):04o}; chmod 700 it"
    return None
