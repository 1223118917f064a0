from epmesh.v1 import error_pb2 as _error_pb2
from epmesh.v1 import frame_pb2 as _frame_pb2
from epmesh.v1 import membership_service_pb2 as _membership_service_pb2
from epmesh.v1 import view_pb2 as _view_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeNodeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeNodeResponse(_message.Message):
    __slots__ = ("node_id", "incarnation", "slot", "registered", "mesh_id", "grpc_socket", "descriptor_socket", "coordinator_address", "link_host", "version", "coordinator_reachable", "curve", "zap_socket", "recent_waits")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    GRPC_SOCKET_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_SOCKET_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LINK_HOST_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    CURVE_FIELD_NUMBER: _ClassVar[int]
    ZAP_SOCKET_FIELD_NUMBER: _ClassVar[int]
    RECENT_WAITS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: int
    slot: int
    registered: bool
    mesh_id: str
    grpc_socket: str
    descriptor_socket: str
    coordinator_address: str
    link_host: str
    version: str
    coordinator_reachable: bool
    curve: bool
    zap_socket: str
    recent_waits: _containers.RepeatedCompositeFieldContainer[RecentWaits]
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., slot: _Optional[int] = ..., registered: bool = ..., mesh_id: _Optional[str] = ..., grpc_socket: _Optional[str] = ..., descriptor_socket: _Optional[str] = ..., coordinator_address: _Optional[str] = ..., link_host: _Optional[str] = ..., version: _Optional[str] = ..., coordinator_reachable: bool = ..., curve: bool = ..., zap_socket: _Optional[str] = ..., recent_waits: _Optional[_Iterable[_Union[RecentWaits, _Mapping]]] = ...) -> None: ...

class RecentWaits(_message.Message):
    __slots__ = ("rank", "window_s", "waited_for")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    WAITED_FOR_FIELD_NUMBER: _ClassVar[int]
    rank: int
    window_s: float
    waited_for: _containers.RepeatedCompositeFieldContainer[_frame_pb2.WaitedFor]
    def __init__(self, rank: _Optional[int] = ..., window_s: _Optional[float] = ..., waited_for: _Optional[_Iterable[_Union[_frame_pb2.WaitedFor, _Mapping]]] = ...) -> None: ...

class OpenRank(_message.Message):
    __slots__ = ("local_rank", "pid", "declaration")
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    DECLARATION_FIELD_NUMBER: _ClassVar[int]
    local_rank: int
    pid: int
    declaration: _membership_service_pb2.RankDeclaration
    def __init__(self, local_rank: _Optional[int] = ..., pid: _Optional[int] = ..., declaration: _Optional[_Union[_membership_service_pb2.RankDeclaration, _Mapping]] = ...) -> None: ...

class UnreachablePeers(_message.Message):
    __slots__ = ("failures",)
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    failures: _containers.RepeatedCompositeFieldContainer[_membership_service_pb2.LinkFailure]
    def __init__(self, failures: _Optional[_Iterable[_Union[_membership_service_pb2.LinkFailure, _Mapping]]] = ...) -> None: ...

