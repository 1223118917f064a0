"""send and recv over a process group: a head that says what comes, then the bytes; in order for each two members."""

from __future__ import annotations

import atexit
import struct
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from epmesh.errors import InvalidRequest
from epmesh.frames import num_bytes
from epmesh.v1 import frame_pb2
from epmesh_server.ranks.flat_member import FlatMember
from epmesh_server.ranks.point_to_point import BUDGET_BYTES, Announced, MessagesToSelf, check_received
from epmesh_server.ranks.tensors import Bytes, as_bytes, dtype_from_name, from_bytes, meta_of
from epmesh_server.worker import Worker

_HEAD = struct.Struct("<IxxxxQ")  # bytes of the TensorMeta that follows; messages taken of the receiver
_END_S = 2.0  # what a thread may take to come out of a receive that was ended
_HEAD_BYTES = 256  # head and TensorMeta, which has at most 8 dimensions


class FlatMessages:
    """One rank's sends and receives in one group.

    A sender that has no room waits for its receiver, which may be waiting for something else. So receives that were
    announced are made by a thread for each source: torch has no other way to wait for one of several members.
    """

    def __init__(self, member: FlatMember) -> None:
        world_size = member.topology.world_size
        self._member = member
        self._sent = [0] * world_size
        self._unread: list[deque[_Sent]] = [deque() for _ in range(world_size)]
        self._receivers: dict[int, Worker] = {}
        self._to_self = MessagesToSelf()

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Sends; waits only while `dst` has more than `BUDGET_BYTES` of ours unread."""
        member = self._member
        if dst == member.topology.me:
            self._to_self.send(tensor)
            return
        data = as_bytes(tensor).copy()
        self._make_room(dst, data.size)
        works = [member.mail.send(_head(tensor, member.taken[dst]), dst)]
        if data.size:
            works.append(member.mail.send(data, dst))
        self._sent[dst] += 1
        self._unread[dst].append(_Sent(self._sent[dst], data.size, works))

    def announce(self, tensor: torch.Tensor, src: int) -> Announced:
        """Says that the next message of `src` goes into `tensor`, ahead of those that later receives get."""
        if src == self._member.topology.me:
            return self._to_self.announce(tensor)
        announced = Announced(tensor, lambda: self._member.mail.await_future(came, src))
        if src not in self._receivers:
            self._receivers[src] = Worker(f"epmesh-receiver-{src}")
            _RECEIVING.add(self)
        came = self._receivers[src].submit(lambda: announced.fill(self._next(src, patient=True), self._name(src)))
        return announced

    def withdraw(self, receives: Collection[Announced]) -> None:
        """Nothing: a process group in which a send failed is of no use any more."""

    def recv(self, shape: Sequence[int], dtype: torch.dtype, src: int) -> torch.Tensor:
        """Receives the next message of `src`.

        Raises:
            InvalidRequest: it has another shape or dtype; the message is gone.
        """
        if src == self._member.topology.me:
            return self._to_self.recv(shape, dtype)
        receiver = self._receivers.get(src)
        if receiver is not None and receiver.busy:
            came = self._member.mail.await_future(receiver.submit(lambda: self._next(src, patient=True)), src)
        else:
            came = self._next(src)
        return check_received(came, self._name(src), shape, dtype)

    def close(self) -> None:
        """Lets the threads go, as soon as nothing is waited for any more; idempotent."""
        for receiver in self._receivers.values():
            receiver.close(wait=False)

    def end_receives(self) -> None:
        """Ends what threads wait for, and with it the process group: the interpreter dies of threads that are in it."""
        busy = [(src, receiver) for src, receiver in self._receivers.items() if receiver.busy]
        for src, _ in busy:
            self._member.mail.end_recv(src)
        for _, receiver in busy:
            receiver.join(_END_S)

    def _next(self, src: int, *, patient: bool = False) -> torch.Tensor:
        """The next message of `src`; `patient`: whoever waits for it here looks at the clock."""
        member = self._member
        length, acknowledged, head = _read(member.mail.recv(_HEAD_BYTES, src, patient=patient))
        meta = frame_pb2.TensorMeta.FromString(head[:length])
        data = member.mail.recv(num_bytes(meta), src, patient=patient)
        member.taken[src] += 1
        member.acknowledged[src] = max(member.acknowledged[src], acknowledged)
        return from_bytes(data, dtype_from_name(meta.dtype), tuple(meta.shape))

    def _name(self, src: int) -> str:
        return f"rank {self._member.topology.ranks[src]}"

    def _make_room(self, dst: int, size: int) -> None:
        """Forgets what was taken; waits for the oldest messages where too much is left."""
        member, unread = self._member, self._unread[dst]
        while unread and unread[0].number <= member.acknowledged[dst]:
            unread.popleft()
        while unread and sum(sent.size for sent in unread) + size > BUDGET_BYTES:
            for work in unread[0].works:
                member.mail.await_peer(work, dst)
            unread.popleft()


_RECEIVING: weakref.WeakSet[FlatMessages] = weakref.WeakSet()  # those with threads that receive


@atexit.register  # not before: until then the group may be of use to its maker
def _end_receives() -> None:
    for messages in list(_RECEIVING):
        messages.end_receives()


class _Sent:
    """A message that its receiver may not have taken yet, and the works that keep its bytes."""

    def __init__(self, number: int, size: int, works: list[Any]) -> None:
        self.number, self.size, self.works = number, size, works


def _head(tensor: torch.Tensor, taken: int) -> Bytes:
    meta = meta_of(tensor).SerializeToString()
    return np.frombuffer((_HEAD.pack(len(meta), taken) + meta).ljust(_HEAD_BYTES, b"\0"), np.uint8).copy()


def _read(head: Bytes) -> tuple[int, int, bytes]:
    length, taken = _HEAD.unpack_from(head.data)
    if length > _HEAD_BYTES - _HEAD.size:
        raise InvalidRequest(f"a head announced {length} bytes; {_HEAD_BYTES - _HEAD.size} fit")
    return length, taken, head[_HEAD.size :].tobytes()
