"""Links whose connections break, over real sockets: what was on its way is sent again, or told as lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from epmesh.v1 import frame_pb2
from epmesh_server.ranks import inbox as inboxes
from epmesh_server.ranks import link_watcher, links
from epmesh_server.ranks.inbox import Inbox
from epmesh_server.ranks.link_window import READ_EVERY, REPORT_EVERY, SendWindow
from epmesh_server.ranks.links import LinkHub
from tests.proxy import Mode, Proxy

GROUP, EPOCH, PATIENCE_S = 1, 3, 30.0
P2P = frame_pb2.FRAME_KIND_POINT_TO_POINT


class Line:
    """Rank 0 sends numbered bytes to rank 1 through a proxy."""

    def __init__(self) -> None:
        self.told: list[frozenset[tuple[int, str]]] = []
        self.sender = LinkHub("127.0.0.1", 11, self.told.append)
        self.receiver = LinkHub("127.0.0.1", 22, lambda _: None)
        self.sender.identify("mesh", 0, lambda sender: True)
        self.receiver.identify("mesh", 1, lambda sender: True)
        self.proxy = Proxy(self.receiver.endpoint)
        self.inbox = self.receiver.inbox(GROUP, EPOCH)
        self.sent = 0
        self.arrived: list[int] = []

    def send(self, count: int = 1, size: int = 64) -> None:
        for _ in range(count):
            self.sent += 1
            header = frame_pb2.FrameHeader(epoch=EPOCH, group_id=GROUP, sequence=self.sent, kind=P2P)
            header.tensors.add(dtype="uint8", shape=[size])
            data = self.sent.to_bytes(8, "big") * (size // 8)
            self.sender.send(1, self.proxy.endpoint, header, [data])

    def receive(self, timeout_s: float = 0.05) -> None:
        self.receiver.wait(self.inbox, (), timeout_s)
        while (message := self.inbox.take_point_to_point(0)) is not None:
            data = bytes(message.tensors[0])
            assert data == data[:8] * (len(data) // 8)
            self.arrived.append(int.from_bytes(data[:8], "big"))

    def until(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert time.monotonic() < deadline, f"{len(self.arrived)} of {self.sent} arrived"
            self.receive()

    def until_all_arrived(self) -> None:
        self.until(lambda: len(self.arrived) >= self.sent)
        assert self.arrived == list(range(1, self.sent + 1))
        assert self.inbox.lost_messages == {}
        assert self.told == []

    @property
    def window(self) -> SendWindow[list[bytes]]:
        return self.sender._sending[((1, self.proxy.endpoint), EPOCH)]  # type: ignore[return-value]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    # A busy test machine is late to make a connection, for the proxy is a thread of this process.
    monkeypatch.setattr(link_watcher, "RECONNECT_GRACE_S", 4 * link_watcher.RECONNECT_GRACE_S)
    monkeypatch.setattr(link_watcher, "CONNECT_GRACE_S", 4 * link_watcher.CONNECT_GRACE_S)
    made = Line()
    yield made
    made.sender.close(0)
    made.receiver.close(0)
    made.proxy.close()


def test_a_message_lost_with_its_connection_arrives_in_its_place(line: Line) -> None:
    line.send(3)
    line.until_all_arrived()
    line.proxy.set(Mode.SWALLOW)
    line.send(2)
    line.until(lambda: line.window.last == 5)
    line.proxy.cut()
    line.send(2)
    line.until_all_arrived()


def test_the_last_message_is_sent_again_though_nothing_follows_it(line: Line) -> None:
    line.send(3)
    line.until_all_arrived()
    line.proxy.set(Mode.SWALLOW)
    line.send()
    line.proxy.cut()
    line.until_all_arrived()
    assert line.window.last == 4


def test_a_message_is_sent_again_while_the_sender_is_busy_elsewhere(line: Line) -> None:
    """The sender makes no call any more; its link's own thread mends."""
    line.send()
    line.until_all_arrived()
    line.proxy.set(Mode.SWALLOW)
    line.send(40, size=1 << 17)
    line.proxy.cut()
    line.until_all_arrived()


def test_a_connection_that_comes_back_within_the_grace_leaves_no_trace(line: Line) -> None:
    line.send()
    line.until_all_arrived()
    line.proxy.cut(Mode.REFUSE)
    line.send(5)
    before = line.proxy.connections
    line.until(lambda: line.proxy.connections > before)  # it tries
    line.proxy.set(Mode.FORWARD)
    line.until_all_arrived()


def test_connections_that_break_all_the_time_lose_nothing_and_keep_the_order(line: Line) -> None:
    chance = random.Random(7)
    for _ in range(150):
        line.send(chance.randint(1, 30), size=8 * chance.choice([1, 8, 2048, 20_000]))
        if chance.random() < 0.3:
            line.receive(0)
        if chance.random() < 0.1:
            line.proxy.cut()
    line.until_all_arrived()
    assert line.proxy.connections > 2


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.HOLD])
def test_a_connection_that_does_not_come_back_is_told_in_time(line: Line, mode: Mode) -> None:
    line.send()
    line.until_all_arrived()
    cut_at = time.monotonic()
    if mode is Mode.REFUSE:
        line.proxy.cut(mode)
    else:
        line.proxy.set(mode)
    line.send()
    line.until(lambda: line.told)
    assert line.told == [frozenset({(1, line.proxy.endpoint)})]
    assert time.monotonic() - cut_at < 4 * 2.0


