"""send and recv: numbered per (group, source, destination), shape-checked, buffered up to a byte budget."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch

from epmesh.errors import InvalidRequest
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.member import GroupMember
from epmesh_server.ranks.tensors import as_bytes, dtype_from_name, dtype_name, from_bytes, meta_of

BUDGET_BYTES = 64 << 20

_POINT_TO_POINT, _TAKEN = frame_pb2.FRAME_KIND_POINT_TO_POINT, frame_pb2.FRAME_KIND_TAKEN


class PointToPoint:
    """One rank's sends and receives in one group.

    A sender that has no room waits for its receiver, which may be waiting for something else. So receives that were
    announced take what has come whenever their rank waits in the group, whatever it waits for.
    """

    def __init__(self, member: GroupMember) -> None:
        self._member = member
        self._received: dict[int, int] = {}  # position -> number of the last message
        self._unread: dict[int, _Unread] = {}
        self._announced: dict[int, deque[Announced]] = {}
        self._to_self = MessagesToSelf()
        member.meanwhile = self._take_announced

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

    def announce(self, tensor: torch.Tensor, src: int) -> Announced:
        """Says that the next message of `src` goes into `tensor`, ahead of those that later receives get."""
        if src == self._member.topology.me:
            return self._to_self.announce(tensor)
        announced = Announced(tensor, lambda: self._wait(lambda: announced.done, src))
        self._announced.setdefault(src, deque()).append(announced)
        return announced

    def withdraw(self, receives: Collection[Announced]) -> None:
        """Nobody will wait for these: what has not come of their messages goes to later receives."""
        for queue in (*self._announced.values(), self._to_self.announced):
            for receive in [each for each in queue if each in receives]:
                queue.remove(receive)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> torch.Tensor:
        """Receives the next message of `src`.

        Raises:
            InvalidRequest: it has another shape or dtype; the message is gone.
        """
        if src == self._member.topology.me:
            return self._to_self.recv(shape, dtype)
        self._wait(lambda: not self._announced.get(src), src)
        return check_received(self._next(src), self._name(src), shape, dtype).clone()

    def _next(self, src: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def ready() -> bool:
            tensor = self._take(src)
            found.extend([] if tensor is None else [tensor])
            return bool(found)

        self._wait(ready, src)
        return found[0]

    def _wait(self, ready: Callable[[], bool], peer: int) -> None:
        member = self._member
        member.wait_until(ready, 0, time.monotonic() + member.timeout_s, lambda: [peer])

    def _take_announced(self) -> None:
        for src, announced in self._announced.items():
            while announced:
                try:
                    tensor = self._take(src)
                except InvalidRequest as exc:
                    announced.popleft().fail(exc)
                    continue
                if tensor is None:
                    break
                announced.popleft().fill(tensor, self._name(src))

    def _take(self, src: int) -> torch.Tensor | None:
        """The next message of `src` if it is there, over its bytes; `src` is told that it was taken."""
        member = self._member
        rank = member.global_rank(src)
        message = member.inbox.take_point_to_point(rank)
        if message is None or message.header.incarnation != member.view.ranks[rank].incarnation:
            return None
        number = self._received[src] = self._received.get(src, 0) + 1
        if message.header.sequence != number or len(message.tensors) != 1:
            raise InvalidRequest(f"rank {rank} sent message {message.header.sequence}; {number} was next")
        member.send(src, member.header(_TAKEN, number))
        meta = message.header.tensors[0]
        return from_bytes(message.tensors[0], dtype_from_name(meta.dtype), tuple(meta.shape))

    def _name(self, src: int) -> str:
        return f"rank {self._member.global_rank(src)}"


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


class Announced:
    """A receive that was announced.

    Attributes:
        done: whether its message has come, whatever it was.
    """

    def __init__(self, tensor: torch.Tensor, wait: Callable[[], object]) -> None:
        """Waits to be filled; `wait` returns once it is done."""
        self._tensor = tensor
        self._wait = wait
        self._error: InvalidRequest | None = None
        self.done = False

    def finish(self) -> None:
        """Waits until its message has come.

        Raises:
            InvalidRequest: it has another shape or dtype, or could not be written; it is gone.
        """
        self._wait()
        if self._error is not None:
            raise self._error

    def fill(self, came: torch.Tensor, by: str) -> None:
        """Takes over what came, if that is what was announced. Never raises: whoever waits may wait for another."""
        try:
            self._tensor.copy_(check_received(came, by, self._tensor.shape, self._tensor.dtype))
        except InvalidRequest as exc:
            self._error = exc
        except Exception as exc:  # noqa: BLE001 - such as a tensor that may not be written to; raised by `finish`
            self._error = InvalidRequest(f"what {by} sent could not be written: {type(exc).__name__}: {exc}")
        self.done = True

    def fail(self, error: InvalidRequest) -> None:
        """There is no message for it."""
        self._error = error
        self.done = True


class MessagesToSelf:
    """What a rank sends to itself.

    Attributes:
        announced: receives that are open, the oldest first.
    """

    def __init__(self) -> None:
        self._waiting: deque[torch.Tensor] = deque()
        self.announced: deque[Announced] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Keeps a copy."""
        self._waiting.append(tensor.clone())

    def announce(self, tensor: torch.Tensor) -> Announced:
        """As `recv`, into a tensor, and when it is waited for."""
        announced = Announced(tensor, lambda: self._fill(lambda: announced.done))
        self.announced.append(announced)
        return announced

    def recv(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The oldest one, which must have this shape and dtype; there must be one, for nobody else could send it."""
        self._fill(lambda: bool(self._waiting) and not self.announced)
        return check_received(self._waiting.popleft(), "this rank", shape, dtype)

    def _fill(self, ready: Callable[[], bool]) -> None:
        while self.announced and self._waiting:
            self.announced.popleft().fill(self._waiting.popleft(), "this rank")
        if not ready():
            raise InvalidRequest("recv from this rank itself, to which nothing was sent")


def check_received(came: torch.Tensor, by: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`came`, if it has this shape and dtype.

    Raises:
        InvalidRequest: it has another one.
    """
    if list(came.shape) != list(shape) or came.dtype != dtype:
        sent = f"{dtype_name(came.dtype)}{list(came.shape)}"
        raise InvalidRequest(f"recv expected {dtype_name(dtype)}{list(shape)}, but {by} sent {sent}; make them equal")
    return came
