from epmesh.v1 import error_pb2 as _error_pb2
from epmesh.v1 import frame_pb2 as _frame_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FrontRequest(_message.Message):
    __slots__ = ("mesh_id", "rank", "incarnation", "request_id", "deadline_ms", "tensors", "places", "released", "serve_rows", "serve_share", "cancel", "driver_call")
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    SERVE_ROWS_FIELD_NUMBER: _ClassVar[int]
    SERVE_SHARE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DRIVER_CALL_FIELD_NUMBER: _ClassVar[int]
    mesh_id: str
    rank: int
    incarnation: int
    request_id: int
    deadline_ms: int
    tensors: _containers.RepeatedCompositeFieldContainer[_frame_pb2.TensorMeta]
    places: _containers.RepeatedScalarFieldContainer[int]
    released: _containers.RepeatedScalarFieldContainer[int]
    serve_rows: ServeRows
    serve_share: ServeShare
    cancel: CancelRequest
    driver_call: DriverCall
    def __init__(self, mesh_id: _Optional[str] = ..., rank: _Optional[int] = ..., incarnation: _Optional[int] = ..., request_id: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[_frame_pb2.TensorMeta, _Mapping]]] = ..., places: _Optional[_Iterable[int]] = ..., released: _Optional[_Iterable[int]] = ..., serve_rows: _Optional[_Union[ServeRows, _Mapping]] = ..., serve_share: _Optional[_Union[ServeShare, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., driver_call: _Optional[_Union[DriverCall, _Mapping]] = ...) -> None: ...

class FrontResponse(_message.Message):
    __slots__ = ("request_id", "error", "tensors", "places", "released", "driver_result")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    DRIVER_RESULT_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    error: _error_pb2.Error
    tensors: _containers.RepeatedCompositeFieldContainer[_frame_pb2.TensorMeta]
    places: _containers.RepeatedScalarFieldContainer[int]
    released: _containers.RepeatedScalarFieldContainer[int]
    driver_result: DriverResult
    def __init__(self, request_id: _Optional[int] = ..., error: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_frame_pb2.TensorMeta, _Mapping]]] = ..., places: _Optional[_Iterable[int]] = ..., released: _Optional[_Iterable[int]] = ..., driver_result: _Optional[_Union[DriverResult, _Mapping]] = ...) -> None: ...

class ServeRows(_message.Message):
    __slots__ = ("layer", "epoch", "ranks", "client")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    epoch: int
    ranks: _containers.RepeatedScalarFieldContainer[int]
    client: str
    def __init__(self, layer: _Optional[int] = ..., epoch: _Optional[int] = ..., ranks: _Optional[_Iterable[int]] = ..., client: _Optional[str] = ...) -> None: ...

