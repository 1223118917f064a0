"""`LocalMesh`: a whole mesh of real processes on loopback, for tests."""

from __future__ import annotations

import atexit
import pickle
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from epmesh.channels import UNIX_PREFIX, open_channel
from epmesh.errors import InvalidRequest, MeshUnavailable, NotReady, PeerLost, from_rpc_error
from epmesh.tls import TlsFiles
from epmesh.v1 import discovery_service_pb2, discovery_service_pb2_grpc
from epmesh.view import View
from epmesh_server.access import Identity, Role
from epmesh_server.certificates import Authority, directory_name
from epmesh_server.coordinator import CoordinatorSettings
from epmesh_server.node.runtime_dir import GRPC_SOCKET
from epmesh_server.node.settings import DEFAULT_BUFFER_BYTES, NodeSettings
from epmesh_server.processes import pickling
from epmesh_server.processes.child import Child, answers, ask, end_all
from epmesh_server.processes.raised import Raised
from epmesh_server.testing.cleaner import remove_when_owner_ends
from epmesh_server.testing.hosted import await_joined, start_hosted
from epmesh_server.testing.messages import Bound, GetReady, Join, NotYet, Ready, Result, Work
from epmesh_server.testing.ports import HOST, Port
from epmesh_server.testing.preload import start_mesh_fork_server
from epmesh_server.testing.rank_runner import DriverSettings, RankSettings, rank_main
from epmesh_server.testing.services import coordinator_main, node_main
from epmesh_server.worker import Worker

_GRACE_S = 0.8
_VIEW_TIMEOUT_S = 5.0
_POLL_S = 0.01


