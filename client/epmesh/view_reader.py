"""The thread that watches a mesh: connects to one service after the other, and follows its views until it goes away."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Sequence

import grpc

from epmesh.channels import ONE_TRY_OPTIONS, open_channel
from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest, MeshUnavailable, from_rpc_error
from epmesh.mesh_state import MeshState
from epmesh.rotation import Rotation
from epmesh.tls import TlsFiles
from epmesh.tls_refusals import explained
from epmesh.v1 import discovery_service_pb2 as discovery
from epmesh.v1 import discovery_service_pb2_grpc as discovery_rpc
from epmesh.version import VERSION, check_compatible
from epmesh.view import View

_log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 2.0
STEADY_S = 1.0
_JOIN_TIMEOUT_S = 2.0


class ViewReader:
    """Writes the views of the first service that answers into a `MeshState`; goes on with the next when it goes away.

    Tries for ever, until closed. Every try has a channel of its own, so that names are looked up anew. Besides the
    given addresses it uses those of the nodes in the newest view, if they belong to the same mesh still.
    """

    def __init__(self, addresses: Sequence[str], state: MeshState, tls: TlsFiles | None = None) -> None:
        self._tls = tls
        self._addresses = tuple(addresses)
        self._state = state
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _channel
        self._channel: grpc.Channel | None = None
        self._answered_at = math.inf  # the thread's own
        self._thread = threading.Thread(target=self._run, name="epmesh-views", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and its connection; idempotent. May be called on the thread itself."""
        self._closing.set()
        with self._lock:
            channel = self._channel
        if channel is not None:
            channel.close()  # ends whatever call is under way
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        rotation = Rotation(self._addresses)
        while True:
            address, pause_s = rotation.next(self._learned())
            # Where many clients lose one service, chance keeps them from coming back all at once.
            if self._closing.wait(pause_s * random.uniform(0.5, 1.0)):
                return
            self._answered_at = math.inf
            error = self._follow(address)
            if self._closing.is_set():
                return
            if time.monotonic() - self._answered_at > STEADY_S:
                rotation.worked(address)
            self._say(address, error)
            self._state.failed(address if address in self._addresses else None, error)

    def _learned(self) -> list[str]:
        """Addresses of the nodes in the newest view."""
        return [node.address for node in self._state.view.nodes] if self._state.view else []

    def _say(self, address: str, error: EpmeshError) -> None:
        """Logs what is new, not every try. Before the first answer `connect` says it, as an error."""
        view, known = self._state.view, self._state.problems.get(address)
        in_use = self._answered_at < math.inf
        if in_use or (address in self._addresses and (known is None or str(known) != str(error))):
            level = logging.WARNING if view else logging.INFO
            _log.log(level, "epoch=%d discovery.lost: %s: %s", view.epoch if view else 0, address, error)

    def _follow(self, address: str) -> EpmeshError:
        """Watches the service at `address` for as long as it answers; returns why it does not, or not any more."""
        try:
            channel = open_channel(address, ONE_TRY_OPTIONS, tls=self._tls)
        except InvalidRequest as exc:
            return exc
        try:
            with self._lock:
                self._channel = channel
            if self._closing.is_set():
                return MeshUnavailable("closed")
            self._watch(address, discovery_rpc.DiscoveryServiceStub(channel))
            return MeshUnavailable("it ended the watch")
        except EpmeshError as exc:
            return exc
        except grpc.RpcError as exc:
            return self._typed(exc, address)
        except Exception as exc:  # noqa: BLE001 - if this thread died, views would stop without a word
            if not self._closing.is_set():  # gRPC raises ValueError where a channel is closed already
                _log.exception("discovery.failed: %s", address)
            return MeshUnavailable(f"{type(exc).__name__}: {exc}")
        finally:
            with self._lock:
                self._channel = None
            channel.close()

    def _typed(self, error: grpc.RpcError, address: str) -> EpmeshError:
        typed = _typed(error)
        first = self._answered_at == math.inf and not self._closing.is_set()
        return explained(typed, address, self._tls) if first else typed

    def _watch(self, address: str, stub: discovery_rpc.DiscoveryServiceStub) -> None:
        answer = stub.GetView(discovery.GetViewRequest(), timeout=ANSWER_TIMEOUT_S)
        check_compatible(VERSION, answer.version, f"the service at {address}", here="this client")
        if address not in self._addresses and answer.view.mesh_id != self._state.mesh_id:
            raise MeshUnavailable(f"it belongs to another mesh now, {answer.view.mesh_id or 'or none'}")
        self._state.answered(address, View.from_proto(answer.view))
        self._answered_at = time.monotonic()
        newest = self._state.view
        assert newest is not None
        _log.info("epoch=%d discovery.connected: %s", newest.epoch, address)
        request = discovery.WatchViewsRequest(after_epoch=newest.epoch, mesh_id=newest.mesh_id)
        for response in stub.WatchViews(request):
            self._state.adopt(View.from_proto(response.view))


def _typed(error: grpc.RpcError) -> EpmeshError:
    """The error with the one part of gRPC's text that says something."""
    typed = from_rpc_error(error, "DiscoveryService")
    if isinstance(typed, DeadlineExceeded):
        return MeshUnavailable(f"no answer within {ANSWER_TIMEOUT_S:g} s")
    if isinstance(typed, MeshUnavailable):
        reason = str(typed).rpartition("remote host: ")[2].removesuffix(" (UNAVAILABLE)")
        return MeshUnavailable(reason.removeprefix("DiscoveryService: "))
    return typed
