"""Under which address others reach this node. Nobody has to say it: the way to the coordinator shows it.

Host names are no help: inside containers they resolve to loopback, or not at all elsewhere. Which of this host's
addresses others can reach shows in the one that its own packets to the coordinator carry. It is looked up at every
registration, for it may change when a container is moved to another network.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable

from epmesh.addresses import ANY_HOST, has_port, is_loopback, join_address, split_address
from epmesh.errors import MeshUnavailable
from epmesh_server.node.settings import NodeSettings

_ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # documentation addresses: routed by default routes alone, and never asked
_RESOLVE_WITHIN_S = 2.0


async def advertised_address(settings: NodeSettings, port: int) -> str:
    """host:port under which others reach the node that bound `port`.

    Raises:
        MeshUnavailable: the coordinator's name does not resolve, or not yet.
    """
    return choose_address(settings, port, await _sources(settings.coordinators) if wants_route(settings) else ())


def wants_route(settings: NodeSettings) -> bool:
    """Whether only routes tell the address: it listens everywhere, and nobody said where others reach it."""
    return settings.advertise is None and settings.host in ANY_HOST


def choose_address(settings: NodeSettings, port: int, sources: tuple[str, ...]) -> str:
    """The address to advertise.

    Args:
        sources: this host's own addresses on the way to the coordinator, then on default routes; the first that is not
            loopback is taken. Where all are, the mesh is on this host alone.
    """
    if not wants_route(settings):
        advertise = settings.advertise or settings.host
        return advertise if has_port(advertise) else join_address(advertise, port)
    host = next((source for source in sources if not is_loopback(source)), "127.0.0.1")
    return join_address(host, port)


async def _sources(coordinators: tuple[str, ...]) -> tuple[str, ...]:
    """Of the first whose name resolves: that of a host that is down may not."""
    for coordinator in coordinators[:-1]:
        with contextlib.suppress(MeshUnavailable):
            return await _sources_towards(coordinator)
    return await _sources_towards(coordinators[-1])


async def _sources_towards(coordinator: str) -> tuple[str, ...]:
    host, port = split_address(coordinator, "coordinator")
    try:
        async with asyncio.timeout(_RESOLVE_WITHIN_S):
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)
    except (OSError, TimeoutError) as exc:
        raise MeshUnavailable(f"the coordinator's name {host} does not resolve, or not yet: {exc}") from exc
    return sources_towards(str(address[0]) for _, _, _, _, address in found)


def sources_towards(addresses: Iterable[str]) -> tuple[str, ...]:
    """This host's own addresses on the way to `addresses`, then on default routes; none where there is no way."""
    return tuple(source for to in (*addresses, *_ELSEWHERE) if (source := source_towards(to)))


def source_towards(address: str) -> str:
    """This host's own address on packets to `address`; empty where there is no way. Sends nothing."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0]).partition("%")[0]
    return ""
