"""A thousand nodes with eight ranks each."""

from __future__ import annotations

import time

from epmesh_server.membership.actions import HeartbeatAck, Send
from epmesh_server.membership.events import Heartbeat
from tests.unit.fake_mesh import FakeMesh, linear, rank

NUM_NODES, NUM_RANKS = 1000, 8


def full_mesh() -> FakeMesh:
    mesh = FakeMesh()
    for number in range(NUM_NODES):
        node = mesh.start(f"node-{number}", number + 1)
        first = node.slot * NUM_RANKS
        node.ranks = {n: rank(n, world_size=8000, experts=[linear(256)]) for n in range(first, first + NUM_RANKS)}
        mesh.report(node)
    mesh.advance(0.5)
    return mesh


def test_a_thousand_nodes_register_and_are_committed_in_time() -> None:
    began = time.process_time()
    mesh = full_mesh()
    took = time.process_time() - began
    assert len(mesh.view.ranks) == NUM_NODES * NUM_RANKS
    assert len(mesh.view.placements[None].experts_of) == NUM_NODES * NUM_RANKS
    assert len(mesh.views) <= 3
    assert took < 20.0  # four times what the whole mesh is promised

    sessions = list(mesh.nodes)
    began = time.process_time()
    for number in range(10):
        for session in sessions:
            assert mesh.machine.step(Heartbeat(session, number), mesh.now) == [Send(session, HeartbeatAck(number))]
    took = (time.process_time() - began) / (10 * NUM_NODES)
    assert took < 0.2e-3  # a thousand a second are a fifth of one core, gRPC included


def test_a_heartbeat_costs_the_same_however_many_nodes_there_are() -> None:
    mesh = full_mesh()
    session = next(iter(mesh.nodes))
    before = mesh.machine.next_deadline()
    for number in range(100):
        mesh.machine.step(Heartbeat(session, number), mesh.now)
    assert mesh.machine.next_deadline() == before  # the lease is looked at when it may have ended, not before
