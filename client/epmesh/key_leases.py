"""A client's leases on its CURVE key, one at every node service whose ranks it asks: taken, renewed, given back.

The fronts of a node's ranks admit a client only while its lease there runs. Nothing here waits: a connection may be
made at the same time as the lease is asked for, since the node service answers a moment later about a key that it does
not know yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import grpc

from epmesh import errors
from epmesh.channels import NodeAddress, RenewedChannel
from epmesh.curve import KeyPair
from epmesh.errors import EpmeshError, Overloaded
from epmesh.tls import TlsFiles
from epmesh.v1 import key_service_pb2, key_service_pb2_grpc

_RPC_TIMEOUT_S = 2.0
_RETRY_S = 0.25
_RELEASE_WITHIN_S = 0.3
_RENEWALS = 3  # in the time of one lease


class _Lease:
    """At one node service. gRPC's threads write `due` and `error`; the rest is the owner's thread's alone."""

    def __init__(self, node: NodeAddress, tls: TlsFiles | None) -> None:
        self.address = node.address
        self.channel = RenewedChannel(node, tls)
        self.uses = 0
        self.due = 0.0
        self.error: EpmeshError | None = None

    @property
    def stub(self) -> key_service_pb2_grpc.KeyServiceStub:
        """To call."""
        return key_service_pb2_grpc.KeyServiceStub(self.channel.get())

    def ask(self, pair: KeyPair, name: str) -> None:
        """Asks for the lease, or its renewal."""
        self.due = time.monotonic() + _RPC_TIMEOUT_S + _RETRY_S
        request = key_service_pb2.LeaseKeyRequest(public_key=pair.public, name=name)
        self.stub.LeaseKey.future(request, timeout=_RPC_TIMEOUT_S).add_done_callback(self._answered)

    def _answered(self, done: Any) -> None:
        try:
            granted = done.result()
        except grpc.RpcError as exc:
            self.error = errors.from_rpc_error(exc, f"LeaseKey at {self.address}")
            after_s = self.error.retry_after_s if isinstance(self.error, Overloaded) else 0.0
            self.due = time.monotonic() + max(_RETRY_S, after_s)
        except grpc.FutureCancelledError:  # the client was closed
            pass
        else:
            self.error = None
            self.due = time.monotonic() + granted.lease_s / _RENEWALS


class KeyLeases:
    """All leases of one client. Used by one thread."""

    def __init__(self, pair: KeyPair, name: str, tls: TlsFiles | None = None) -> None:
        """Has no lease yet.

        Args:
            name: who the client is, for people.
            tls: what it shows itself with.
        """
        self._pair = pair
        self._name = name
        self._tls = tls
        self._leases: dict[NodeAddress, _Lease] = {}

    def use(self, node: NodeAddress) -> None:
        """A connection to a rank of `node` is about to be made.

        Raises:
            InvalidRequest: the files of `tls` cannot be read.
        """
        lease = self._leases.get(node)
        if lease is None:
            lease = self._leases[node] = _Lease(node, self._tls)
        if not lease.uses:
            lease.ask(self._pair, self._name)
        lease.uses += 1

    def unuse(self, node: NodeAddress) -> None:
        """Such a connection is gone; without any the lease is not renewed."""
        self._leases[node].uses -= 1

    def error(self, node: NodeAddress) -> EpmeshError | None:
        """Why there is no lease at `node`; `None` where there is one, or no answer yet."""
        return self._leases[node].error

    def due(self) -> float | None:
        """``time.monotonic()`` when to call `tend` next; `None`: there is no need."""
        return min((lease.due for lease in self._in_use()), default=None)

    def tend(self, now: float) -> None:
        """Renews what is due."""
        for lease in self._in_use():
            if lease.due <= now:
                lease.ask(self._pair, self._name)

    def close(self) -> None:
        """Gives all leases back, where that takes no time, and closes the channels; idempotent."""
        leases, self._leases = list(self._leases.values()), {}
        request = key_service_pb2.ReleaseKeyRequest(public_key=self._pair.public)
        calls = [
            lease.stub.ReleaseKey.future(request, timeout=_RELEASE_WITHIN_S) for lease in leases if lease.error is None
        ]
        for call in calls:
            call.exception()  # one that is not released ends by itself
        for lease in leases:
            lease.channel.close()

    def _in_use(self) -> Iterable[_Lease]:
        return (lease for lease in self._leases.values() if lease.uses)