class ServeShare(_message.Message):
    __slots__ = ("layer", "membership_epoch", "source", "result_offset", "result_bytes", "client")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    RESULT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    membership_epoch: int
    source: int
    result_offset: int
    result_bytes: int
    client: str
    def __init__(self, layer: _Optional[int] = ..., membership_epoch: _Optional[int] = ..., source: _Optional[int] = ..., result_offset: _Optional[int] = ..., result_bytes: _Optional[int] = ..., client: _Optional[str] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class DriverCall(_message.Message):
    __slots__ = ("token", "group", "refusal", "arguments", "shared_memory")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    group: str
    refusal: _error_pb2.Error
    arguments: MethodArguments
    shared_memory: bool
    def __init__(self, token: _Optional[bytes] = ..., group: _Optional[str] = ..., refusal: _Optional[_Union[_error_pb2.Error, _Mapping]] = ..., arguments: _Optional[_Union[MethodArguments, _Mapping]] = ..., shared_memory: bool = ...) -> None: ...

class DriverResult(_message.Message):
    __slots__ = ("epoch", "sequence", "completed", "nothing", "description")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    NOTHING_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sequence: int
    completed: int
    nothing: bool
    description: RankDescription
    def __init__(self, epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., completed: _Optional[int] = ..., nothing: bool = ..., description: _Optional[_Union[RankDescription, _Mapping]] = ...) -> None: ...

class RankDescription(_message.Message):
    __slots__ = ("group", "ranks", "rank_in_group", "global_rank", "global_world_size", "device", "all2all_backend", "call_limit_s")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    RANK_IN_GROUP_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_RANK_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ALL2ALL_BACKEND_FIELD_NUMBER: _ClassVar[int]
    CALL_LIMIT_S_FIELD_NUMBER: _ClassVar[int]
    group: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    rank_in_group: int
    global_rank: int
    global_world_size: int
    device: str
    all2all_backend: str
    call_limit_s: float
    def __init__(self, group: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., rank_in_group: _Optional[int] = ..., global_rank: _Optional[int] = ..., global_world_size: _Optional[int] = ..., device: _Optional[str] = ..., all2all_backend: _Optional[str] = ..., call_limit_s: _Optional[float] = ...) -> None: ...

class MethodArguments(_message.Message):
    __slots__ = ("all_reduce", "all_gather", "all_gatherv", "reduce_scatter", "reduce_scatterv", "gather", "broadcast", "send", "recv", "batch", "dispatch", "dispatch_router_logits", "start_dispatch", "wait_dispatch", "combine", "describe_group", "wait_ready", "check", "make_group", "remove_group", "place_experts", "destroy")
    ALL_REDUCE_FIELD_NUMBER: _ClassVar[int]
    ALL_GATHER_FIELD_NUMBER: _ClassVar[int]
    ALL_GATHERV_FIELD_NUMBER: _ClassVar[int]
    REDUCE_SCATTER_FIELD_NUMBER: _ClassVar[int]
    REDUCE_SCATTERV_FIELD_NUMBER: _ClassVar[int]
    GATHER_FIELD_NUMBER: _ClassVar[int]
    BROADCAST_FIELD_NUMBER: _ClassVar[int]
    SEND_FIELD_NUMBER: _ClassVar[int]
    RECV_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_ROUTER_LOGITS_FIELD_NUMBER: _ClassVar[int]
    START_DISPATCH_FIELD_NUMBER: _ClassVar[int]
    WAIT_DISPATCH_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    DESCRIBE_GROUP_FIELD_NUMBER: _ClassVar[int]
    WAIT_READY_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    MAKE_GROUP_FIELD_NUMBER: _ClassVar[int]
    REMOVE_GROUP_FIELD_NUMBER: _ClassVar[int]
    PLACE_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    DESTROY_FIELD_NUMBER: _ClassVar[int]
    all_reduce: AllReduceArguments
    all_gather: AllGatherArguments
    all_gatherv: AllGathervArguments
    reduce_scatter: ReduceScatterArguments
    reduce_scatterv: ReduceScattervArguments
    gather: GatherArguments
    broadcast: BroadcastArguments
    send: SendArguments
    recv: RecvArguments
    batch: BatchArguments
    dispatch: DispatchArguments
    dispatch_router_logits: DispatchRouterLogitsArguments
    start_dispatch: StartDispatchArguments
    wait_dispatch: WaitDispatchArguments
    combine: CombineArguments
    describe_group: DescribeGroupArguments
    wait_ready: WaitReadyArguments
    check: CheckArguments
    make_group: MakeGroupArguments
    remove_group: RemoveGroupArguments
    place_experts: PlaceExpertsArguments
    destroy: DestroyArguments
    def __init__(self, all_reduce: _Optional[_Union[AllReduceArguments, _Mapping]] = ..., all_gather: _Optional[_Union[AllGatherArguments, _Mapping]] = ..., all_gatherv: _Optional[_Union[AllGathervArguments, _Mapping]] = ..., reduce_scatter: _Optional[_Union[ReduceScatterArguments, _Mapping]] = ..., reduce_scatterv: _Optional[_Union[ReduceScattervArguments, _Mapping]] = ..., gather: _Optional[_Union[GatherArguments, _Mapping]] = ..., broadcast: _Optional[_Union[BroadcastArguments, _Mapping]] = ..., send: _Optional[_Union[SendArguments, _Mapping]] = ..., recv: _Optional[_Union[RecvArguments, _Mapping]] = ..., batch: _Optional[_Union[BatchArguments, _Mapping]] = ..., dispatch: _Optional[_Union[DispatchArguments, _Mapping]] = ..., dispatch_router_logits: _Optional[_Union[DispatchRouterLogitsArguments, _Mapping]] = ..., start_dispatch: _Optional[_Union[StartDispatchArguments, _Mapping]] = ..., wait_dispatch: _Optional[_Union[WaitDispatchArguments, _Mapping]] = ..., combine: _Optional[_Union[CombineArguments, _Mapping]] = ..., describe_group: _Optional[_Union[DescribeGroupArguments, _Mapping]] = ..., wait_ready: _Optional[_Union[WaitReadyArguments, _Mapping]] = ..., check: _Optional[_Union[CheckArguments, _Mapping]] = ..., make_group: _Optional[_Union[MakeGroupArguments, _Mapping]] = ..., remove_group: _Optional[_Union[RemoveGroupArguments, _Mapping]] = ..., place_experts: _Optional[_Union[PlaceExpertsArguments, _Mapping]] = ..., destroy: _Optional[_Union[DestroyArguments, _Mapping]] = ...) -> None: ...

class AllReduceArguments(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AllGatherArguments(_message.Message):
    __slots__ = ("dim",)
    DIM_FIELD_NUMBER: _ClassVar[int]
    dim: int
    def __init__(self, dim: _Optional[int] = ...) -> None: ...

class Sizes(_message.Message):
    __slots__ = ("lengths",)
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    lengths: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lengths: _Optional[_Iterable[int]] = ...) -> None: ...

class AllGathervArguments(_message.Message):
    __slots__ = ("dim", "sizes", "as_list")
    DIM_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    AS_LIST_FIELD_NUMBER: _ClassVar[int]
    dim: int
    sizes: Sizes
    as_list: bool
    def __init__(self, dim: _Optional[int] = ..., sizes: _Optional[_Union[Sizes, _Mapping]] = ..., as_list: bool = ...) -> None: ...

class ReduceScatterArguments(_message.Message):
    __slots__ = ("dim",)
    DIM_FIELD_NUMBER: _ClassVar[int]
    dim: int
    def __init__(self, dim: _Optional[int] = ...) -> None: ...

class ReduceScattervArguments(_message.Message):
    __slots__ = ("dim", "sizes", "output")
    DIM_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    dim: int
    sizes: Sizes
    output: _frame_pb2.TensorMeta
    def __init__(self, dim: _Optional[int] = ..., sizes: _Optional[_Union[Sizes, _Mapping]] = ..., output: _Optional[_Union[_frame_pb2.TensorMeta, _Mapping]] = ...) -> None: ...

class GatherArguments(_message.Message):
    __slots__ = ("dst", "dim")
    DST_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    dst: int
    dim: int
    def __init__(self, dst: _Optional[int] = ..., dim: _Optional[int] = ...) -> None: ...

class BroadcastArguments(_message.Message):
    __slots__ = ("src",)
    SRC_FIELD_NUMBER: _ClassVar[int]
    src: int
    def __init__(self, src: _Optional[int] = ...) -> None: ...

class SendArguments(_message.Message):
    __slots__ = ("dst",)
    DST_FIELD_NUMBER: _ClassVar[int]
    dst: int
    def __init__(self, dst: _Optional[int] = ...) -> None: ...

class RecvArguments(_message.Message):
    __slots__ = ("expected", "src", "open")
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    SRC_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    expected: _frame_pb2.TensorMeta
    src: int
    open: int
    def __init__(self, expected: _Optional[_Union[_frame_pb2.TensorMeta, _Mapping]] = ..., src: _Optional[int] = ..., open: _Optional[int] = ...) -> None: ...

class BatchOperation(_message.Message):
    __slots__ = ("is_send", "peer", "tensor")
    IS_SEND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    is_send: bool
    peer: int
    tensor: _frame_pb2.TensorMeta
    def __init__(self, is_send: bool = ..., peer: _Optional[int] = ..., tensor: _Optional[_Union[_frame_pb2.TensorMeta, _Mapping]] = ...) -> None: ...

class BatchArguments(_message.Message):
    __slots__ = ("operations", "open_receives", "closed")
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    OPEN_RECEIVES_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    operations: _containers.RepeatedCompositeFieldContainer[BatchOperation]
    open_receives: bool
    closed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, operations: _Optional[_Iterable[_Union[BatchOperation, _Mapping]]] = ..., open_receives: bool = ..., closed: _Optional[_Iterable[int]] = ...) -> None: ...

