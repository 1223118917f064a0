"""What ranks of a secured mesh, and those who try to get in, do in tests of CURVE."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from epmesh import Communicator
from epmesh.curve import KeyPair, secure_client
from epmesh.frames import encode
from epmesh.v1 import frame_pb2
from epmesh.view import RankInfo
from epmesh_server.ranks.communicator import JoinedCommunicator
from tests.fault.works import exchange

PATIENCE_S = 10.0
CLOSED = {"DISCONNECTED", "HANDSHAKE_FAILED_NO_DETAIL", "HANDSHAKE_FAILED_PROTOCOL"}  # without a word


@dataclass(frozen=True)
class Forgery:
    """A link frame that claims to be of `source`."""

    mesh_id: str
    epoch: int
    source: int
    incarnation: int
    link_sequence: int = 1

    def frames(self) -> list[bytes]:
        header = frame_pb2.FrameHeader(
            mesh_id=self.mesh_id,
            epoch=self.epoch,
            group_id=1,
            sequence=1 << 20,
            kind=frame_pb2.FRAME_KIND_COLLECTIVE,
            source=self.source,
            incarnation=self.incarnation,
            link_sequence=self.link_sequence,
        )
        return [bytes(frame) for frame in encode(header, ())]


def knock(endpoint: str, pair: KeyPair | None, server_key: bytes, frames: list[bytes] | None = None) -> str:
    """Connects to a ZeroMQ endpoint, sends `frames`, and says how the handshake ended.

    Args:
        pair: the keys to show; `None`: no CURVE at all.
    """
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 200
        if pair is not None:
            secure_client(dealer, pair, server_key)
        monitor = dealer.get_monitor_socket()
        dealer.connect(endpoint)
        if frames is not None:
            dealer.send_multipart(frames)
        try:
            return _outcome(monitor)
        finally:
            dealer.disable_monitor()
            monitor.close(0)


def _outcome(monitor: zmq.Socket[bytes]) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if monitor.poll(50):
            name = str(zmq.Event(recv_monitor_message(monitor)["event"]).name)
            if name.startswith("HANDSHAKE") or name == "DISCONNECTED":
                return name
    raise AssertionError("no handshake ended")


def exchange_all(comm: Communicator, experts: list[int]) -> list[float]:
    """One exchange with every rank."""
    return exchange(comm, experts)


def refused(comm: Communicator) -> int:
    """Link frames that this rank has refused."""
    assert isinstance(comm, JoinedCommunicator)
    hub = comm._rank_process.hub
    hub.wait(comm._member.inbox, (), 0.05)
    return hub.refused


def curve_key(comm: Communicator) -> bytes:
    """This rank's public key."""
    assert isinstance(comm, JoinedCommunicator)
    assert comm._rank_process.door is not None
    return comm._rank_process.door.pair.public


def speak_for(comm: Communicator, liar: int, forgery: Forgery, victim: RankInfo) -> str | None:
    """Rank `liar`, with its own good key, sends a frame of another."""
    assert isinstance(comm, JoinedCommunicator)
    if comm.global_rank != liar:
        return None
    door = comm._rank_process.door
    assert door is not None
    return knock(victim.link_endpoint, door.pair, victim.curve_key, forgery.frames())


def exchange_beside_a_held_lock(comm: Communicator, late: int, hold_s: float, experts: list[int]) -> Any:
    """The first exchange ever, while rank `late` holds its interpreter lock: nobody is connected to it yet."""
    if comm.global_rank == late:
        ctypes.PyDLL(None).usleep(int(hold_s * 1e6))
    return exchange(comm, experts)
