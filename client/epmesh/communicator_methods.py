"""The methods of CommunicatorService that are calls on a communicator: all of one form, so one table has them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import message_factory

from epmesh.errors import InvalidRequest
from epmesh.frames import MAX_TENSORS, num_bytes
from epmesh.v1 import communicator_service_pb2, frame_pb2, front_pb2

SERVICE = "epmesh.v1.CommunicatorService"
CHUNK_BYTES = 1 << 20
MAX_CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class Method:
    """One of them.

    Attributes:
        name: of the RPC.
        field: of `MethodArguments`, which the call's arguments go into.
        request, response: message classes.
    """

    name: str
    field: str
    request: Any
    response: Any

    @property
    def path(self) -> str:
        """As gRPC names it."""
        return f"/{SERVICE}/{self.name}"


def _methods() -> dict[str, Method]:
    fields: dict[str, str] = {}
    for argument in front_pb2.MethodArguments.DESCRIPTOR.fields:
        assert argument.message_type is not None
        fields[argument.message_type.full_name] = argument.name
    service = communicator_service_pb2.DESCRIPTOR.services_by_name["CommunicatorService"]
    found = {}
    for method in service.methods:
        arguments = method.input_type.fields_by_name.get("arguments")
        if arguments is not None and arguments.message_type is not None:
            name = fields[arguments.message_type.full_name]
            request, response = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
            found[name] = Method(method.name, name, request, response)
    return found


METHODS = _methods()
"""By the field of `MethodArguments`."""


def pieces(buffers: Iterable[memoryview]) -> Iterator[bytes]:
    """The bytes of `buffers`, one after the other, in pieces of `CHUNK_BYTES`; the last may be smaller."""
    parts: list[memoryview] = []
    room = CHUNK_BYTES
    for buffer in buffers:
        while len(buffer):
            parts.append(buffer[:room])
            room -= len(parts[-1])
            buffer = buffer[len(parts[-1]) :]
            if not room:
                yield b"".join(parts)
                parts, room = [], CHUNK_BYTES
    if parts:
        yield b"".join(parts)


def messages(make: Callable[..., Any], first: dict[str, Any], buffers: Iterable[memoryview]) -> Iterator[Any]:
    """The messages of one direction of a call: the first has the fields `first`, all have data."""
    rest = pieces(buffers)
    yield make(**first, data=next(rest, b""))
    for piece in rest:
        yield make(data=piece)


class Assembly:
    """The tensors of one direction of a call, as they arrive. Memory grows with what came, never with what was said."""

    def __init__(self, metas: Iterable[frame_pb2.TensorMeta], most_bytes: int) -> None:
        """Expects the bytes of tensors.

        Raises:
            InvalidRequest: there are too many, one cannot travel, or together they are larger than `most_bytes`.
        """
        self.metas = list(metas)
        if len(self.metas) > MAX_TENSORS:
            raise InvalidRequest(f"{len(self.metas)} tensors; at most {MAX_TENSORS} can travel together")
        self._sizes = [num_bytes(meta) for meta in self.metas]
        self.num_bytes = sum(self._sizes)
        if self.num_bytes > most_bytes:
            raise InvalidRequest(f"tensors of {self.num_bytes} bytes in one call; at most {most_bytes} are taken")
        self._data = bytearray()

    @property
    def num_missing(self) -> int:
        """Bytes that are still to come."""
        return self.num_bytes - len(self._data)

    def add(self, data: bytes) -> None:
        """Takes the next piece.

        Raises:
            InvalidRequest: the piece is too large, or there is more than was announced.
        """
        if len(data) > MAX_CHUNK_BYTES:
            raise InvalidRequest(f"a message with {len(data)} bytes of data; at most {MAX_CHUNK_BYTES} are taken")
        if len(self._data) + len(data) > self.num_bytes:
            raise InvalidRequest(f"more data came than the {self.num_bytes} bytes of the tensors announced")
        self._data += data

    def tensors(self) -> list[memoryview]:
        """The bytes of each tensor.

        Raises:
            InvalidRequest: some are missing.
        """
        if len(self._data) != self.num_bytes:
            raise InvalidRequest(f"{len(self._data)} bytes of data came for tensors of {self.num_bytes}")
        rest, cut = memoryview(self._data), []
        for size in self._sizes:
            cut.append(rest[:size])
            rest = rest[size:]
        return cut
