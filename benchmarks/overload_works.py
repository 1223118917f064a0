"""What the processes of `benchmarks.overload` do: ranks whose experts take a known time, and who asks them.

A `Sender` is one thread that writes requests made beforehand straight to the ranks' fronts, so that next to nothing of
what it measures is its own. A witness is an ordinary `AsyncRouter`: what it measures is what a user sees.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zmq

import epmesh
from epmesh import AsyncRouter, Communicator, EpmeshError, Overloaded
from epmesh.forward import NodeCall, Tokens
from epmesh.frames import Buffer
from epmesh.front import configure_front_socket
from epmesh.router_core import make_tokens
from epmesh.routes import Routes
from epmesh.row_transport import call_parts, front_request
from epmesh.v1 import error_pb2, front_pb2
from epmesh.view import View

EXPERTS_PER_RANK = 4
TOP_K = 2
Input = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]
_MADE = 64  # requests that are made beforehand, with ids of their own
_IDLE_MS = 5


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the mesh can do, and what one process asks of it.

    Attributes:
        rows, hidden: of one request.
        num_experts: of the mesh.
        batch_rows, batch_s: most rows of one call of the experts, and how long it takes.
        timeout_s: deadline of a request.
        rate: requests a second that are offered, whatever becomes of them; 0: as many as there are answers.
        callers: requests under way at once where the rate is 0.
        transport: of a witness.
        begin_at: ``time.monotonic()`` at which all begin; it is one clock for all processes of a machine.
        warm_s, seconds: how long it lasts; requests of the first seconds do not count.
    """

    rows: int = 8
    hidden: int = 1024
    num_experts: int = EXPERTS_PER_RANK
    batch_rows: int = 32
    batch_s: float = 0.04
    timeout_s: float = 1.0
    rate: float = 0.0
    callers: int = 12
    transport: str = "zmq"
    begin_at: float = 0.0
    warm_s: float = 1.5
    seconds: float = 4.0
    seed: int = 1


@dataclass
class Answers:
    """What one process got, of what it offered after the warm-up; seconds.

    Attributes:
        offered, failed: requests; those that failed otherwise than by a refusal, by the error's name.
        done_at: when each answer came, of whichever request, on the clock that `Load.begin_at` is of.
        done_s: of each request that was answered, how long it took, from when it was sent.
        refused_s: of each refusal, how long it took, from when the request was sent.
        hints_s: the hints.
        late_s: of each request, by how much it was sent after it was due.
        turn_s: how long the process was at work before it could look again at what had come: an answer may have waited
            for so long, and its time says so.
        cpu_s: of the process.
    """

    offered: int = 0
    done_at: list[float] = field(default_factory=list)
    done_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    hints_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    turn_s: list[float] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0

    def fail(self, name: str) -> None:
        """One more request failed, in another way."""
        self.failed[name] = self.failed.get(name, 0) + 1


