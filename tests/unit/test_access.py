"""Who may call what: the table is whole, and says what the design says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from epmesh import v1
from epmesh.errors import Unauthenticated
from epmesh_server.access import (
    COORDINATOR_ACCESS,
    NODE_ACCESS,
    Access,
    Identity,
    Role,
    authorize,
    check_node,
    identities,
)

_SERVICES = {
    "coordinator": ("membership", "discovery", "group"),
    "node": ("rank", "discovery", "group", "key", "router", "communicator"),
}
_TABLES = {"coordinator": COORDINATOR_ACCESS, "node": NODE_ACCESS}
_ANYONE = tuple(Identity(role, "x") for role in Role)


def _methods(server: str) -> list[str]:
    """Every method that a TCP port of `server` serves."""
    names = []
    for service in _SERVICES[server]:
        module = import_module(f"epmesh.v1.{service}_service_pb2")
        names += [
            f"/{found.full_name}/{method.name}"
            for found in module.DESCRIPTOR.services_by_name.values()
            for method in found.methods
        ]
    names += [f"/grpc.health.v1.Health/{m.name}" for m in health_pb2.DESCRIPTOR.services_by_name["Health"].methods]
    return names


def _listed(access: Access, method: str) -> bool:
    return method in access or f"{method.rpartition('/')[0]}/*" in access


@pytest.mark.parametrize("server", _SERVICES)
def test_every_method_of_a_port_stands_in_its_table(server: str) -> None:
    assert [method for method in _methods(server) if not _listed(_TABLES[server], method)] == []


@pytest.mark.parametrize("server", _SERVICES)
def test_a_table_names_no_method_that_is_not_there(server: str) -> None:
    methods = _methods(server)
    unknown = [
        entry
        for entry in _TABLES[server]
        if not any(method == entry or entry == f"{method.rpartition('/')[0]}/*" for method in methods)
    ]
    assert unknown == []


def test_every_service_of_the_protos_is_in_a_table_or_stays_on_the_unix_socket() -> None:
    found = {path.name.removesuffix("_service_pb2.py") for path in Path(v1.__path__[0]).glob("*_service_pb2.py")}
    assert found == {service for services in _SERVICES.values() for service in services} | {"store"}


@pytest.mark.parametrize("access", _TABLES.values(), ids=_TABLES)
def test_what_stands_in_no_table_is_for_nobody(access: Access) -> None:
    for method in ("/epmesh.v1.StoreService/Get", "/epmesh.v1.RankService/RankSession", "/made.Up/Method"):
        with pytest.raises(Unauthenticated, match="nobody over this port"):
            authorize(access, method, _ANYONE)


@pytest.mark.parametrize(
    ("access", "method", "roles"),
    [
        (COORDINATOR_ACCESS, "/epmesh.v1.MembershipService/RegisterNode", {Role.NODE}),
        (COORDINATOR_ACCESS, "/epmesh.v1.MembershipService/NodeSession", {Role.NODE}),
        (COORDINATOR_ACCESS, "/epmesh.v1.GroupService/SetExpertPlacement", {Role.NODE}),
        (NODE_ACCESS, "/epmesh.v1.RouterService/ForwardRows", {Role.ROUTER, Role.DRIVER}),
        (NODE_ACCESS, "/epmesh.v1.CommunicatorService/AttachRank", {Role.DRIVER}),
        (NODE_ACCESS, "/epmesh.v1.GroupService/CreateGroup", {Role.DRIVER}),
        (NODE_ACCESS, "/grpc.health.v1.Health/Check", set(Role)),
        (NODE_ACCESS, "/epmesh.v1.DiscoveryService/GetView", set(Role)),
    ],
)
def test_a_method_is_for_these_roles_alone(access: Access, method: str, roles: set[Role]) -> None:
    for role in Role:
        identity = Identity(role, "x")
        if role in roles:
            assert authorize(access, method, [identity]) == identity
        else:
            with pytest.raises(Unauthenticated, match=f"certificate has {role.value} 'x'"):
                authorize(access, method, [identity])


def test_one_of_several_identities_is_enough() -> None:
    both = (Identity(Role.ROUTER, "r"), Identity(Role.DRIVER, "d"))
    assert authorize(NODE_ACCESS, "/epmesh.v1.CommunicatorService/AttachRank", both) == both[1]


def test_a_certificate_without_a_role_may_do_nothing() -> None:
    with pytest.raises(Unauthenticated, match="no role of a mesh"):
        authorize(NODE_ACCESS, "/grpc.health.v1.Health/Check", ())


def test_names_survive_their_way_through_a_certificate() -> None:
    for name in ("node-0", "host:7400", "a/b c", "ä", "%2F"):
        identity = Identity(Role.NODE, name)
        assert identities([identity.uri]) == (identity,)


def test_other_names_of_a_certificate_mean_nothing() -> None:
    uris = ["spiffe://x/node/a", "epmesh://king/a", "epmesh:/node/a", "http://epmesh://node/a", "epmesh://NODE/a", ""]
    assert identities(uris) == ()


def test_a_node_acts_for_itself_alone() -> None:
    own = [Identity(Role.NODE, "a"), Identity(Role.ROUTER, "b")]
    check_node("a", own)
    check_node("b", None)  # nothing authenticates here
    for other in ("b", "", "A"):
        with pytest.raises(Unauthenticated, match="certificate is for 'a'"):
            check_node(other, own)
