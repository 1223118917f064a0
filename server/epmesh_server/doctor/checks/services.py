"""The coordinator and node services: names, connections, who answers, and what they know."""

from __future__ import annotations

from collections.abc import Iterator

from epmesh.errors import InvalidRequest
from epmesh.version import VERSION, check_compatible
from epmesh_server.doctor.checks.certificates import node_id
from epmesh_server.doctor.facts import Asked, Dial, Dialled, Facts, HostFacts, Kind, MeshFacts, NetworkFacts, Service
from epmesh_server.doctor.findings import Finding, error, ok, warning

_LATE_S = 1.0
_CLOCK_WARNING_S, _CLOCK_ERROR_S = 1.0, 60.0
_DOCKER_DNS = "127.0.0.11"
_MOST_NAMED = 8


def check_services(asked: Asked, facts: Facts) -> Iterator[Finding]:
    """All of this module."""
    mesh = facts.mesh
    if mesh is None:
        return
    yield from _coordinator(asked, facts, mesh.coordinator)
    if mesh.node is not None:
        yield from _reached(mesh.node, Kind.NODE, facts)
    for node in dict.fromkeys((mesh.node, mesh.here)):
        if node is not None and node.kind is Kind.NODE:
            yield from _node(asked, mesh, node)
    yield from _same_id(asked, facts, mesh)
    yield from _endpoints(mesh)


def _coordinator(asked: Asked, facts: Facts, service: Service) -> Iterator[Finding]:
    if asked.coordinator is None and not service.opened:
        yield ok("coordinator", f"none at {service.address} yet: `epmesh serve` starts one beside the node")
        return
    yield from _reached(service, Kind.COORDINATOR, facts)


def _reached(service: Service, wanted: Kind, facts: Facts) -> Iterator[Finding]:
    """From the name to the answer, as far as it goes."""
    if not service.lookup.addresses:
        yield _unknown(service, wanted, facts)
        return
    yield from _names(service, facts.network)
    if not service.opened:
        yield _closed(service, wanted, facts.host)
        return
    yield from (_half_open(service, dial) for dial in service.dials if dial.outcome is not Dialled.OPEN)
    if service.kind is Kind.UNTRUSTED:
        return  # the checks of certificates say why
    if service.kind is not wanted:
        yield _somebody_else(service, wanted)
    else:
        nodes = f", epoch {service.epoch}, {len(service.nodes)} node{'' if len(service.nodes) == 1 else 's'}"
        yield ok(_slug(wanted), f"{service.address} answers, epmesh {service.version}{nodes}")
    if service.kind in (Kind.NODE, Kind.COORDINATOR):
        yield from _version(service)
        yield from _clock(service)


# Names -------------------------------------------------------------------------------------------------------------


def _unknown(service: Service, wanted: Kind, facts: Facts) -> Finding:
    lookup = service.lookup
    return error(
        "name-unknown",
        f"{lookup.name}, the {wanted.value}'s name, does not resolve: {lookup.problem} "
        f"({lookup.tries} tries, {lookup.took_s:.1f} s{_asked_of(facts.network)})",
        "Nothing here can find it. A node goes on trying, so a name that comes late is found.",
        _name_mend(lookup.name, facts),
    )


def _asked_of(network: NetworkFacts | None) -> str:
    if network is None or not network.resolver.nameservers:
        return ", no name server is set"
    return f", asked {' '.join(network.resolver.nameservers)}"


def _name_mend(name: str, facts: Facts) -> str:
    container = facts.host.container if facts.host else ""
    servers = facts.network.resolver.nameservers if facts.network else ()
    if container == "kubernetes":
        return (
            f"the whole name, {name.partition('.')[0]}.NAMESPACE.svc.cluster.local; of a headless service set "
            "`publishNotReadyAddresses: true`, else names wait for readiness"
        )
    if container and _DOCKER_DNS not in servers:
        return (
            "a network of your own: Docker's default bridge has no names; in compose put both services on one of "
            "`networks:`"
        )
    if container:
        return "compose's service name, on a network that both containers are on, and the container running"
    return "--coordinator (EPMESH_COORDINATOR) with a name that `getent hosts` knows, or a line in /etc/hosts"


