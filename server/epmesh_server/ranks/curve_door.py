"""What secures the ZeroMQ endpoints of one rank: its keys, and the way to the node service that knows all others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import zmq

from epmesh.curve import HANDSHAKE_MS, KeyPair
from epmesh.errors import Unauthenticated
from epmesh.v1 import frame_pb2, front_pb2, rank_service_pb2
from epmesh.view import View
from epmesh_server.curve_users import Domain, front_refusal, lease_of, link_refusal
from epmesh_server.refusals import RefusalLog

_log = logging.getLogger(__name__)

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True)
class _Leases:
    """Which clients' leases run; those after `newest` do until the node service says otherwise."""

    newest: int = 0
    live: frozenset[int] = frozenset()

    def run(self, lease: int) -> bool:
        """Whether this one does."""
        return lease > self.newest or lease in self.live


class CurveDoor:
    """The keys of one rank, for as long as its membership. Usable from any thread.

    Attributes:
        pair: of this incarnation, never written anywhere.
        refusals: of admitted peers that said what is not theirs to say.
    """

    def __init__(self, zap_socket: str) -> None:
        """Makes the keys.

        Args:
            zap_socket: path of the unix socket where the node service says whom to admit.
        """
        self.pair = KeyPair.generate()
        self.refusals = RefusalLog(_log, "source.refused")
        self._zap_socket = zap_socket
        self._lock = threading.Lock()  # guards _keys
        self._keys: dict[str, bytes] = {}  # public keys by link endpoint
        self._leases = _Leases()

    def guard(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], domain: Domain) -> None:
        """Has `socket` admit whom the node service admits, and nobody else; before ``bind``.

        A thread of its own carries the questions, until the context is terminated.
        """
        frontend, backend = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        for each in (frontend, backend):
            each.linger = 0
        frontend.bind(_ZAP_ENDPOINT)
        backend.connect(f"ipc://{self._zap_socket}")
        threading.Thread(target=_carry, args=(frontend, backend), name="epmesh-zap", daemon=True).start()
        socket.setsockopt(zmq.ZAP_DOMAIN, domain.value.encode())
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.pair.secret)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)

    def key_at(self, rank: int, endpoint: str) -> bytes:
        """The public key of `rank`, which takes link frames at `endpoint`.

        Raises:
            Unauthenticated: no view has shown a key for that endpoint.
        """
        key = self._keys.get(endpoint)
        if not key:
            raise Unauthenticated(
                f"no view shows a CURVE key of rank {rank} at {endpoint}; nothing is sent in the clear"
            )
        return key

    def learn(self, view: View) -> None:
        """Takes in the keys of a view that arrived."""
        with self._lock:
            self._keys.update({info.link_endpoint: info.curve_key for info in view.ranks.values()})

    def forget_all_but(self, endpoints: Iterable[str]) -> None:
        """Drops the keys of other link endpoints."""
        keep = set(endpoints)
        with self._lock:
            self._keys = {endpoint: key for endpoint, key in self._keys.items() if endpoint in keep}

    def take_leases(self, notice: rank_service_pb2.ClientKeys) -> None:
        """Clients' leases ended."""
        self._leases = _Leases(notice.newest, frozenset(notice.live))

    def check_link(self, frame: zmq.Frame, header: frame_pb2.FrameHeader) -> None:
        """Refuses a link frame whose source is not who sent it.

        Raises:
            Unauthenticated: it is not; this was counted, and logged if nothing was lately.
        """
        user = str(frame.get("User-Id"))
        self._raise(user, link_refusal(user, header))

    def check_front(self, frame: zmq.Frame, request: front_pb2.FrontRequest) -> None:
        """Refuses a request that is not for its sender to make.

        Raises:
            Unauthenticated: it is not, or its sender's lease is over.
        """
        user = str(frame.get("User-Id"))
        lease = lease_of(user)
        over = lease is not None and not self._leases.run(lease)
        self._raise(user, f"the lease of {user} is over; lease the key again" if over else front_refusal(user, request))

    def _raise(self, user: str, refusal: str | None) -> None:
        if refusal is not None:
            self.refusals.note(user, refusal)
            raise Unauthenticated(refusal)


def _carry(frontend: zmq.Socket[bytes], backend: zmq.Socket[bytes]) -> None:
    """Carries questions and answers without the GIL, until the context is terminated."""
    try:
        zmq.proxy(frontend, backend)
    except zmq.ContextTerminated:
        pass
    finally:
        frontend.close(0)
        backend.close(0)
