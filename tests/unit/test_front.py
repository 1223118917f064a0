"""A rank's front and its client, over loopback, in one process."""

from __future__ import annotations

import errno
import gc
import queue
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import zmq

from epmesh import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, NotReady, Overloaded, PeerLost
from epmesh.errors import StaleEpoch
from epmesh.frames import tensor_meta
from epmesh.front import FrontClient, FrontPeer, FrontReply
from epmesh.v1 import error_pb2, front_pb2
from epmesh_server.ranks.front import _REQUESTS_A_TURN, UNREAD_PART, Front, Incoming
from tests.processes import eventually

MESH, RANK, INCARNATION = "mesh-1", 3, 7

# An eighth of it may be unread answers: many times what a test has here, for a front hears late what was read.
BUDGET_BYTES = 100_000


@pytest.fixture
def front() -> Iterator[Front]:
    made = Front("127.0.0.1", budget_bytes=BUDGET_BYTES)
    made.identify(MESH, RANK, INCARNATION)
    yield made
    made.close()


@pytest.fixture
def client() -> Iterator[FrontClient]:
    made = FrontClient(MESH)
    yield made
    made.close()


def peer(front: Front, **changes: Any) -> FrontPeer:
    return FrontPeer(**{"rank": RANK, "incarnation": INCARNATION, "endpoint": front.endpoint, **changes})


def rows(*tensors: bytes) -> front_pb2.FrontRequest:
    request = front_pb2.FrontRequest(serve_rows=front_pb2.ServeRows(epoch=1))
    request.tensors.extend(tensor_meta("uint8", (len(tensor),)) for tensor in tensors)
    return request


def echo(incoming: Incoming) -> None:
    incoming.answer(front_pb2.FrontResponse(tensors=incoming.request.tensors), [bytes(t) for t in incoming.tensors])


def test_an_answer_brings_the_tensors_of_its_own_request(front: Front, client: FrontClient) -> None:
    front.handle(echo)
    futures = [client.call(peer(front), rows(b"a" * n, b""), [b"a" * n, b""], timeout_s=20) for n in range(1, 40)]
    for n, future in enumerate(futures, 1):
        assert [bytes(t) for t in future.result(20).tensors] == [b"a" * n, b""]
    assert front.open_requests == 0


