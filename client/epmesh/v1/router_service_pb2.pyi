from epmesh.v1 import frame_pb2 as _frame_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardRowsRequest(_message.Message):
    __slots__ = ("mesh_id", "layer", "epoch", "ranks", "tensors", "data")
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    mesh_id: str
    layer: int
    epoch: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_frame_pb2.TensorMeta]
    data: bytes
    def __init__(self, mesh_id: _Optional[str] = ..., layer: _Optional[int] = ..., epoch: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., tensors: _Optional[_Iterable[_Union[_frame_pb2.TensorMeta, _Mapping]]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ForwardRowsResponse(_message.Message):
    __slots__ = ("tensors", "data")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_frame_pb2.TensorMeta]
    data: bytes
    def __init__(self, tensors: _Optional[_Iterable[_Union[_frame_pb2.TensorMeta, _Mapping]]] = ..., data: _Optional[bytes] = ...) -> None: ...