def _names(service: Service, network: NetworkFacts | None) -> Iterator[Finding]:
    lookup = service.lookup
    if lookup.tries > 1 or lookup.took_s > _LATE_S:
        first = f"; at first: {lookup.first_problem}" if lookup.first_problem else ""
        yield warning(
            "name-late",
            f"{lookup.name} resolved at try {lookup.tries} after {lookup.took_s:.1f} s{first}",
            "Nodes wait for that at every start and after every loss of the connection.",
            _late_mend(lookup.name, network),
        )
    for family, of in (("IPv4", "."), ("IPv6", ":")):
        several = [address for address in lookup.addresses if of in address]
        if len(several) > 1:
            yield warning(
                "several-addresses",
                f"{lookup.name} has {len(several)} {family} addresses: {', '.join(several)}",
                "A mesh has one coordinator. Which address is used may change with every connection.",
                "a name of its own for the coordinator: in compose no `scale` or shared alias, in Kubernetes a service "
                "that selects one pod",
            )


def _late_mend(name: str, network: NetworkFacts | None) -> str:
    resolver = network.resolver if network else None
    if resolver and name.count(".") < resolver.ndots and len(resolver.search) > 1:
        return (
            f"write the name with a dot at its end ({name}. as a full name), or `dnsConfig: options: ndots: 1`: "
            f"{len(resolver.search)} search domains are tried first"
        )
    return "a name server that is nearer, or wait for it before the start"


# Connections -------------------------------------------------------------------------------------------------------


def _closed(service: Service, wanted: Kind, host: HostFacts | None) -> Finding:
    worst = service.dials[0]
    tried = ", ".join(f"{dial.address}" for dial in service.dials)
    where = service.address if tried == service.lookup.name else f"{service.address} ({tried})"
    if service.on_loopback and host is not None and host.container:
        return error(
            "coordinator-loopback" if wanted is Kind.COORDINATOR else "node-loopback",
            f"the {wanted.value}'s address is {where}, and nothing listens there",
            "In a container that is the container itself, not the host or another container.",
            "the other container's service name, or the host's own address: --coordinator NAME:7401",
        )
    match worst.outcome:
        case Dialled.REFUSED:
            return error(
                "refused",
                f"{where} refuses connections",
                f"The host is there, and no {wanted.value} listens on that port, or on that of its addresses.",
                f"start it, or mend the port; if it runs, it listens on loopback: {_listen_mend(wanted)}",
            )
        case Dialled.SILENT:
            return error(
                "silent",
                f"{where} does not answer at all: no connection and no refusal",
                "A firewall, security group or network policy drops the packets, or the address is an old one.",
                f"let TCP port {worst.port} through between nodes, and for links all of the ephemeral range; "
                "in Kubernetes look for a NetworkPolicy",
            )
    return error(
        "unreachable",
        f"{where} cannot be reached: {worst.problem}",
        "There is no route from here, or none for that kind of address.",
        "put both on one network (compose `networks:`), or an address of a family that this host has",
    )


def _listen_mend(wanted: Kind) -> str:
    option = "EPMESH_COORDINATOR_HOST" if wanted is Kind.COORDINATOR else "EPMESH_HOST"
    return f"there, --host 0.0.0.0 ({option})"


def _half_open(service: Service, dial: Dial) -> Finding:
    return warning(
        "half-reachable",
        f"{service.lookup.name} opens at {service.opened[0].address}, and is {dial.outcome.value} at {dial.address}",
        "Connections that try that address first are slow, or fail.",
        "take the address out of the name's entry, or listen on both families: --host '::'",
    )


def _somebody_else(service: Service, wanted: Kind) -> Finding:
    if service.kind is Kind.MUTE:
        return error(
            "no-answer",
            f"what listens at {service.address} takes connections and answers no call: {service.problem}",
            f"If it is the {wanted.value}, it stands still: stopped, out of CPU time, or swapped out.",
            "look at it with `docker-compose ps`, `docker stats` or `kubectl top pod`, and start it again",
        )
    if service.kind is Kind.STRANGER:
        return error(
            "not-epmesh",
            f"what listens at {service.address} is no service of epmesh: {service.problem}",
            f"There should be the {wanted.value}.",
            "mend host and port",
        )
    option = "--coordinator" if wanted is Kind.COORDINATOR else "--node"
    usual = 7401 if wanted is Kind.COORDINATOR else 7400
    its = f"; its coordinator is {service.coordinator_address}" if service.coordinator_address else ""
    return error(
        f"{_slug(wanted)}-is-a-{_slug(service.kind)}",
        f"at {service.address} is a {service.kind.value}, where the {wanted.value} should be{its}",
        "The two answer different calls: registration fails, or ranks are refused.",
        f"{option} with the {wanted.value}'s port, usually {usual}",
    )


