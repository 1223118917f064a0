"""The coordinator, node services, and every endpoint that the view names."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import grpc

from epmesh.addresses import join_address, split_address
from epmesh.channels import ONE_TRY_OPTIONS, open_channel
from epmesh.tls import TlsFiles
from epmesh.tls_refusals import why_refused
from epmesh.v1 import discovery_service_pb2, discovery_service_pb2_grpc, rank_service_pb2, rank_service_pb2_grpc
from epmesh.v1.view_pb2 import View
from epmesh_server.doctor.facts import Asked, Endpoint, Kind, Lookup, MeshFacts, NodeSeen, Service
from epmesh_server.doctor.probes.certificates import look_at_certificates
from epmesh_server.doctor.probes.dialling import dial_all
from epmesh_server.doctor.probes.names import look_up
from epmesh_server.doctor.probes.together import run_together

_NAME_WITHIN_S = 1.5
_DIAL_WITHIN_S = 1.0
_CALL_WITHIN_S = 1.5


def look_at_mesh(asked: Asked) -> MeshFacts:
    """Asks the coordinator, this node's own port and the node service that was named; then dials all the view names."""
    wanted = {"coordinator": asked.coordinator_address}
    if asked.port:
        wanted["here"] = _address_here(asked)
    if asked.node is not None:
        wanted["node"] = asked.node
    tls = _files(asked)
    found, _ = run_together(
        {role: lambda address=address: ask(address, tls) for role, address in wanted.items()},  # type: ignore[misc]
        _NAME_WITHIN_S + _DIAL_WITHIN_S + _CALL_WITHIN_S,
    )
    views = [view for _, view in found.values() if view is not None]
    newest = max(views, key=lambda view: view.epoch, default=None)
    services = {role: service for role, (service, _) in found.items()}
    missing = Service(
        address=asked.coordinator_address,
        lookup=Lookup(name=asked.coordinator_host, problem="no answer in time"),
        problem="no answer in time",
    )
    here = services.get("here")
    return MeshFacts(
        coordinator=services.get("coordinator", missing),
        node=services.get("node"),
        here=here if here is not None and here.opened else None,
        endpoints=dial_endpoints(newest) if newest is not None else (),
    )


def ask(address: str, tls: TlsFiles | None) -> tuple[Service, View | None]:
    """Looks the address up, dials all it stands for, and asks who is there; with the view, where there is one."""
    host, port = split_address(address, "address")
    lookup = look_up(host.strip("[]"), _NAME_WITHIN_S)
    dials = dial_all([(found, port) for found in lookup.addresses], _DIAL_WITHIN_S)
    service = Service(address=address, lookup=lookup, dials=dials)
    if not service.opened:
        return service, None
    with open_channel(address, ONE_TRY_OPTIONS, tls=tls) as channel:
        service, view = _ask(channel, service)
    if service.kind in (Kind.STRANGER, Kind.MUTE):
        reason = why_refused(join_address(service.opened[0].address, port), tls)
        if reason is not None:
            service = replace(service, kind=Kind.UNTRUSTED, tls_refusal=reason)
    return service, view


def _files(asked: Asked) -> TlsFiles | None:
    """This node's; `None` also where they cannot be used, which is a finding of its own."""
    if asked.tls_dir is None:
        return None
    certificates = look_at_certificates(asked.tls_dir)
    return None if certificates.problem else TlsFiles.from_directory(asked.tls_dir)


def _ask(channel: grpc.Channel, service: Service) -> tuple[Service, View | None]:
    discovery = discovery_service_pb2_grpc.DiscoveryServiceStub(channel)
    request = discovery_service_pb2.GetViewRequest()
    try:
        discovery.GetView(request, timeout=_CALL_WITHIN_S)  # opens the connection, which would count as a late answer
        sent = time.time()
        answer = discovery.GetView(request, timeout=_CALL_WITHIN_S)
        took_s = time.time() - sent
    except grpc.RpcError as exc:
        return _unanswered(service, exc), None
    service = replace(
        service,
        version=answer.version,
        clock_ahead_s=answer.time_unix_s - sent - took_s / 2 if answer.time_unix_s else None,
        clock_error_s=took_s / 2,
        epoch=answer.view.epoch,
        nodes=tuple(
            NodeSeen(slot=node.slot, node_id=node.node_id, incarnation=node.incarnation, address=node.address)
            for node in answer.view.nodes
        ),
    )
    return _with_kind(channel, service), answer.view


def _with_kind(channel: grpc.Channel, service: Service) -> Service:
    """A coordinator does not know the service of ranks."""
    stub = rank_service_pb2_grpc.RankServiceStub(channel)
    try:
        node = stub.DescribeNode(rank_service_pb2.DescribeNodeRequest(), timeout=_CALL_WITHIN_S)
    except grpc.RpcError as exc:
        if _code(exc) is grpc.StatusCode.UNIMPLEMENTED:
            return replace(service, kind=Kind.COORDINATOR)
        return _unanswered(service, exc)
    return replace(
        service,
        kind=Kind.NODE,
        node_id=node.node_id,
        incarnation=node.incarnation,
        coordinator_address=node.coordinator_address,
        registered=node.registered,
        coordinator_reachable=node.coordinator_reachable,
    )


def _unanswered(service: Service, error: grpc.RpcError) -> Service:
    if _code(error) in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return replace(service, kind=Kind.UNTRUSTED, role_refusal=_text(error))
    late = _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED
    return replace(service, kind=Kind.MUTE if late else Kind.STRANGER, problem=_text(error))


def dial_endpoints(view: View) -> tuple[Endpoint, ...]:
    """Dials every endpoint of a view, all at once."""
    named = _endpoints(view)
    parts = [split_address(endpoint.address, "endpoint") for endpoint in named]
    hosts = {host.strip("[]") for host, _ in parts}
    lookups, _ = run_together(
        {host: lambda host=host: look_up(host, 0.0) for host in hosts},  # type: ignore[misc]
        _NAME_WITHIN_S,
    )
    known = {host: lookup.addresses[0] for host, lookup in lookups.items() if lookup.addresses}
    targets = [(known[host.strip("[]")], port) for host, port in parts if host.strip("[]") in known]
    dials = iter(dial_all(targets, _DIAL_WITHIN_S))
    return tuple(
        replace(endpoint, outcome=next(dials).outcome) if host.strip("[]") in known else endpoint
        for endpoint, (host, _) in zip(named, parts, strict=True)
    )


def _endpoints(view: View) -> list[Endpoint]:
    found = []
    for node in view.nodes:
        found.append(Endpoint(what="node service", owner=node.node_id, address=node.address, outcome=None))
        for rank in node.ranks:
            owner = f"rank {rank.rank} of {node.node_id}"
            for what, endpoint in (("links", rank.link_endpoint), ("front", rank.front_endpoint)):
                if endpoint.startswith("tcp://"):
                    address = endpoint.removeprefix("tcp://")
                    found.append(Endpoint(what=what, owner=owner, address=address, outcome=None))
    return found


def _address_here(asked: Asked) -> str:
    return replace(asked, coordinator=None, coordinator_port=asked.port).coordinator_address


def _code(error: Any) -> grpc.StatusCode:
    """Status of a failed call. The stubs do not say that its error is the call, too."""
    code: grpc.StatusCode = error.code()
    return code


def _text(error: Any) -> str:
    return f"{error.details()} ({_code(error).name})"
