"""The node's key-value store for the rendezvous of device groups: in memory, bounded, dropped by membership epoch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, Overloaded, StaleEpoch
from epmesh.grpc_errors import abort
from epmesh.v1 import store_service_pb2, store_service_pb2_grpc
from epmesh_server.node.rpc import seconds_left

MAX_KEY_CHARS = 1024
MAX_VALUE_BYTES = 4 << 20
MAX_TOTAL_BYTES = 64 << 20
_MAX_WAIT_S = 600.0
_RETRY_AFTER_S = 1.0

_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[Any, Any]


class KeyValueStore:
    """Keys start with ``<membership_epoch>/``; one event loop only.

    Every method raises `InvalidRequest` for a key or value out of bounds, and `StaleEpoch` for a key of an epoch that
    was dropped.
    """

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._waiters: dict[str, set[asyncio.Future[bytes]]] = {}
        self._oldest_epoch = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def set(self, key: str, value: bytes) -> None:
        """Writes a key and wakes those who wait for it.

        Raises:
            Overloaded: the store is full.
        """
        self._check(key, value)
        grown = self._bytes + len(value) + (0 if key in self._values else len(key))
        grown -= len(self._values.get(key, b""))
        if grown > MAX_TOTAL_BYTES:
            raise Overloaded(_RETRY_AFTER_S, f"the node's store holds {self._bytes} of {MAX_TOTAL_BYTES} bytes")
        self._bytes = grown
        self._values[key] = value
        for waiter in self._waiters.pop(key, ()):
            if not waiter.done():
                waiter.set_result(value)

    async def get(self, key: str, timeout_s: float) -> bytes:
        """The key's value, as soon as there is one.

        Raises:
            DeadlineExceeded: there was none within `timeout_s`.
        """
        self._check(key)
        if key in self._values:
            return self._values[key]
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, set()).add(waiter)
        try:
            return await asyncio.wait_for(waiter, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(message=f"nobody wrote key {key!r} within {timeout_s:.1f} s") from None
        finally:
            self._forget(key, waiter)

    def add(self, key: str, amount: int) -> int:
        """Adds to a decimal counter and returns the sum.

        Raises:
            InvalidRequest: the value there is no number.
        """
        self._check(key)
        current = self._values.get(key, b"0")
        try:
            total = int(current) + amount
        except ValueError:
            raise InvalidRequest(f"key {key!r} is no counter: {current[:32]!r}") from None
        self.set(key, str(total).encode())
        return total

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Writes where the key has `expected` (empty: is absent); returns what is there then (empty: nothing)."""
        self._check(key, desired)
        if self._values.get(key, b"") == expected:
            self.set(key, desired)
        return self._values.get(key, b"")

    def exist(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        for key in keys:
            self._check(key)
        return all(key in self._values for key in keys)

    def delete(self, key: str) -> bool:
        """Removes a key; says whether it was there."""
        self._check(key)
        value = self._values.pop(key, None)
        if value is None:
            return False
        self._bytes -= len(key) + len(value)
        return True

    def drop_before(self, epoch: int) -> None:
        """Drops keys of membership epochs before `epoch`; those who wait for one get `StaleEpoch`."""
        if epoch <= self._oldest_epoch:
            return
        self._oldest_epoch = epoch
        for key in [key for key in self._values if _epoch_of(key) < epoch]:
            self._bytes -= len(key) + len(self._values.pop(key))
        for key in [key for key in self._waiters if _epoch_of(key) < epoch]:
            for waiter in self._waiters.pop(key):
                if not waiter.done():
                    waiter.set_exception(StaleEpoch(epoch, f"key {key!r} is of an older membership epoch than {epoch}"))

    def clear(self) -> None:
        """Forgets everything, epochs too."""
        self.drop_before(1 << 63)
        self._oldest_epoch = 0

    def _forget(self, key: str, waiter: asyncio.Future[bytes]) -> None:
        waiters = self._waiters.get(key)
        if waiters is not None:
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[key]

    def _check(self, key: str, value: bytes = b"") -> None:
        if not 0 < len(key) <= MAX_KEY_CHARS:
            raise InvalidRequest(f"a key has 1 to {MAX_KEY_CHARS} characters, not {len(key)}")
        if len(value) > MAX_VALUE_BYTES:
            raise InvalidRequest(f"the value of {key!r} has {len(value)} bytes; at most {MAX_VALUE_BYTES} are kept")
        epoch = _epoch_of(key)
        if epoch < 0:
            raise InvalidRequest(f"key {key!r} does not start with '<membership epoch>/'")
        if epoch < self._oldest_epoch:
            raise StaleEpoch(self._oldest_epoch, f"key {key!r} is older than membership epoch {self._oldest_epoch}")


def _epoch_of(key: str) -> int:
    """The membership epoch a key starts with; -1 where there is none."""
    head, slash, _ = key.partition("/")
    return int(head) if slash and head.isascii() and head.isdigit() and len(head) <= 20 else -1


async def _answer(context: _Context, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except EpmeshError as exc:
        await abort(context, exc)


async def _answer_later(context: _Context, call: Awaitable[_T]) -> _T:
    try:
        return await call
    except EpmeshError as exc:
        await abort(context, exc)


class Store(store_service_pb2_grpc.StoreServiceServicer):
    """StoreService over a `KeyValueStore`."""

    def __init__(self, values: KeyValueStore) -> None:
        self._values = values

    async def SetValue(
        self, request: store_service_pb2.SetValueRequest, context: _Context
    ) -> store_service_pb2.SetValueResponse:
        """Writes a key."""
        await _answer(context, lambda: self._values.set(request.key, request.value))
        return store_service_pb2.SetValueResponse()

    async def GetValue(
        self, request: store_service_pb2.GetValueRequest, context: _Context
    ) -> store_service_pb2.GetValueResponse:
        """Waits for a key, up to the call's deadline."""
        value = await _answer_later(context, self._values.get(request.key, seconds_left(context, _MAX_WAIT_S)))
        return store_service_pb2.GetValueResponse(value=value)

    async def AddValue(
        self, request: store_service_pb2.AddValueRequest, context: _Context
    ) -> store_service_pb2.AddValueResponse:
        """Adds to a counter."""
        total = await _answer(context, lambda: self._values.add(request.key, request.amount))
        return store_service_pb2.AddValueResponse(value=total)

    async def CompareSetValue(
        self, request: store_service_pb2.CompareSetValueRequest, context: _Context
    ) -> store_service_pb2.CompareSetValueResponse:
        """Writes where the value is the expected one."""
        value = await _answer(context, lambda: self._values.compare_set(request.key, request.expected, request.desired))
        return store_service_pb2.CompareSetValueResponse(value=value)

    async def CheckKeys(
        self, request: store_service_pb2.CheckKeysRequest, context: _Context
    ) -> store_service_pb2.CheckKeysResponse:
        """Whether all keys exist."""
        exist = await _answer(context, lambda: self._values.exist(list(request.keys)))
        return store_service_pb2.CheckKeysResponse(exist=exist)

    async def DeleteValue(
        self, request: store_service_pb2.DeleteValueRequest, context: _Context
    ) -> store_service_pb2.DeleteValueResponse:
        """Removes a key."""
        deleted = await _answer(context, lambda: self._values.delete(request.key))
        return store_service_pb2.DeleteValueResponse(deleted=deleted)