def test_a_connection_that_stands_before_a_late_watcher_looks_is_no_loss(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time was up while the watcher waited; hands were shaken before it got a turn to say so."""
    waited, go, on = threading.Event(), threading.Event(), threading.Event()

    class LatePoller(zmq.Poller):
        def poll(self, timeout: int | None = None) -> list[tuple[Any, int]]:
            if go.is_set():
                on.set()
            ready: list[tuple[Any, int]] = super().poll(timeout)
            if not ready and threading.current_thread().name == "epmesh-links":
                waited.set()
                assert go.wait(PATIENCE_S)
            return ready

    monkeypatch.setattr(link_watcher, "CONNECT_GRACE_S", 0.2)
    monkeypatch.setattr(zmq, "Poller", LatePoller)
    line.proxy.set(Mode.HOLD)
    line.send()
    assert waited.wait(PATIENCE_S)
    line.proxy.set(Mode.FORWARD)
    line.until(lambda: line.arrived)
    go.set()
    assert on.wait(PATIENCE_S)  # it has said what it had to say
    line.until_all_arrived()


def test_messages_beyond_the_budget_are_told_as_lost(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "SendWindow", lambda: SendWindow[object](keep_bytes=400))
    line.send(2)
    line.until(lambda: len(line.arrived) == 2)
    line.proxy.set(Mode.SWALLOW)
    line.send(8, size=128)
    line.proxy.cut()
    line.until(lambda: line.inbox.lost_messages)
    assert line.inbox.lost_messages[0].startswith("messages 3 to ")
    assert line.receiver.inbox(GROUP + 1, EPOCH).lost_messages  # whatever group they were for
    line.until(lambda: 10 in line.arrived)
    assert line.arrived == sorted(set(line.arrived))


def test_a_hole_that_nobody_mends_is_told_as_lost(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "HOLE_PATIENCE_S", 0.2)
    line.send()
    line.until_all_arrived()
    line.window.number()  # a number is used, and no message has it
    line.window.keep([], 0)
    line.send()
    line.until(lambda: line.inbox.lost_messages)
    assert line.inbox.lost_messages == {0: "messages 2 to 2"}


def test_what_arrived_is_not_kept(line: Line) -> None:
    line.send(3 * REPORT_EVERY)
    line.until_all_arrived()

    def acknowledged() -> bool:
        line.send(READ_EVERY)  # a sender looks for receipts when it sends, and they are on their way for a while
        return line.window.acknowledged >= 3 * REPORT_EVERY

    line.until(acknowledged)
    line.until_all_arrived()
    assert line.window.first_kept == line.window.acknowledged + 1


def test_much_that_is_kept_is_let_go_without_another_send(line: Line) -> None:
    line.send(5, size=8 << 20)
    line.until_all_arrived()
    line.until(lambda: line.window.kept_bytes <= links._TEND_BYTES)  # the rest is let go with the next send


def test_receipts_cost_next_to_nothing(line: Line) -> None:
    line.send(10 * REPORT_EVERY, size=1024)
    line.until_all_arrived()
    assert line.receiver.receipt_bytes < 0.002 * line.sender.bytes_sent
    assert line.sender.bytes_sent < 1.2 * 1024 * line.sent


def test_a_sender_of_an_epoch_that_is_over_is_told_to_forget(line: Line) -> None:
    line.send()
    line.until_all_arrived()
    line.proxy.set(Mode.SWALLOW)
    line.send()
    line.receiver.forget_epochs_before(EPOCH + 1, [])
    line.proxy.cut()
    line.until(lambda: line.window.acknowledged == 2)
    assert line.arrived == [1]


def test_frames_that_play_a_link_badly_are_refused(line: Line) -> None:
    line.send()
    line.until_all_arrived()
    probe = frame_pb2.FrameHeader(mesh_id="mesh", kind=frame_pb2.FRAME_KIND_PROBE, source=9, incarnation=9, epoch=EPOCH)
    probe.link.last = probe.link.first_kept = (1 << 64) - 1
    other = frame_pb2.FrameHeader(mesh_id="other", kind=frame_pb2.FRAME_KIND_PROBE, epoch=EPOCH)
    receipt = frame_pb2.FrameHeader(mesh_id="mesh", kind=frame_pb2.FRAME_KIND_RECEIPT, epoch=EPOCH)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(line.receiver.endpoint)
        for header in (other, receipt, probe):
            stranger.send(header.SerializeToString())
        line.until(lambda: stranger.poll(0))
    assert line.receiver.refused == 2
    line.send(5)
    line.until(lambda: len(line.arrived) == 6)


def test_connections_of_one_name_that_break_end_no_process(line: Line) -> None:
    """libzmq starves the earlier one where names are taken over, and dies of its end at the next heartbeat."""
    line.send()
    line.until_all_arrived()
    with zmq.Context() as context:
        first, second = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
        for each in (first, second):
            each.routing_id, each.linger = b"one name", 0
            each.connect(line.receiver.endpoint)
            each.send(b"no frame")
            line.until(lambda: line.receiver.refused)
        line.receive(0.2)  # the second has taken the name over, were that allowed
        for _ in range(100):
            first.send(bytes(100_000))
        line.receive(0.2)
        first.close()
        second.close()
    for _ in range(4):
        line.receive(links.HEARTBEAT_MS / 1000)
    line.send(5)
    line.until_all_arrived()


def test_inboxes_have_their_budget_still(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inboxes, "MAX_INBOX_BYTES", 1000)
    inbox: Inbox = line.inbox
    line.send(3, size=512)
    line.until(lambda: inbox.lost_messages)
    assert "no room" in inbox.lost_messages[0]
