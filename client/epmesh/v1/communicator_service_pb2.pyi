from epmesh.v1 import error_pb2 as _error_pb2
from epmesh.v1 import frame_pb2 as _frame_pb2
from epmesh.v1 import front_pb2 as _front_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRankRequest(_message.Message):
    __slots__ = ("rank", "driver", "version", "token")
    RANK_FIELD_NUMBER: _ClassVar[int]
    DRIVER_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    rank: int
    driver: str
    version: str
    token: bytes
    def __init__(self, rank: _Optional[int] = ..., driver: _Optional[str] = ..., version: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class AttachRankResponse(_message.Message):
    __slots__ = ("token", "mesh_id", "incarnation", "front_endpoint", "descriptor_socket", "curve_key")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FRONT_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_SOCKET_FIELD_NUMBER: _ClassVar[int]
    CURVE_KEY_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    mesh_id: str
    incarnation: int
    front_endpoint: str
    descriptor_socket: str
    curve_key: bytes
    def __init__(self, token: _Optional[bytes] = ..., mesh_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., front_endpoint: _Optional[str] = ..., descriptor_socket: _Optional[str] = ..., curve_key: _Optional[bytes] = ...) -> None: ...

class DetachRankRequest(_message.Message):
    __slots__ = ("rank", "token")
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    rank: int
    token: bytes
    def __init__(self, rank: _Optional[int] = ..., token: _Optional[bytes] = ...) -> None: ...

class DetachRankResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CallHeader(_message.Message):
    __slots__ = ("rank", "token", "group", "tensors", "refusal")
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    rank: int
    token: bytes
    group: str
    tensors: _containers.RepeatedCompositeFieldContainer[_frame_pb2.TensorMeta]
    refusal: _error_pb2.Error
    def __init__(self, rank: _Optional[int] = ..., token: _Optional[bytes] = ..., group: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_frame_pb2.TensorMeta, _Mapping]]] = ..., refusal: _Optional[_Union[_error_pb2.Error, _Mapping]] = ...) -> None: ...

class CallResult(_message.Message):
    __slots__ = ("result", "tensors")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    result: _front_pb2.DriverResult
    tensors: _containers.RepeatedCompositeFieldContainer[_frame_pb2.TensorMeta]
    def __init__(self, result: _Optional[_Union[_front_pb2.DriverResult, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_frame_pb2.TensorMeta, _Mapping]]] = ...) -> None: ...

class AllReduceRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.AllReduceArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.AllReduceArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class AllReduceResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class AllGatherRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.AllGatherArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.AllGatherArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class AllGatherResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class AllGathervRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.AllGathervArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.AllGathervArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class AllGathervResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ReduceScatterRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.ReduceScatterArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.ReduceScatterArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ReduceScatterResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ReduceScattervRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.ReduceScattervArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.ReduceScattervArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ReduceScattervResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class GatherRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.GatherArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.GatherArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class GatherResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class BroadcastRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.BroadcastArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.BroadcastArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class BroadcastResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SendRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.SendArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.SendArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SendResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class RecvRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.RecvArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.RecvArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class RecvResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class BatchSendRecvRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.BatchArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.BatchArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class BatchSendRecvResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DispatchRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.DispatchArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.DispatchArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DispatchResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DispatchRouterLogitsRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.DispatchRouterLogitsArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.DispatchRouterLogitsArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DispatchRouterLogitsResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class StartDispatchRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.StartDispatchArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.StartDispatchArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class StartDispatchResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class WaitDispatchRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.WaitDispatchArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.WaitDispatchArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class WaitDispatchResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CombineRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.CombineArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.CombineArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CombineResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DescribeGroupRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.DescribeGroupArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.DescribeGroupArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DescribeGroupResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class WaitReadyRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.WaitReadyArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.WaitReadyArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class WaitReadyResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.CheckArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.CheckArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class MakeGroupRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.MakeGroupArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.MakeGroupArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class MakeGroupResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class RemoveGroupRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.RemoveGroupArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.RemoveGroupArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class RemoveGroupResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PlaceExpertsRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.PlaceExpertsArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.PlaceExpertsArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PlaceExpertsResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DestroyCommunicatorRequest(_message.Message):
    __slots__ = ("call", "arguments", "data")
    CALL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    call: CallHeader
    arguments: _front_pb2.DestroyArguments
    data: bytes
    def __init__(self, call: _Optional[_Union[CallHeader, _Mapping]] = ..., arguments: _Optional[_Union[_front_pb2.DestroyArguments, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class DestroyCommunicatorResponse(_message.Message):
    __slots__ = ("result", "data")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    result: CallResult
    data: bytes
    def __init__(self, result: _Optional[_Union[CallResult, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...
