"""Callers' arrays as bytes and back; sums bit for bit as torch forms them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epmesh.arrays import Ints, Rows, as_ids, as_rows, in_kind, sum_rows
from epmesh.errors import InvalidRequest
from epmesh.frames import ITEM_BYTES
from epmesh_server.ranks.tensors import sum_rows as torch_sum_rows

SUMMED = ("float16", "bfloat16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64")


def tensor_of(dtype: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, ITEM_BYTES[dtype]), np.uint8)
    kind = getattr(torch, dtype)
    values = torch.from_numpy(bits).view(kind).reshape(shape)
    if not kind.is_floating_point or kind.itemsize == 1:
        return values
    return torch.where(values.isfinite(), values, torch.ones((), dtype=kind))


@st.composite
def sums(draw: st.DrawFn) -> tuple[str, int, list[tuple[Ints, torch.Tensor]]]:
    dtype, num_rows, width = draw(st.sampled_from(SUMMED)), draw(st.integers(0, 5)), draw(st.integers(1, 5))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        rows = np.array(sorted(draw(st.sets(st.integers(0, max(0, num_rows - 1)), max_size=num_rows))), np.int64)
        parts.append((rows, tensor_of(dtype, (len(rows), width), draw(st.integers(0, 1 << 16)))))
    return dtype, num_rows, parts


@given(sums())
def test_sums_are_bit_for_bit_those_of_the_ranks(case: tuple[str, int, list[tuple[Ints, torch.Tensor]]]) -> None:
    dtype, num_rows, parts = case
    width = parts[0][1].shape[1]
    ours = sum_rows([(rows, as_rows(values, "part")) for rows, values in parts], num_rows)
    theirs = torch_sum_rows(parts, num_rows, width, getattr(torch, dtype))
    assert ours.dtype == dtype
    got = in_kind(ours, theirs)
    nan = got.isnan() & theirs.isnan()  # of a sum of infinities; which of the many NaNs it is, is no one's promise
    assert torch.equal(torch.where(nan, 0, got), torch.where(nan, 0, theirs))
    assert torch.equal(torch.where(nan, 0, got).signbit(), torch.where(nan, 0, theirs).signbit())


def test_bfloat16_rounds_to_even_and_keeps_nan() -> None:
    values = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, torch.inf, torch.nan, -0.0]], dtype=torch.float32)
    halves = [(np.array([0]), as_rows(part.bfloat16(), "part")) for part in (values, torch.zeros_like(values))]
    ends = torch.tensor([[1.0, 1.015625, 3.3895e38, torch.inf, torch.nan, 0.0]]).bfloat16()
    summed = in_kind(sum_rows(halves, 1), ends)
    assert torch.equal(summed.isnan(), ends.isnan())
    ties = [(np.array([0]), as_rows(torch.tensor([[1.0, 1.0]]).bfloat16(), "part"))] * 1
    ties.append((np.array([0]), as_rows(torch.tensor([[2.0**-8, 3 * 2.0**-8]]).bfloat16(), "part")))
    assert in_kind(sum_rows(ties, 1), ends).tolist() == [[1.0, 1.015625]]


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize(
    "cut", [lambda x: x, lambda x: x[::2], lambda x: x[:, 1:3], lambda x: x[:0], lambda x: x[:, :0]]
)
def test_torch_tensors_come_back_as_they_went(dtype: str, cut: Callable[[Any], Any]) -> None:
    tensor = tensor_of(dtype, (4, 6), 1) if dtype != "bool" else torch.arange(24).reshape(4, 6) % 3 == 0
    tensor = cut(tensor)
    rows = as_rows(tensor, "x")
    assert (rows.dtype, len(rows), rows.width) == (dtype, *tensor.shape)
    back = in_kind(rows, tensor)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "float32", ">f4", "int64", "complex64"])
@pytest.mark.parametrize("cut", [lambda x: x, lambda x: x[::2], lambda x: x.T, lambda x: x[:, :0]])
def test_numpy_arrays_come_back_as_they_went(dtype: str, cut: Callable[[Any], Any]) -> None:
    array = cut(np.arange(24).reshape(4, 6).astype(dtype))
    back = in_kind(as_rows(array, "x"), array)
    assert back.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(back, array)


def test_numpy_callers_get_bfloat16_results_as_float32() -> None:
    results = as_rows(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), "x")
    got = in_kind(results, np.zeros((1, 2), np.float32))
    assert got.dtype == np.float32
    assert got.tolist() == [[1.5, -2.0]]


def test_answers_do_not_share_memory_that_came_over_a_wire() -> None:
    data = np.ones((1, 2), np.float32).tobytes()
    rows = Rows.over("float32", (1, 2), data)
    in_kind(rows, np.zeros(1))[:] = 5
    in_kind(rows, torch.zeros(1))[:] = 5
    assert data == np.ones((1, 2), np.float32).tobytes()


def test_contiguous_arrays_are_not_copied() -> None:
    array = np.ones((2, 2), np.float32)
    assert np.shares_memory(as_rows(array, "x").data, array)
    tensor = torch.ones(2, 2, requires_grad=True)
    assert as_rows(tensor, "x").data.ctypes.data == tensor.data_ptr()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([[1.0]], "x is a list; give a NumPy array or a torch tensor"),
        (np.zeros(3, np.float32), r"x has shape \[3\]; it must have two dimensions"),
        (np.zeros((1, 1), "datetime64[s]"), "x has dtype datetime64"),
        (np.zeros((1, 1), object), "x has dtype object, which cannot travel"),
        (torch.zeros(1, 1, device="meta"), r"x is on meta; .* give x.cpu\(\)"),
        (torch.zeros(1, 1, dtype=torch.complex128), "x has dtype complex128"),
        (torch.eye(2).to_sparse(), r"x has layout .*to_dense"),
    ],
)
def test_what_cannot_travel_is_named_with_the_mend(value: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        as_rows(value, "x")


def test_ids_keep_their_width_or_become_int64() -> None:
    assert as_ids(np.zeros((1, 1), np.int32), "ids").dtype == np.int32
    assert as_ids(np.zeros((1, 1), np.uint8), "ids").dtype == np.int64
    assert as_ids(torch.zeros(1, 1, dtype=torch.int64), "ids").dtype == np.int64
    with pytest.raises(InvalidRequest, match=r"ids is float32\[1, 1\]; it must be integers"):
        as_ids(np.zeros((1, 1), np.float32), "ids")


@pytest.mark.parametrize(("shape", "data"), [((1, 2), b"1234567"), ((8,), b"12345678"), ((2, 1 << 40), b"12345678")])
def test_answers_of_the_wrong_size_are_refused(shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        Rows.over("float32", shape, data)


def test_nodes_must_answer_alike() -> None:
    parts = [(np.array([0]), Rows.of(np.zeros((1, 2), dtype))) for dtype in (np.float32, np.float64)]
    with pytest.raises(InvalidRequest, match="nodes answered with different results"):
        sum_rows(parts, 1)
