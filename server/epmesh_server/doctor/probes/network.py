"""Addresses, names and ports of this host."""

from __future__ import annotations

import socket

from epmesh.addresses import has_port, split_address
from epmesh_server.doctor.facts import Asked, Interface, Lookup, NetworkFacts
from epmesh_server.doctor.probes.interfaces import default_interface, read_interfaces
from epmesh_server.doctor.probes.names import look_up, read_resolver
from epmesh_server.doctor.probes.ports import ephemeral_ports, look_at_port, reserved_ports
from epmesh_server.doctor.probes.together import run_together

_NAME_WITHIN_S = 1.5


def look_at_network(asked: Asked) -> NetworkFacts:
    """Looks up the names under which this host could be known, and tries its ports."""
    hostname = socket.gethostname()
    wanted = [("node service", asked.host, asked.port)]
    if asked.coordinator is None:
        wanted.append(("coordinator", asked.host, asked.coordinator_port))
    interfaces, problem = _interfaces()
    return NetworkFacts(
        hostname=hostname,
        interfaces=interfaces,
        interfaces_problem=problem,
        own_names=_own_names(hostname, asked),
        resolver=read_resolver(),
        default_interface=default_interface(),
        ephemeral_ports=ephemeral_ports(),
        reserved_ports=reserved_ports(),
        ports=tuple(look_at_port(*port) for port in wanted if port[2]),
    )


def _interfaces() -> tuple[tuple[Interface, ...], str]:
    """Also where netlink sockets are forbidden, as by systemd's RestrictAddressFamilies=, the rest is looked at."""
    try:
        return read_interfaces(), ""
    except OSError as exc:
        return (), str(exc)


def _own_names(hostname: str, asked: Asked) -> dict[str, Lookup]:
    names = {hostname, asked.host, *(host_of(given) for given in (asked.advertise, asked.link_host) if given)}
    found, _ = run_together(
        {name: lambda name=name: look_up(name, _NAME_WITHIN_S) for name in names},  # type: ignore[misc]
        _NAME_WITHIN_S + 0.5,
    )
    return found


def host_of(address: str) -> str:
    """The host of ``host`` or ``host:port``, without brackets."""
    return (split_address(address, "advertise")[0] if has_port(address) else address).strip("[]")
