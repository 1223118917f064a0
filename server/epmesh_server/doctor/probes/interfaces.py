"""Interfaces and their addresses, asked of the kernel over netlink: what `ip address` shows, where there is no `ip`."""

from __future__ import annotations

import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from epmesh_server.doctor.facts import Interface

_GET_LINK, _NEW_LINK, _GET_ADDRESS, _NEW_ADDRESS = 18, 16, 22, 20
_DONE, _FAILED = 3, 2
_REQUEST, _DUMP = 0x1, 0x300
_NAME, _MTU = 3, 4  # of a link
_ADDRESS, _LOCAL = 1, 2  # of an address; on a point-to-point interface the first one is the other side's
_UP, _LOOPBACK = 0x1, 0x8
_ANSWER_WITHIN_S = 1.0


def read_interfaces() -> tuple[Interface, ...]:
    """Every interface that is up, with all its addresses.

    Raises:
        OSError: the kernel does not answer.
    """
    addresses: dict[int, list[str]] = defaultdict(list)
    for body in _dump(_GET_ADDRESS, _NEW_ADDRESS):
        family, _, _, _, index = struct.unpack_from("=BBBBI", body)
        attributes = _attributes(body[8:])
        raw = attributes.get(_LOCAL) or attributes.get(_ADDRESS)
        if raw and family in (socket.AF_INET, socket.AF_INET6):
            addresses[index].append(socket.inet_ntop(family, raw))
    found = []
    for body in _dump(_GET_LINK, _NEW_LINK):
        _, _, _, index, flags, _ = struct.unpack_from("=BBHiII", body)
        attributes = _attributes(body[16:])
        if flags & _UP:
            found.append(
                Interface(
                    name=attributes.get(_NAME, b"?").rstrip(b"\0").decode(errors="replace"),
                    addresses=tuple(addresses[index]),
                    mtu=int.from_bytes(attributes.get(_MTU, b""), "little"),
                    loopback=bool(flags & _LOOPBACK),
                )
            )
    return tuple(found)


def default_interface(table: Path = Path("/proc/net/route")) -> str:
    """The interface of the IPv4 default route with the lowest metric; empty where there is none."""
    rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    default = [(int(row[6]), row[0]) for row in rows if row[1] == "00000000" and row[7] == "00000000"]
    return min(default)[1] if default else ""


def _dump(request: int, answer: int) -> Iterator[bytes]:
    """Bodies of the messages with which the kernel answers a dump."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as netlink:
        netlink.settimeout(_ANSWER_WITHIN_S)
        netlink.send(struct.pack("=IHHIIB3x", 20, request, _REQUEST | _DUMP, 1, 0, socket.AF_UNSPEC))
        while True:
            data = netlink.recv(1 << 16)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == _FAILED:
                    raise OSError(-struct.unpack_from("=i", data, 16)[0], "netlink refused to list interfaces")
                if kind == _DONE:
                    return
                if kind == answer:
                    yield data[16:length]
                data = data[_aligned(length) :]


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[4:length]
        data = data[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3
