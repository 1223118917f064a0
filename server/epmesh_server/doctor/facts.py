"""What the doctor knows of a host, and what it was asked about. Plain values: probes fill them, checks judge them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from epmesh.addresses import ANY_HOST, is_loopback, join_address, parse_coordinators, split_address


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `epmesh serve` would be told; the names are its options'.

    Attributes:
        coordinator: host:port; `None`: one beside the node, on `coordinator_port`.
        node: host:port of a node service to look at besides; `None`: none.
        runtime_dir: `None`: a fresh directory under the temporary one.
        data_dir: where a coordinator beside the node keeps its log; `None`: there is none beside it.
        ranks: hosted ranks.
        tls_dir: where the certificates of this node are; `None`: there is no TLS.
    """

    host: str = "127.0.0.1"
    port: int = 7400
    node_id: str | None = None
    advertise: str | None = None
    link_host: str | None = None
    coordinator: str | None = None
    coordinator_port: int = 7401
    node: str | None = None
    runtime_dir: Path | None = None
    data_dir: Path | None = None
    buffer_bytes: int = 1 << 30
    ranks: int = 0
    threads: int = 1
    device: str = "cpu"
    insecure: bool = False
    tls_dir: Path | None = None

    @property
    def coordinator_address(self) -> str:
        """host:port of the coordinator, wherever it is; the first of several."""
        if self.coordinator is not None:
            return parse_coordinators(self.coordinator)[0]
        return join_address("127.0.0.1" if self.host in ANY_HOST else self.host, self.coordinator_port)

    @property
    def coordinator_host(self) -> str:
        """Its host alone, without brackets."""
        return split_address(self.coordinator_address, "coordinator")[0].strip("[]")

    @property
    def on_one_host(self) -> bool:
        """Whether the whole mesh is on this host's loopback, which is what `epmesh serve` makes without options."""
        return is_loopback(self.coordinator_host) and is_loopback(self.host)

    @property
    def on_gpu(self) -> bool:
        """Whether ranks here use CUDA devices."""
        return self.device.startswith("cuda")


# Network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Interface:
    """One network interface that is up.

    Attributes:
        addresses: IPv4 and IPv6, as text.
        mtu: bytes; 0 where unknown.
    """

    name: str
    addresses: tuple[str, ...] = ()
    mtu: int = 0
    loopback: bool = False


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """How a name was looked up.

    Attributes:
        addresses: what it stands for, in the resolver's order; none where the last try failed.
        problem: what the last try said; empty where it worked.
        first_problem: what the first try said, where a later one worked.
        tries: how many it took.
        took_s: how long all of them took.
    """

    name: str
    addresses: tuple[str, ...] = ()
    problem: str = ""
    first_problem: str = ""
    tries: int = 1
    took_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Resolver:
    """What /etc/resolv.conf says."""

    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    ndots: int = 1


class Dialled(enum.Enum):
    """What became of a try to connect."""

    OPEN = "open"
    REFUSED = "refused"
    SILENT = "silent"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, kw_only=True)
class Dial:
    """One try to connect to one address.

    Attributes:
        source: this host's address towards it; empty where there is no route.
        segment_bytes: most bytes of a TCP segment that both ends agreed on; 0 where it did not open.
        problem: what the kernel said, where it is unreachable.
    """

    address: str
    port: int
    outcome: Dialled
    source: str = ""
    segment_bytes: int = 0
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Port:
    """A port that a service here would listen on.

    Attributes:
        state: "free", "taken", "foreign" (not an address of this host), "denied" or "unknown".
        pid: of the process that listens there; 0 where it cannot be seen.
        command: its command line.
    """

    what: str
    host: str
    number: int
    state: str
    pid: int = 0
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """Addresses, names and ports of this host.

    Attributes:
        advertised: host:port that the node would advertise; empty where that hangs on a name that does not resolve.
        own_names: the hosts of `advertised` and of `--link-host`, each looked up.
        interfaces_problem: why the kernel does not list them; empty where it does.
        default_interface: the interface of the default route; empty where there is none.
        ephemeral_ports: lowest and highest; (0, 0) where unknown.
        reserved_ports: numbers that the kernel gives to nobody who asks for a free one.
    """

    hostname: str
    interfaces: tuple[Interface, ...] = ()
    interfaces_problem: str = ""
    advertised: str = ""
    own_names: Mapping[str, Lookup] = field(default_factory=dict)
    resolver: Resolver = Resolver()
    default_interface: str = ""
    ephemeral_ports: tuple[int, int] = (0, 0)
    reserved_ports: frozenset[int] = frozenset()
    ports: tuple[Port, ...] = ()

    def interface_of(self, address: str) -> Interface | None:
        """The interface that has `address`."""
        return next((interface for interface in self.interfaces if address in interface.addresses), None)

    def route_interface(self, dial: Dial) -> Interface | None:
        """The interface on the way to what was dialled."""
        return self.interface_of(dial.source)


