"""Ports: whether a service here gets its own, and keeps it."""

from __future__ import annotations

from collections.abc import Iterator

from epmesh.addresses import join_address
from epmesh_server.doctor.facts import Asked, Facts, Kind, MeshFacts, NetworkFacts, Port
from epmesh_server.doctor.findings import Finding, error, ok, warning

_FEW_PORTS = 1024


def check_ports(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module."""
    if facts.network is None:
        return
    for port in facts.network.ports:
        yield _bound(port, facts.mesh)
    yield from _ephemeral(facts.network)


def _bound(port: Port, mesh: MeshFacts | None) -> Finding:
    address = join_address(port.host, port.number)
    option = "--port" if port.what == "node service" else "--coordinator-port"
    match port.state:
        case "free":
            return ok("port", f"{address} is free for the {port.what}")
        case "taken":
            return _taken(port, address, option, mesh)
        case "foreign":
            return error(
                "host-foreign",
                f"the {port.what} would listen at {address}, which is no address of this host",
                "It cannot start.",
                "--host 0.0.0.0 (EPMESH_HOST), or an address that `ip address` shows",
            )
        case "denied":
            return error(
                "port-denied",
                f"the {port.what} would listen at {address}, which only root may",
                "It cannot start.",
                f"{option} with a number from 1024 on, or `sysctls: [net.ipv4.ip_unprivileged_port_start=0]`",
            )
    return warning(
        "port-unknown",
        f"{address} cannot be bound by the {port.what}: {port.host} does not resolve, or the kernel does not say why",
        "It may not be able to start.",
        "--host 0.0.0.0 (EPMESH_HOST)",
    )


def _taken(port: Port, address: str, option: str, mesh: MeshFacts | None) -> Finding:
    owner = f"process {port.pid} ({port.command})" if port.pid else "a process that this user cannot see"
    services = (mesh.here, mesh.coordinator) if mesh else ()
    wanted = Kind.NODE if port.what == "node service" else Kind.COORDINATOR
    if any(service and service.kind is wanted and service.address.endswith(f":{port.number}") for service in services):
        return ok("port", f"a {port.what} of epmesh runs at {address}: {owner}")
    return error(
        "port-taken",
        f"{address} is taken by {owner}",
        f"The {port.what} cannot start.",
        f"{option} with another number, or end that process"
        + ("" if port.pid else "; with `network_mode: host` or hostPort it may run outside this container"),
    )


def _ephemeral(network: NetworkFacts) -> Iterator[Finding]:
    low, high = network.ephemeral_ports
    if not high:
        return
    caught = [port.number for port in network.ports if low <= port.number <= high]
    caught = [number for number in caught if number not in network.reserved_ports]
    if caught:
        numbers = ",".join(map(str, caught))
        yield warning(
            "port-ephemeral",
            f"port {numbers} is among those the kernel gives to any connection ({low} to {high})",
            "While the service is down, a connection may take its port, and it cannot come back.",
            f"`sysctl net.ipv4.ip_local_reserved_ports={numbers}` (compose and pods: `sysctls:`), "
            f"or a port below {low}",
        )
    if high - low + 1 < _FEW_PORTS:
        yield warning(
            "few-ports",
            f"the kernel has {high - low + 1} ports to give to connections ({low} to {high})",
            "Every rank listens on ports of its own and connects to every other: they run out.",
            "`sysctl net.ipv4.ip_local_port_range='32768 60999'` (compose and pods: `sysctls:`)",
        )
