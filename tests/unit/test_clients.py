"""For whom a rank does something."""

from __future__ import annotations

import pytest

from epmesh_server.ranks.clients import between


@pytest.mark.parametrize(
    ("sender", "user", "asked_for", "client"),
    [
        ("01ab", "", "", "01ab"),
        ("router 'a'", "client:3:router 'a':x", "", "router 'a'"),
        ("rank:4:9f", "rank:4:9f", "router 'a'", "router 'a'"),
        ("node", "node", "router 'b'", "router 'b'"),
        ("01ab", "", "02cd", "01ab for 02cd"),
        ("router 'a'", "client:3:router 'a':x", "router 'b'", "router 'a'"),
    ],
    ids=["connection", "user", "by a neighbour", "by the node", "by nobody known", "pretended"],
)
def test_a_client_is_who_it_was_shown_to_be(sender: str, user: str, asked_for: str, client: str) -> None:
    assert between(sender, user, asked_for) == client
