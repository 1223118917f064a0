from epmesh.v1 import membership_service_pb2 as _membership_service_pb2
from epmesh.v1 import view_pb2 as _view_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LogBatch(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[LogRecord]
    def __init__(self, records: _Optional[_Iterable[_Union[LogRecord, _Mapping]]] = ...) -> None: ...

class LogRecord(_message.Message):
    __slots__ = ("mesh_created", "node_registered", "view_committed", "epoch_used", "ranks_lost")
    MESH_CREATED_FIELD_NUMBER: _ClassVar[int]
    NODE_REGISTERED_FIELD_NUMBER: _ClassVar[int]
    VIEW_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_USED_FIELD_NUMBER: _ClassVar[int]
    RANKS_LOST_FIELD_NUMBER: _ClassVar[int]
    mesh_created: MeshCreated
    node_registered: NodeRegistered
    view_committed: _view_pb2.View
    epoch_used: EpochUsed
    ranks_lost: RanksLost
    def __init__(self, mesh_created: _Optional[_Union[MeshCreated, _Mapping]] = ..., node_registered: _Optional[_Union[NodeRegistered, _Mapping]] = ..., view_committed: _Optional[_Union[_view_pb2.View, _Mapping]] = ..., epoch_used: _Optional[_Union[EpochUsed, _Mapping]] = ..., ranks_lost: _Optional[_Union[RanksLost, _Mapping]] = ...) -> None: ...

class MeshCreated(_message.Message):
    __slots__ = ("mesh_id", "stride")
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    mesh_id: str
    stride: int
    def __init__(self, mesh_id: _Optional[str] = ..., stride: _Optional[int] = ...) -> None: ...

class NodeRegistered(_message.Message):
    __slots__ = ("request", "slot")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    request: _membership_service_pb2.RegisterNodeRequest
    slot: int
    def __init__(self, request: _Optional[_Union[_membership_service_pb2.RegisterNodeRequest, _Mapping]] = ..., slot: _Optional[int] = ...) -> None: ...

class EpochUsed(_message.Message):
    __slots__ = ("epoch", "next_group_id")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    next_group_id: int
    def __init__(self, epoch: _Optional[int] = ..., next_group_id: _Optional[int] = ...) -> None: ...

class RanksLost(_message.Message):
    __slots__ = ("ranks",)
    RANKS_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedCompositeFieldContainer[_membership_service_pb2.RankIncarnation]
    def __init__(self, ranks: _Optional[_Iterable[_Union[_membership_service_pb2.RankIncarnation, _Mapping]]] = ...) -> None: ...