# Services --------------------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    """Who answers at an address."""

    NODE = "node service"
    COORDINATOR = "coordinator"
    STRANGER = "something else"
    MUTE = "something that does not answer"
    UNTRUSTED = "somebody who does not talk to this host, or to whom it does not talk"
    NOBODY = "nobody"


@dataclass(frozen=True, kw_only=True)
class NodeSeen:
    """A node of the view."""

    slot: int
    node_id: str
    incarnation: int
    address: str


@dataclass(frozen=True, kw_only=True)
class Service:
    """What answers at an address.

    Attributes:
        lookup: of its host name.
        dials: one an address of it.
        problem: why it did not answer as a service of epmesh.
        clock_ahead_s: how far its clock is ahead of ours; `None` where it tells no time.
        clock_error_s: how far that may be wrong.
        node_id, incarnation, coordinator_address, registered, coordinator_reachable: of a node service.
        nodes: of its view.
        tls_refusal: what TLS minds, on either side; empty where it minds nothing.
        role_refusal: why the caller's certificate may not ask; empty where it may.
    """

    address: str
    lookup: Lookup
    dials: tuple[Dial, ...] = ()
    kind: Kind = Kind.NOBODY
    problem: str = ""
    version: str = ""
    clock_ahead_s: float | None = None
    clock_error_s: float = 0.0
    node_id: str = ""
    incarnation: int = 0
    coordinator_address: str = ""
    registered: bool = False
    coordinator_reachable: bool = False
    epoch: int = 0
    nodes: tuple[NodeSeen, ...] = ()
    tls_refusal: str = ""
    role_refusal: str = ""

    @property
    def on_loopback(self) -> bool:
        """Whether only this host can be there."""
        return bool(self.lookup.addresses) and all(map(is_loopback, self.lookup.addresses))

    @property
    def opened(self) -> tuple[Dial, ...]:
        """The addresses that took a connection."""
        return tuple(dial for dial in self.dials if dial.outcome is Dialled.OPEN)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An endpoint that the view names, dialled from here.

    Attributes:
        what: "node service", "links" or "front".
        owner: the node's id and, of a rank, its number.
        outcome: `None` where the name could not be looked up in time.
    """

    what: str
    owner: str
    address: str
    outcome: Dialled | None


@dataclass(frozen=True, kw_only=True)
class MeshFacts:
    """The services that were asked, and what they know.

    Attributes:
        coordinator: at the address where the coordinator should be.
        node: the node service that was asked about; `None` where none was.
        here: what listens on this node's own port; `None` where nobody does.
        endpoints: every endpoint of the newest view.
    """

    coordinator: Service
    node: Service | None = None
    here: Service | None = None
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """What is in the TLS directory.

    Attributes:
        problem: why the files cannot be used; empty where they can.
        doubt: "expired", "early" or "untrusted", where a peer with the same authority would not believe them.
        doubt_text: what it would say.
        seconds_left: until the certificate ends.
        names: all that it is for.
    """

    directory: Path
    problem: str = ""
    doubt: str = ""
    doubt_text: str = ""
    seconds_left: float = 0.0
    names: tuple[str, ...] = ()


# This host -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LimitFacts:
    """What this process may use.

    Attributes:
        open_files, locked_bytes: soft and hard limit; -1 means none.
        memory_limit_bytes: the tightest cgroup limit, or the host's memory; 0 where unknown.
        memory_used_bytes: of it; page cache that can be dropped is left out.
        memory_limited_by: the file with that limit; "MemTotal" where no cgroup limits it.
        cpus: that the scheduler may use.
        cpu_quota: CPUs' worth of time a period; 0 where there is no quota.
        pids_limit, pids_used: tasks (processes and threads) of the cgroup; 0 where there is no limit.
        shm_bytes: size of /dev/shm; 0 where there is none.
        shm_free_bytes: what is free there.
        memfd_problem, passing_problem, eventfd_problem: why memfd_create, passing descriptors over a unix socket, or
            eventfd do not work; empty where they do.
        seccomp: whether a system call filter is on.
    """

    open_files: tuple[int, int] = (-1, -1)
    locked_bytes: tuple[int, int] = (-1, -1)
    memory_limit_bytes: int = 0
    memory_used_bytes: int = 0
    memory_limited_by: str = ""
    cpus: int = 1
    cpu_quota: float = 0.0
    pids_limit: int = 0
    pids_used: int = 0
    shm_bytes: int = 0
    shm_free_bytes: int = 0
    memfd_problem: str = ""
    passing_problem: str = ""
    eventfd_problem: str = ""
    seccomp: bool = False


@dataclass(frozen=True, kw_only=True)
class Directory:
    """A directory that a service writes to.

    Attributes:
        what: "runtime directory", "data directory" or "temporary directory".
        exists: whether it is there; else everything else is about its nearest parent that is.
        owner, mode: user id and permission bits.
        file_system: its type, such as "ext4" or "overlay"; empty where unknown.
        free_bytes: what this user may still write there.
        write_problem: why a file cannot be made there; empty where it can.
        socket_problem: why a unix socket cannot be made there; empty where it can, or where none is needed.
        socket_path_bytes: length of the longest socket's path there; 0 where none is needed.
        socket_path_most: how long the kernel lets it be.
        in_use: whether a running node service holds it.
    """

    what: str
    path: Path
    exists: bool = True
    owner: int = 0
    mode: int = 0o700
    file_system: str = ""
    free_bytes: int = 1 << 40
    write_problem: str = ""
    socket_problem: str = ""
    socket_path_bytes: int = 0
    socket_path_most: int = 107
    in_use: bool = False


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """Versions, environment and what kind of place this is.

    Attributes:
        versions: by name: epmesh, python, kernel, libc, and the packages that matter; empty where not installed.
        environment: variables that change how epmesh, gRPC, torch or NCCL work.
        container: "docker", "podman", "kubernetes", "container" or empty.
        first_process: command line of process 1.
        zombies: dead processes that nobody has waited for.
        user: effective user id.
        proxy_used: whether epmesh's own channels would take an HTTP proxy.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    container: str = ""
    first_process: tuple[str, ...] = ()
    zombies: int = 0
    user: int = 0
    proxy_used: bool = False


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """CUDA devices, as the driver shows them.

    Attributes:
        problem: why there are none; empty where there are.
        device_files: of /dev, such as "/dev/nvidia0".
        driver: version of the kernel module; empty where it is not loaded.
        cuda: the newest CUDA that the driver takes, as 13000 for 13.0.
        names: of the devices.
        no_peer_access: pairs of devices that cannot reach each other's memory.
        multicast: whether every device can NVLink multicast.
        torch_cuda: CUDA version that torch was built for; empty: a build without CUDA.
    """

    problem: str = ""
    device_files: tuple[str, ...] = ()
    driver: str = ""
    cuda: int = 0
    names: tuple[str, ...] = ()
    no_peer_access: tuple[tuple[int, int], ...] = ()
    multicast: bool = False
    torch_cuda: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that was found out.

    Attributes:
        gpu: `None` where no rank uses one.
        certificates: `None` where there is no TLS directory.
        refused: why the options themselves would be refused; empty where they would not.
        unanswered: probes that did not end in time, by name.
    """

    network: NetworkFacts | None = None
    mesh: MeshFacts | None = None
    limits: LimitFacts | None = None
    directories: tuple[Directory, ...] | None = None
    host: HostFacts | None = None
    gpu: GpuFacts | None = None
    certificates: CertificateFacts | None = None
    refused: str = ""
    unanswered: Mapping[str, str] = field(default_factory=dict)
