"""Callers' tensors travel as bytes and come back in kind, NumPy's and torch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from epmesh.errors import InvalidRequest
from epmesh.frames import ITEM_BYTES
from epmesh.tensors import Kind, bytes_of, check_writable, copy_into, kind_of, kind_of_dtype, meta_of

NUMPY_DTYPES = [name for name in ITEM_BYTES if name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2")]


def random_bytes(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(count).integers(0, 2, count).astype(np.uint8)


@pytest.mark.parametrize("name", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 1, 3)])
def test_torch_tensors_of_every_dtype_come_back_as_they_went(name: str, shape: tuple[int, ...]) -> None:
    dtype = getattr(torch, name)
    count = int(np.prod(shape))
    raw = torch.from_numpy(random_bytes(count * ITEM_BYTES[name]))
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    back = kind_of(tensor).make(meta_of(tensor), bytes_of(tensor).data)
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert bytes_of(back).tolist() == bytes_of(tensor).tolist() == (raw.tolist() if count else [])
    assert not count or back.data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize("name", NUMPY_DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 1, 3)])
def test_arrays_of_every_dtype_come_back_as_they_went(name: str, shape: tuple[int, ...]) -> None:
    array = random_bytes(int(np.prod(shape)) * ITEM_BYTES[name]).view(name).reshape(shape)
    back = kind_of(array).make(meta_of(array), bytes_of(array).data)
    assert isinstance(back, np.ndarray)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable


def test_what_does_not_lie_in_order_travels_in_order() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    for tensor in (array.T, torch.from_numpy(array).T):
        assert bytes_of(tensor).view(np.int32).tolist() == array.T.reshape(-1).tolist()
    swapped = array.astype(">i4")
    assert bytes_of(swapped).view(np.int32).tolist() == array.reshape(-1).tolist()


def test_results_are_written_into_tensors_that_do_not_lie_in_order() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for target in (np.zeros((3, 2), np.float32).T, torch.zeros(3, 2).T, np.zeros((2, 3), ">f4")):
        copy_into(target, meta_of(values), bytes_of(values).data)
        assert target.tolist() == values.tolist()


def test_a_torch_tensor_that_wants_gradients_takes_results_too() -> None:
    target = torch.zeros(3, requires_grad=True)
    copy_into(target, meta_of(target), np.ones(3, np.float32).view(np.uint8).data)
    assert target.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (None, "None"),
        ([1.0, 2.0], "list"),
        (np.float32(1), "float32"),
        (torch.zeros(1, dtype=torch.complex128), "complex128"),
        (np.zeros(1, np.complex128), "complex128"),
        (np.array(["a"]), "str"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(1, device="meta"), "meta"),
        (np.zeros((1,) * 9), "9 dimensions"),
    ],
)
def test_what_cannot_travel_is_named(wrong: Any, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        meta_of(wrong)


def test_a_read_only_array_takes_no_result() -> None:
    array = np.zeros(2)
    check_writable(array)
    array.flags.writeable = False
    with pytest.raises(InvalidRequest, match="read-only"):
        check_writable(array)


def test_a_dtype_says_whose_tensors_are_wanted() -> None:
    assert kind_of_dtype(torch.bfloat16) == (Kind(True), "bfloat16")
    for dtype in (np.int16, np.dtype("int16"), "int16"):
        assert kind_of_dtype(dtype) == (Kind(False, np.dtype("int16")), "int16")
    with pytest.raises(InvalidRequest, match="17"):
        kind_of_dtype(17)


def test_a_dtype_that_numpy_lacks_is_refused_with_the_mend() -> None:
    meta = meta_of(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(InvalidRequest, match=r"bfloat16.*torch"):
        Kind(False).make(meta, memoryview(bytes(4)))
