"""Ports that a service here would listen on: whether they are free, and who has them."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

from epmesh_server.doctor.facts import Port

_LISTENING = "0A"
_STATES = {errno.EADDRINUSE: "taken", errno.EADDRNOTAVAIL: "foreign", errno.EACCES: "denied"}


def look_at_port(what: str, host: str, number: int) -> Port:
    """Binds the port as a service would, and lets it go. Who has it is told where this user may see that."""
    state = _bind(host.strip("[]"), number)
    pid, command = _owner(number) if state == "taken" else (0, "")
    return Port(what=what, host=host, number=number, state=state, pid=pid, command=command)


def ephemeral_ports(path: Path = Path("/proc/sys/net/ipv4/ip_local_port_range")) -> tuple[int, int]:
    """Lowest and highest port that the kernel gives to those who ask for a free one; (0, 0) where it does not say."""
    low, high = map(int, path.read_text().split()) if path.exists() else (0, 0)
    return low, high


def reserved_ports(path: Path = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")) -> frozenset[int]:
    """Ports among those that it gives to nobody."""
    found: set[int] = set()
    for span in path.read_text().strip().split(",") if path.exists() else []:
        first, _, last = span.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def _bind(host: str, number: int) -> str:
    try:
        found = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, where = found[0]
        with socket.socket(family, kind) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(where)
            bound.listen(1)  # two may be bound, one may listen
    except OSError as exc:
        return _STATES.get(exc.errno or 0, "unknown")
    return "free"


def _owner(number: int) -> tuple[int, str]:
    """Process id and command line of who listens on a port of this network namespace; (0, "") where that is hidden."""
    inodes = set(_listening_inodes(number))
    for process in Path("/proc").glob("[0-9]*"):
        if inodes.intersection(_descriptors(process)):
            return int(process.name), _command(process)
    return 0, ""


def _command(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "it ended just now"


def _descriptors(process: Path) -> Iterator[str]:
    """What the descriptors of a process stand for, as far as this user may see it and it stays open."""
    links: list[Path] = []
    with contextlib.suppress(OSError):
        links = list((process / "fd").iterdir())
    for link in links:
        with contextlib.suppress(OSError):
            yield str(link.readlink())


def _listening_inodes(number: int) -> list[str]:
    found = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            words = line.split()
            if words[3] == _LISTENING and int(words[1].rpartition(":")[2], 16) == number:
                found.append(f"socket:[{words[9]}]")
    return found
