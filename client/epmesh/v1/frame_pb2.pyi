from epmesh.v1 import error_pb2 as _error_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrameKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_KIND_UNSPECIFIED: _ClassVar[FrameKind]
    FRAME_KIND_DISPATCH: _ClassVar[FrameKind]
    FRAME_KIND_COMBINE: _ClassVar[FrameKind]
    FRAME_KIND_COLLECTIVE: _ClassVar[FrameKind]
    FRAME_KIND_POINT_TO_POINT: _ClassVar[FrameKind]
    FRAME_KIND_ABANDON: _ClassVar[FrameKind]
    FRAME_KIND_TAKEN: _ClassVar[FrameKind]
    FRAME_KIND_PROBE: _ClassVar[FrameKind]
    FRAME_KIND_RECEIPT: _ClassVar[FrameKind]
FRAME_KIND_UNSPECIFIED: FrameKind
FRAME_KIND_DISPATCH: FrameKind
FRAME_KIND_COMBINE: FrameKind
FRAME_KIND_COLLECTIVE: FrameKind
FRAME_KIND_POINT_TO_POINT: FrameKind
FRAME_KIND_ABANDON: FrameKind
FRAME_KIND_TAKEN: FrameKind
FRAME_KIND_PROBE: FrameKind
FRAME_KIND_RECEIPT: FrameKind

class NumberRange(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class LinkState(_message.Message):
    __slots__ = ("acknowledged", "missing", "first_kept", "last", "probe")
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    FIRST_KEPT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    acknowledged: int
    missing: _containers.RepeatedCompositeFieldContainer[NumberRange]
    first_kept: int
    last: int
    probe: int
    def __init__(self, acknowledged: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[NumberRange, _Mapping]]] = ..., first_kept: _Optional[int] = ..., last: _Optional[int] = ..., probe: _Optional[int] = ...) -> None: ...

class TensorMeta(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class WaitedFor(_message.Message):
    __slots__ = ("rank", "seconds")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    seconds: float
    def __init__(self, rank: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class FrameHeader(_message.Message):
    __slots__ = ("mesh_id", "epoch", "group_id", "sequence", "kind", "source", "incarnation", "link_sequence", "step", "deadline_ms", "tensors", "call", "error", "with_targets", "link", "waited_for")
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LINK_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    WITH_TARGETS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    WAITED_FOR_FIELD_NUMBER: _ClassVar[int]
    mesh_id: str
    epoch: int
    group_id: int
    sequence: int
    kind: FrameKind
    source: int
    incarnation: int
    link_sequence: int
    step: int
    deadline_ms: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    call: bytes
    error: _error_pb2.Error
    with_targets: bool
    link: LinkState
    waited_for: WaitedFor
    def __init__(self, mesh_id: _Optional[str] = ..., epoch: _Optional[int] = ..., group_id: _Optional[int] = ..., sequence: _Optional[int] = ..., kind: _Optional[_Union[FrameKind, str]] = ..., source: _Optional[int] = ..., incarnation: _Optional[int] = ..., link_sequence: _Optional[int] = ..., step: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ..., call: _Optional[bytes] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., with_targets: bool = ..., link: _Optional[_Union[LinkState, _Mapping]] = ..., waited_for: _Optional[_Union[WaitedFor, _Mapping]] = ...) -> None: ...

class CallDescriptor(_message.Message):
    __slots__ = ("method", "arguments", "tensors", "numbers", "refusal", "abandoned")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ABANDONED_FIELD_NUMBER: _ClassVar[int]
    method: str
    arguments: str
    tensors: _containers.RepeatedCompositeFieldContainer[TensorMeta]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    refusal: _error_pb2.Error
    abandoned: int
    def __init__(self, method: _Optional[str] = ..., arguments: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[TensorMeta, _Mapping]]] = ..., numbers: _Optional[_Iterable[int]] = ..., refusal: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., abandoned: _Optional[int] = ...) -> None: ...