class CloseRank(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdateRank(_message.Message):
    __slots__ = ("mode", "front_endpoint")
    MODE_FIELD_NUMBER: _ClassVar[int]
    FRONT_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    mode: _view_pb2.RankMode
    front_endpoint: str
    def __init__(self, mode: _Optional[_Union[_view_pb2.RankMode, str]] = ..., front_endpoint: _Optional[str] = ...) -> None: ...

class Durations(_message.Message):
    __slots__ = ("counts", "sum_s")
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    SUM_S_FIELD_NUMBER: _ClassVar[int]
    counts: _containers.RepeatedScalarFieldContainer[int]
    sum_s: float
    def __init__(self, counts: _Optional[_Iterable[int]] = ..., sum_s: _Optional[float] = ...) -> None: ...

class GroupStats(_message.Message):
    __slots__ = ("group", "dispatches", "combines", "rows_sent_inside", "rows_received_inside", "rows_sent_between", "rows_received_between", "bytes_sent_inside", "bytes_sent_between", "floor_bytes", "waited_for", "errors")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    DISPATCHES_FIELD_NUMBER: _ClassVar[int]
    COMBINES_FIELD_NUMBER: _ClassVar[int]
    ROWS_SENT_INSIDE_FIELD_NUMBER: _ClassVar[int]
    ROWS_RECEIVED_INSIDE_FIELD_NUMBER: _ClassVar[int]
    ROWS_SENT_BETWEEN_FIELD_NUMBER: _ClassVar[int]
    ROWS_RECEIVED_BETWEEN_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_INSIDE_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_BETWEEN_FIELD_NUMBER: _ClassVar[int]
    FLOOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITED_FOR_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    group: str
    dispatches: Durations
    combines: Durations
    rows_sent_inside: int
    rows_received_inside: int
    rows_sent_between: int
    rows_received_between: int
    bytes_sent_inside: int
    bytes_sent_between: int
    floor_bytes: int
    waited_for: _containers.RepeatedCompositeFieldContainer[_frame_pb2.WaitedFor]
    errors: _containers.RepeatedCompositeFieldContainer[ErrorCount]
    def __init__(self, group: _Optional[str] = ..., dispatches: _Optional[_Union[Durations, _Mapping]] = ..., combines: _Optional[_Union[Durations, _Mapping]] = ..., rows_sent_inside: _Optional[int] = ..., rows_received_inside: _Optional[int] = ..., rows_sent_between: _Optional[int] = ..., rows_received_between: _Optional[int] = ..., bytes_sent_inside: _Optional[int] = ..., bytes_sent_between: _Optional[int] = ..., floor_bytes: _Optional[int] = ..., waited_for: _Optional[_Iterable[_Union[_frame_pb2.WaitedFor, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[ErrorCount, _Mapping]]] = ...) -> None: ...

class ErrorCount(_message.Message):
    __slots__ = ("error", "count")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    error: str
    count: int
    def __init__(self, error: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class ServingStats(_message.Message):
    __slots__ = ("requests", "batches", "rows", "experts_s", "cancelled", "overloaded", "failures", "open_requests", "open_bytes", "front_refused")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_S_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    OVERLOADED_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRONT_REFUSED_FIELD_NUMBER: _ClassVar[int]
    requests: int
    batches: int
    rows: int
    experts_s: float
    cancelled: int
    overloaded: int
    failures: int
    open_requests: int
    open_bytes: int
    front_refused: int
    def __init__(self, requests: _Optional[int] = ..., batches: _Optional[int] = ..., rows: _Optional[int] = ..., experts_s: _Optional[float] = ..., cancelled: _Optional[int] = ..., overloaded: _Optional[int] = ..., failures: _Optional[int] = ..., open_requests: _Optional[int] = ..., open_bytes: _Optional[int] = ..., front_refused: _Optional[int] = ...) -> None: ...

class RankStats(_message.Message):
    __slots__ = ("groups", "link_bytes_sent", "link_bytes_received", "frames_refused", "messages_resent", "inbox_bytes", "serving")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_REFUSED_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_RESENT_FIELD_NUMBER: _ClassVar[int]
    INBOX_BYTES_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[GroupStats]
    link_bytes_sent: int
    link_bytes_received: int
    frames_refused: int
    messages_resent: int
    inbox_bytes: int
    serving: ServingStats
    def __init__(self, groups: _Optional[_Iterable[_Union[GroupStats, _Mapping]]] = ..., link_bytes_sent: _Optional[int] = ..., link_bytes_received: _Optional[int] = ..., frames_refused: _Optional[int] = ..., messages_resent: _Optional[int] = ..., inbox_bytes: _Optional[int] = ..., serving: _Optional[_Union[ServingStats, _Mapping]] = ...) -> None: ...

class RankSessionRequest(_message.Message):
    __slots__ = ("open", "unreachable", "close", "update", "stats")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    open: OpenRank
    unreachable: UnreachablePeers
    close: CloseRank
    update: UpdateRank
    stats: RankStats
    def __init__(self, open: _Optional[_Union[OpenRank, _Mapping]] = ..., unreachable: _Optional[_Union[UnreachablePeers, _Mapping]] = ..., close: _Optional[_Union[CloseRank, _Mapping]] = ..., update: _Optional[_Union[UpdateRank, _Mapping]] = ..., stats: _Optional[_Union[RankStats, _Mapping]] = ...) -> None: ...

class RankOpened(_message.Message):
    __slots__ = ("rank", "local_rank", "token")
    RANK_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    rank: int
    local_rank: int
    token: bytes
    def __init__(self, rank: _Optional[int] = ..., local_rank: _Optional[int] = ..., token: _Optional[bytes] = ...) -> None: ...

class ClientKeys(_message.Message):
    __slots__ = ("newest", "live")
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    newest: int
    live: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, newest: _Optional[int] = ..., live: _Optional[_Iterable[int]] = ...) -> None: ...

class RankSessionResponse(_message.Message):
    __slots__ = ("opened", "view", "error", "client_keys")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEYS_FIELD_NUMBER: _ClassVar[int]
    opened: RankOpened
    view: _view_pb2.View
    error: _error_pb2.Error
    client_keys: ClientKeys
    def __init__(self, opened: _Optional[_Union[RankOpened, _Mapping]] = ..., view: _Optional[_Union[_view_pb2.View, _Mapping]] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., client_keys: _Optional[_Union[ClientKeys, _Mapping]] = ...) -> None: ...

class DescriptorRequest(_message.Message):
    __slots__ = ("token", "control_page", "group_buffers", "serve_buffers", "driver_buffers")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CONTROL_PAGE_FIELD_NUMBER: _ClassVar[int]
    GROUP_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    SERVE_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    DRIVER_BUFFERS_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    control_page: ControlPage
    group_buffers: GroupBuffers
    serve_buffers: ServeBuffers
    driver_buffers: DriverBuffers
    def __init__(self, token: _Optional[bytes] = ..., control_page: _Optional[_Union[ControlPage, _Mapping]] = ..., group_buffers: _Optional[_Union[GroupBuffers, _Mapping]] = ..., serve_buffers: _Optional[_Union[ServeBuffers, _Mapping]] = ..., driver_buffers: _Optional[_Union[DriverBuffers, _Mapping]] = ...) -> None: ...

class ControlPage(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GroupBuffers(_message.Message):
    __slots__ = ("group_id", "membership_epoch")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    membership_epoch: int
    def __init__(self, group_id: _Optional[int] = ..., membership_epoch: _Optional[int] = ...) -> None: ...

class ServeBuffers(_message.Message):
    __slots__ = ("membership_epoch",)
    MEMBERSHIP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    membership_epoch: int
    def __init__(self, membership_epoch: _Optional[int] = ...) -> None: ...

class DriverBuffers(_message.Message):
    __slots__ = ("driver_token",)
    DRIVER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    driver_token: bytes
    def __init__(self, driver_token: _Optional[bytes] = ...) -> None: ...

class DescriptorResponse(_message.Message):
    __slots__ = ("error", "ranks", "memfd_bytes", "region_bytes")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    MEMFD_BYTES_FIELD_NUMBER: _ClassVar[int]
    REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    error: _error_pb2.Error
    ranks: _containers.RepeatedScalarFieldContainer[int]
    memfd_bytes: int
    region_bytes: int
    def __init__(self, error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., ranks: _Optional[_Iterable[int]] = ..., memfd_bytes: _Optional[int] = ..., region_bytes: _Optional[int] = ...) -> None: ...
