from epmesh.v1 import error_pb2 as _error_pb2
from epmesh.v1 import view_pb2 as _view_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RegisterNodeRequest(_message.Message):
    __slots__ = ("node_id", "incarnation", "address", "version", "slot", "curve", "join_token")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CURVE_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    incarnation: int
    address: str
    version: str
    slot: int
    curve: bool
    join_token: bytes
    def __init__(self, node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., version: _Optional[str] = ..., slot: _Optional[int] = ..., curve: bool = ..., join_token: _Optional[bytes] = ...) -> None: ...

class RegisterNodeResponse(_message.Message):
    __slots__ = ("slot", "mesh_id", "stride", "heartbeat_interval_s", "lease_s")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    slot: int
    mesh_id: str
    stride: int
    heartbeat_interval_s: float
    lease_s: float
    def __init__(self, slot: _Optional[int] = ..., mesh_id: _Optional[str] = ..., stride: _Optional[int] = ..., heartbeat_interval_s: _Optional[float] = ..., lease_s: _Optional[float] = ...) -> None: ...

class ExpertDeclaration(_message.Message):
    __slots__ = ("layer", "num_experts", "experts", "linear")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LINEAR_FIELD_NUMBER: _ClassVar[int]
    layer: int
    num_experts: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    linear: bool
    def __init__(self, layer: _Optional[int] = ..., num_experts: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., linear: bool = ...) -> None: ...

class RankDeclaration(_message.Message):
    __slots__ = ("rank", "world_size", "tensor_parallel_size", "experts", "exchange_timeout_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXCHANGE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    rank: _view_pb2.Rank
    world_size: int
    tensor_parallel_size: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertDeclaration]
    exchange_timeout_s: float
    def __init__(self, rank: _Optional[_Union[_view_pb2.Rank, _Mapping]] = ..., world_size: _Optional[int] = ..., tensor_parallel_size: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertDeclaration, _Mapping]]] = ..., exchange_timeout_s: _Optional[float] = ...) -> None: ...

class GroupProgress(_message.Message):
    __slots__ = ("group_id", "begun", "completed")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    begun: int
    completed: int
    def __init__(self, group_id: _Optional[int] = ..., begun: _Optional[int] = ..., completed: _Optional[int] = ...) -> None: ...

class LinkFailure(_message.Message):
    __slots__ = ("reporter", "target", "target_incarnation")
    REPORTER_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    TARGET_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    reporter: int
    target: int
    target_incarnation: int
    def __init__(self, reporter: _Optional[int] = ..., target: _Optional[int] = ..., target_incarnation: _Optional[int] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("slot", "incarnation", "epoch")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    slot: int
    incarnation: int
    epoch: int
    def __init__(self, slot: _Optional[int] = ..., incarnation: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("ranks", "left")
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[RankDeclaration]
    left: _containers.RepeatedCompositeFieldContainer[RankIncarnation]
    def __init__(self, ranks: _Optional[_Iterable[_Union[RankDeclaration, _Mapping]]] = ..., left: _Optional[_Iterable[_Union[RankIncarnation, _Mapping]]] = ...) -> None: ...

class LinkReport(_message.Message):
    __slots__ = ("failures",)
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    failures: _containers.RepeatedCompositeFieldContainer[LinkFailure]
    def __init__(self, failures: _Optional[_Iterable[_Union[LinkFailure, _Mapping]]] = ...) -> None: ...

class Prepared(_message.Message):
    __slots__ = ("epoch", "progress")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    progress: _containers.RepeatedCompositeFieldContainer[GroupProgress]
    def __init__(self, epoch: _Optional[int] = ..., progress: _Optional[_Iterable[_Union[GroupProgress, _Mapping]]] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("epoch", "progress")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    progress: _containers.RepeatedCompositeFieldContainer[GroupProgress]
    def __init__(self, epoch: _Optional[int] = ..., progress: _Optional[_Iterable[_Union[GroupProgress, _Mapping]]] = ...) -> None: ...

class Committed(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class NodeSessionRequest(_message.Message):
    __slots__ = ("hello", "heartbeat", "ranks", "links", "prepared", "finished", "committed")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    ranks: RankReport
    links: LinkReport
    prepared: Prepared
    finished: Finished
    committed: Committed
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., ranks: _Optional[_Union[RankReport, _Mapping]] = ..., links: _Optional[_Union[LinkReport, _Mapping]] = ..., prepared: _Optional[_Union[Prepared, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., committed: _Optional[_Union[Committed, _Mapping]] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("epoch", "lost_ranks")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOST_RANKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    lost_ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., lost_ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class GroupCut(_message.Message):
    __slots__ = ("group_id", "sequence")
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    group_id: int
    sequence: int
    def __init__(self, group_id: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("epoch", "cuts", "abort", "members_unchanged", "timeout_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    cuts: _containers.RepeatedCompositeFieldContainer[GroupCut]
    abort: bool
    members_unchanged: bool
    timeout_s: float
    def __init__(self, epoch: _Optional[int] = ..., cuts: _Optional[_Iterable[_Union[GroupCut, _Mapping]]] = ..., abort: bool = ..., members_unchanged: bool = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("view",)
    VIEW_FIELD_NUMBER: _ClassVar[int]
    view: _view_pb2.View
    def __init__(self, view: _Optional[_Union[_view_pb2.View, _Mapping]] = ...) -> None: ...

class RankIncarnation(_message.Message):
    __slots__ = ("rank", "incarnation")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Evict(_message.Message):
    __slots__ = ("error", "ranks")
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    error: _error_pb2.Error
    ranks: _containers.RepeatedCompositeFieldContainer[RankIncarnation]
    def __init__(self, error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., ranks: _Optional[_Iterable[_Union[RankIncarnation, _Mapping]]] = ...) -> None: ...

class NodeSessionResponse(_message.Message):
    __slots__ = ("heartbeat", "prepare", "finish", "commit", "evict")
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    EVICT_FIELD_NUMBER: _ClassVar[int]
    heartbeat: Heartbeat
    prepare: Prepare
    finish: Finish
    commit: Commit
    evict: Evict
    def __init__(self, heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., evict: _Optional[_Union[Evict, _Mapping]] = ...) -> None: ...
