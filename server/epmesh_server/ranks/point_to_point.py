"""send and recv: numbered per (group, source, destination), shape-checked, buffered up to a byte budget."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from epmesh.errors import InvalidRequest
from epmesh.frames import Message
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.tensors import as_bytes, dtype_name, from_bytes, meta_of

BUDGET_BYTES = 64 << 20

_POINT_TO_POINT, _TAKEN = frame_pb2.FRAME_KIND_POINT_TO_POINT, frame_pb2.FRAME_KIND_TAKEN


class PointToPoint:
    """One rank's sends and receives in one group."""

    def __init__(self, member: GroupMember) -> None:
        self._member = member
        self._sent: dict[int, int] = {}  # position -> number of the last message
        self._received: dict[int, int] = {}
        self._unread: dict[int, deque[tuple[int, int]]] = {}  # position -> (number, bytes) not taken yet
        self._to_self = MessagesToSelf()

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Sends; waits only while `dst` has more than `BUDGET_BYTES` of ours unread."""
        member = self._member
        member.check(0)
        if dst == member.topology.me:
            self._to_self.send(tensor)
            return
        data = as_bytes(tensor).copy()
        unread = self._unread.setdefault(dst, deque())
        deadline = time.monotonic() + member.timeout_s
        member.wait_until(lambda: self._has_room(dst, unread, data.size), 0, deadline, lambda: [dst])
        number = self._sent[dst] = self._sent.get(dst, 0) + 1
        header = member.header(_POINT_TO_POINT, number)
        header.tensors.append(meta_of(tensor))
        member.send(dst, header, [data.data])
        unread.append((number, data.size))

    def recv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> torch.Tensor:
        """Receives the next message of `src`.

        Raises:
            InvalidRequest: it has another shape or dtype; the message is gone.
        """
        if src == self._member.topology.me:
            return self._to_self.recv(shape, dtype)
        message = self._next(src)
        meta = message.header.tensors[0]
        if list(meta.shape) != list(shape) or meta.dtype != dtype_name(dtype):
            rank = self._member.global_rank(src)
            raise mismatch(f"{meta.dtype}{list(meta.shape)}", f"rank {rank}", shape, dtype)
        return from_bytes(message.tensors[0], dtype, shape).clone()

    def _next(self, src: int) -> Message:
        member = self._member
        rank, found = member.global_rank(src), deque[Message]()

        def ready() -> bool:
            message = member.inbox.take_point_to_point(rank)
            if message is not None and message.header.incarnation == member.view.ranks[rank].incarnation:
                found.append(message)
            return bool(found)

        member.wait_until(ready, 0, time.monotonic() + member.timeout_s, lambda: [src])
        number = self._received[src] = self._received.get(src, 0) + 1
        if found[0].header.sequence != number or len(found[0].tensors) != 1:
            raise InvalidRequest(f"rank {rank} sent message {found[0].header.sequence}; {number} was next")
        member.send(src, member.header(_TAKEN, number))
        return found[0]

    def _has_room(self, dst: int, unread: deque[tuple[int, int]], size: int) -> bool:
        taken = self._member.inbox.taken.get(self._member.global_rank(dst), 0)
        while unread and unread[0][0] <= taken:
            unread.popleft()
        return not unread or sum(waiting for _, waiting in unread) + size <= BUDGET_BYTES


class MessagesToSelf:
    """What a rank sends to itself."""

    def __init__(self) -> None:
        self._waiting: deque[torch.Tensor] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Keeps a copy."""
        self._waiting.append(tensor.clone())

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The oldest one, which must have this shape and dtype; there must be one, for nobody else could send it."""
        if not self._waiting:
            raise InvalidRequest("recv from this rank itself, to which nothing was sent")
        tensor = self._waiting.popleft()
        if list(tensor.shape) != list(shape) or tensor.dtype != dtype:
            raise mismatch(f"{dtype_name(tensor.dtype)}{list(tensor.shape)}", "this rank", shape, dtype)
        return tensor


def mismatch(sent: str, by: str, shape: Sequence[int], dtype: torch.dtype) -> InvalidRequest:
    """What a receiver raises that expected another tensor."""
    return InvalidRequest(f"recv expected {dtype_name(dtype)}{list(shape)}, but {by} sent {sent}; make them equal")