class DispatchArguments(_message.Message):
    __slots__ = ("is_sequence_parallel", "with_extra_tensors", "layer", "static_mode")
    IS_SEQUENCE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    WITH_EXTRA_TENSORS_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    STATIC_MODE_FIELD_NUMBER: _ClassVar[int]
    is_sequence_parallel: bool
    with_extra_tensors: bool
    layer: int
    static_mode: bool
    def __init__(self, is_sequence_parallel: bool = ..., with_extra_tensors: bool = ..., layer: _Optional[int] = ..., static_mode: bool = ...) -> None: ...

class DispatchRouterLogitsArguments(_message.Message):
    __slots__ = ("is_sequence_parallel", "with_extra_tensors", "layer", "static_mode")
    IS_SEQUENCE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    WITH_EXTRA_TENSORS_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    STATIC_MODE_FIELD_NUMBER: _ClassVar[int]
    is_sequence_parallel: bool
    with_extra_tensors: bool
    layer: int
    static_mode: bool
    def __init__(self, is_sequence_parallel: bool = ..., with_extra_tensors: bool = ..., layer: _Optional[int] = ..., static_mode: bool = ...) -> None: ...

class StartDispatchArguments(_message.Message):
    __slots__ = ("dispatch",)
    DISPATCH_FIELD_NUMBER: _ClassVar[int]
    dispatch: DispatchArguments
    def __init__(self, dispatch: _Optional[_Union[DispatchArguments, _Mapping]] = ...) -> None: ...

class WaitDispatchArguments(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class CombineArguments(_message.Message):
    __slots__ = ("is_sequence_parallel", "sequence", "output")
    IS_SEQUENCE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    is_sequence_parallel: bool
    sequence: int
    output: _frame_pb2.TensorMeta
    def __init__(self, is_sequence_parallel: bool = ..., sequence: _Optional[int] = ..., output: _Optional[_Union[_frame_pb2.TensorMeta, _Mapping]] = ...) -> None: ...

class DescribeGroupArguments(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WaitReadyArguments(_message.Message):
    __slots__ = ("timeout_s", "world_size")
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    world_size: int
    def __init__(self, timeout_s: _Optional[float] = ..., world_size: _Optional[int] = ...) -> None: ...

class CheckArguments(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MakeGroupArguments(_message.Message):
    __slots__ = ("name", "ranks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class RemoveGroupArguments(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PlaceExpertsArguments(_message.Message):
    __slots__ = ("num_experts", "experts", "layer")
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    num_experts: int
    experts: Sizes
    layer: int
    def __init__(self, num_experts: _Optional[int] = ..., experts: _Optional[_Union[Sizes, _Mapping]] = ..., layer: _Optional[int] = ...) -> None: ...

class DestroyArguments(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
