"""What tests of broken links run in the ranks: all links of a rank go through proxies of its own."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import torch
import zmq

from epmesh import Communicator, EpmeshError, MeshUnavailable, StaleEpoch
from epmesh_server.ranks import link_watcher
from tests.fault.works import Seen, go_on
from tests.integration.mesh_works import tell
from tests.proxy import Mode, Proxy

_STRETCH = 4  # a busy test machine is late to make a connection anew
_PROXIES: dict[str, Proxy] = {}  # of this process, by the endpoint they stand before


def put_proxies_before_links(comm: Communicator) -> None:
    """Before the first message: connections that this process makes from now on go through proxies."""
    connect = zmq.Socket.connect

    def through_proxy(socket: zmq.Socket[Any], endpoint: str) -> Any:
        if endpoint.startswith("tcp://"):
            proxy = _PROXIES.setdefault(endpoint, Proxy(endpoint))
            endpoint = proxy.endpoint
        return connect(socket, endpoint)

    zmq.Socket.connect = through_proxy  # type: ignore[method-assign, assignment]
    link_watcher.RECONNECT_GRACE_S *= _STRETCH
    link_watcher.CONNECT_GRACE_S *= _STRETCH


def exchange_while_links_break(comm: Communicator, exchanges: int, seed: int) -> tuple[int, int, int]:
    """Exchanges rows of many sizes while this rank's connections are cut at random moments.

    Returns:
        Exchanges whose sums were right, connections made, and the epoch at the end.
    """
    chance, stop = random.Random(100 * seed + comm.global_rank), threading.Event()
    cutter = threading.Thread(target=_cut_until, args=(stop, chance.randrange(1 << 32)))
    cutter.start()
    try:
        right = sum(_exchange(comm, number, seed) for number in range(exchanges))
    finally:
        stop.set()
        cutter.join()
    return right, sum(proxy.connections for proxy in _PROXIES.values()), comm.epoch


def _cut_until(stop: threading.Event, seed: int) -> None:
    chance = random.Random(seed)
    while not stop.wait(chance.uniform(0.02, 0.15)):
        for proxy in _PROXIES.values():
            if chance.random() < 0.5:
                proxy.set(Mode.SWALLOW)  # what is sent from now on is certainly lost
                stop.wait(chance.uniform(0.0, 0.003))
            proxy.cut()


def _exchange(comm: Communicator, number: int, seed: int) -> bool:
    """One exchange in which every rank sends rows to all experts; whether the sums have the right bits."""
    placement = comm.view.placement(None)
    assert placement is not None
    size = random.Random(seed + number).choice([1, 8, 300])
    generator = torch.Generator().manual_seed(1000 * number + comm.global_rank)
    rows = torch.randn(size, 64, generator=generator)
    ids = torch.randint(placement.num_experts, (size, 1), generator=generator)
    received = comm.dispatch(rows, torch.ones(size, 1), ids, True)[0]
    sums = comm.combine(received * 2.0, True)
    return bool(torch.equal(sums, rows * 2.0))


def lose_a_link_for_good(comm: Communicator, inbox: Path, who: int, mode: str) -> Seen:
    """All exchange; then the links of one rank to other nodes end, and do not come back."""
    seen, done = Seen(), 0
    try:
        while True:
            _exchange(comm, done, 0)
            done += 1
            if done == 5:
                tell(inbox, "ready", comm.global_rank)
            if done == 6 and comm.global_rank == who:  # all have begun this one, so all have told
                _break_for_good(mode)
    except EpmeshError as error:
        seen.at = time.monotonic()
        seen.error, seen.text, seen.ranks = type(error).__name__, str(error), getattr(error, "ranks", ())
    try:
        return go_on(comm, seen, list(range(8)))
    except (MeshUnavailable, StaleEpoch):
        return seen  # this rank is the one that was left out: by what it sees itself, or by what it is told
    finally:
        for proxy in _PROXIES.values():
            proxy.set(Mode.FORWARD)


def _break_for_good(mode: str) -> None:
    for proxy in _PROXIES.values():
        if mode == "silent":
            proxy.set(Mode.HOLD)
        else:
            proxy.cut(Mode.REFUSE)
