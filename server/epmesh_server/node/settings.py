"""What a node service is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from epmesh.addresses import has_port, parse_coordinators, split_address
from epmesh.errors import InvalidRequest
from epmesh.tls import TlsFiles
from epmesh_server.exposure import check_exposure
from epmesh_server.join_token import check_token_stays_secret
from epmesh_server.shared_memory import PAGE_BYTES

DEFAULT_PORT = 7400
DEFAULT_COORDINATOR = "127.0.0.1:7401"
DEFAULT_BUFFER_BYTES = 1 << 30
MAX_NODE_ID_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """Settings of one node service; checked when made.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one, and what was bound is published.
        node_id: name of the node, unique among live ones; `None` means ``hostname:port``.
        coordinator: host:port of the coordinator, or of several of which one leads, with commas between.
        runtime_dir: directory for the unix sockets, mode 0700; `None` makes a fresh one and removes it at the end.
        buffer_bytes: most bytes one source may have for one rank in one exchange; rounded up to whole pages.
        advertise: host or host:port under which others reach this node; `None` means what was bound.
        link_host: host that the links of this node's ranks bind and advertise; `None` means the advertised host.
        slot: claims the slot of a dead node, for a replacement under another name.
        tls: what the node shows itself with, and checks callers by; `None`: nothing authenticates them.
        insecure: allows a host that is not loopback without `tls`.
        metrics_port: where `host` answers ``GET /metrics``, in plain HTTP to whoever asks; 0 takes a free port, `None`
            opens none.
        metrics_tls: whether it does so over TLS, to those with a certificate of the mesh; needs `tls`.
        join_token_file: holds what the coordinator may want to see of a node that is new to the mesh.

    Raises:
        InvalidRequest: a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    node_id: str | None = None
    coordinator: str = DEFAULT_COORDINATOR
    runtime_dir: Path | None = None
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    advertise: str | None = None
    link_host: str | None = None
    slot: int | None = None
    tls: TlsFiles | None = None
    insecure: bool = False
    metrics_port: int | None = None
    metrics_tls: bool = False
    join_token_file: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InvalidRequest(f"port is {self.port}; it must be 0 to 65535")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65_535:
            raise InvalidRequest(f"metrics port is {self.metrics_port}; it must be 0 to 65535")
        if self.metrics_tls and self.tls is None:
            raise InvalidRequest("--metrics-tls needs certificates: give --tls-dir")
        if self.buffer_bytes <= 0:
            raise InvalidRequest(f"buffer bytes are {self.buffer_bytes}; they must be positive")
        if self.slot is not None and self.slot < 0:
            raise InvalidRequest(f"slot is {self.slot}; it must not be negative")
        if self.node_id is not None and not 0 < len(self.node_id) <= MAX_NODE_ID_CHARS:
            raise InvalidRequest(f"node id must have 1 to {MAX_NODE_ID_CHARS} characters, not {len(self.node_id)}")
        for coordinator in self.coordinators:
            check_token_stays_secret(self.join_token_file, split_address(coordinator, "coordinator")[0], self.tls)
        if self.advertise is not None and has_port(self.advertise):
            split_address(self.advertise, "advertise")
        check_exposure(self.host, self.tls, insecure=self.insecure)

    @property
    def coordinators(self) -> tuple[str, ...]:
        """host:port of every coordinator."""
        return parse_coordinators(self.coordinator)

    @property
    def curve(self) -> bool:
        """Whether the ZeroMQ endpoints of this node's ranks use CURVE; all nodes of a mesh do, or none."""
        return self.tls is not None

    @property
    def region_bytes(self) -> int:
        """`buffer_bytes` in whole pages."""
        return -(-self.buffer_bytes // PAGE_BYTES) * PAGE_BYTES
