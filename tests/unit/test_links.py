"""Links between two ranks of one process, over real sockets on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from epmesh.frames import Message
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.inbox import Inbox
from epmesh_server.ranks.links import LinkHub

GROUP, EPOCH, PATIENCE_S = 1, 3, 10.0
COLLECTIVE, P2P = frame_pb2.FRAME_KIND_COLLECTIVE, frame_pb2.FRAME_KIND_POINT_TO_POINT


class Pair:
    """Two hubs of one mesh; `receiver` is rank 1."""

    def __init__(self) -> None:
        self.told: list[frozenset[tuple[int, str]]] = []
        self.changed = threading.Event()
        self.sender = LinkHub("127.0.0.1", 11, self._tell)
        self.receiver = LinkHub("127.0.0.1", 22, lambda _: None)
        self.sender.identify("mesh", 0)
        self.receiver.identify("mesh", 1)

    def _tell(self, peers: frozenset[tuple[int, str]]) -> None:
        self.told.append(peers)
        self.changed.set()

    def send(
        self, kind: frame_pb2.FrameKind = COLLECTIVE, sequence: int = 1, epoch: int = EPOCH, data: bytes = b""
    ) -> None:
        header = frame_pb2.FrameHeader(epoch=epoch, group_id=GROUP, sequence=sequence, kind=kind)
        if data:
            header.tensors.add(dtype="uint8", shape=[len(data)])
        self.sender.send(1, self.receiver.endpoint, header, [data] if data else [])

    def await_(self, ready: Callable[[], object], inbox: Inbox) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert time.monotonic() < deadline, "nothing came"
            self.receiver.wait(inbox, (), 0.1)

    def next(self, inbox: Inbox) -> Message:
        """The message with sequence number 1."""
        found: list[Message] = []

        def ready() -> bool:
            message = inbox.take(COLLECTIVE, 1, 0, 0)
            found.extend([message] if message else [])
            return bool(found)

        self.await_(ready, inbox)
        return found[0]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.sender.close(0)
    made.receiver.close(0)


def test_a_message_arrives_with_its_tensors_and_its_sender(pair: Pair) -> None:
    inbox = pair.receiver.inbox(GROUP, EPOCH)
    pair.send(data=b"rows")
    message = pair.next(inbox)
    assert (message.header.source, message.header.incarnation) == (0, 11)
    assert bytes(message.tensors[0]) == b"rows"
    assert inbox.take(COLLECTIVE, 1, 0, 0) is None


def test_what_comes_before_its_epoch_is_kept_and_what_comes_after_is_refused(pair: Pair) -> None:
    inbox = pair.receiver.inbox(GROUP, EPOCH)
    pair.send(epoch=EPOCH + 1, sequence=5)
    pair.send(epoch=EPOCH - 1, sequence=6)
    pair.send(sequence=7)
    pair.await_(lambda: inbox.take(COLLECTIVE, 7, 0, 0), inbox)
    assert pair.receiver.refused == 1
    later = pair.receiver.inbox(GROUP, EPOCH + 1)
    assert later.take(COLLECTIVE, 5, 0, 0) is not None


def test_frames_of_another_mesh_are_refused(pair: Pair) -> None:
    inbox = pair.receiver.inbox(GROUP, EPOCH)
    pair.sender.identify("other", 0)
    pair.send()
    pair.await_(lambda: pair.receiver.refused, inbox)
    assert inbox.take(COLLECTIVE, 1, 0, 0) is None


def test_bytes_that_are_no_frames_are_refused_and_the_link_goes_on(pair: Pair) -> None:
    inbox = pair.receiver.inbox(GROUP, EPOCH)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(pair.receiver.endpoint)
        stranger.send_multipart([b"\xff\xfe", b"x"])
        pair.await_(lambda: pair.receiver.refused, inbox)
    pair.send()
    pair.await_(lambda: inbox.take(COLLECTIVE, 1, 0, 0), inbox)


def test_point_to_point_messages_keep_their_order(pair: Pair) -> None:
    inbox = pair.receiver.inbox(GROUP, EPOCH)
    for number in range(1, 6):
        pair.send(P2P, number, data=bytes([number]))
    pair.await_(lambda: len(inbox.point_to_point.get(0, ())) == 5, inbox)
    taken = [inbox.take_point_to_point(0) for _ in range(5)]
    assert [bytes(message.tensors[0])[0] for message in taken if message] == [1, 2, 3, 4, 5]


def test_a_peer_that_goes_away_is_told_as_unreachable(pair: Pair) -> None:
    inbox = pair.receiver.inbox(GROUP, EPOCH)
    pair.send()
    pair.await_(lambda: inbox.take(COLLECTIVE, 1, 0, 0), inbox)
    assert pair.told == []
    gone = LinkHub("127.0.0.1", 33, lambda _: None)
    pair.sender.send(2, gone.endpoint, frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP, kind=COLLECTIVE))
    gone.close(0)
    assert pair.changed.wait(PATIENCE_S)
    assert pair.told == [frozenset({(2, gone.endpoint)})]
    assert pair.sender.unreachable == frozenset({(2, gone.endpoint)})


def test_a_link_that_is_given_up_is_forgotten(pair: Pair) -> None:
    pair.sender.send(2, "tcp://127.0.0.1:9", frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP, kind=COLLECTIVE))
    assert pair.changed.wait(PATIENCE_S)
    pair.changed.clear()
    pair.sender.forget_epochs_before(EPOCH + 1, [])
    assert pair.changed.wait(PATIENCE_S)
    assert pair.sender.unreachable == frozenset()


def test_a_thread_that_cannot_receive_is_woken_by_the_one_that_does(pair: Pair) -> None:
    import os

    mine, other = pair.receiver.inbox(GROUP, EPOCH), pair.receiver.inbox(GROUP + 1, EPOCH)
    other.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        header = frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP + 1, sequence=1, kind=COLLECTIVE)
        pair.sender.send(1, pair.receiver.endpoint, header)
        pair.await_(lambda: other.take(COLLECTIVE, 1, 0, 0), mine)
        assert os.eventfd_read(other.wake_fd) == 1
    finally:
        os.close(other.wake_fd)