class LocalMesh:
    """A coordinator, node services and ranks, each a process of its own on this machine.

    ::

        with LocalMesh(nodes=2, ranks_per_node=2) as mesh:
            results = mesh.run(work, 3.0)  # work(comm, 3.0) in every rank; a list by global rank

    With ``hosted=True`` the ranks are processes as a node service hosts them, and works run in drivers, one process a
    rank, whose communicators come from ``epmesh.attach``. Where `experts` names a factory, the hosted ranks serve
    instead: send rows by ``epmesh.Router(mesh.address)``.

    Nothing runs before the ``with`` statement and nothing is left after it, nor after the owning process was killed:
    no process, port, descriptor or file. (The fork server that all meshes of a process share ends with the process.)
    The coordinator stands beside no node. Global rank is ``slot * ranks_per_node + local rank``.

    Methods may raise what ``epmesh.join`` and the services raise, `InvalidRequest` for a rank or slot that is not
    there, and `MeshUnavailable` where a process does not start within `timeout_s`. Not for several threads at once.
    """

    def __init__(
        self,
        nodes: int = 2,
        ranks_per_node: int = 2,
        *,
        num_experts: int | None = None,
        experts: str | Sequence[Iterable[int]] | None = None,
        held: Sequence[Iterable[int]] | None = None,
        hosted: bool = False,
        transport: str | None = None,
        tensor_parallel_size: int = 1,
        device: str = "cpu",
        max_tokens_per_rank: int | None = None,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        exchange_timeout_s: float = 30.0,
        timeout_s: float = 30.0,
        tls: bool = False,
    ) -> None:
        """Describes a mesh; ``with`` starts it.

        Args:
            nodes: node services.
            ranks_per_node: ranks of each, and the stride of the mesh.
            num_experts: logical experts that every rank declares when it joins; `None`: nothing is declared.
            experts: those of each global rank; or ``package.module:factory``, whose ``factory(comm)`` makes what hosted
                ranks serve with; `None`: the linear default.
            held: the experts of each global rank where `experts` is a factory; `None`: the linear default.
            hosted: whether the ranks are hosted ones; with a factory they always are.
            transport: of the drivers, as ``epmesh.attach`` takes it.
            tensor_parallel_size: consecutive ranks of one node that form a ``tp:k`` group.
            device: of every rank; "cuda" gives local rank k the device "cuda:k".
            max_tokens_per_rank: as ``epmesh.join`` takes it.
            buffer_bytes: most bytes one source may have for one rank in one exchange.
            exchange_timeout_s: how long a rank's calls wait for others.
            timeout_s: how long starting may take, and how long `run` waits for a view of the living ranks.
            tls: whether the mesh is secured, with certificates that are made for it; clients use `LocalMesh.tls`.
        """
        if nodes < 1 or ranks_per_node < 1:
            raise InvalidRequest(f"a mesh of {nodes} nodes with {ranks_per_node} ranks each; both must be 1 or more")
        world_size = nodes * ranks_per_node
        self._factory = experts if isinstance(experts, str) else ""
        self._hosted = hosted or bool(self._factory)
        self._transport = transport
        placed = held if isinstance(experts, str) or experts is None else experts
        if held is not None and placed is not held:
            raise InvalidRequest("held stands beside a list of experts; give one of them")
        if placed is not None and len(placed) != world_size:
            raise InvalidRequest(f"experts has {len(placed)} entries for {world_size} ranks; give one each")
        if self._factory and num_experts is None:
            raise InvalidRequest(f"experts={self._factory!r} needs num_experts: the logical experts of the model")
        if transport is not None and (self._factory or not self._hosted):
            raise InvalidRequest(f"transport={transport!r} is the drivers'; it needs hosted=True and no factory")
        self.nodes = nodes
        self.ranks_per_node = ranks_per_node
        self._buffer_bytes = buffer_bytes
        self._timeout_s = timeout_s
        self._secured = tls
        self._rank_settings = [
            RankSettings(
                local_rank=rank % ranks_per_node,
                device=f"cuda:{rank % ranks_per_node}" if device == "cuda" else device,
                num_experts=num_experts,
                experts=None if placed is None else tuple(placed[rank]),
                tensor_parallel_size=tensor_parallel_size,
                max_tokens_per_rank=max_tokens_per_rank,
                exchange_timeout_s=exchange_timeout_s,
                timeout_s=timeout_s,
            )
            for rank in range(world_size)
        ]
        self._lock = threading.Lock()  # guards the tables of children, which `start`'s thread reads
        self._rank_children: dict[int, Child] = {}
        self._driver_children: dict[int, Child] = {}
        self._node_children: dict[int, Child] = {}
        self._coordinator: Child | None = None
        self._cleaner: Child | None = None
        self._folder: Path | None = None
        self._ports: list[Port] = []
        self._worker = Worker("local-mesh")

    # Life ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._folder is not None:
            raise InvalidRequest("this LocalMesh has been started before; make another one")
        atexit.register(self.close)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything, within 2 s; idempotent. Work that still runs is cut off."""
        atexit.unregister(self.close)
        with self._lock:
            ranks = [*self._driver_children.values(), *self._rank_children.values()]
            services = [*([self._coordinator] if self._coordinator else []), *self._node_children.values()]
            self._rank_children, self._driver_children = {}, {}
            self._node_children, self._coordinator = {}, None
        for child in ranks:
            child.pause()  # they say nothing of what ends around them, and there is nobody left whom they should answer
        for child in services:
            child.terminate()  # before the ranks are gone, which is no news to services that end
        for child in ranks:
            child.kill()
        end_all([*services, *ranks], _GRACE_S)
        self._worker.close()
        for port in self._ports:
            port.close()
        self._remove_folder()

    def _start(self) -> None:
        start_mesh_fork_server()
        self._folder = Path(tempfile.mkdtemp(prefix="epmesh-"))
        self._cleaner = Child("cleaner", remove_when_owner_ends, str(self._folder), survives=True)
        self._ports = [Port() for _ in range(self.nodes + 1)]
        # Ranks are forked first and joined last: they are there by the time the services listen.
        self._new_ranks(range(len(self._rank_settings)))
        self.start_coordinator()
        self._start_node_services(range(self.nodes))
        self._join(sorted(self._rank_children))

    def _remove_folder(self) -> None:
        cleaner, self._cleaner = self._cleaner, None
        if cleaner is not None:
            cleaner.send(None)
            cleaner.wait(time.monotonic() + _GRACE_S)
            cleaner.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # Work ------------------------------------------------------------------------------------------------------

    def run(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``work(comm, *args)`` in every living rank, after ``wait_ready`` there.

        Args:
            work: a module-level function, of ``__main__`` too. `comm` is the rank's communicator of the group ``ep``,
                the same object every time unless the rank had to join again.
            args: picklable.

        Returns:
            What the ranks returned, ascending by global rank: one entry for each that was alive and not paused at the
            start, a `PeerLost` for one that was killed meanwhile.

        Raises:
            Exception: what `work` raised; of several, the lowest rank's, the others in its notes.
            NotReady: the living ranks had no view in common in time.
        """
        return self.start(work, *args).result()

    def start(self, work: Callable[..., Any], *args: Any) -> Future[list[Any]]:
        """As `run`, but returns at once; the future's result is what `run` returns. One work runs at a time."""
        if self._coordinator is None:
            raise InvalidRequest("this LocalMesh is not started; use it in a with statement")
        if self._factory:
            raise InvalidRequest(
                f"the ranks of this LocalMesh serve with {self._factory!r} and take part in no collective call; send "
                f"rows by epmesh.Router(mesh.address)"
            )
        try:
            message = Work(pickling.dumps((work, args)), tuple(sys.path))
        except (pickle.PicklingError, AttributeError, TypeError) as exc:
            raise InvalidRequest(f"work and its arguments go by pickle: {exc}; use a module-level function") from exc
        return self._worker.submit(lambda: self._run(message))

    def _run(self, message: Work) -> list[Any]:
        children, epoch = self._ready_ranks()
        done = ask(children, message)
        if self._hosted:  # a driver whose rank was killed may raise that it is gone
            alive = self.ranks
            done = {rank: answer if rank in alive else None for rank, answer in done.items()}
        _raise_first(done)
        return [
            pickling.loads(answer.pickled)
            if isinstance(answer, Result)
            else PeerLost([rank], epoch, f"rank {rank} was killed during the work")
            for rank, answer in sorted(done.items())
        ]

    def _ready_ranks(self) -> tuple[dict[int, Child], int]:
        """The living ranks, all in the same view, and its membership epoch."""
        epoch, deadline = 0, time.monotonic() + self._timeout_s
        while children := self._workers(self._living()):
            timeout_s = max(0.0, deadline - time.monotonic())
            ready = ask(children, GetReady(frozenset(children), epoch, timeout_s))
            _raise_first(ready)
            epochs = {answer.membership_epoch for answer in ready.values() if isinstance(answer, Ready)}
            if len(epochs) == 1 and all(isinstance(answer, Ready) for answer in ready.values()):
                return children, epochs.pop()
            if timeout_s == 0:
                seen = [f"rank {rank} sees {each.text}" for rank, each in ready.items() if isinstance(each, NotYet)]
                raise NotReady(f"ranks {sorted(children)} are alive, but have no view in common: {'; '.join(seen)}")
            epoch = max(epochs, default=0)
        raise MeshUnavailable("no rank of this LocalMesh is alive; start a node")

    def _living(self) -> dict[int, Child]:
        with self._lock:
            return {rank: child for rank, child in self._rank_children.items() if child.alive and not child.paused}

    def _workers(self, ranks: dict[int, Child]) -> dict[int, Child]:
        """Who does the work of `ranks`: themselves, or their drivers, of which the dead are replaced."""
        if not self._hosted:
            return ranks
        for rank in ranks:
            if not self._driver(rank).alive:
                self._replace(self._driver_children, rank, self._new_driver(rank))
        return {rank: self._driver(rank) for rank in ranks}

    # Faults ----------------------------------------------------------------------------------------------------

    def kill_rank(self, rank: int) -> None:
        """Kills a rank (SIGKILL); returns when its process is gone."""
        child = self._rank(rank)
        child.kill()
        child.wait()

    def kill_driver(self, rank: int) -> None:
        """Kills the driver of a hosted rank (SIGKILL); returns when its process is gone.

        The rank's membership ends as if it had died, and the rank joins again; the next `run` gives it another driver.
        """
        child = self._driver(rank)
        child.kill()
        child.wait()

    def pause_rank(self, rank: int) -> None:
        """Stops a rank (SIGSTOP); returns when it stands still. `run` leaves it out until it is resumed."""
        self._rank(rank).pause()

    def resume_rank(self, rank: int) -> None:
        """Lets a stopped rank go on (SIGCONT). It joins again at the next `run` if it was evicted meanwhile."""
        self._rank(rank).resume()

    def kill_node(self, slot: int) -> None:
        """Kills a node: its service, ranks and drivers (SIGKILL); returns when their processes are gone."""
        service = self._node(slot)
        with self._lock:
            children = [service, *(self._rank_children[rank] for rank in self._ranks_of(slot))]
            children += [self._driver_children[rank] for rank in self._ranks_of(slot) if rank in self._driver_children]
        for child in children:
            child.kill()
        for child in children:
            child.wait()

    def start_node(self, slot: int) -> None:
        """Starts a node's service again, and those of its ranks that are dead; returns when they have joined."""
        if not self._node(slot).alive:
            self._start_node_services([slot])
        dead = [rank for rank in self._ranks_of(slot) if not self._rank(rank).alive]
        self._new_ranks(dead)
        self._join(dead)

    def kill_coordinator(self) -> None:
        """Kills the coordinator (SIGKILL); returns when its process is gone."""
        if self._coordinator is None:
            raise InvalidRequest("this LocalMesh is not started; use it in a with statement")
        self._coordinator.kill()
        self._coordinator.wait()

    def start_coordinator(self) -> None:
        """Starts the coordinator again, with its log and on its port; returns when it listens."""
        if self._coordinator is not None:
            if self._coordinator.alive:
                raise InvalidRequest("the coordinator is alive; kill it first")
            self._coordinator.close()
        settings = CoordinatorSettings(
            host=HOST,
            port=self._ports[-1].number,
            data_dir=self._path("coordinator"),
            stride=self.ranks_per_node,
            tls=self._certificate(Identity(Role.COORDINATOR)),
        )
        self._coordinator = Child("coordinator", coordinator_main, settings)
        _bound(self._coordinator, time.monotonic() + self._timeout_s)

    # What there is ---------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> list[int]:
        """Global ranks whose processes are alive, paused ones too."""
        with self._lock:
            return [rank for rank, child in sorted(self._rank_children.items()) if child.alive]

    @property
    def addresses(self) -> list[str]:
        """host:port of every living node service, ascending by slot."""
        with self._lock:
            alive = [slot for slot, child in sorted(self._node_children.items()) if child.alive]
        return [self._ports[slot].address for slot in alive]

    @property
    def address(self) -> str:
        """host:port of a living node service."""
        addresses = self.addresses
        if not addresses:
            raise MeshUnavailable("no node service of this LocalMesh is alive; start a node")
        return addresses[0]

    @property
    def coordinator_address(self) -> str:
        """host:port of the coordinator, alive or not."""
        if not self._ports:
            raise InvalidRequest("this LocalMesh is not started; use it in a with statement")
        return self._ports[-1].address

    @property
    def tls(self) -> TlsFiles | None:
        """What a router or driver of this mesh shows itself with; `None` where it is not secured."""
        return self._certificate(Identity(Role.DRIVER, "local"), Identity(Role.ROUTER, "local"))

    @property
    def authority(self) -> Authority | None:
        """Who makes the certificates of this mesh, for others that tests need; `None` where it is not secured."""
        if not self._secured:
            return None
        folder = self._path("certificates")
        return Authority.load(folder) if folder.exists() else Authority.make(folder)

    def view(self) -> View:
        """The newest view that a living node service knows."""
        address = self.address
        request = discovery_service_pb2.GetViewRequest()
        with open_channel(address, tls=self.tls) as channel:
            stub = discovery_service_pb2_grpc.DiscoveryServiceStub(channel)
            try:
                # On a busy machine one try to connect may take longer than a channel gives it.
                answer = stub.GetView(request, timeout=_VIEW_TIMEOUT_S, wait_for_ready=True)
                return View.from_proto(answer.view)
            except grpc.RpcError as exc:
                raise from_rpc_error(exc, f"GetView at {address}") from exc

    # Parts -----------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name

    def _certificate(self, *identities: Identity) -> TlsFiles | None:
        """The certificate with these identities, made when first needed; `None` where the mesh is not secured."""
        authority = self.authority
        if authority is None:
            return None
        directory = authority.directory / directory_name(identities[0])
        return TlsFiles.from_directory(directory) if directory.exists() else authority.issue(directory, identities)

    def _ranks_of(self, slot: int) -> range:
        return range(slot * self.ranks_per_node, (slot + 1) * self.ranks_per_node)

    def _rank(self, rank: int) -> Child:
        with self._lock:
            if rank not in self._rank_children:
                raise InvalidRequest(f"no rank {rank}; there are {sorted(self._rank_children)}")
            return self._rank_children[rank]

    def _node(self, slot: int) -> Child:
        with self._lock:
            if slot not in self._node_children:
                raise InvalidRequest(f"no node in slot {slot}; there are {sorted(self._node_children)}")
            return self._node_children[slot]

    def _driver(self, rank: int) -> Child:
        self._rank(rank)
        with self._lock:
            if rank not in self._driver_children:
                raise InvalidRequest(f"rank {rank} has no driver: the ranks of this LocalMesh are not driven")
            return self._driver_children[rank]

    def _new_ranks(self, ranks: Collection[int]) -> None:
        """Starts the processes of ranks, and those of their drivers; nobody waits for them yet."""
        world_size = len(self._living()) + len(ranks)
        for rank in ranks:
            settings = self._rank_settings[rank]
            if not self._hosted:
                child = Child(f"rank-{rank}", rank_main, settings)
            else:
                child = start_hosted(rank, settings, self._local_address_of(rank), world_size, self._factory)
            self._replace(self._rank_children, rank, child)
            if self._hosted and not self._factory:
                self._replace(self._driver_children, rank, self._new_driver(rank))

    def _new_driver(self, rank: int) -> Child:
        settings = DriverSettings(
            address=self._address_of(rank),
            rank=rank,
            transport=self._transport,
            timeout_s=self._timeout_s,
            tls=self.tls,
        )
        return Child(f"driver-{rank}", rank_main, settings)

    def _address_of(self, rank: int) -> str:
        """host:port of the node service of a rank."""
        return self._ports[rank // self.ranks_per_node].address

    def _local_address_of(self, rank: int) -> str:
        """Where a rank joins: in a secured mesh at its node service's unix socket, which asks for no certificate."""
        slot = rank // self.ranks_per_node
        return f"{UNIX_PREFIX}{self._path(f'node-{slot}') / GRPC_SOCKET}" if self._secured else self._address_of(rank)

    def _where_to_enter(self, rank: int) -> str:
        """Where the worker of a rank comes in: a rank at its socket, a driver at the port."""
        return self._address_of(rank) if self._hosted else self._local_address_of(rank)

    def _replace(self, children: dict[int, Child], key: int, child: Child) -> None:
        """Puts a new child in the place of a dead one."""
        with self._lock:
            old = children.get(key)
            children[key] = child
        if old is not None:
            old.close()

    def _start_node_services(self, slots: Iterable[int]) -> None:
        """Starts them all at once; returns when they listen."""
        started = {slot: Child(f"node-{slot}", node_main, self._node_settings(slot)) for slot in slots}
        for slot, child in started.items():
            self._replace(self._node_children, slot, child)
        for child in started.values():
            _bound(child, time.monotonic() + self._timeout_s)

    def _node_settings(self, slot: int) -> NodeSettings:
        return NodeSettings(
            host=HOST,
            port=self._ports[slot].number,
            node_id=f"node-{slot}",
            coordinator=self.coordinator_address,
            runtime_dir=self._path(f"node-{slot}"),
            slot=slot,
            buffer_bytes=self._buffer_bytes,
            tls=self._certificate(Identity(Role.NODE, f"node-{slot}")),
        )

    def _join(self, ranks: Sequence[int]) -> None:
        """Has new ranks join, all at once, in a view with every other living rank."""
        with self._lock:
            children = {rank: self._rank_children[rank] for rank in ranks}
        if self._hosted:
            deadline = time.monotonic() + self._timeout_s
            epochs = [await_joined(child, deadline) for child in children.values()]
            if self._factory:
                self._await_serving(children, max(epochs, default=0), deadline)
                return
        world_size = len(self._living())
        workers = self._workers(children)
        for rank, child in workers.items():
            child.send(Join(self._where_to_enter(rank), world_size))
        joined = answers(workers)
        _raise_first(joined)
        dead = [rank for rank, answer in joined.items() if answer is None]
        if dead:
            raise MeshUnavailable(f"rank {dead[0]} ended while it was starting")

    def _await_serving(self, ranks: Collection[int], epoch: int, deadline: float) -> None:
        """Until a view not older than `epoch` shows the front of each of `ranks`: then routers may come."""
        while True:
            view = self.view()
            silent = [rank for rank in ranks if rank not in view.ranks or not view.ranks[rank].front_endpoint]
            if view.epoch >= epoch and not silent:
                return
            if time.monotonic() > deadline:
                raise MeshUnavailable(f"ranks {silent} do not serve in time; epoch {view.epoch}")
            time.sleep(_POLL_S)


def _bound(child: Child, deadline: float) -> str:
    """The address a service reports; raises what it reports instead."""
    if not child.pipe.poll(max(0.0, deadline - time.monotonic())):
        raise MeshUnavailable(f"{child.name} does not listen in time")
    try:
        answer = child.receive()
    except EOFError:
        raise MeshUnavailable(f"{child.name} ended while it was starting") from None
    if isinstance(answer, Raised):
        raise answer.error(child.name)
    assert isinstance(answer, Bound)
    return answer.address


def _raise_first(messages: dict[int, Any]) -> None:
    """Raises what the lowest rank raised, if one did; the others' errors are added as notes."""
    raised = {rank: answer for rank, answer in sorted(messages.items()) if isinstance(answer, Raised)}
    if not raised:
        return
    errors = [answer.error(f"rank {rank}") for rank, answer in raised.items()]
    for other in errors[1:]:
        errors[0].add_note(f"also {type(other).__name__}: {other}, {other.__notes__[0]}")
    raise errors[0]
