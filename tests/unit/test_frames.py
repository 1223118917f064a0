"""Frames: what was encoded comes back, and nothing else gets in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epmesh import frames
from epmesh.errors import InvalidRequest
from epmesh.v1 import frame_pb2

DTYPES = sorted(frames.ITEM_BYTES)


def header(*metas: frame_pb2.TensorMeta) -> frame_pb2.FrameHeader:
    return frame_pb2.FrameHeader(mesh_id="m", epoch=3, kind=frame_pb2.FRAME_KIND_DISPATCH, tensors=metas)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4)), max_size=5))
def test_a_message_comes_back_as_it_was(tensors: list[tuple[str, list[int]]]) -> None:
    metas = [frames.tensor_meta(dtype, shape) for dtype, shape in tensors]
    data = [bytes(range(256)) * (frames.num_bytes(meta) // 256) + bytes(frames.num_bytes(meta) % 256) for meta in metas]
    message = frames.decode(frames.encode(header(*metas), data))
    assert message.header == header(*metas)
    assert [bytes(view) for view in message.tensors] == data


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_arbitrary_bytes_are_refused_or_decoded_but_never_crash(parts: list[bytes]) -> None:
    try:
        message = frames.decode(parts)
    except InvalidRequest:
        return
    assert sum(map(frames.num_bytes, message.header.tensors)) == sum(map(len, message.tensors))


@given(st.data())
def test_a_damaged_message_is_refused_or_has_lengths_that_fit(data: st.DataObject) -> None:
    meta = frames.tensor_meta("float32", (2, 3))
    whole = [bytes(frame) for frame in frames.encode(header(meta), [bytes(24)])]
    which = data.draw(st.integers(0, 1))
    at = data.draw(st.integers(0, len(whole[which]) - 1))
    whole[which] = whole[which][:at] + data.draw(st.binary(max_size=3)) + whole[which][at + 1 :]
    try:
        message = frames.decode(whole)
    except InvalidRequest:
        return
    assert [frames.num_bytes(m) for m in message.header.tensors] == [len(view) for view in message.tensors]


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([], "0 frames"),
        ([b""] * (frames.MAX_TENSORS + 2), "frames"),
        ([bytes(frames.MAX_HEADER_BYTES + 1)], "a header of"),
        ([b"\xff"], "no FrameHeader"),
        ([b""], "names no kind"),
        ([header().SerializeToString(), b"x"], "0 tensors; 1 came"),
        ([header(frame_pb2.TensorMeta(dtype="float32", shape=[2])).SerializeToString(), b"1234"], "8 bytes; 4 came"),
        ([header(frame_pb2.TensorMeta(dtype="object", shape=[1])).SerializeToString(), b"1"], "'object' is unknown"),
        ([header(frame_pb2.TensorMeta(dtype="int8", shape=[1] * 9)).SerializeToString(), b"1"], "9 dimensions"),
        ([header(frame_pb2.TensorMeta(dtype="int8", shape=[1 << 40, 1 << 40])).SerializeToString(), b"1"], "at most"),
    ],
)
def test_each_lie_is_refused_by_name(parts: list[bytes], text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        frames.decode(parts)


def test_a_dtype_that_does_not_travel_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="complex128 cannot travel"):
        frames.tensor_meta("complex128", (1,))
