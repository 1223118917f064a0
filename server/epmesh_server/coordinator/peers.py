"""What the connection of a node tells about the address it advertises. Pure."""

from __future__ import annotations

import ipaddress
from urllib.parse import unquote

from epmesh.addresses import is_loopback, split_address
from epmesh.errors import InvalidRequest


def peer_host(peer: str) -> str:
    """The host of gRPC's ``ipv4:10.0.0.3:5000`` or ``ipv6:%5B::1%5D:5000``; empty for what is no IP address."""
    family, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    return host.removeprefix("::ffff:") if family in ("ipv4", "ipv6") else ""


def check_advertised(node_id: str, address: str, peer: str) -> str | None:
    """What is odd about a node's address, for the log; `None` where nothing is.

    Args:
        address: host:port that the node advertises.
        peer: where its connection comes from, as gRPC says it.

    Raises:
        InvalidRequest: it advertises loopback, and is on another host.
    """
    came_from = peer_host(peer)
    host = split_address(address, "address")[0].strip("[]")
    if not came_from or host == came_from or is_loopback(came_from):
        return None
    if is_loopback(host):
        raise InvalidRequest(
            f"node {node_id!r} advertises {address}, which nobody else can reach, and comes from {came_from}; start it "
            f"with --host 0.0.0.0 (and no --advertise), or with --advertise {came_from}"
        )
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None  # a name; what it means elsewhere cannot be known here
    return (
        f"node {node_id!r} advertises {address} and comes from {came_from}; if other nodes do not reach it by that "
        "interface, say --advertise"
    )
