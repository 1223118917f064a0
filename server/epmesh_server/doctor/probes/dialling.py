"""TCP connections to many addresses at once: which open, which are refused, and which say nothing."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Sequence

from epmesh_server.doctor.facts import Dial, Dialled
from epmesh_server.node.advertising import source_towards

_IN_PROGRESS = (0, errno.EINPROGRESS)


def dial_all(targets: Sequence[tuple[str, int]], within_s: float) -> tuple[Dial, ...]:
    """Tries to connect to every (numeric address, port) at the same time; in their order."""
    outcomes: dict[int, Dial] = {}
    waiting: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    try:
        for index, (address, port) in enumerate(targets):
            made = _begin(address, port)
            if isinstance(made, Dial):
                outcomes[index] = made
            else:
                waiting[made.fileno()] = index, made
                poll.register(made, select.POLLOUT)
        deadline = time.monotonic() + within_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(1000 * left):
                index, ready = waiting.pop(fd)
                poll.unregister(fd)
                with ready:
                    outcomes[index] = _outcome(ready, *targets[index])
        for index, silent in waiting.values():
            address, port = targets[index]
            outcomes[index] = Dial(address=address, port=port, outcome=Dialled.SILENT, source=_source(silent))
    finally:
        for _, unused in waiting.values():
            unused.close()
    return tuple(outcomes[index] for index in range(len(targets)))


def _begin(address: str, port: int) -> socket.socket | Dial:
    made = None
    try:
        made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.setblocking(False)
        code = made.connect_ex((address, port))
        problem = os.strerror(code)
    except OSError as exc:  # no such family, no descriptors left
        code, problem = exc.errno or -1, str(exc)
    if made is not None and code in _IN_PROGRESS:
        return made
    if made is not None:
        made.close()
    return Dial(address=address, port=port, outcome=_meaning(code), problem=problem)


def _outcome(connected: socket.socket, address: str, port: int) -> Dial:
    code = connected.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    segment = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) if code == 0 else 0
    return Dial(
        address=address,
        port=port,
        outcome=_meaning(code),
        source=_source(connected) if code == 0 else source_towards(address),
        segment_bytes=segment,
        problem=os.strerror(code) if code else "",
    )


def _meaning(code: int) -> Dialled:
    if code == 0:
        return Dialled.OPEN
    if code in (errno.ECONNREFUSED, errno.ECONNRESET):
        return Dialled.REFUSED
    return Dialled.SILENT if code == errno.ETIMEDOUT else Dialled.UNREACHABLE


def _source(connecting: socket.socket) -> str:
    return str(connecting.getsockname()[0])
