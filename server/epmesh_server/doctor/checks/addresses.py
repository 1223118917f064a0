"""The address under which others reach this node, and the one it listens on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from epmesh.addresses import ANY_HOST, has_port, is_loopback, split_address
from epmesh_server.doctor.facts import Asked, Facts, Interface, Lookup, NetworkFacts, Service
from epmesh_server.doctor.findings import Finding, error, ok, warning

_BRIDGES = ("docker", "br-", "cni", "cbr", "virbr", "flannel", "lxc", "lxdbr", "podman")
_OVERHEAD_BYTES = 100  # headers and options of IP and TCP, at most
_ADVERTISE = (
    "leave --advertise (EPMESH_ADVERTISE) out with --host 0.0.0.0: the node finds its address by its route to the "
    "coordinator; or give one that others reach, in a pod the field `status.podIP`"
)


def check_addresses(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module."""
    network = facts.network
    if network is None:
        return
    if network.interfaces_problem:
        yield _unlisted(network)
        return
    yield _interfaces(network)
    coordinator = facts.mesh.coordinator if facts.mesh else None
    yield from _family(asked, network)
    yield from _advertised(asked, network, coordinator)
    if coordinator is not None:
        yield from _segments(network, coordinator)


def _unlisted(network: NetworkFacts) -> Finding:
    return warning(
        "interfaces-hidden",
        f"the kernel does not list interfaces: {network.interfaces_problem}",
        "Whether the node advertises an address of this host cannot be said.",
        "let processes open netlink sockets: AF_NETLINK in `RestrictAddressFamilies=`, or the default seccomp profile",
    )


def _interfaces(network: NetworkFacts) -> Finding:
    shown = [
        f"{interface.name}{_if_default(interface, network)} {' '.join(interface.addresses)}"
        for interface in network.interfaces
        if interface.addresses and not interface.loopback
    ]
    return ok("interfaces", "; ".join(shown) or "loopback alone")


def _if_default(interface: Interface, network: NetworkFacts) -> str:
    return " (default route)" if interface.name == network.default_interface else ""


