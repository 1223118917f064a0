"""Addresses, names and ports of this host."""

from __future__ import annotations

import socket

from epmesh.addresses import has_port, split_address
from epmesh.errors import InvalidRequest
from epmesh_server.doctor.facts import Asked, Interface, Lookup, NetworkFacts
from epmesh_server.doctor.probes.interfaces import default_interface, read_interfaces
from epmesh_server.doctor.probes.names import look_up, read_resolver
from epmesh_server.doctor.probes.ports import ephemeral_ports, look_at_port, reserved_ports
from epmesh_server.doctor.probes.together import run_together
from epmesh_server.node.advertising import choose_address, sources_towards, wants_route
from epmesh_server.node.settings import NodeSettings

_NAME_WITHIN_S = 1.5


def look_at_network(asked: Asked) -> NetworkFacts:
    """Looks up the names under which this host could be known, and tries its ports."""
    hostname = socket.gethostname()
    wanted = [("node service", asked.host, asked.port)]
    if asked.coordinator is None:
        wanted.append(("coordinator", asked.host, asked.coordinator_port))
    interfaces, problem = _interfaces()
    advertised = _advertised(asked)
    return NetworkFacts(
        hostname=hostname,
        interfaces=interfaces,
        interfaces_problem=problem,
        advertised=advertised,
        own_names=_own_names(asked, advertised),
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


def _advertised(asked: Asked) -> str:
    """As the node service finds it at its registration."""
    try:
        settings = NodeSettings(
            host=asked.host,
            port=asked.port,
            coordinator=asked.coordinator_address,
            advertise=asked.advertise,
            insecure=True,  # whether it may listen there is another question
        )
    except InvalidRequest:
        return ""
    if not wants_route(settings):
        return choose_address(settings, asked.port, ())
    towards = look_up(asked.coordinator_host, _NAME_WITHIN_S).addresses
    return choose_address(settings, asked.port, sources_towards(towards)) if towards else ""


def _own_names(asked: Asked, advertised: str) -> dict[str, Lookup]:
    names = {host_of(given) for given in (advertised, asked.link_host) if given}
    found, _ = run_together(
        {name: lambda name=name: look_up(name, _NAME_WITHIN_S) for name in names},  # type: ignore[misc]
        _NAME_WITHIN_S + 0.5,
    )
    return found


def host_of(address: str) -> str:
    """The host of ``host`` or ``host:port``, without brackets."""
    return (split_address(address, "advertise")[0] if has_port(address) else address).strip("[]")
