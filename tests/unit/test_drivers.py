"""Drivers' tokens and shared memory, and the form in which calls go over gRPC."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh.communicator_methods import CHUNK_BYTES, MAX_CHUNK_BYTES, METHODS, Assembly, messages, pieces
from epmesh.driver_memory import INLINE, DriverMemory
from epmesh.errors import InvalidRequest, Unauthenticated
from epmesh.frames import tensor_meta
from epmesh.v1 import communicator_service_pb2, front_pb2
from epmesh_server.driver_tokens import make_token, verify_token
from epmesh_server.ranks.driver_calls import _METHODS
from epmesh_server.shared_memory import sealed_memfd

SECRET = b"s" * 32


# Tokens ---------------------------------------------------------------------------------------------------------


def test_a_rank_reads_the_number_of_a_token_made_for_it() -> None:
    assert [verify_token(SECRET, make_token(SECRET, number)) for number in (1, 2, 1 << 40)] == [1, 2, 1 << 40]


def test_tokens_are_not_guessed_from_each_other() -> None:
    assert make_token(SECRET, 1) != make_token(SECRET, 1)


@pytest.mark.parametrize("position", [0, 7, 8, 23, 24, 55])
def test_a_token_with_any_byte_changed_is_refused(position: int) -> None:
    token = bytearray(make_token(SECRET, 3))
    token[position] ^= 1
    with pytest.raises(Unauthenticated):
        verify_token(SECRET, bytes(token))


@pytest.mark.parametrize("token", [b"", b"x", SECRET, make_token(b"another", 1), make_token(SECRET, 1) + b"x"])
def test_what_is_no_token_of_this_rank_is_refused(token: bytes) -> None:
    with pytest.raises(Unauthenticated, match="attach"):
        verify_token(SECRET, token)


# Memory ---------------------------------------------------------------------------------------------------------


def both_sides(num_bytes: int) -> tuple[DriverMemory, DriverMemory]:
    fd = sealed_memfd("test", num_bytes)
    sides = DriverMemory(fd, num_bytes, is_driver=True), DriverMemory(fd, num_bytes, is_driver=False)
    os.close(fd)
    return sides


def test_each_side_reads_what_the_other_wrote_and_there_is_room_again_once_it_is_given_back() -> None:
    driver, rank = both_sides(8192)
    for writer, reader in ((driver, rank), (rank, driver)):
        data = np.arange(4096, dtype=np.uint16).view(np.uint8)[:4096]
        for _ in range(3):
            place = writer.write(data)
            assert reader.read(place, 4096).tolist() == data.tolist()
            assert writer.write(data[:1]) == INLINE
            writer.free([place])
        with pytest.raises(InvalidRequest):
            writer.free([place])
    driver.close()
    rank.close()


@pytest.mark.parametrize(("place", "num_bytes"), [(-2, 1), (4096, 1), (4000, 97), (0, 4097), (1 << 60, 1)])
def test_a_place_outside_of_the_senders_half_is_refused(place: int, num_bytes: int) -> None:
    driver, rank = both_sides(8192)
    with pytest.raises(InvalidRequest, match=str(place)):
        rank.read(place, num_bytes)
    driver.close()
    rank.close()


# Calls over gRPC ------------------------------------------------------------------------------------------------


def test_every_method_has_an_rpc_and_the_rank_knows_it() -> None:
    fields = {field.name for field in front_pb2.MethodArguments.DESCRIPTOR.fields}
    assert METHODS.keys() == _METHODS.keys() == fields


@given(st.lists(st.sampled_from([0, 1, 7, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES]), max_size=4))
def test_tensors_are_cut_into_small_messages_and_arrive_whole(sizes: list[int]) -> None:
    tensors = [(np.arange(size) % 251).astype(np.uint8) for size in sizes]
    metas = [tensor_meta("uint8", tensor.shape) for tensor in tensors]
    header = communicator_service_pb2.CallHeader(tensors=metas)
    make = communicator_service_pb2.AllReduceRequest
    sent = list(messages(make, {"call": header}, [tensor.data for tensor in tensors]))
    assert [message.HasField("call") for message in sent] == [True] + [False] * (len(sent) - 1)
    assembly = Assembly(sent[0].call.tensors, sum(sizes))
    for message in sent:
        assert message.ByteSize() < MAX_CHUNK_BYTES
        assembly.add(message.data)
    assert [bytes(part) for part in assembly.tensors()] == [tensor.tobytes() for tensor in tensors]


def test_pieces_are_as_large_as_they_may_be() -> None:
    assert [len(piece) for piece in pieces([memoryview(bytes(10))] * 2)] == [20]
    assert [len(piece) for piece in pieces([memoryview(bytes(2 * CHUNK_BYTES + 5))])] == [CHUNK_BYTES, CHUNK_BYTES, 5]


def test_more_or_less_data_than_was_announced_is_refused() -> None:
    metas = [tensor_meta("float32", (2, 2))]
    short = Assembly(metas, 1000)
    short.add(bytes(15))
    with pytest.raises(InvalidRequest, match="15 bytes"):
        short.tensors()
    with pytest.raises(InvalidRequest, match="more data"):
        short.add(bytes(2))


@pytest.mark.parametrize(
    ("metas", "word"),
    [
        ([tensor_meta("float64", (1 << 10, 1 << 10))], "8388608"),
        ([tensor_meta("uint8", (1,))] * 65, "65 tensors"),
        ([front_pb2.FrontRequest().tensors.add(dtype="float128", shape=[1])], "float128"),
        ([front_pb2.FrontRequest().tensors.add(dtype="uint8", shape=[1 << 40, 1 << 20])], "bytes"),
    ],
)
def test_tensors_beyond_the_limits_are_refused_before_anything_is_taken(metas: list[object], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        Assembly(metas, 1 << 20)  # type: ignore[arg-type]


def test_a_message_with_too_much_data_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at most"):
        Assembly([tensor_meta("uint8", (1 << 24,))], 1 << 24).add(bytes(MAX_CHUNK_BYTES + 1))
