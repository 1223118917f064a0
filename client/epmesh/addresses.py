"""Addresses: host:port, as people write them and as gRPC takes them."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from epmesh.errors import InvalidRequest

ANY_HOST = ("0.0.0.0", "::", "[::]")

_HOST = re.compile(r"\[[0-9A-Fa-f:.%\w]+\]|[^\s/:\[\]]+")


def split_address(address: object, what: str) -> tuple[str, int]:
    """Host and port of ``host:port``; `what` names the setting in the error. An IPv6 host keeps its brackets.

    Raises:
        InvalidRequest: it is something else.
    """
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    good_port = port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) <= 65_535
    if not (good_port and _HOST.fullmatch(host)):
        raise InvalidRequest(
            f"{what} is {address!r}; it must be host:port, such as 127.0.0.1:7401 or, for IPv6, [::1]:7401"
        )
    return host, int(port)


def parse_addresses(addresses: object, what: str) -> tuple[str, ...]:
    """One address or several, each checked, in their order and without repeats.

    Raises:
        InvalidRequest: there is none, or one is no host:port.
    """
    several = (addresses,) if isinstance(addresses, str) else addresses
    if isinstance(several, bytes) or not isinstance(several, Sequence):
        raise InvalidRequest(f"{what} is {addresses!r}; it must be host:port or a sequence of them")
    if not several:
        raise InvalidRequest(f"{what} is empty; give at least one host:port")
    for address in several:
        split_address(address, what)
    return tuple(dict.fromkeys(several))


def parse_coordinators(text: str) -> tuple[str, ...]:
    """The addresses of ``host:port[,host:port]``: where coordinators may be, of which one leads.

    Raises:
        InvalidRequest: one is no host:port.
    """
    return parse_addresses(text.split(","), "coordinator")


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def has_port(address: str) -> bool:
    """Whether `address` is host:port rather than a host alone, IPv6 or not."""
    return address.count(":") == 1 or "]:" in address


def is_loopback(host: str) -> bool:
    """Whether only this host can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
