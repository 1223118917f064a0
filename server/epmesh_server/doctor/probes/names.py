"""Names: how they are looked up, and with what."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from epmesh_server.doctor.facts import Lookup, Resolver
from epmesh_server.doctor.probes.together import run_alone

_PAUSE_S = 0.2


def look_up(name: str, within_s: float) -> Lookup:
    """Looks `name` up as gRPC does, again and again for up to `within_s` where it fails: it may come late."""
    started = time.monotonic()
    first_problem, problem, tries = "", "", 0
    while tries == 0 or time.monotonic() - started < within_s:
        tries += 1
        left = max(_PAUSE_S, within_s - (time.monotonic() - started))
        addresses: tuple[str, ...] = ()
        try:
            addresses = run_alone(lambda: _addresses(name), left)
            problem = ""
        except (OSError, UnicodeError) as exc:  # a TimeoutError is an OSError
            problem = str(exc.strerror if isinstance(exc, OSError) and exc.strerror else exc)
            first_problem = first_problem or problem
        if addresses:
            break
        time.sleep(_PAUSE_S)
    return Lookup(
        name=name,
        addresses=addresses,
        problem=problem,
        first_problem=first_problem if addresses else "",
        tries=tries,
        took_s=time.monotonic() - started,
    )


def read_resolver(path: Path = Path("/etc/resolv.conf")) -> Resolver:
    """What the resolver is set to; its defaults where there is no such file."""
    nameservers: list[str] = []
    search: tuple[str, ...] = ()
    ndots = 1
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        words = line.split()
        match words[:1]:
            case ["nameserver"] if len(words) > 1:
                nameservers.append(words[1])
            case ["search" | "domain"]:
                search = tuple(words[1:])
            case ["options"]:
                given = [word.partition(":")[2] for word in words if word.startswith("ndots:")]
                ndots = next((int(value) for value in given if value.isdigit()), ndots)
    return Resolver(nameservers=tuple(nameservers), search=search, ndots=ndots)


def _addresses(name: str) -> tuple[str, ...]:
    host = name.strip("[]")
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))
