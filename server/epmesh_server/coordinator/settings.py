"""What a coordinator is set to. Frozen, validated once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from epmesh.addresses import join_address
from epmesh.errors import InvalidRequest
from epmesh.tls import TlsFiles
from epmesh.version import VERSION
from epmesh_server.coordinator.etcd_client import EtcdLocation, parse_store
from epmesh_server.exposure import check_exposure
from epmesh_server.join_token import check_token_stays_secret, read_token
from epmesh_server.membership import MembershipSettings

DEFAULT_PORT = 7401


@dataclass(frozen=True, kw_only=True)
class CoordinatorSettings:
    """Where a coordinator listens, where it keeps its log, and the constants of its mesh.

    Attributes:
        host: address to bind; beyond loopback only with `insecure`, for whoever reaches it could join the mesh.
        port: 0 binds a free one, which `run_coordinator` publishes.
        data_dir: directory of the log; made when missing, and no other coordinator's.
        stride, min_nodes, heartbeat_interval_s, lease_s, answer_timeout_s: see `MembershipSettings`.
        tls: what it shows itself with, and checks callers by; `None`: nothing authenticates them.
        insecure: whether to listen beyond loopback without `tls`.
        metrics_port: where `host` answers ``GET /metrics``, in plain HTTP to whoever asks; 0 takes a free port, `None`
            opens none.
        metrics_tls: whether it does so over TLS, to those with a certificate of the mesh; needs `tls`.
        store: ``etcd://host:port[,host:port][/prefix]`` keeps the log there instead of in `data_dir`; a
            coordinator that is not the first then stands by until the leader is gone.
        join_token_file: holds what a node must show that is new to the mesh; `None`: nothing. Read anew every time.
    """

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    stride: int = 8
    min_nodes: int | None = None
    heartbeat_interval_s: float = 1.0
    lease_s: float = 3.0
    answer_timeout_s: float = 1.0
    tls: TlsFiles | None = None
    insecure: bool = False
    metrics_port: int | None = None
    metrics_tls: bool = False
    join_token_file: Path | None = None
    store: str | None = None
    etcd: EtcdLocation | None = field(init=False)
    membership: MembershipSettings = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InvalidRequest(f"port is {self.port}; it must be 0 to 65535")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65_535:
            raise InvalidRequest(f"metrics port is {self.metrics_port}; it must be 0 to 65535")
        if self.metrics_tls and self.tls is None:
            raise InvalidRequest("--metrics-tls needs certificates: give --tls-dir")
        check_exposure(self.host, self.tls, insecure=self.insecure)
        check_token_stays_secret(self.join_token_file, self.host, self.tls)
        if self.join_token_file is not None:
            read_token(self.join_token_file)  # refuses at the start what would be refused later
        membership = MembershipSettings(
            version=VERSION,
            stride=self.stride,
            min_nodes=self.min_nodes,
            heartbeat_interval_s=self.heartbeat_interval_s,
            lease_s=self.lease_s,
            answer_timeout_s=self.answer_timeout_s,
        )
        object.__setattr__(self, "membership", membership)
        object.__setattr__(self, "etcd", None if self.store is None else parse_store(self.store))

    def address(self, port: int) -> str:
        """host:port as gRPC writes it."""
        return join_address(self.host, port)
