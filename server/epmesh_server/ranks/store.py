"""The node service's key-value store, as torch's rendezvous sees it: never in a rank, gone with the epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import torch.distributed

from epmesh import errors
from epmesh.errors import DeadlineExceeded
from epmesh.v1 import store_service_pb2, store_service_pb2_grpc

_POLL_S = 0.5
_RPC_TIMEOUT_S = 2.0


_Store: Any = getattr(torch.distributed, "Store")  # noqa: B009  (not in torch's typed exports)


class NodeStore(_Store):  # type: ignore[misc]
    """A ``torch.distributed.Store`` over the node service's StoreService."""

    def __init__(self, channel: grpc.Channel, prefix: str, timeout_s: float, check: Callable[[], None]) -> None:
        """Keys get `prefix`, which starts with the membership epoch.

        Args:
            timeout_s: how long `get` and `wait` wait.
            check: called while waiting; raises where waiting makes no sense any more.
        """
        super().__init__()
        self._stub = store_service_pb2_grpc.StoreServiceStub(channel)
        self._prefix = prefix
        self._timeout_s = timeout_s
        self._check = check

    def set(self, key: str, value: str | bytes) -> None:
        """Writes a key."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        request = store_service_pb2.SetValueRequest(key=self._prefix + key, value=data)
        self._call(lambda: self._stub.SetValue(request, timeout=_RPC_TIMEOUT_S))

    def get(self, key: str) -> bytes:
        """Waits for a key and returns its value."""
        request = store_service_pb2.GetValueRequest(key=self._prefix + key)
        deadline = time.monotonic() + self._timeout_s
        while True:
            self._check()
            try:
                return bytes(self._stub.GetValue(request, timeout=_POLL_S).value)
            except grpc.RpcError as exc:
                if exc.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise errors.from_rpc_error(exc, "GetValue") from exc
            if time.monotonic() > deadline:
                raise DeadlineExceeded(message=f"key {key!r} was not set within {self._timeout_s:g} s")

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Waits for all `keys`."""
        for key in keys:
            self.get(key)

    def add(self, key: str, amount: int) -> int:
        """Adds to a counter."""
        request = store_service_pb2.AddValueRequest(key=self._prefix + key, amount=amount)
        return int(self._call(lambda: self._stub.AddValue(request, timeout=_RPC_TIMEOUT_S)).value)

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        request = store_service_pb2.CheckKeysRequest(keys=[self._prefix + key for key in keys])
        return bool(self._call(lambda: self._stub.CheckKeys(request, timeout=_RPC_TIMEOUT_S)).exist)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Writes a key where it has the expected value."""
        request = store_service_pb2.CompareSetValueRequest(
            key=self._prefix + key, expected=expected.encode(), desired=desired.encode()
        )
        return bytes(self._call(lambda: self._stub.CompareSetValue(request, timeout=_RPC_TIMEOUT_S)).value)

    def delete_key(self, key: str) -> bool:
        """Removes a key."""
        request = store_service_pb2.DeleteValueRequest(key=self._prefix + key)
        return bool(self._call(lambda: self._stub.DeleteValue(request, timeout=_RPC_TIMEOUT_S)).deleted)

    def set_timeout(self, timeout: timedelta) -> None:
        """Bounds `get` and `wait`."""
        self._timeout_s = timeout.total_seconds()

    @staticmethod
    def _call(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except grpc.RpcError as exc:
            raise errors.from_rpc_error(exc, "the node's store") from exc