def test_a_caller_hears_that_the_rank_is_done_with_what_was_given_up(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    told: queue.Queue[tuple[str, int]] = queue.Queue()

    def call(name: str, timeout_s: float = 5.0) -> Future[FrontReply]:
        return client.call(
            peer(front), rows(), timeout_s=timeout_s, on_answer=lambda answer: told.put((name, answer.error.code))
        )

    calls = {name: call(name, timeout_s) for name, timeout_s in (("waited", 5.0), ("cancelled", 5.0), ("late", 0.05))}
    taken = [waiting.get(timeout=5) for _ in calls]
    assert calls["cancelled"].cancel()
    with pytest.raises(DeadlineExceeded):
        calls["late"].result(5)
    assert eventually(lambda: taken[1].cancelled)
    assert told.empty()
    for incoming in reversed(taken):
        incoming.refuse(Overloaded(0.1)) if incoming is taken[2] else incoming.answer()
    assert [told.get(timeout=5) for _ in calls] == [
        ("late", error_pb2.ERROR_CODE_OVERLOADED),
        ("cancelled", 0),
        ("waited", 0),
    ]
    calls["waited"].result(5)


def test_a_request_that_never_left_counts_as_answered_and_one_whose_connection_broke_does_not(front: Front) -> None:
    told: list[int] = []
    front.handle(lambda _: None)
    client = FrontClient(MESH)
    nowhere = peer(front, endpoint="nowhere")
    with pytest.raises(InvalidRequest):
        client.call(nowhere, rows(), timeout_s=5, on_answer=lambda _: told.append(1)).result(5)
    assert told == [1]
    left = client.call(peer(front), rows(), timeout_s=5, on_answer=lambda _: told.append(2))
    assert eventually(lambda: front.open_requests == 1)
    client.close()
    assert isinstance(left.exception(5), MeshUnavailable)
    assert told == [1]


def test_answers_may_come_from_any_thread_and_in_any_order(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    futures = [client.call(peer(front), rows(bytes([n])), [bytes([n])], timeout_s=20) for n in range(20)]
    taken = [waiting.get(timeout=20) for _ in futures]
    threads = [threading.Thread(target=echo, args=(incoming,)) for incoming in reversed(taken)]
    for thread in threads:
        thread.start()
    assert [bytes(future.result(20).tensors[0]) for future in futures] == [bytes([n]) for n in range(20)]
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("ending", ["answer", "error", "cancel"])
def test_a_request_that_ended_is_let_go_at_once(front: Front, client: FrontClient, ending: str) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    gc.disable()
    try:
        future = client.call(peer(front), rows(b"a" * 500), [b"a" * 500], timeout_s=20)
        incoming = waiting.get(timeout=20)
        if ending == "cancel":
            future.cancel()
        incoming.answer(front_pb2.FrontResponse()) if ending != "error" else incoming.refuse(NotReady("no"))
        if ending != "cancel":
            future.exception(20)
        ended = weakref.ref(future)
        del future
        client.call(peer(front), rows(), timeout_s=20)  # the thread has gone on when this one is there
        waiting.get(timeout=20)
        assert eventually(lambda: ended() is None)
    finally:
        gc.enable()


def test_what_its_callbacks_know_of_a_request_is_let_go_with_its_answer(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    gc.disable()
    try:
        future = client.call(peer(front), rows(), timeout_s=5)
        incoming = waiting.get(timeout=5)
        for callback in (incoming.give_up, incoming.refuse):
            incoming.on_cancel(callback)  # type: ignore[arg-type]
        incoming.answer()
        incoming.on_cancel(incoming.give_up)
        future.result(5)
        ended = weakref.ref(incoming)
        del incoming, callback
        client.call(peer(front), rows(), timeout_s=5)  # the front's thread has gone on when this one is there
        waiting.get(timeout=5)
        assert eventually(lambda: ended() is None)
    finally:
        gc.enable()


def test_what_a_handler_refuses_goes_before_answers_that_wait(front: Front) -> None:
    taken: list[Incoming] = []

    def handle(incoming: Incoming) -> None:
        taken.append(incoming)
        if len(taken) == 2:
            taken[0].answer()  # it is queued, for this thread is busy
            raise Overloaded(0.25, "enough")

    front.handle(handle)
    with zmq.Context[zmq.Socket[bytes]]() as context, context.socket(zmq.DEALER) as asker:
        asker.setsockopt(zmq.LINGER, 0)
        asker.setsockopt(zmq.RCVTIMEO, 10_000)
        asker.connect(front.endpoint)
        for number in (1, 2):
            request = rows()
            request.mesh_id, request.rank, request.incarnation = MESH, RANK, INCARNATION
            request.request_id, request.deadline_ms = number, 60_000
            asker.send(request.SerializeToString())
        came = [front_pb2.FrontResponse.FromString(asker.recv()) for _ in range(2)]
    assert [(each.request_id, each.HasField("error")) for each in came] == [(2, True), (1, False)]
    assert came[0].error.retry_after_s == 0.25
    assert front.open_requests == 0


def test_an_answer_is_let_go_while_an_earlier_request_still_waits(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    late = client.call(peer(front), rows(b"late"), [b"late"], timeout_s=20)
    waiting.get(timeout=20)
    front.handle(echo)
    gc.disable()
    try:
        future = client.call(peer(front), rows(b"a" * 500), [b"a" * 500], timeout_s=20)
        future.result(20)
        ended = weakref.ref(future)
        del future
        client.call(peer(front), rows(), timeout_s=20).result(20)  # the thread has gone on when this one is there
        assert eventually(lambda: ended() is None)
        assert not late.done()
    finally:
        gc.enable()


def test_one_client_reaches_more_ranks_than_zeromq_allows_sockets_by_default(client: FrontClient) -> None:
    assert client._core._context.get(zmq.MAX_SOCKETS) > 3 * 1024


def test_a_connection_that_cannot_be_opened_fails_its_request_and_no_other(
    front: Front, client: FrontClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any) -> Any:
        raise zmq.ZMQError(errno.EMFILE)

    front.handle(echo)
    client.call(peer(front), rows(), timeout_s=20).result(20)
    with monkeypatch.context() as patched:
        patched.setattr(client._core._context, "socket", none_left)
        with pytest.raises(MeshUnavailable, match="ulimit"):
            client.call(peer(front, rank=RANK + 1), rows(), timeout_s=20).result(20)
        client.call(peer(front), rows(), timeout_s=20).result(20)
    with pytest.raises(StaleEpoch):  # it is reached, and is another rank
        client.call(peer(front, rank=RANK + 1), rows(), timeout_s=20).result(20)


def test_answers_leave_while_requests_go_on_coming(
    front: Front, client: FrontClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    count = 3 * _REQUESTS_A_TURN
    send = front._send

    def sent(sender: bytes, frames: list[Any]) -> list[zmq.Frame]:
        events.append("out")
        return send(sender, frames)

    def handle(incoming: Incoming) -> None:
        events.append("in")
        echo(incoming)
        if events.count("in") < count:
            assert front._router.poll(20_000)  # on the front's own thread: it never finds its socket empty

    monkeypatch.setattr(front, "_send", sent)
    front.handle(handle)
    futures = [client.call(peer(front), rows(), timeout_s=20) for _ in range(count)]
    for future in futures:
        future.result(20)
    assert [len(run) for run in "".join(event[0] for event in events).split("o") if run] == [_REQUESTS_A_TURN] * 3


def test_errors_come_back_typed_whoever_raises_them(front: Front, client: FrontClient) -> None:
    front.handle(lambda incoming: incoming.refuse(PeerLost([5], 9)))
    with pytest.raises(PeerLost) as lost:
        client.call(peer(front), rows(), timeout_s=20).result(20)
    assert (lost.value.rank, lost.value.epoch) == (5, 9)

    def refuse(_: Incoming) -> None:
        raise NotReady("not yet")

    front.handle(refuse)
    with pytest.raises(NotReady, match="not yet"):
        client.call(peer(front), rows(), timeout_s=20).result(20)
    front.handle(lambda _: dict[str, None]()["nothing"])
    with pytest.raises(EpmeshError, match="KeyError"):
        client.call(peer(front), rows(), timeout_s=20).result(20)


def test_what_is_meant_for_somebody_else_or_says_no_deadline_is_refused(front: Front, client: FrontClient) -> None:
    front.handle(echo)
    for changes in ({"rank": 4}, {"incarnation": 8}):
        with pytest.raises(StaleEpoch, match="rank 3 of mesh 'mesh-1', incarnation 7"):
            client.call(peer(front, **changes), rows(), timeout_s=20).result(20)
    stranger = FrontClient("mesh-2")
    with pytest.raises(StaleEpoch, match="mesh-2"):
        stranger.call(peer(front), rows(), timeout_s=20).result(20)
    stranger.close()
    for timeout_s in (0, -1.0, float("nan"), 1e9):
        with pytest.raises(InvalidRequest, match="timeout_s"):
            client.call(peer(front), rows(), timeout_s=timeout_s)


def test_a_front_without_a_rank_takes_nothing_yet(client: FrontClient) -> None:
    nobody = Front("127.0.0.1", on_request=echo)
    with pytest.raises(NotReady):
        client.call(peer(nobody), rows(), timeout_s=20).result(20)
    nobody.close()


def test_requests_beyond_the_budget_are_overload_at_once_and_room_comes_back(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    first = client.call(peer(front), rows(b"x" * 80_000), [b"x" * 80_000], timeout_s=20)
    taken = waiting.get(timeout=20)
    with pytest.raises(Overloaded) as full:
        client.call(peer(front), rows(b"x" * 30_000), [b"x" * 30_000], timeout_s=20).result(20)
    assert full.value.retry_after_s > 0
    taken.answer()
    first.result(20)
    front.handle(lambda incoming: incoming.answer())
    client.call(peer(front), rows(b"x" * 30_000), [b"x" * 30_000], timeout_s=20).result(20)


def test_frames_must_be_what_the_header_says(front: Front, client: FrontClient) -> None:
    front.handle(echo)
    with pytest.raises(InvalidRequest, match="describes 1 frames; 0 came"):
        client.call(peer(front), rows(b"abc"), timeout_s=20).result(20)
    with pytest.raises(InvalidRequest, match="3 bytes; 2 came"):
        client.call(peer(front), rows(b"abc"), [b"ab"], timeout_s=20).result(20)
    request = rows(b"abc")
    request.places.extend([0, 0])
    with pytest.raises(InvalidRequest, match="2 places for 1 tensors"):
        client.call(peer(front), request, timeout_s=20).result(20)
    assert front.open_requests == 0


def test_a_tensor_in_shared_memory_has_no_frame(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    request = rows(b"abc", b"de")
    request.places.extend([4096, -1])
    future = client.call(peer(front), request, [b"de"], timeout_s=20)
    taken = waiting.get(timeout=20)
    assert [bytes(tensor) for tensor in taken.tensors] == [b"de"]
    taken.answer()
    assert future.result(20).tensors == ()


def test_garbage_on_the_socket_harms_nobody(front: Front, client: FrontClient) -> None:
    front.handle(echo)
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(front.endpoint)
    for frames in ([b"\xff" * 50], [b""], [b"\x00" * (1 << 19)], [b"x"] * 80):
        stranger.send_multipart(frames)
    stranger.poll(200)
    (answer,) = client.call(peer(front), rows(b"ab"), [b"ab"], timeout_s=20).result(20).tensors
    assert bytes(answer) == b"ab"
    stranger.close()
    context.term()


def test_a_second_request_under_an_open_number_is_refused_and_the_first_goes_on(front: Front) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    context = zmq.Context()
    sender = context.socket(zmq.DEALER)
    sender.linger = 0
    sender.connect(front.endpoint)
    request = rows()
    request.mesh_id, request.rank, request.incarnation, request.request_id = MESH, RANK, INCARNATION, 1
    request.deadline_ms = 20_000
    for _ in range(2):
        sender.send(request.SerializeToString())
    refusal = front_pb2.FrontResponse.FromString(sender.recv())
    assert "open already" in refusal.error.message
    waiting.get(timeout=20).answer(front_pb2.FrontResponse(tensors=[tensor_meta("uint8", (0,))]), [b""])
    assert not front_pb2.FrontResponse.FromString(sender.recv_multipart()[0]).HasField("error")
    sender.close()
    context.term()


def test_cancelling_reaches_the_rank(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    future = client.call(peer(front), rows(), timeout_s=30)
    taken = waiting.get(timeout=20)
    told = threading.Event()
    taken.on_cancel(told.set)
    before = taken.cancelled
    assert future.cancel()
    assert told.wait(20)
    assert (before, taken.cancelled) == (False, True)
    late = threading.Event()
    taken.on_cancel(late.set)
    assert late.is_set()
    taken.answer()
    assert front.open_requests == 0


def test_a_late_answer_is_a_deadline_and_the_rank_is_told(front: Front, client: FrontClient) -> None:
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    future = client.call(peer(front), rows(), timeout_s=0.1)
    taken = waiting.get(timeout=20)
    told = threading.Event()
    taken.on_cancel(told.set)
    with pytest.raises(DeadlineExceeded) as late:
        future.result(20)
    assert late.value.rank == RANK
    assert told.wait(20)


def test_a_front_that_ends_fails_what_is_open_at_once(client: FrontClient) -> None:
    front = Front("127.0.0.1")
    front.identify(MESH, RANK, INCARNATION)
    waiting: queue.Queue[Incoming] = queue.Queue()
    front.handle(waiting.put)
    future = client.call(peer(front), rows(), timeout_s=30)
    waiting.get(timeout=20)
    front.close()
    with pytest.raises((MeshUnavailable, PeerLost)):
        future.result(20)
    with pytest.raises(PeerLost) as lost:
        client.call(peer(front), rows(), timeout_s=30).result(20)
    assert lost.value.ranks == (RANK,)


def test_nobody_at_the_endpoint_is_a_loss_and_not_a_wait(client: FrontClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and shakes no hands
        endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(PeerLost, match="rank 1 cannot be reached"):
            client.call(FrontPeer(1, 1, endpoint), rows(), timeout_s=30).result(10)
        assert time.monotonic() - started < 8
    with pytest.raises(InvalidRequest, match="no address"):
        client.call(FrontPeer(1, 1, "nonsense"), rows(), timeout_s=20).result(20)


def test_a_closed_client_fails_what_it_had_and_takes_nothing_more(front: Front) -> None:
    front.handle(lambda _: None)
    client = FrontClient(MESH)
    future = client.call(peer(front), rows(), timeout_s=30)
    client.close()
    client.close()
    with pytest.raises(MeshUnavailable, match="closed"):
        future.result(20)
    with pytest.raises(MeshUnavailable, match="closed"):
        client.call(peer(front), rows(), timeout_s=20)


def test_nothing_is_left_of_a_client_or_of_one_that_is_forgotten(front: Front) -> None:
    front.handle(echo)

    def use(close: bool) -> None:
        client = FrontClient(MESH)
        client.call(peer(front), rows(b"a"), [b"a"], timeout_s=20).result(20)
        if close:
            client.close()

    use(True)
    gc.collect()
    before = descriptors(), threading.active_count()
    for close in (True, False) * 3:
        use(close)
        gc.collect()
    # The front's I/O thread closes its sides of the connections when it hears of their ends.
    assert eventually(lambda: descriptors() <= before[0])
    assert threading.active_count() == before[1]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Deaf:
    """A client that asks and never reads an answer."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 1)
        self._socket.setsockopt(zmq.RCVBUF, 4096)
        self._socket.connect(front.endpoint)
        self._number = 0

    def ask(self) -> None:
        self._number += 1
        request = rows(b"")
        request.mesh_id, request.rank, request.incarnation = MESH, RANK, INCARNATION
        request.request_id, request.deadline_ms = self._number, 60_000
        self._socket.send_multipart([request.SerializeToString(), b""])

    def close(self) -> None:
        self._context.destroy(0)


@pytest.fixture
def long_answers() -> Iterator[Front]:
    """A front with a budget of 512 MiB, whose answers have one."""
    made = Front("127.0.0.1", budget_bytes=512 << 20)
    made.identify(MESH, RANK, INCARNATION)
    answer = bytes(1 << 20)
    meta = tensor_meta("uint8", (len(answer),))
    made.handle(lambda incoming: incoming.answer(front_pb2.FrontResponse(tensors=[meta]), [answer]))
    yield made
    made.close()


def test_answers_that_nobody_reads_count_until_their_client_is_refused_and_others_go_on(
    long_answers: Front, client: FrontClient
) -> None:
    deaf = Deaf(long_answers)
    try:
        while not long_answers.refused:
            deaf.ask()
        most = (512 // UNREAD_PART + _REQUESTS_A_TURN + 1) << 20  # what was taken in at once is answered, too
        assert long_answers.open_bytes <= most
        for _ in range(50):
            deaf.ask()
            assert len(client.call(peer(long_answers), rows(b""), [b""], timeout_s=20).result(20).tensors[0]) == 1 << 20
        assert eventually(lambda: long_answers.open_bytes <= most)
    finally:
        deaf.close()
    assert eventually(lambda: long_answers.open_bytes == 0)


def test_whoever_reads_nothing_is_cut_off_and_what_was_kept_for_him_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("epmesh_server.ranks.front.UNREAD_S", 1.0)
    front = Front("127.0.0.1", budget_bytes=64 << 20)
    front.identify(MESH, RANK, INCARNATION)
    answer = bytes(1 << 20)
    front.handle(lambda incoming: incoming.answer(front_pb2.FrontResponse(), [answer]))
    deaf = Deaf(front)
    try:
        while not front.refused:
            deaf.ask()
        assert eventually(lambda: front.open_bytes == 0)
    finally:
        deaf.close()
        front.close()


def test_small_answers_that_nobody_reads_are_dropped_beyond_a_number(long_answers: Front, client: FrontClient) -> None:
    front = long_answers
    front.handle(lambda incoming: incoming.answer(front_pb2.FrontResponse(), [bytes(8000)]))
    deaf = Deaf(front)
    try:
        while not front.unread:
            deaf.ask()
        front.handle(echo)
        client.call(peer(front), rows(b"a"), [b"a"], timeout_s=20).result(20)
    finally:
        deaf.close()