class FileStop:
    """Set once a file is there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def is_set(self) -> bool:
        """Whether it is there."""
        return self._path.exists()


def serve(comm: Communicator, folder: Path, load: Load) -> None:
    """Serves until ``stop`` is in the folder; each call of the experts sleeps, so that only a rank's time is short."""
    (folder / f"rank-{comm.global_rank}.pid").write_text(str(os.getpid()))

    def experts(_: int | None, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        time.sleep(load.batch_s)
        return hidden * (weights * (ids >= 0)).sum(1, keepdim=True)

    comm.serve(experts, stop=FileStop(folder / "stop"), max_batch_rows=load.batch_rows)


def due_times(load: Load) -> Iterator[float]:
    """When requests are due, from the beginning: at random, at the rate."""
    dice = np.random.default_rng(load.seed)
    due = 0.0
    while due < load.warm_s + load.seconds:
        yield due
        due += float(dice.exponential(1 / load.rate))


def some_input(load: Load, dice: np.random.Generator) -> Input:
    """The input of one request."""
    hidden = dice.standard_normal((load.rows, load.hidden), dtype=np.float32)
    weights = np.full((load.rows, TOP_K), 1 / TOP_K, np.float32)
    return hidden, weights, dice.integers(0, load.num_experts, (load.rows, TOP_K))


# Senders -----------------------------------------------------------------------------------------------------------


def send(addresses: list[str], load: Load) -> Answers:
    """One sender, in a process of its own."""
    with ExitStack() as stack:
        view = stack.enter_context(epmesh.connect(addresses)).view
        context = stack.enter_context(zmq.Context())
        sender = Sender(view, load, context)
        stack.callback(sender.close)
        return sender.run()


@dataclass(frozen=True)
class _Part:
    """What one rank gets of a request; the header without number and deadline."""

    entry: int
    header: front_pb2.FrontRequest
    frames: list[Buffer]


@dataclass(eq=False)
class _Sent:
    """A request under way."""

    number: int
    sent_at: float
    counts: bool
    waiting: int


class Sender:
    """One thread that writes requests to fronts on a schedule, or as soon as earlier ones are answered."""

    def __init__(self, view: View, load: Load, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._load = load
        self._answers = Answers()
        self._sockets: dict[int, zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        for rank, info in view.ranks.items():
            socket = self._sockets[rank] = context.socket(zmq.DEALER)
            configure_front_socket(socket)
            socket.connect(info.front_endpoint)
            self._poller.register(socket, zmq.POLLIN)
        dice, routes = np.random.default_rng(load.seed), Routes(view)
        self._made = [_parts(view, routes, make_tokens(*some_input(load, dice), None), turn) for turn in range(_MADE)]
        self._under_way: dict[int, _Sent] = {}
        self._by_deadline: deque[_Sent] = deque()
        self._next_number = 1
        self._due = due_times(load) if load.rate else iter(())
        self._next_due = next(self._due, None)

    def close(self) -> None:
        """Closes the sockets."""
        for socket in self._sockets.values():
            socket.close(0)

    def run(self) -> Answers:
        """Everything, until the last answer or deadline."""
        load, answers = self._load, self._answers
        time.sleep(max(0.0, load.begin_at - time.monotonic()))
        woken_at, cpu_s = time.monotonic(), time.process_time()
        while woken_at < load.begin_at + load.warm_s + load.seconds or self._under_way:
            self._expire(woken_at)
            while (due := self._take_due(now := time.monotonic())) is not None:
                self._send(due, now)
            answers.turn_s.append(now - woken_at)
            ready = self._poller.poll(self._wait_ms(now))
            woken_at = time.monotonic()
            for socket, _ in ready:
                self._receive(socket)
        answers.cpu_s = time.process_time() - cpu_s
        return answers

    def _take_due(self, now: float) -> float | None:
        """When the next request was due that is to be sent now."""
        load, at = self._load, now - self._load.begin_at
        if not load.rate:
            return at if len(self._under_way) < load.callers and at < load.warm_s + load.seconds else None
        due = self._next_due
        if due is None or due > at:
            return None
        self._next_due = next(self._due, None)
        return due

    def _wait_ms(self, now: float) -> int:
        if self._next_due is None:
            return _IDLE_MS
        return min(_IDLE_MS, max(0, math.ceil((self._load.begin_at + self._next_due - now) * 1000)))

    def _send(self, due: float, now: float) -> None:
        load, number = self._load, self._next_number
        self._next_number += 1
        parts = self._made[number % _MADE]
        sent = _Sent(number, now, due >= load.warm_s, len(parts))
        for part in parts:
            part.header.request_id, part.header.deadline_ms = number, int(load.timeout_s * 1000)
            self._sockets[part.entry].send_multipart([part.header.SerializeToString(), *part.frames], copy=False)
        self._under_way[number] = sent
        self._by_deadline.append(sent)
        if sent.counts:
            self._answers.offered += 1
            self._answers.late_s.append(now - load.begin_at - due)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(front_pb2.FrontResponse.FromString(frames[0]), time.monotonic())

    def _take(self, response: front_pb2.FrontResponse, now: float) -> None:
        sent, answers = self._under_way.get(response.request_id), self._answers
        if sent is None:
            return
        if not response.HasField("error"):
            sent.waiting -= 1
            if not sent.waiting:
                del self._under_way[sent.number]
                answers.done_at.append(now)
                if sent.counts:
                    answers.done_s.append(now - sent.sent_at)
            return
        del self._under_way[sent.number]
        if not sent.counts:
            return
        if response.error.code == error_pb2.ERROR_CODE_OVERLOADED:
            answers.refused_s.append(now - sent.sent_at)
            answers.hints_s.append(response.error.retry_after_s)
        else:
            answers.fail(error_pb2.ErrorCode.Name(response.error.code))

    def _expire(self, now: float) -> None:
        while self._by_deadline and self._by_deadline[0].sent_at + self._load.timeout_s <= now:
            sent = self._by_deadline.popleft()
            if self._under_way.pop(sent.number, None) is not None and sent.counts:
                self._answers.fail("no answer")


def _parts(view: View, routes: Routes, tokens: Tokens, turn: int) -> list[_Part]:
    """What goes to each node's rank whose turn it is, as a router would send it."""
    parts = []
    for number, rows in enumerate(routes.split(tokens.ids, None, turn)):
        entry = rows.ranks[turn % len(rows.ranks)]
        call = NodeCall(number, entry, rows, view, None)
        metas, buffers = call_parts(call, tokens)
        header = front_request(call, metas)
        header.mesh_id, header.rank, header.incarnation = view.mesh_id, entry.rank, entry.incarnation
        parts.append(_Part(entry.rank, header, buffers))
    return parts


# Witnesses ---------------------------------------------------------------------------------------------------------


def watch(addresses: list[str], load: Load) -> Answers:
    """One witness, in a process of its own."""
    return asyncio.run(_watch(addresses, load))


async def _watch(addresses: list[str], load: Load) -> Answers:
    answers = Answers()
    dice = np.random.default_rng(load.seed)
    inputs = [some_input(load, dice) for _ in range(_MADE)]
    async with AsyncRouter(addresses, timeout_s=load.timeout_s, transport=load.transport) as router:
        turns = asyncio.create_task(_watch_turns(answers))
        cpu_s, tasks = time.process_time(), []
        for number, due in enumerate(due_times(load)):
            await asyncio.sleep(max(0.0, load.begin_at + due - time.monotonic()))
            tasks.append(asyncio.create_task(_ask(router, inputs[number % _MADE], load, due, answers)))
        await asyncio.gather(*tasks)
        turns.cancel()
        answers.cpu_s = time.process_time() - cpu_s
    return answers


async def _ask(router: AsyncRouter, given: Input, load: Load, due: float, answers: Answers) -> None:
    sent_at, counts = time.monotonic(), due >= load.warm_s
    if counts:
        answers.offered += 1
        answers.late_s.append(sent_at - load.begin_at - due)
    try:
        await router.forward(*given, timeout=load.timeout_s)
    except Overloaded as exc:
        if counts:
            answers.refused_s.append(time.monotonic() - sent_at)
            answers.hints_s.append(exc.retry_after_s)
    except EpmeshError as exc:
        if counts:
            answers.fail(type(exc).__name__)
    else:
        answers.done_at.append(time.monotonic())
        if counts:
            answers.done_s.append(time.monotonic() - sent_at)


async def _watch_turns(answers: Answers) -> None:
    """How late the process runs what is due: its own share of every time that it measures."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(0.005)
        answers.turn_s.append(time.monotonic() - began - 0.005)
