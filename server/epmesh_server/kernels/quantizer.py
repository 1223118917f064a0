"""Quantizes rows on a GPU before they are dispatched, by one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from epmesh.quantization import GROUP, LARGEST, SMALLEST_PEAK
from epmesh_server.kernels import quantize_kernels as kernels
from epmesh_server.kernels.launcher import Launcher
from epmesh_server.ranks.tensors import dtype_name

_GROUPS = 16  # of 128 values, by one program: 16 bytes of bf16 a thread
_FROM = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNED = 15


class Quantizer:
    """Makes fp8 rows and their scales on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._launch = Launcher(device)

    def takes(self, hidden_states: Any) -> bool:
        """Whether the kernel can read the rows as they are; for others there is `epmesh.quantization`."""
        return (
            type(hidden_states) is torch.Tensor
            and hidden_states.device == self._device
            and hidden_states.dtype in _FROM
            and hidden_states.dim() == 2
            and hidden_states.shape[1] > 0
            and not hidden_states.shape[1] % GROUP
            and hidden_states.is_contiguous()
            and not hidden_states.data_ptr() & _ALIGNED
        )

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[num_tokens, hidden]`` in float8_e4m3fn, and ``[num_tokens, hidden / 128]`` float32, on the current stream.

        Args:
            hidden_states: rows that the kernel `takes`; the device is the current one.
        """
        num_tokens, hidden = hidden_states.shape
        values = torch.empty((num_tokens, hidden), dtype=torch.float8_e4m3fn, device=self._device)
        scales = torch.empty((num_tokens, hidden // GROUP), dtype=torch.float32, device=self._device)
        if num_groups := scales.numel():
            self._launch(
                kernels.quantize,
                hidden_states.dtype,
                -(-num_groups // _GROUPS),
                (hidden_states.data_ptr(), values.data_ptr(), scales.data_ptr(), num_groups),
                lambda: {
                    "FROM": getattr(tl, dtype_name(hidden_states.dtype)),
                    "GROUP": GROUP,
                    "GROUPS": _GROUPS,
                    "LARGEST": LARGEST,
                    "SMALLEST_PEAK": SMALLEST_PEAK,
                },
            )
        return values, scales
