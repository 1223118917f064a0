"""Answers, for all ranks of the node, whom their ZeroMQ endpoints admit: a ZAP handler (RFC 27 of ZeroMQ).

ZeroMQ asks at ``inproc://zeromq.zap.01`` of the rank's process, where a thread that needs no GIL passes requests on to
this unix socket. So a rank that holds its GIL still admits peers, and keys count as soon as the node service knows
them. A key that is unknown may be in a view or a lease that is on its way, so the answer waits a moment for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.asyncio

from epmesh.curve import KeyPair
from epmesh.errors import InvalidRequest
from epmesh.view import View
from epmesh_server.curve_users import Domain
from epmesh_server.node.admission import Admitted, Refused, decide, member_keys
from epmesh_server.node.client_keys import ClientKeyTable
from epmesh_server.node.views import ViewBoard
from epmesh_server.refusals import RefusalLog

_log = logging.getLogger(__name__)

HOLD_S = 1.0  # less than a link or a front client waits for its first connection
MAX_HELD = 512
_LOOK_S = 0.02  # between two looks at those
_MAX_BYTES = 4096
_VERSION = b"1.0"


@dataclass(frozen=True)
class _Question:
    """One ZAP request, with what its answer must begin with."""

    envelope: list[bytes]
    number: bytes
    domain: str
    address: str
    mechanism: str
    credentials: list[bytes]

    @classmethod
    def parse(cls, frames: list[bytes]) -> _Question:
        """Takes a request apart.

        Raises:
            ValueError: it is none.
        """
        start = frames.index(b"") + 1
        version, number, domain, address, _identity, mechanism = frames[start : start + 6]
        if version != _VERSION:
            raise ValueError(f"version {version!r}")
        domain_text, address_text = domain.decode(errors="replace"), address.decode(errors="replace")
        return cls(frames[:start], number, domain_text, address_text, mechanism.decode("ascii"), frames[start + 6 :])

    def answer(self, decision: Admitted | Refused) -> list[bytes]:
        """The answer's frames. A refusal of a link that may change is one without a word: the peer tries again."""
        if isinstance(decision, Admitted):
            code, text, user = b"200", b"OK", decision.user.encode()
        else:
            again = decision.may_change and self.domain == Domain.LINK.value
            code, text, user = b"300" if again else b"400", decision.reason.encode(), b""
        return [*self.envelope, _VERSION, self.number, code, text, user, b""]


class KeyAuthority:
    """Listens at `path` until closed. Used on the event loop only."""

    def __init__(self, path: Path, pair: KeyPair, board: ViewBoard, clients: ClientKeyTable) -> None:
        """Binds the socket.

        Raises:
            InvalidRequest: it cannot be bound.
        """
        self._path = path
        self._pair = pair
        self._board = board
        self._clients = clients
        self._members: tuple[View | None, Mapping[bytes, str]] = (None, member_keys(None, pair.public))
        self.refusals = RefusalLog(_log, "key.refused")
        self._held: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Future[None], _Question] = {}
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = _MAX_BYTES
        try:
            path.unlink(missing_ok=True)
            self._socket.bind(f"ipc://{path}")
            path.chmod(0o600)
        except (zmq.ZMQError, OSError) as exc:
            self._context.destroy(0)
            raise InvalidRequest(f"cannot listen at {path}: {exc}") from exc
        self._tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._look())]

    async def close(self) -> None:
        """Ends it and removes the socket; idempotent."""
        tasks = [*self._tasks, *self._held]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(0)
        self._path.unlink(missing_ok=True)

    async def _serve(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                question = _Question.parse(frames)
            except ValueError as exc:
                self.refusals.note("", f"something that is no ZAP request: {exc}")
                continue
            decision = self._decide(question)
            if isinstance(decision, Refused) and decision.may_change and len(self._held) < MAX_HELD:
                task = asyncio.create_task(self._hold(question))
                self._held.add(task)
                task.add_done_callback(self._held.discard)
            else:
                await self._answer(question, decision)

    async def _hold(self, question: _Question) -> None:
        """Answers when the key became known, or when that took too long."""
        known = asyncio.get_running_loop().create_future()
        self._waiting[known] = question
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HOLD_S):
                if isinstance(self._decide(question), Refused):
                    await known
        del self._waiting[known]
        await self._answer(question, self._decide(question))

    async def _look(self) -> None:
        """Tells those that wait for a key when it became known: one look a change, however many strangers wait."""
        while True:
            changes = self._board.next_change, self._clients.next_change
            for known, question in self._waiting.items():
                if not known.done() and isinstance(self._decide(question), Admitted):
                    known.set_result(None)
            await _any_of(*changes)
            await asyncio.sleep(_LOOK_S)  # whoever leases keys in a loop must not keep the event loop busy

    def _decide(self, question: _Question) -> Admitted | Refused:
        view = self._board.view
        if view is not self._members[0]:
            self._members = view, member_keys(view, self._pair.public)
        credentials = question.credentials
        known: Mapping[bytes, str] = self._members[1]
        if len(credentials) == 1 and credentials[0] not in known:
            known = self._clients.users(credentials[0])
        return decide(question.domain, question.mechanism, credentials, known)

    async def _answer(self, question: _Question, decision: Admitted | Refused) -> None:
        if isinstance(decision, Refused):
            who = f"{question.address} at a {question.domain}"
            self.refusals.note(who, f"{who}: {decision.reason}")
        await self._socket.send_multipart(question.answer(decision))


async def _any_of(*events: asyncio.Event) -> None:
    """Returns once one of them is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
