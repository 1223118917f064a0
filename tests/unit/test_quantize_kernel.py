"""The kernel that quantizes rows against the plain reference: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from epmesh.quantization import quantize_rows

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; on CPU its interpreter runs these", allow_module_level=True)

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True, scope="module")
def interpreted() -> Iterator[None]:
    """Triton reads the variable when kernels are defined, which is at the first import."""
    if DEVICE.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    yield
    os.environ.pop("TRITON_INTERPRET", None)


def rows(dtype: torch.dtype, num_tokens: int, hidden: int) -> torch.Tensor:
    """Of very different sizes, with groups of zeros, and the largest and least that the dtype has."""
    source = torch.Generator().manual_seed(hidden + num_tokens)
    wide = torch.randn(num_tokens, hidden, generator=source) * 10 ** torch.randint(-4, 4, (num_tokens, 1))
    wide[0, :128] = 0.0
    wide[-1, 0], wide[-1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    return wide.to(dtype).to(DEVICE)


def check(given: torch.Tensor) -> None:
    from epmesh_server.kernels.quantizer import Quantizer

    quantizer = Quantizer(given.device)
    assert quantizer.takes(given)
    values, scales = quantizer(given)
    wanted, its_scales = quantize_rows(given.cpu())  # on GPUs torch divides by a number less exactly
    assert torch.equal(scales.cpu(), its_scales)
    found, bits = values.view(torch.uint8).cpu(), wanted.view(torch.uint8)
    if DEVICE.type == "cuda":
        assert torch.equal(found, bits)
    else:  # Triton's interpreter rounds ties its own way, and halves what is rounded up to the next power of two
        told = bits % 8 != 0
        assert (found[told].int() - bits[told].int()).abs().max() <= 1
        assert (found[told] != bits[told]).float().mean() < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 128), (5, 384), (33, 1024)])
def test_rows_become_the_same_bits_as_the_references(dtype: torch.dtype, num_tokens: int, hidden: int) -> None:
    check(rows(dtype, num_tokens, hidden))


def test_a_group_with_a_nan_has_a_nan_as_its_scale_and_no_other_has() -> None:
    from epmesh_server.kernels.quantizer import Quantizer

    given = rows(torch.float32, 3, 256)
    given[1, 130] = float("nan")
    _, scales = Quantizer(DEVICE)(given)
    _, wanted = quantize_rows(given.cpu())
    assert torch.equal(scales.isnan().cpu(), wanted.isnan())
    assert scales.isnan().sum() == 1


def test_no_rows_are_quantized_to_none() -> None:
    from epmesh_server.kernels.quantizer import Quantizer

    values, scales = Quantizer(DEVICE)(torch.zeros(0, 256, device=DEVICE))
    assert (values.shape, scales.shape) == ((0, 256), (0, 2))


def test_rows_that_the_kernel_cannot_read_in_place_are_left_to_others() -> None:
    from epmesh_server.kernels.quantizer import Quantizer

    takes = Quantizer(DEVICE).takes
    plain = torch.zeros(4, 256, device=DEVICE)
    assert takes(plain)
    strided, odd = plain[:, ::2], torch.zeros(4 * 256 + 1, device=DEVICE)[1:].view(4, 256)
    for other in (strided, odd, plain[:, :100].contiguous(), plain.double(), plain[0], "rows", plain.to("meta")):
        assert not takes(other)
