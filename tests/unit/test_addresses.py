"""Addresses: what is host:port, what is not, and that the error names it."""

from __future__ import annotations

import pytest

from epmesh.addresses import has_port, is_loopback, join_address, parse_addresses, split_address
from epmesh.errors import InvalidRequest


@pytest.mark.parametrize(
    ("host", "address"), [("h", "h:1"), ("::1", "[::1]:1"), ("[::1]", "[::1]:1"), ("10.0.0.1", "10.0.0.1:1")]
)
def test_hosts_and_ports_are_joined(host: str, address: str) -> None:
    assert join_address(host, 1) == address
    assert has_port(address)
    assert not has_port(host)


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("[::1]:7401", "[::1]", 7401), ("node-0:1", "node-0", 1), ("a.b_c.svc:65535", "a.b_c.svc", 65_535)],
)
def test_addresses_split_at_the_last_colon(address: str, host: str, port: int) -> None:
    assert split_address(address, "x") == (host, port)


MALFORMED = ["", ":1", "h", "h:", "h:0", "h:65536", "h:x", "h:1_0", "h:\u0661", "h:" + "9" * 5000]
MALFORMED += ["http://h:1", "h h:1", "::1:7401", "[::1:7401", "h\n:1", "h:-1", " h:1"]


@pytest.mark.parametrize("address", [*MALFORMED, None, 7400, b"h:1", ("h", 1)])
def test_what_is_no_host_and_port_is_refused_and_named(address: object) -> None:
    with pytest.raises(InvalidRequest, match="the setting") as caught:
        split_address(address, "the setting")
    assert repr(address) in str(caught.value)


def test_several_addresses_keep_their_order_without_repeats() -> None:
    assert parse_addresses("b:1", "x") == ("b:1",)
    assert parse_addresses(["b:1", "a:1", "b:1"], "x") == ("b:1", "a:1")


@pytest.mark.parametrize("addresses", [[], (), None, 3, b"h:1", {"h:1"}, ["h:1", None], ["h:1", "h"], [["h:1"]]])
def test_sequences_with_anything_else_in_them_are_refused(addresses: object) -> None:
    with pytest.raises(InvalidRequest, match="the setting"):
        parse_addresses(addresses, "the setting")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.0.0.9", True), ("[::1]", True), ("0.0.0.0", False), ("node-0", False)],
)
def test_only_loopback_is_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
