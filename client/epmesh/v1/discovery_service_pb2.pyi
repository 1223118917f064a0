from epmesh.v1 import view_pb2 as _view_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetViewRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetViewResponse(_message.Message):
    __slots__ = ("view", "version", "time_unix_s")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    view: _view_pb2.View
    version: str
    time_unix_s: float
    def __init__(self, view: _Optional[_Union[_view_pb2.View, _Mapping]] = ..., version: _Optional[str] = ..., time_unix_s: _Optional[float] = ...) -> None: ...

class WatchViewsRequest(_message.Message):
    __slots__ = ("after_epoch", "mesh_id")
    AFTER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MESH_ID_FIELD_NUMBER: _ClassVar[int]
    after_epoch: int
    mesh_id: str
    def __init__(self, after_epoch: _Optional[int] = ..., mesh_id: _Optional[str] = ...) -> None: ...

class WatchViewsResponse(_message.Message):
    __slots__ = ("view", "version")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    view: _view_pb2.View
    version: str
    def __init__(self, view: _Optional[_Union[_view_pb2.View, _Mapping]] = ..., version: _Optional[str] = ...) -> None: ...