def _slug(kind: Kind) -> str:
    return {Kind.NODE: "node", Kind.COORDINATOR: "coordinator"}.get(kind, "stranger")


# What they say -----------------------------------------------------------------------------------------------------


def _version(service: Service) -> Iterator[Finding]:
    try:
        check_compatible(VERSION, service.version, f"{service.kind.value} at {service.address}", here="this host")
    except InvalidRequest as exc:
        yield error(
            "version-skew",
            str(exc).split(";")[0],
            "They refuse each other.",
            "one version on both: the same image tag everywhere, or `pip install epmesh==...`",
        )


def _clock(service: Service) -> Iterator[Finding]:
    if service.clock_ahead_s is None:
        return
    off_s = abs(service.clock_ahead_s)
    way = "ahead of" if service.clock_ahead_s > 0 else "behind"
    seen = f"the clock at {service.address} is {off_s:.1f} s {way} this one"
    if off_s - service.clock_error_s < _CLOCK_WARNING_S:
        yield ok("clock", f"agrees with {service.address} to {max(off_s, service.clock_error_s):.3f} s")
        return
    make = error if off_s > _CLOCK_ERROR_S else warning
    yield make(
        "clock-skew",
        seen,
        "Certificates look expired, or not valid yet, and log lines of two hosts cannot be put in order.",
        "NTP on the hosts (a container has its host's clock): `timedatectl set-ntp true`, or chrony",
    )


def _node(asked: Asked, mesh: MeshFacts, node: Service) -> Iterator[Finding]:
    if not node.coordinator_reachable:
        yield error(
            "node-cut-off",
            f"node {node.node_id} at {node.address} does not reach its coordinator at {node.coordinator_address}",
            "It is not in the mesh, or will be out of it when its lease ends.",
            "run the doctor where that node runs, with its environment: `docker-compose exec NODE epmesh doctor`, "
            "`kubectl exec POD -- epmesh doctor`",
        )
    known = mesh.coordinator
    if known.kind is Kind.COORDINATOR and node.epoch and known.epoch and not _in(node, known):
        yield warning(
            "node-elsewhere",
            f"node {node.node_id} at {node.address} is not in the view of the coordinator at {known.address}; "
            f"its own coordinator is {node.coordinator_address}",
            "There are two meshes, or the node is on its way in.",
            "the same --coordinator (EPMESH_COORDINATOR) on all nodes",
        )


def _in(node: Service, coordinator: Service) -> bool:
    return any(seen.incarnation == node.incarnation for seen in coordinator.nodes)


def _same_id(asked: Asked, facts: Facts, mesh: MeshFacts) -> Iterator[Finding]:
    """A live node has the id that the one here would take. One that runs here already is that node itself."""
    if mesh.coordinator.kind is not Kind.COORDINATOR or facts.network is None:
        return
    wanted = node_id(asked, facts)
    ours = mesh.here.incarnation if mesh.here else 0
    for seen in mesh.coordinator.nodes:
        if seen.node_id == wanted and seen.incarnation != ours:
            yield error(
                "node-id-taken",
                f"a live node at {seen.address} has the id {wanted}",
                "The coordinator refuses a second one.",
                "--node-id (EPMESH_NODE_ID) of its own for each node, or `hostname:` in compose; by default it is "
                "hostname:port",
            )


def _endpoints(mesh: MeshFacts) -> Iterator[Finding]:
    closed = [endpoint for endpoint in mesh.endpoints if endpoint.outcome is not Dialled.OPEN]
    for endpoint in closed[:_MOST_NAMED]:
        how = endpoint.outcome.value if endpoint.outcome else "a name that does not resolve here"
        yield error(
            "endpoint-unreachable",
            f"from here to {endpoint.owner}: {endpoint.what} at {endpoint.address} is {how}",
            "Every pair of nodes exchanges rows directly; the coordinator leaves out one of two that cannot.",
            f"on that node --advertise and --link-host with an address that is reached from here; let the ports through"
            f"{'' if len(closed) <= _MOST_NAMED else f' ({len(closed)} endpoints in all)'}",
        )
    if mesh.endpoints and not closed:
        yield ok("endpoints", f"all {len(mesh.endpoints)} endpoints of the view open from here")
