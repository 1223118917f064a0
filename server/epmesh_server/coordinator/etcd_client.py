"""Calls of etcd's v3 API in its JSON form, over plain HTTP: no client library pins gRPC for us.

Keys and values travel in base64, and 64 bit integers as strings. Every call is bounded in time and in bytes.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import time
from dataclasses import dataclass
from typing import Any

from epmesh.addresses import parse_addresses, split_address
from epmesh.errors import InvalidRequest, MeshUnavailable

CALL_TIMEOUT_S = 1.0
MAX_ANSWER_BYTES = 256 << 20
_SCHEME = "etcd://"
_PREFIX = re.compile(r"(/[A-Za-z0-9._-]+)+")
_RETRIED = (500, 502, 503, 504)  # no leader just now, or etcd's own timeout: another member may do


@dataclass(frozen=True)
class EtcdLocation:
    """Where in an etcd a mesh is kept.

    Attributes:
        hosts: host:port of its members, or of some.
        prefix: what all keys of the mesh begin with; no other mesh's.
    """

    hosts: tuple[str, ...]
    prefix: str

    def __str__(self) -> str:
        return f"{_SCHEME}{','.join(self.hosts)}{self.prefix}"


def parse_store(store: str) -> EtcdLocation:
    """What ``etcd://host:port[,host:port][/prefix]`` says; the prefix is ``/epmesh`` unless given.

    Raises:
        InvalidRequest: it is something else.
    """
    hosts, slash, prefix = store.removeprefix(_SCHEME).partition("/")
    prefix = slash + prefix.rstrip("/") if prefix else "/epmesh"
    if not store.startswith(_SCHEME) or not _PREFIX.fullmatch(prefix):
        raise InvalidRequest(f"store is {store!r}; it must be etcd://host:2379[,host2:2379][/prefix]")
    return EtcdLocation(parse_addresses(hosts.split(","), "store"), prefix)


class EtcdClient:
    """Calls whichever member answers. Keeps no connection, so threads may share it."""

    def __init__(self, hosts: tuple[str, ...]) -> None:
        self._hosts = hosts

    def call(self, path: str, body: dict[str, Any], within_s: float = CALL_TIMEOUT_S) -> dict[str, Any]:
        """One call; it may have been carried out, once or more, also where this raises.

        Args:
            path: of the method, below ``/v3/``.
            body: the request.
            within_s: seconds for each member that is tried, one after the other.

        Raises:
            MeshUnavailable: no member carried it out in time, or etcd refused it.
        """
        text = json.dumps(body)
        why = []
        for host in self._hosts:
            try:
                status, answer = _post(host, f"/v3/{path}", text, within_s)
            except (OSError, http.client.HTTPException, TimeoutError) as exc:
                why.append(f"{host}: {exc!r}")
                continue
            if status == http.HTTPStatus.OK:
                return _parsed(host, answer)
            why.append(f"{host}: HTTP {status}: {answer[:200].decode(errors='replace')}")
            if status not in _RETRIED:
                break
        raise MeshUnavailable(f"etcd did not carry out {path}: {'; '.join(why)}")


def encoded(data: bytes | str) -> str:
    """Bytes as the API takes them."""
    return base64.b64encode(data.encode() if isinstance(data, str) else data).decode()


def decoded(text: str) -> bytes:
    """Bytes as the API gave them."""
    return base64.b64decode(text)


def _post(host: str, path: str, text: str, within_s: float) -> tuple[int, bytes]:
    name, port = split_address(host, "store")
    until = time.monotonic() + within_s
    connection = http.client.HTTPConnection(name.strip("[]"), port, timeout=within_s)
    try:
        connection.request("POST", path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        parts, size = [], 0
        while part := response.read1(1 << 20):
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES or time.monotonic() > until:  # the socket's timeout is for each part alone
                raise TimeoutError(f"the answer was not whole after {within_s} s and {size} bytes")
        return response.status, b"".join(parts)
    finally:
        connection.close()


def _parsed(host: str, answer: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(answer)
    except ValueError as exc:
        raise MeshUnavailable(f"{host} answered what is no JSON; is it an etcd?") from exc
    if not isinstance(parsed, dict):
        raise MeshUnavailable(f"{host} answered {type(parsed).__name__}, no object; is it an etcd?")
    return parsed
