"""send and recv: numbered per (group, source, destination), shape-checked, buffered up to a byte budget."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

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
        self._received: dict[int, int] = {}  # position -> number of the last message
        self._unread: dict[int, _Unread] = {}
        self._announced: dict[int, deque[_Announced]] = {}
        self._to_self = MessagesToSelf()

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Sends; waits only while `dst` has more than `BUDGET_BYTES` of ours unread."""
        member = self._member
        member.check(0)
        if dst == member.topology.me:
            self._to_self.send(tensor)
            return
        data = as_bytes(tensor).copy()
        unread = self._unread.setdefault(dst, _Unread())
        self._wait(lambda: unread.has_room(data.size, member.inbox.taken.get(member.global_rank(dst), 0)), dst)
        header = member.header(_POINT_TO_POINT, unread.add(data.size))
        header.tensors.append(meta_of(tensor))
        member.send(dst, header, [data.data])

    def announce(self, tensor: torch.Tensor, src: int) -> Callable[[], None]:
        """Says that the next message of `src` goes into `tensor`, ahead of those that later receives get.

        Returns:
            Waits until it has come. Raises `InvalidRequest` where it has another shape or dtype; it is gone then.
        """
        if src == self._member.topology.me:
            return lambda: self._to_self.recv_into(tensor)
        announced = _Announced(tensor)
        self._announced.setdefault(src, deque()).append(announced)
        return lambda: self._finish(announced, src)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> torch.Tensor:
        """Receives the next message of `src`.

        Raises:
            InvalidRequest: it has another shape or dtype; the message is gone.
        """
        if src == self._member.topology.me:
            return self._to_self.recv(shape, dtype)
        self._wait(lambda: not self._announced.get(src), src)
        return _checked(self._next(src), shape, dtype).clone()

    def _next(self, src: int) -> Message:
        found: list[Message] = []

        def ready() -> bool:
            message = self._take(src)
            found.extend([message] if message else [])
            return bool(found)

        self._wait(ready, src)
        return found[0]

    def _finish(self, announced: _Announced, src: int) -> None:
        self._wait(lambda: announced.done, src)
        if announced.error is not None:
            raise announced.error

    def _wait(self, ready: Callable[[], bool], peer: int) -> None:
        """Waits for a peer; peers that wait for room here get it, as far as receives were announced."""

        def ready_or_taken() -> bool:
            self._take_announced()
            return ready()

        member = self._member
        member.wait_until(ready_or_taken, 0, time.monotonic() + member.timeout_s, lambda: [peer])

    def _take_announced(self) -> None:
        for src, announced in self._announced.items():
            while announced and (message := self._take(src)) is not None:
                announced.popleft().fill(message)

    def _take(self, src: int) -> Message | None:
        """The next message of `src` if it is there; `src` is told that it was taken."""
        member = self._member
        rank = member.global_rank(src)
        message = member.inbox.take_point_to_point(rank)
        if message is None or message.header.incarnation != member.view.ranks[rank].incarnation:
            return None
        number = self._received[src] = self._received.get(src, 0) + 1
        if message.header.sequence != number or len(message.tensors) != 1:
            raise InvalidRequest(f"rank {rank} sent message {message.header.sequence}; {number} was next")
        member.send(src, member.header(_TAKEN, number))
        return message


class _Unread:
    """Messages to one member that it has not taken yet."""

    def __init__(self) -> None:
        self._last = 0
        self._waiting: deque[tuple[int, int]] = deque()  # number, bytes
        self._bytes = 0

    def add(self, size: int) -> int:
        """One more of `size` bytes; its number."""
        self._last += 1
        self._waiting.append((self._last, size))
        self._bytes += size
        return self._last

    def has_room(self, size: int, taken: int) -> bool:
        """Whether `size` bytes more fit; those up to number `taken` are forgotten. One message always fits."""
        while self._waiting and self._waiting[0][0] <= taken:
            self._bytes -= self._waiting.popleft()[1]
        return not self._waiting or self._bytes + size <= BUDGET_BYTES


class _Announced:
    """A receive that was announced."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.done = False
        self.error: InvalidRequest | None = None

    def fill(self, message: Message) -> None:
        """Takes the message's bytes over, if they are what was announced."""
        try:
            self._tensor.copy_(_checked(message, self._tensor.shape, self._tensor.dtype))
        except InvalidRequest as exc:
            self.error = exc
        self.done = True


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

    def recv_into(self, tensor: torch.Tensor) -> None:
        """As `recv`, into a tensor."""
        tensor.copy_(self.recv(tensor.shape, tensor.dtype))


def _checked(message: Message, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of a message, over the message's bytes."""
    meta = message.header.tensors[0]
    if list(meta.shape) != list(shape) or meta.dtype != dtype_name(dtype):
        raise mismatch(f"{meta.dtype}{list(meta.shape)}", f"rank {message.header.source}", shape, dtype)
    return from_bytes(message.tensors[0], dtype, shape)


def mismatch(sent: str, by: str, shape: Sequence[int], dtype: torch.dtype) -> InvalidRequest:
    """What a receiver raises that expected another tensor."""
    return InvalidRequest(f"recv expected {dtype_name(dtype)}{list(shape)}, but {by} sent {sent}; make them equal")
