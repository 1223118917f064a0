"""What a hosted rank does while it is in the mesh: it serves routers, or waits for a driver."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

from epmesh.errors import EpmeshError, InvalidRequest
from epmesh_server.hosted.factory import Experts, Factory

if TYPE_CHECKING:
    from epmesh_server.ranks.communicator import JoinedCommunicator

_log = logging.getLogger(__name__)
_LOOK_S = 0.2


class Duty(Protocol):
    """One of them. `prepare` and `run` are called once for each membership, in turn."""

    @property
    def front_endpoint(self) -> str:
        """Where the rank takes requests from the moment on that it joins; empty: nowhere yet."""

    def prepare(self, comm: JoinedCommunicator) -> None:
        """The rank is in the mesh: gets ready for work."""

    def run(self, stop: threading.Event) -> None:
        """Works until `stop` is set; raises what ended the membership."""

    def close(self) -> None:
        """The process ends."""


class Serve:
    """Answers routers with what a factory makes.

    The rank has no front before its experts are there, so no router sends it anything while weights are loaded.
    """

    front_endpoint = ""

    def __init__(self, name: str, factory: Factory, drain_s: float) -> None:
        self._name = name
        self._factory = factory
        self._drain_s = drain_s
        self._comm: JoinedCommunicator | None = None
        self._experts: Experts | None = None

    def prepare(self, comm: JoinedCommunicator) -> None:
        """Has the factory make the experts.

        Raises:
            InvalidRequest: it failed, or made something else.
        """
        self._comm = comm
        try:
            experts = self._factory(comm)
        except EpmeshError:
            raise
        except Exception as exc:
            _log.exception("experts %s failed", self._name)
            text = f"experts {self._name!r}: the factory raised {type(exc).__name__}: {exc}"
            raise InvalidRequest(text) from exc
        if not callable(experts):
            raise InvalidRequest(
                f"experts {self._name!r}: the factory returned {experts!r:.80}; return a function "
                f"experts(layer, hidden_states, topk_weights, topk_ids) -> hidden_states"
            )
        self._experts = experts

    def run(self, stop: threading.Event) -> None:
        """Serves; after `stop` it answers what was taken in, for `drain_s` at most."""
        assert self._comm is not None
        assert self._experts is not None
        self._comm.serve(self._experts, stop=stop, drain_s=self._drain_s)

    def close(self) -> None:
        """Nothing is left."""


class Drive:
    """Does what a driver says."""

    front_endpoint = ""

    def __init__(self, address: str) -> None:
        self._address = address
        self._comm: JoinedCommunicator | None = None

    def prepare(self, comm: JoinedCommunicator) -> None:
        """Nothing is needed."""
        self._comm = comm

    def run(self, stop: threading.Event) -> None:
        """Waits until `stop` is set or the membership ends."""
        assert self._comm is not None
        _idle(self._comm, stop)

    def close(self) -> None:
        """Nothing is left."""


def _idle(comm: JoinedCommunicator, stop: threading.Event) -> None:
    session = comm._rank_process.session
    while not stop.wait(_LOOK_S):
        if session.error is not None:
            raise session.error
