"""What came for one group, until it is asked for."""

from __future__ import annotations

import threading
from collections import deque

from epmesh.frames import Message
from epmesh.v1 import frame_pb2

MAX_INBOX_BYTES = 1 << 32
_MESSAGE_BYTES = 1024  # what a message takes besides its header and tensors, about

Key = tuple[int, int, int, int]  # kind, sequence, step, source


class Inbox:
    """Messages for one group in one membership epoch, until somebody asks for them. Guarded by the hub's receive lock
    while messages come in; reads are single dictionary or deque operations."""

    def __init__(self) -> None:
        self.wake_fd: int | None = None
        self.lost_messages: dict[int, str] = {}  # source -> what is missing
        self.abandoned: dict[int, Message] = {}  # sequence -> why
        self.point_to_point: dict[int, deque[Message]] = {}  # source -> in order
        self.taken: dict[int, int] = {}  # receiver -> highest number it took
        self._messages: dict[Key, Message] = {}
        self._bytes = 0
        self._lock = threading.Lock()  # one thread puts, for all groups; another takes

    @property
    def num_bytes(self) -> int:
        """Of the messages that wait here."""
        return self._bytes

    def put(self, message: Message) -> bool:
        """Files a message; False where the budget is spent."""
        with self._lock:
            return self._put(message)

    def _put(self, message: Message) -> bool:
        header = message.header
        if header.kind == frame_pb2.FRAME_KIND_TAKEN:
            self.taken[header.source] = max(self.taken.get(header.source, 0), header.sequence)
            return True
        size = _size(message)
        if self._bytes + size > MAX_INBOX_BYTES:
            return False
        self._bytes += size
        if header.kind == frame_pb2.FRAME_KIND_ABANDON:
            self._released(self.abandoned.get(header.sequence))
            self.abandoned[header.sequence] = message
        elif header.kind == frame_pb2.FRAME_KIND_POINT_TO_POINT:
            self.point_to_point.setdefault(header.source, deque()).append(message)
        else:
            key = (header.kind, header.sequence, header.step, header.source)
            self._released(self._messages.get(key))
            self._messages[key] = message
        return True

    def take(self, kind: int, sequence: int, step: int, source: int) -> Message | None:
        """Removes and returns a message, if it is there."""
        with self._lock:
            return self._released(self._messages.pop((kind, sequence, step, source), None))

    def peek(self, kind: int, sequence: int, step: int, source: int) -> Message | None:
        """A message, if it is there; it stays."""
        return self._messages.get((kind, sequence, step, source))

    def take_point_to_point(self, source: int) -> Message | None:
        """Removes and returns the next message that `source` sent."""
        with self._lock:
            waiting = self.point_to_point.get(source)
            return self._released(waiting.popleft()) if waiting else None

    def forget(self, sequence: int) -> None:
        """Drops what belongs to `sequence` and to exchanges before it."""
        with self._lock:
            for key in [key for key in self._messages if key[1] <= sequence]:
                self._released(self._messages.pop(key))
            for old in [number for number in self.abandoned if number <= sequence]:
                self._released(self.abandoned.pop(old))

    def _released(self, message: Message | None) -> Message | None:
        if message is not None:
            self._bytes -= _size(message)
        return message


def _size(message: Message) -> int:
    return _MESSAGE_BYTES + message.header.ByteSize() + sum(map(len, message.tensors))