def check_given(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """What the options alone show: loopback, where the coordinator is on another host."""
    if is_loopback(asked.coordinator_host):
        return
    if is_loopback(asked.host):
        yield error(
            "listens-on-loopback",
            f"the node listens on {asked.host}, and its coordinator is {asked.coordinator_address}",
            "Nodes on other hosts, and in other containers, cannot connect to it.",
            "--host 0.0.0.0 (EPMESH_HOST), and --insecure only on a network you trust",
        )
    if asked.advertise is not None and is_loopback(_host(asked.advertise)):
        yield _loopback(asked, asked.advertise)


def _host(address: str) -> str:
    return (split_address(address, "advertise")[0] if has_port(address) else address).strip("[]")


def _family(asked: Asked, network: NetworkFacts) -> Iterator[Finding]:
    addresses = [
        address for interface in network.interfaces if not interface.loopback for address in interface.addresses
    ]
    if asked.host == "0.0.0.0" and addresses and all(":" in address for address in addresses):
        yield error(
            "ipv6-only",
            f"--host is 0.0.0.0, and this host has IPv6 addresses alone: {', '.join(addresses)}",
            "It listens where nobody can reach it.",
            "--host '::' (EPMESH_HOST)",
        )


def _advertised(asked: Asked, network: NetworkFacts, coordinator: Service | None) -> Iterator[Finding]:
    if not network.advertised:
        return  # other findings say why
    host = _host(network.advertised)
    says = "--advertise" if asked.advertise else "by its routes" if asked.host in ANY_HOST else "--host"
    lookup = network.own_names.get(host, Lookup(name=host, problem="no answer in time"))
    if not lookup.addresses:
        yield error(
            "advertised-unknown",
            f"the node would advertise {host} ({says}), which does not resolve here: {lookup.problem}",
            "Other nodes get that name and cannot connect.",
            _ADVERTISE,
        )
        return
    if is_loopback(asked.coordinator_host) and all(map(is_loopback, lookup.addresses)):
        yield _alone(asked, network, f"{host} ({says})")
        return
    if is_loopback(host) and not is_loopback(asked.coordinator_host):
        return  # the options alone show it
    address = lookup.addresses[0]
    named = host if host == address else f"{host}, which is {address}"
    found = _judged(asked, network, coordinator, address, f"{named} ({says})")
    yield found
    if found.cause in ("advertised", "advertised-foreign", "advertised-wrong-interface"):
        yield from _links(asked, network, host, address)


def _alone(asked: Asked, network: NetworkFacts, named: str) -> Finding:
    """Loopback, with a coordinator beside it: as it should be, unless it listens for others, too."""
    others = [address for interface in network.interfaces for address in interface.addresses if _travels(address)]
    if asked.host not in ANY_HOST or asked.advertise or not others:
        return ok("advertised", f"{named}: a mesh on this host alone")
    return warning(
        "no-route-out",
        f"the node would advertise {named}: no route leads out of this host, though it has {', '.join(others)}",
        "Nodes on the same network, such as a compose network with `internal: true`, would look for it on themselves.",
        f"--advertise {others[0]} (EPMESH_ADVERTISE), or the coordinator in a container of its own",
    )


def _travels(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    return not (found.is_loopback or found.is_link_local)


def _judged(asked: Asked, network: NetworkFacts, coordinator: Service | None, address: str, named: str) -> Finding:
    """What it means to advertise `address`."""
    interface = network.interface_of(address)
    if is_loopback(address) and asked.advertise and _host(asked.advertise) == network.hostname:
        return _hostname(network, address, named)
    if is_loopback(address):
        return _loopback(asked, named)
    if ipaddress.ip_address(address.partition("%")[0]).is_link_local:
        return error(
            "advertised-link-local",
            f"the node would advertise {named}, an address that holds on one cable only",
            "Other nodes cannot route to it.",
            _ADVERTISE,
        )
    if interface is None:
        return warning(
            "advertised-foreign",
            f"the node would advertise {named}, which no interface here has",
            "That is right behind a NAT or a published port, and wrong where the address is an old one.",
            f"if it is an old one: {_ADVERTISE}",
        )
    if interface.name.startswith(_BRIDGES):
        return error(
            "advertised-bridge",
            f"the node would advertise {named}, of {interface.name}, a bridge for containers on this host",
            "Nodes on other hosts have a bridge with the same network, and end up at themselves or nowhere.",
            f"{_ADVERTISE}; the default route is by {network.default_interface or 'no interface'}",
        )
    return _routed(network, coordinator, interface, named)


def _hostname(network: NetworkFacts, address: str, named: str) -> Finding:
    return error(
        "hostname-loopback",
        f"the node would advertise {named}: /etc/hosts gives {network.hostname} the address {address}",
        "Every other node would look for it on itself.",
        "leave --advertise out: the node finds its address by its route to the coordinator; or mend the line of "
        "/etc/hosts",
    )


def _loopback(asked: Asked, named: str) -> Finding:
    return error(
        "advertised-loopback",
        f"the node would advertise {named}, and its coordinator is {asked.coordinator_address}",
        "Every other node would look for it on itself.",
        _ADVERTISE,
    )


def _routed(network: NetworkFacts, coordinator: Service | None, interface: Interface, named: str) -> Finding:
    """Whether the advertised interface is the one towards the coordinator."""
    dials = coordinator.dials if coordinator is not None else ()
    way = next((found for dial in dials if (found := network.route_interface(dial))), None)
    if way is None or way.loopback or way.name == interface.name:
        return ok("advertised", f"{named} of {interface.name}")
    source = next(dial.source for dial in dials if network.route_interface(dial))
    return warning(
        "advertised-wrong-interface",
        f"the node would advertise {named}, of {interface.name}; the coordinator is reached by {way.name} ({source})",
        "If the other nodes are on the coordinator's network, they may have no route to this one.",
        f"--advertise {source} (EPMESH_ADVERTISE), unless the other nodes are on {interface.name}'s network",
    )


def _links(asked: Asked, network: NetworkFacts, host: str, address: str) -> Iterator[Finding]:
    """Ranks bind the host of links, so it has to be this host's own."""
    wanted = (asked.link_host or host).strip("[]")
    lookup = network.own_names.get(wanted)
    addresses = lookup.addresses if asked.link_host and lookup else (address,)
    if not any(network.interface_of(found) for found in addresses):
        yield error(
            "link-host-foreign",
            f"links of ranks would listen on {wanted}, which no interface here has",
            "Ranks bind that address themselves; a NAT in between cannot be crossed.",
            "--link-host with an address of an interface here that the other nodes reach; with docker: "
            "`network_mode: host`, or one network for all nodes; with Kubernetes: the pod's own address",
        )


def _segments(network: NetworkFacts, coordinator: Service) -> Iterator[Finding]:
    for dial in coordinator.opened:
        interface = network.route_interface(dial)
        if interface is None or interface.loopback or not dial.segment_bytes:
            continue
        if dial.segment_bytes + _OVERHEAD_BYTES < interface.mtu:
            yield warning(
                "mtu-mismatch",
                f"{interface.name} sends packets of {interface.mtu} bytes, the other end at {dial.address} takes "
                f"segments of {dial.segment_bytes}",
                "Where a router in between drops ICMP, large frames vanish while small ones pass: exchanges hang, "
                "heartbeats do not.",
                f"the same MTU on all nodes: `ip link set {interface.name} mtu ...`; in compose: "
                "`driver_opts: {com.docker.network.driver.mtu: ...}`",
            )
