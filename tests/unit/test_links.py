"""Links between two ranks of one process, over real sockets on loopback."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from epmesh.errors import InvalidRequest
from epmesh.frames import Message
from epmesh.v1 import frame_pb2
from epmesh.view import NodeInfo, RankInfo, RankMode, View
from epmesh_server.ranks import inbox as inboxes
from epmesh_server.ranks import link_window, links
from epmesh_server.ranks.inbox import Inbox
from epmesh_server.ranks.links import LinkHub
from epmesh_server.ranks.session import standing_in

GROUP, EPOCH, PATIENCE_S = 1, 3, 30.0
COLLECTIVE, P2P = frame_pb2.FRAME_KIND_COLLECTIVE, frame_pb2.FRAME_KIND_POINT_TO_POINT


class Pair:
    """Two hubs of one mesh; `receiver` is rank 1."""

    def __init__(self) -> None:
        self.told: list[frozenset[tuple[int, str]]] = []
        self.changed = threading.Event()
        self.sender = LinkHub("127.0.0.1", 11, self._tell)
        self.receiver = LinkHub("127.0.0.1", 22, lambda _: None)
        self.sender.identify("mesh", 0, lambda _: True)
        self.receiver.identify("mesh", 1, lambda _: True)

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
    pair.sender.identify("other", 0, lambda _: True)
    pair.send()
    pair.await_(lambda: pair.receiver.refused, inbox)
    assert inbox.take(COLLECTIVE, 1, 0, 0) is None


class Flood:
    """One sender's frames, as they come out of the receiver's socket; it may say anything of itself."""

    def __init__(self, hub: LinkHub) -> None:
        self.hub = hub
        self.inbox = hub.inbox(GROUP, EPOCH)
        self.sent = 0

    def send(self, size: int = 0, **fields: Any) -> bool:
        """Whether the receiver took it. Messages are numbered, as far as `link_sequence` does not say otherwise."""
        self.sent += 1
        common = {"mesh_id": "mesh", "epoch": EPOCH, "group_id": GROUP, "kind": COLLECTIVE, "link_sequence": self.sent}
        header = frame_pb2.FrameHeader(**{**common, **fields})
        if size:
            header.tensors.add(dtype="uint8", shape=[size])
        message = Message(header, (memoryview(bytes(size)),) if size else ())
        refused = self.hub.refused
        try:
            self.hub._take_in(zmq.Frame(b"nobody"), message, self.inbox)
        except InvalidRequest:
            return False
        return self.hub.refused == refused


@pytest.fixture
def flood(pair: Pair) -> Flood:
    """Into a rank whose view has ranks 0 and 1, incarnation 10 each, and that was told of the epoch after the next."""
    ranks = tuple(RankInfo(rank, 10, "cpu", RankMode.EXCHANGE, "") for rank in range(2))
    nodes = (NodeInfo(0, "n", 1, "", ranks),)
    view = View(mesh_id="mesh", epoch=EPOCH + 1, membership_epoch=EPOCH, stride=8, nodes=nodes, groups=())
    pair.receiver.identify("mesh", 1, functools.partial(standing_in, view, EPOCH + 3))
    return Flood(pair.receiver)


@pytest.mark.parametrize(
    ("sender", "takes"),
    [
        ({"source": 0, "incarnation": 10}, True),
        ({"source": 0, "incarnation": 11}, False),  # its old self
        ({"source": 2, "incarnation": 10}, False),  # nobody
        ({"source": 0, "incarnation": 10, "epoch": EPOCH - 1}, False),  # over
        ({"source": 0, "incarnation": 10, "epoch": EPOCH + 1}, False),  # an epoch that changed no rank
        ({"source": 2, "incarnation": 5, "epoch": EPOCH + 2}, True),  # a view may be on its way
        ({"source": 1 << 20, "incarnation": 5, "epoch": EPOCH + 2}, False),  # no mesh has such a rank
        ({"source": 0, "incarnation": 10, "epoch": EPOCH + 4}, False),  # nobody has prepared it
    ],
)
def test_frames_are_taken_of_those_that_the_view_permits_and_no_others(
    flood: Flood, sender: dict[str, int], takes: bool
) -> None:
    assert flood.send(**sender) is takes
    assert len(flood.hub._receiving) == takes


def test_naming_epochs_ranks_and_incarnations_grows_nothing(flood: Flood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_EARLY_SENDERS", 50)
    taken = [
        flood.send(source=source, incarnation=incarnation, epoch=epoch)
        for source in range(20)
        for incarnation in range(20)
        for epoch in range(20)
    ]
    assert sum(taken) == len(flood.hub._receiving) == 50 + 2  # and those two that are members
    assert flood.send(source=0, incarnation=10)
    flood.hub.forget_epochs_before(EPOCH + 2, ())
    flood.hub.forget_epochs_before(EPOCH + 4, ())
    assert not flood.hub._receiving
    assert not flood.hub._early


def test_what_was_left_for_groups_that_nobody_asks_for_is_dropped_oldest_first(
    flood: Flood, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "MAX_EARLY_INBOXES", 10)
    for number in range(1, 101):
        flood.send(source=0, incarnation=10, group_id=GROUP + number, sequence=1)
    assert len(flood.hub._inboxes) == 10 + 1
    assert flood.hub.inbox(GROUP + 100, EPOCH).take(COLLECTIVE, 1, 0, 0) is not None
    assert flood.hub.inbox(GROUP, EPOCH) is flood.inbox


def test_groups_that_nobody_asks_for_share_one_budget(flood: Flood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_INBOX_BYTES", 10_000)
    for number in range(1, 101):
        flood.send(1000, source=0, incarnation=10, group_id=GROUP + number)
    assert flood.hub.inbox_bytes < 20_000
    assert flood.send(1000, source=0, incarnation=10, sequence=7)
    assert flood.inbox.take(COLLECTIVE, 7, 0, 0) is not None
    assert not flood.inbox.lost_messages


def test_messages_without_tensors_count_too(flood: Flood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inboxes, "MAX_INBOX_BYTES", 100_000)
    for kind in (COLLECTIVE, frame_pb2.FRAME_KIND_ABANDON):
        for sequence in range(1000):
            flood.send(source=0, incarnation=10, kind=kind, sequence=sequence)
    assert flood.inbox.num_bytes <= 100_000
    assert len(flood.inbox._messages) + len(flood.inbox.abandoned) <= 100
    assert flood.inbox.lost_messages[0]
    flood.inbox.forget(1000)
    assert flood.inbox.num_bytes == 0


def test_what_waits_behind_holes_shares_one_budget(flood: Flood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_window, "MAX_HELD_BYTES", 10_000)
    for source in range(40):
        flood.send(1000, source=source, incarnation=1, epoch=EPOCH + 2, link_sequence=2)
    assert flood.hub._held.num_bytes == 10_000
    flood.hub.forget_epochs_before(EPOCH + 3, ())
    assert flood.hub._held.num_bytes == 0


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
