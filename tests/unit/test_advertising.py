"""Which address a node advertises, and what the coordinator makes of it."""

from __future__ import annotations

import asyncio

import pytest

from epmesh.errors import InvalidRequest, MeshUnavailable
from epmesh_server.coordinator.peers import check_advertised, peer_host
from epmesh_server.node.advertising import advertised_address, choose_address
from epmesh_server.node.settings import NodeSettings

EVERYWHERE = NodeSettings(host="0.0.0.0", insecure=True, coordinator="coordinator:7401")


@pytest.mark.parametrize(
    ("settings", "sources", "address"),
    [
        (EVERYWHERE, ("10.0.0.5", "192.168.0.2"), "10.0.0.5:7400"),  # the way to the coordinator counts first
        (EVERYWHERE, ("127.0.0.1", "192.168.0.2"), "192.168.0.2:7400"),  # it runs beside this node: the default route
        (EVERYWHERE, ("::1", "fd00::5"), "[fd00::5]:7400"),
        (EVERYWHERE, ("127.0.0.1",), "127.0.0.1:7400"),  # no network at all: a mesh on this host alone
        (EVERYWHERE, (), "127.0.0.1:7400"),
        (NodeSettings(host="127.0.0.1"), ("10.0.0.5",), "127.0.0.1:7400"),  # what it listens on
        (NodeSettings(host="::1"), (), "[::1]:7400"),
        (NodeSettings(host="0.0.0.0", insecure=True, advertise="node-a"), ("10.0.0.5",), "node-a:7400"),
        (NodeSettings(host="0.0.0.0", insecure=True, advertise="node-a:99"), ("10.0.0.5",), "node-a:99"),
    ],
)
def test_a_node_advertises_what_others_reach(settings: NodeSettings, sources: tuple[str, ...], address: str) -> None:
    assert choose_address(settings, 7400, sources) == address


def test_a_name_that_does_not_resolve_yet_is_said() -> None:
    settings = NodeSettings(host="0.0.0.0", insecure=True, coordinator="no-such-host.invalid:7401")
    with pytest.raises(MeshUnavailable, match=r"no-such-host\.invalid does not resolve, or not yet"):
        asyncio.run(advertised_address(settings, 7400))


def test_a_mesh_on_one_host_is_found_by_its_routes() -> None:
    settings = NodeSettings(host="0.0.0.0", insecure=True, coordinator="127.0.0.1:7401")
    host, _, port = asyncio.run(advertised_address(settings, 7400)).rpartition(":")
    assert (host != "", port) == (True, "7400")


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:172.18.0.3:40512", "172.18.0.3"),
        ("ipv6:%5B::1%5D:40512", "::1"),
        ("ipv6:%5Bfe80::1%25eth0%5D:40512", "fe80::1"),
        ("ipv6:%5B::ffff:10.0.0.3%5D:1", "10.0.0.3"),
        ("unix:/run/x", ""),
        ("", ""),
    ],
)
def test_the_host_of_a_peer(peer: str, host: str) -> None:
    assert peer_host(peer) == host


def test_loopback_is_refused_from_another_host_with_the_mend() -> None:
    with pytest.raises(InvalidRequest, match=r"'a' advertises 127\.0\.0\.1:7400.*--advertise 172\.18\.0\.3"):
        check_advertised("a", "127.0.0.1:7400", "ipv4:172.18.0.3:1")


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("127.0.0.1:7400", "ipv4:127.0.0.1:1"),
        ("10.0.0.3:7400", "ipv4:10.0.0.3:1"),
        ("node-a:7400", "ipv4:10.0.0.3:1"),
        ("10.0.0.3:7400", "ipv4:127.0.0.1:1"),  # beside the coordinator
        ("10.0.0.3:7400", "unix:"),
    ],
)
def test_nothing_is_odd_about_what_fits(address: str, peer: str) -> None:
    assert check_advertised("a", address, peer) is None


def test_another_interface_is_told() -> None:
    odd = check_advertised("a", "172.17.0.1:7400", "ipv4:10.0.0.3:1")
    assert odd is not None
    assert "comes from 10.0.0.3" in odd
