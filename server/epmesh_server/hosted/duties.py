"""What a hosted rank does while it is in the mesh: it serves routers, or waits for a driver."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Protocol

from epmesh.errors import EpmeshError, InvalidRequest
from epmesh_server.hosted.factory import Experts, Factory

if TYPE_CHECKING:
    from epmesh_server.ranks.communicator import JoinedCommunicator
    from epmesh_server.ranks.curve_door import CurveDoor
    from epmesh_server.ranks.front import Front

_log = logging.getLogger(__name__)
_DESCRIBE_WITHIN_S = 1e6  # the coordinator may be started whenever it pleases


class Duty(Protocol):
    """One of them. Called in this order for each membership; `close` ends whatever `open` began.

    Attributes:
        door: what `open` secured the front with; the rank's links then take the same keys.
    """

    door: CurveDoor | None

    def open(self) -> str:
        """Before joining: where the rank takes requests from then on; empty: nowhere yet."""

    def prepare(self, comm: JoinedCommunicator) -> None:
        """The rank is in the mesh: gets ready for work."""

    def run(self, comm: JoinedCommunicator, stop: threading.Event) -> None:
        """Works until `stop` is set or the membership ends; may raise what ended it."""

    def close(self) -> None:
        """The membership is over."""


class Serve:
    """Answers routers with what a factory makes.

    The rank has no front before its experts are there, so no router sends it anything while weights are loaded.
    """

    def __init__(self, name: str, factory: Factory, drain_s: float) -> None:
        """Serves with ``factory(comm)``; `name` is what errors call it."""
        self._name = name
        self._factory = factory
        self._drain_s = drain_s
        self._experts: Experts | None = None
        self.door: CurveDoor | None = None  # made when the rank joins, and the front has it then

    def open(self) -> str:
        """Nowhere yet."""
        return ""

    def prepare(self, comm: JoinedCommunicator) -> None:
        """Has the factory make the experts.

        Raises:
            InvalidRequest: it failed, or made something else.
        """
        placement = comm.view.placement(None)
        if placement is not None and not placement.experts_of.get(comm.global_rank):
            _log.warning(
                "this rank holds none of the %d experts, so no router sends it rows; say with --world-size how many "
                "ranks share them, or with --hold which are this one's",
                placement.num_experts,
            )
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

    def run(self, comm: JoinedCommunicator, stop: threading.Event) -> None:
        """Serves; after `stop` it answers what was taken in, for `drain_s` at most."""
        assert self._experts is not None
        comm.serve(self._experts, stop=stop, drain_s=self._drain_s)

    def close(self) -> None:
        """Lets go of the experts."""
        self._experts = None


class Drive:
    """Does what a driver says, whoever that is at the time."""

    def __init__(self, address: str) -> None:
        """For a rank of the node service at `address`."""
        self._address = address
        self._front: Front | None = None
        self.door: CurveDoor | None = None

    def open(self) -> str:
        """Binds the front, on the host that the rank's links have too."""
        from epmesh_server.ranks.curve_door import CurveDoor
        from epmesh_server.ranks.front import Front
        from epmesh_server.ranks.session import describe_node

        node = describe_node(self._address, _DESCRIBE_WITHIN_S)
        self.door = CurveDoor(node.zap_socket) if node.curve else None
        self._front = Front(node.link_host, door=self.door)
        return self._front.endpoint

    def prepare(self, comm: JoinedCommunicator) -> None:
        """Says whose front it is."""
        assert self._front is not None
        rank = comm._rank_process
        self._front.identify(comm.view.mesh_id, comm.global_rank, rank.incarnation)

    def run(self, comm: JoinedCommunicator, stop: threading.Event) -> None:
        """Executes drivers' calls."""
        from epmesh_server.ranks.driven import drive

        assert self._front is not None
        drive(comm, self._front, stop)
        error = comm._rank_process.session.error
        if error is not None and not stop.is_set():
            raise error

    def close(self) -> None:
        """Closes the front."""
        if self._front is not None:
            self._front.close(linger_s=0.0)
            self._front = None
