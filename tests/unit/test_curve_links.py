"""Links between ranks that use CURVE, over real sockets, admitted by a real key authority."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from epmesh.curve import KeyPair, secure_client
from epmesh.errors import Unauthenticated
from epmesh.frames import Message, encode
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.curve_door import CurveDoor
from epmesh_server.ranks.links import LinkHub
from tests.unit.key_authority import MESH, PATIENCE_S, Authority

GROUP, EPOCH = 1, 3
COLLECTIVE = frame_pb2.FRAME_KIND_COLLECTIVE
CLOSED = {"DISCONNECTED", "HANDSHAKE_FAILED_NO_DETAIL", "HANDSHAKE_FAILED_PROTOCOL"}  # without a word


class Rank:
    """One rank's links; rank n has incarnation n + 10."""

    def __init__(self, authority: Authority, number: int) -> None:
        self.number, self.incarnation = number, number + 10
        self.told: list[frozenset[tuple[int, str]]] = []
        self.door = CurveDoor(str(authority.path))
        self.hub = LinkHub("127.0.0.1", self.incarnation, self.told.append, self.door)
        self.hub.identify(MESH, number, lambda _: True)
        self.inbox = self.hub.inbox(GROUP, EPOCH)

    def show(self, authority: Authority, *learners: Rank) -> None:
        """Publishes a view with this rank, which the learners see."""
        view = authority.show(self.number, self.incarnation, self.door.pair.public, self.hub.endpoint)
        for rank in learners:
            rank.door.learn(view)

    def send(self, to: Rank, sequence: int = 1) -> None:
        header = frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP, sequence=sequence, kind=COLLECTIVE)
        self.hub.send(to.number, to.hub.endpoint, header)

    def takes(self, source: Rank, sequence: int = 1) -> Message | None:
        """Lets messages in, and takes one if it is there."""
        self.hub.wait(self.inbox, (), 0.02)
        return self.inbox.take(COLLECTIVE, sequence, 0, source.number)

    def await_(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert time.monotonic() < deadline, "nothing came"
            self.hub.wait(self.inbox, (), 0.02)

    def receive(self, source: Rank, sequence: int = 1) -> Message:
        deadline = time.monotonic() + PATIENCE_S
        while (message := self.takes(source, sequence)) is None:
            assert time.monotonic() < deadline, "nothing came"
        return message


@pytest.fixture
def authority() -> Iterator[Authority]:
    with Authority() as made:
        yield made


@pytest.fixture
def ranks(authority: Authority) -> Iterator[list[Rank]]:
    """Ranks 0, 1 and 2, in the view."""
    made = [Rank(authority, number) for number in range(3)]
    for rank in made:
        rank.show(authority, *made)
    yield made
    for rank in made:
        rank.hub.close(0)


class Intruder:
    """A DEALER to a rank's link endpoint, which a test sets up as it likes."""

    def __init__(self, rank: Rank, pair: KeyPair | None = None, server_key: bytes | None = None) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        if pair is not None:
            secure_client(self.socket, pair, server_key or rank.door.pair.public)
        self._monitor = self.socket.get_monitor_socket()
        self.socket.connect(rank.hub.endpoint)

    def outcome(self) -> str:
        """How the handshake ended."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._monitor.poll(50):
                event = recv_monitor_message(self._monitor)["event"]
                name = str(zmq.Event(event).name)
                if name.startswith("HANDSHAKE") or name == "DISCONNECTED":
                    return name
        raise AssertionError("no handshake ended")

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(0)
        self._context.term()


@pytest.fixture
def intrude() -> Iterator[Callable[..., Intruder]]:
    made: list[Intruder] = []

    def intrude(*args: object) -> Intruder:
        made.append(Intruder(*args))  # type: ignore[arg-type]
        return made[-1]

    yield intrude
    for intruder in made:
        intruder.close()


def frame_of(rank: Rank, sequence: int = 1, link_sequence: int = 1) -> list[bytes]:
    header = frame_pb2.FrameHeader(
        mesh_id=MESH,
        epoch=EPOCH,
        group_id=GROUP,
        sequence=sequence,
        kind=COLLECTIVE,
        source=rank.number,
        incarnation=rank.incarnation,
        link_sequence=link_sequence,
    )
    return [bytes(frame) for frame in encode(header, ())]


def test_members_exchange_and_each_message_tells_its_sender(ranks: list[Rank]) -> None:
    ranks[0].send(ranks[2])
    ranks[1].send(ranks[2])
    assert ranks[2].receive(ranks[0]).header.source == 0
    assert ranks[2].receive(ranks[1]).header.source == 1
    assert ranks[2].hub.refused == 0


def test_a_peer_of_a_view_that_comes_later_is_admitted_without_a_loss(authority: Authority) -> None:
    """Its own node service had the view before ours."""
    first, second = Rank(authority, 0), Rank(authority, 1)
    try:
        first.show(authority, first, second)
        second.send(first)
        time.sleep(0.2)
        assert first.takes(second) is None
        second.show(authority, first)
        first.receive(second)
        assert second.told == []
    finally:
        first.hub.close(0)
        second.hub.close(0)


def test_a_peer_whose_key_came_after_all_patience_gets_in_by_itself(authority: Authority) -> None:
    first, second = Rank(authority, 0), Rank(authority, 1)
    try:
        first.show(authority, first, second)
        second.send(first)
        first.await_(lambda: authority.authority.refusals.count)
        second.show(authority, first)
        first.receive(second)
    finally:
        first.hub.close(0)
        second.hub.close(0)


def test_an_unknown_key_does_not_get_in(ranks: list[Rank], intrude: Callable[..., Intruder]) -> None:
    stranger = intrude(ranks[0], KeyPair.generate())
    stranger.socket.send_multipart(frame_of(ranks[1]))
    assert stranger.outcome() in CLOSED
    ranks[1].send(ranks[0], 2)
    ranks[0].receive(ranks[1], 2)
    assert ranks[0].takes(ranks[1], 1) is None


def test_a_socket_without_curve_does_not_get_in(ranks: list[Rank], intrude: Callable[..., Intruder]) -> None:
    stranger = intrude(ranks[0])
    stranger.socket.send_multipart(frame_of(ranks[1]))
    assert stranger.outcome() in CLOSED
    ranks[1].send(ranks[0], 2)
    ranks[0].receive(ranks[1], 2)
    assert ranks[0].takes(ranks[1], 1) is None


def test_a_client_with_a_lease_does_not_get_in(
    authority: Authority, ranks: list[Rank], intrude: Callable[..., Intruder]
) -> None:
    pair = KeyPair.generate()
    authority.call(authority.clients.lease, pair.public, "router", "a")
    assert intrude(ranks[0], pair).outcome() == "HANDSHAKE_FAILED_AUTH"


def test_nobody_can_pass_for_the_rank_that_a_member_connects_to(authority: Authority, ranks: list[Rank]) -> None:
    """An endpoint that somebody else has bound: what is sent there cannot be read, and counts as out of reach."""
    impostor = Rank(authority, 7)
    try:
        view = authority.show(7, 17, KeyPair.generate().public, impostor.hub.endpoint)
        ranks[0].door.learn(view)
        ranks[0].send(impostor)
        deadline = time.monotonic() + PATIENCE_S
        while not ranks[0].told:
            assert time.monotonic() < deadline
            assert impostor.takes(ranks[0]) is None
        assert ranks[0].told == [frozenset({(7, impostor.hub.endpoint)})]
    finally:
        impostor.hub.close(0)


def test_an_admitted_member_cannot_speak_for_another(
    ranks: list[Rank], intrude: Callable[..., Intruder], caplog: pytest.LogCaptureFixture
) -> None:
    liar = intrude(ranks[0], ranks[2].door.pair)
    for number in range(5):
        liar.socket.send_multipart(frame_of(ranks[1], link_sequence=number + 1))
    ranks[0].await_(lambda: ranks[0].hub.refused == 5)
    assert ranks[0].takes(ranks[1]) is None
    assert [message for message in caplog.messages if "rank:2:c sent a frame as rank:1:b" in message] == [
        "source.refused: rank:2:c sent a frame as rank:1:b"
    ]
    ranks[1].send(ranks[0])
    ranks[2].send(ranks[0])
    ranks[0].receive(ranks[1])
    ranks[0].receive(ranks[2])


def test_an_old_incarnation_of_a_rank_does_not_get_in(
    authority: Authority, ranks: list[Rank], intrude: Callable[..., Intruder]
) -> None:
    old = ranks[1].door.pair
    authority.show(1, 99, KeyPair.generate().public, "tcp://127.0.0.1:9")
    assert intrude(ranks[0], old).outcome() in CLOSED


def test_the_node_service_gets_in_and_may_not_send_frames(
    authority: Authority, ranks: list[Rank], intrude: Callable[..., Intruder]
) -> None:
    node = intrude(ranks[0], authority.pair)
    assert node.outcome() == "HANDSHAKE_SUCCEEDED"
    node.socket.send_multipart(frame_of(ranks[1]))
    ranks[0].await_(lambda: ranks[0].hub.refused == 1)
    assert ranks[0].takes(ranks[1]) is None


def test_nothing_is_sent_in_the_clear_to_a_peer_without_a_key(ranks: list[Rank]) -> None:
    header = frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP, kind=COLLECTIVE)
    with pytest.raises(Unauthenticated, match="no view shows a CURVE key of rank 5"):
        ranks[0].hub.send(5, "tcp://127.0.0.1:9", header)


def test_a_frame_that_its_sender_sends_again_changes_nothing(
    ranks: list[Rank], intrude: Callable[..., Intruder]
) -> None:
    """Over the same connection, and over another one that the same member has opened."""
    first, second = intrude(ranks[0], ranks[1].door.pair), intrude(ranks[0], ranks[1].door.pair)
    first.socket.send_multipart(frame_of(ranks[1], 1, 1))
    ranks[0].receive(ranks[1], 1)
    for each in (first, second):
        each.socket.send_multipart(frame_of(ranks[1], 1, 1))
    window = ranks[0].hub._receiving[(1, 11, EPOCH)]
    ranks[0].await_(lambda: window.duplicates == 2)
    assert ranks[0].takes(ranks[1], 1) is None
    second.socket.send_multipart(frame_of(ranks[1], 2, 2))
    ranks[0].receive(ranks[1], 2)


def test_an_authority_that_has_gone_admits_nobody(
    authority: Authority, ranks: list[Rank], intrude: Callable[..., Intruder]
) -> None:
    authority.run(authority.authority.close())
    assert intrude(ranks[0], ranks[1].door.pair).outcome() in CLOSED


class Recorder:
    """Forwards TCP connections to a link endpoint, keeps what the connecting side sends, and can send it again."""

    def __init__(self, target: str) -> None:
        self.target = _address(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.recorded: list[bytearray] = []  # by connection
        self._sockets: list[socket.socket] = []
        self._upstream: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def replay_into(self, connection: int, data: bytes) -> None:
        """Sends bytes to the target as part of a connection that stands."""
        self._upstream[connection].sendall(data)

    def replay_alone(self, data: bytes) -> bytes:
        """Sends bytes over a connection of its own; what the target says until it closes that one."""
        said = b""
        with socket.create_connection(self.target, PATIENCE_S) as alone, contextlib.suppress(ConnectionError):
            alone.sendall(data)
            while part := alone.recv(4096):
                said += part
        return said

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            kept = bytearray()
            self.recorded.append(kept)
            self._upstream.append(far)
            self._sockets += [near, far]
            for source, sink, keep in ((near, far, kept), (far, near, bytearray())):
                thread = threading.Thread(target=_pump, args=(source, sink, keep), daemon=True)
                self._threads.append(thread)
                thread.start()


def _pump(source: socket.socket, sink: socket.socket, keep: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            keep += data
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def _address(endpoint: str) -> tuple[str, int]:
    host, port = endpoint.removeprefix("tcp://").split(":")
    return host, int(port)


@pytest.fixture
def recorder(authority: Authority, ranks: list[Rank]) -> Iterator[Recorder]:
    """On the way to rank 0, for rank 1."""
    made = Recorder(ranks[0].hub.endpoint)
    info = authority.show(0, 10, ranks[0].door.pair.public, made.endpoint)
    ranks[1].door.learn(info)
    yield made
    made.close()


def send_through(recorder: Recorder, ranks: list[Rank], sequence: int) -> None:
    header = frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP, sequence=sequence, kind=COLLECTIVE)
    ranks[1].hub.send(0, recorder.endpoint, header)


def test_bytes_recorded_on_a_link_and_sent_again_by_somebody_else_change_nothing(
    ranks: list[Rank], recorder: Recorder
) -> None:
    send_through(recorder, ranks, 1)
    ranks[0].receive(ranks[1], 1)
    window = ranks[0].hub._receiving[(1, 11, EPOCH)]
    said = recorder.replay_alone(bytes(recorder.recorded[0]))
    assert b"READY" not in said, "a handshake that was recorded is no handshake"
    assert ranks[0].takes(ranks[1], 1) is None
    assert (window.expected, window.duplicates, ranks[0].hub.refused) == (2, 0, 0)
    send_through(recorder, ranks, 2)
    ranks[0].receive(ranks[1], 2)


def test_bytes_sent_again_within_their_own_connection_break_it_and_nothing_is_lost(
    ranks: list[Rank], recorder: Recorder
) -> None:
    send_through(recorder, ranks, 1)
    ranks[0].receive(ranks[1], 1)
    before = len(recorder.recorded[0])
    send_through(recorder, ranks, 2)
    ranks[0].receive(ranks[1], 2)
    recorder.replay_into(0, bytes(recorder.recorded[0][before:]))  # an encrypted message, and perhaps a heartbeat
    deadline = time.monotonic() + PATIENCE_S
    while len(recorder.recorded) == 1:
        assert time.monotonic() < deadline, "the connection stands"
        assert ranks[0].takes(ranks[1], 2) is None
    window = ranks[0].hub._receiving[(1, 11, EPOCH)]
    assert (window.expected, window.duplicates) == (3, 0)
    send_through(recorder, ranks, 3)
    ranks[0].receive(ranks[1], 3)


def test_what_is_sent_cannot_be_read_on_the_way(ranks: list[Rank], recorder: Recorder) -> None:
    secret = b"hidden states of somebody's prompt"
    header = frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP, sequence=1, kind=COLLECTIVE)
    header.tensors.add(dtype="uint8", shape=[len(secret)])
    ranks[1].hub.send(0, recorder.endpoint, header, [secret])
    assert bytes(ranks[0].receive(ranks[1]).tensors[0]) == secret
    wire = b"".join(map(bytes, recorder.recorded))
    for readable in (secret, MESH.encode(), ranks[1].door.pair.public):
        assert readable not in wire
