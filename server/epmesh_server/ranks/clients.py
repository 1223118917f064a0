"""For whom a rank does something: clients share what it has, so each needs a name that it cannot choose."""

from __future__ import annotations

import zmq

from epmesh.v1 import front_pb2
from epmesh_server.curve_users import NODE, account_of, is_rank

MAX_CLIENT_CHARS = 256
_USER_ID = "User-Id"


def client_key(route: zmq.Frame, request: front_pb2.FrontRequest) -> str:
    """Who asks: the owner of the key that CURVE showed, however many it has leased, else the connection.

    Where a neighbour or the node service asks, it asks for somebody, and says for whom. Others might say so too, but
    would only share what they are given anyway: what they say counts beside their own name.
    """
    user = _user(route)
    asked_for = request.serve_share.client or request.serve_rows.client
    return between(account_of(user) or route.bytes.hex(), user, asked_for[:MAX_CLIENT_CHARS])


def between(sender: str, user: str, asked_for: str) -> str:
    """The client behind a sender with this CURVE user; "" where there is none. Pure.

    A client is the same whichever neighbour it came by, so that it cannot have as many parts as there are neighbours.
    """
    if not asked_for:
        return sender
    if not user:
        return f"{sender} for {asked_for}"
    return asked_for if is_rank(user) or user == NODE else sender


def _user(route: zmq.Frame) -> str:
    try:
        found = route.get(_USER_ID)
    except zmq.ZMQError:  # without CURVE there is none
        return ""
    return found if isinstance(found, str) else ""
