from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RANK_MODE_UNSPECIFIED: _ClassVar[RankMode]
    RANK_MODE_EXCHANGE: _ClassVar[RankMode]
    RANK_MODE_SERVE: _ClassVar[RankMode]
RANK_MODE_UNSPECIFIED: RankMode
RANK_MODE_EXCHANGE: RankMode
RANK_MODE_SERVE: RankMode

class Rank(_message.Message):
    __slots__ = ("rank", "incarnation", "device", "mode", "link_endpoint", "front_endpoint", "curve_key")
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    LINK_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    FRONT_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    CURVE_KEY_FIELD_NUMBER: _ClassVar[int]
    rank: int
    incarnation: int
    device: str
    mode: RankMode
    link_endpoint: str
    front_endpoint: str
    curve_key: bytes
    def __init__(self, rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., device: _Optional[str] = ..., mode: _Optional[_Union[RankMode, str]] = ..., link_endpoint: _Optional[str] = ..., front_endpoint: _Optional[str] = ..., curve_key: _Optional[bytes] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("slot", "node_id", "incarnation", "address", "ranks")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    node_id: str
    incarnation: int
    address: str
    ranks: _containers.RepeatedCompositeFieldContainer[Rank]
    def __init__(self, slot: _Optional[int] = ..., node_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[Rank, _Mapping]]] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "id", "ranks", "declared_ranks", "sequence", "completed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    DECLARED_RANKS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    name: str
    id: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    declared_ranks: _containers.RepeatedScalarFieldContainer[int]
    sequence: int
    completed: int
    def __init__(self, name: _Optional[str] = ..., id: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., declared_ranks: _Optional[_Iterable[int]] = ..., sequence: _Optional[int] = ..., completed: _Optional[int] = ...) -> None: ...

class RankExperts(_message.Message):
    __slots__ = ("rank", "experts")
    RANK_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rank: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("layer", "num_experts", "holders")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    num_experts: int
    holders: _containers.RepeatedCompositeFieldContainer[RankExperts]
    def __init__(self, layer: _Optional[int] = ..., num_experts: _Optional[int] = ..., holders: _Optional[_Iterable[_Union[RankExperts, _Mapping]]] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("mesh_id", "epoch", "membership_epoch", "stride", "nodes", "groups", "placements", "tensor_parallel_size")
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    mesh_id: str
    epoch: int
    membership_epoch: int
    stride: int
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    placements: _containers.RepeatedCompositeFieldContainer[Placement]
    tensor_parallel_size: int
    def __init__(self, mesh_id: _Optional[str] = ..., epoch: _Optional[int] = ..., membership_epoch: _Optional[int] = ..., stride: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., placements: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., tensor_parallel_size: _Optional[int] = ...) -> None: ...
