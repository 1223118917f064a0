"""A member of a group: when a call may begin, and what ends a wait. The node service is played by the test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from epmesh.errors import DeadlineExceeded, EpmeshError, MeshUnavailable, PeerLost, StaleEpoch
from epmesh.frames import Message
from epmesh.v1 import frame_pb2
from epmesh.view import GroupInfo, NodeInfo, RankInfo, RankMode, View
from epmesh_server.ranks import member
from epmesh_server.ranks.inbox import Inbox
from epmesh_server.ranks.links import LinkHub
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.session import RankSession
from epmesh_server.shared_memory import ControlPage

EP = 1


def make_view(epoch: int, *ranks: int, membership_epoch: int = 0, sequence: int = 0, incarnation: int = 1) -> View:
    infos = tuple(RankInfo(rank, incarnation, "cpu", RankMode.EXCHANGE, f"tcp://h:{rank}") for rank in ranks)
    nodes = (NodeInfo(0, "n", 1, "", infos),)
    return View("m", epoch, membership_epoch or epoch, 8, nodes, (GroupInfo("ep", EP, ranks, ranks, sequence),))


class Rig:
    """One member, rank 0 of ranks 0 to 2 in epoch 1, on a real control page. `meanwhile` runs at every sleep."""

    def __init__(self) -> None:
        self.fd = ControlPage.create()
        self.node = ControlPage(self.fd)
        self.meanwhile: list[Callable[[], None]] = []
        self.sent: list[tuple[int, frame_pb2.FrameHeader]] = []
        self.view = make_view(1, 0, 1, 2)
        self.node.raise_fence(1)
        self.node.commit(1)
        self.inbox = Inbox()
        self.session = SimpleNamespace(
            page=ControlPage(self.fd), view=self.view, error=None, rank=0, wake_fd=-1, calm=lambda: False
        )
        self.session.report_unreachable = lambda peers: None
        self.hub = SimpleNamespace(
            rank=0, unreachable=frozenset(), inbox=lambda *_: self.inbox, wait=self._wait, send=self._send
        )
        session, hub = cast("RankSession", self.session), cast("LinkHub", self.hub)
        self.member = GroupMember(session, hub, self.view, self.view.group("ep"), 0.2)
        cast("Any", self.member).__dict__["buffers"] = SimpleNamespace(wake_fd=-1, calm=lambda: None)

    def _wait(self, inbox: Inbox, fds: object, timeout_s: float) -> None:
        if self.meanwhile:
            self.meanwhile.pop(0)()
        else:
            time.sleep(min(timeout_s, 0.01))

    def _send(self, rank: int, endpoint: str, header: frame_pb2.FrameHeader, tensors: object = ()) -> int:
        self.sent.append((rank, header))
        return 0

    def commit(self, view: View) -> None:
        """What a node service does at a commit."""
        self.node.set_lost(())
        self.node.commit(view.epoch)
        self.session.view = view

    def wait(self, sequence: int = 0, late: tuple[int, ...] = (1,), timeout_s: float = 20.0) -> None:
        """Waits for what never comes."""
        self.member.wait_until(lambda: False, sequence, time.monotonic() + timeout_s, lambda: late)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    os.close(made.fd)


def test_calls_are_numbered_one_after_the_other_and_shown_to_the_node_service(rig: Rig) -> None:
    assert [rig.member.begin(), rig.member.begin()] == [1, 2]
    assert rig.node.progress()[0].begun == 2
    rig.member.complete(1)
    assert rig.node.progress()[0].completed == 1


def test_completed_never_passes_an_open_exchange(rig: Rig) -> None:
    first, second, third = rig.member.begin(), rig.member.begin(), rig.member.begin()
    rig.member.complete(second)
    assert rig.node.progress()[0].completed == 0
    rig.member.complete(first)
    assert rig.node.progress()[0].completed == 2
    rig.member.complete(third)
    assert rig.node.progress()[0].completed == 3


def test_a_call_up_to_the_cut_goes_on_in_the_old_epoch(rig: Rig) -> None:
    rig.node.raise_fence(2)
    rig.meanwhile = [lambda: rig.node.publish_cuts(2, {EP: 1})]
    assert rig.member.begin() == 1
    assert rig.member.view.epoch == 1


def test_a_call_past_the_cut_waits_and_adopts_a_view_with_the_same_ranks(rig: Rig) -> None:
    rig.node.raise_fence(2)
    seen: list[int] = []
    rig.meanwhile = [
        lambda: rig.node.publish_cuts(2, {EP: 0}),
        lambda: seen.append(rig.node.progress()[0].begun),
        lambda: rig.commit(make_view(2, 0, 1, 2, membership_epoch=1)),
    ]
    assert rig.member.begin() == 1
    assert rig.member.view.epoch == 2
    assert seen == [0], "a call that waits past the cut is not begun"


def test_a_call_past_the_cut_is_stale_where_ranks_were_added(rig: Rig) -> None:
    rig.node.raise_fence(2)
    rig.meanwhile = [lambda: rig.commit(make_view(2, 0, 1, 2, 3))]
    with pytest.raises(StaleEpoch) as caught:
        rig.member.begin()
    assert caught.value.epoch == 2
    assert rig.node.progress()[0].begun == 0


def test_a_fence_that_comes_to_nothing_gives_way_to_the_next(rig: Rig) -> None:
    rig.node.raise_fence(2)
    rig.meanwhile = [
        lambda: rig.node.publish_cuts(2, {EP: 0}),
        lambda: rig.node.raise_fence(3),
        lambda: rig.commit(make_view(3, 0, 1, 2, membership_epoch=1)),
    ]
    assert rig.member.begin() == 1
    assert rig.member.view.epoch == 3


def test_a_call_that_stands_still_past_the_cut_holds_no_commit_up(rig: Rig) -> None:
    rig.member.begin()
    rig.node.raise_fence(2)
    seen: list[int] = []
    rig.meanwhile = [
        lambda: rig.node.publish_cuts(2, {EP: 1}),
        lambda: seen.append(rig.node.blocked),
        lambda: rig.commit(make_view(2, 0, 1, 2, 3)),
    ]
    with pytest.raises(StaleEpoch):
        rig.member.begin()
    assert seen == [2]


def test_a_commit_that_never_comes_ends_in_a_typed_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "_COMMIT_S", 0.1)
    rig.node.raise_fence(2)
    with pytest.raises(MeshUnavailable, match=r"no commit of epoch 2 within 0\.3 s"):
        rig.member.begin()


def test_a_lost_member_ends_a_wait_by_name(rig: Rig) -> None:
    rig.meanwhile = [lambda: rig.node.set_lost([2, 9])]
    with pytest.raises(PeerLost) as caught:
        rig.wait()
    assert (caught.value.ranks, caught.value.epoch) == ((2,), 1)


def test_a_lost_rank_of_another_group_ends_nothing(rig: Rig) -> None:
    rig.node.set_lost([9])
    rig.member.check(0)


def test_a_peer_that_links_cannot_reach_is_lost(rig: Rig) -> None:
    rig.hub.unreachable = frozenset({(1, "tcp://h:1"), (2, "tcp://old:2")})
    with pytest.raises(PeerLost) as caught:
        rig.member.check(0)
    assert caught.value.ranks == (1,)


def test_members_that_a_new_view_lacks_are_lost(rig: Rig) -> None:
    rig.meanwhile = [lambda: rig.commit(make_view(2, 0, 2))]
    with pytest.raises(PeerLost) as caught:
        rig.wait()
    assert caught.value.ranks == (1,)


def test_a_member_that_started_again_is_lost_too(rig: Rig) -> None:
    view = make_view(2, 0, 1, 2)
    again = RankInfo(1, 99, "cpu", RankMode.EXCHANGE, "tcp://h:1")
    ranks = tuple(again if info.rank == 1 else info for info in view.nodes[0].ranks)
    rig.session.view = View("m", 2, 2, 8, (NodeInfo(0, "n", 1, "", ranks),), view.groups)
    with pytest.raises(PeerLost) as caught:
        rig.member.check(0)
    assert caught.value.ranks == (1,)


def test_a_rank_that_a_view_leaves_out_must_join_again(rig: Rig) -> None:
    rig.session.view = make_view(2, 1, 2)
    with pytest.raises(MeshUnavailable, match="rank 0 was removed by epoch 2; join again"):
        rig.member.check(0)


def test_a_closed_page_ends_everything(rig: Rig) -> None:
    rig.node.mark_closed()
    with pytest.raises(MeshUnavailable, match="join again"):
        rig.member.begin()


def test_the_deadline_names_the_late_rank_and_tells_the_others(rig: Rig) -> None:
    sequence = rig.member.begin()
    with pytest.raises(DeadlineExceeded) as caught:
        rig.wait(sequence, late=(2, 1), timeout_s=0.05)
    assert (caught.value.rank, caught.value.sequence) == (1, 1)
    assert sorted(rank for rank, _ in rig.sent) == [1, 2]
    assert {header.kind for _, header in rig.sent} == {frame_pb2.FRAME_KIND_ABANDON}
    assert rig.member.abandoned == 1


def test_an_exchange_that_a_member_gave_up_is_given_up_here_with_its_error(rig: Rig) -> None:
    sequence = rig.member.begin()
    header = frame_pb2.FrameHeader(kind=frame_pb2.FRAME_KIND_ABANDON, sequence=sequence, source=2)
    header.error.CopyFrom(DeadlineExceeded(1, sequence).to_proto())

    def tell() -> None:
        rig.inbox.put(Message(header, ()))

    rig.meanwhile = [tell]
    with pytest.raises(DeadlineExceeded) as caught:
        rig.wait(sequence)
    assert caught.value.rank == 1
    assert rig.sent == [], "who was told does not tell again"
    rig.member.complete(sequence)
    rig.member.check(rig.member.begin())


def test_lost_messages_are_a_lost_peer(rig: Rig) -> None:
    rig.inbox.lost_messages[2] = "messages 4 to 5"
    with pytest.raises(PeerLost, match="the link from rank 2 lost messages 4 to 5"):
        rig.member.check(0)


def test_a_message_of_a_members_old_self_is_dropped(rig: Rig) -> None:
    for incarnation, expected in ((77, False), (1, True)):
        header = frame_pb2.FrameHeader(
            kind=frame_pb2.FRAME_KIND_COLLECTIVE, sequence=1, source=2, incarnation=incarnation
        )
        rig.inbox.put(Message(header, ()))
        assert (rig.member.take(frame_pb2.FRAME_KIND_COLLECTIVE, 1, 2) is not None) == expected


def test_an_ended_session_ends_a_wait_with_its_reason(rig: Rig) -> None:
    def end() -> None:
        rig.session.error = MeshUnavailable("the node service is gone")

    rig.meanwhile = [end]
    with pytest.raises(EpmeshError, match="the node service is gone"):
        rig.wait()


def test_a_rank_that_missed_calls_goes_on_where_the_others_are(rig: Rig) -> None:
    for sequence in (1, 2):
        header = frame_pb2.FrameHeader(kind=frame_pb2.FRAME_KIND_ABANDON, sequence=sequence, source=2)
        rig.inbox.put(Message(header, ()))
    rig.member.resynchronise()
    assert rig.node.progress()[0].completed == 2
    assert rig.member.begin() == 3


def test_a_view_with_a_member_that_another_lost_is_not_believed_at_once(rig: Rig) -> None:
    sequence = rig.member.begin()
    header = frame_pb2.FrameHeader(kind=frame_pb2.FRAME_KIND_ABANDON, sequence=sequence, source=2)
    header.error.CopyFrom(PeerLost([1], 1).to_proto())
    rig.inbox.put(Message(header, ()))
    assert rig.member.usable(rig.view)
    with pytest.raises(PeerLost):
        rig.member.check(sequence)
    assert not rig.member.usable(rig.view)
    assert rig.member.usable(make_view(2, 0, 2))
