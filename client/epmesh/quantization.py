"""Rows made narrower before they travel: ``dispatch(..., quantize="fp8")``. torch is used where the caller brought it.

What is sent are e4m3 values, and for every 128 of a row one scale in float32 that they are to be multiplied by: the
largest absolute value among the 128 becomes 448, the largest that e4m3 has.
"""

from __future__ import annotations

import sys
from typing import Any

from epmesh.errors import InvalidRequest

GROUP = 128  # values of a row that share a scale
LARGEST = 448.0
SMALLEST_PEAK = 1e-10  # where all of a group are 0, or next to it
FORMATS = ("fp8",)


class Unquantized:
    """Stands for rows that could not be quantized, and is refused as one that is no tensor; it says why."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __repr__(self) -> str:
        return self._reason


def quantize_rows(hidden_states: Any) -> tuple[Any, Any]:
    """Rows in fp8 and their scales.

    Args:
        hidden_states: torch tensor ``[num_tokens, hidden]`` in bfloat16, float16 or float32; 128 divides `hidden`.

    Returns:
        ``[num_tokens, hidden]`` in float8_e4m3fn and ``[num_tokens, hidden / 128]`` in float32.

    Raises:
        InvalidRequest: it is something else.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(hidden_states, torch.Tensor):
        raise InvalidRequest(f"rows of type {type(hidden_states).__name__}; quantize takes torch's")
    if hidden_states.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InvalidRequest(f"{hidden_states.dtype} rows; quantize takes bfloat16 to float32")
    if hidden_states.dim() != 2 or hidden_states.shape[1] % GROUP or not hidden_states.shape[1]:
        raise InvalidRequest(f"rows of shape {list(hidden_states.shape)}; quantize needs [*, n x {GROUP}]")
    num_tokens, hidden = hidden_states.shape
    groups = hidden_states.float().reshape(num_tokens, hidden // GROUP, GROUP)
    scales = groups.abs().amax(dim=-1).clamp_(min=SMALLEST_PEAK) / LARGEST
    values = (groups / scales.unsqueeze(-1)).clamp_(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn).reshape(num_tokens, hidden), scales


def quantized(hidden_states: Any, extra_tensors: Any, quantize: str | None) -> tuple[Any, Any]:
    """What a dispatch sends in place of its rows and extra tensors: the scales are the last of those."""
    if quantize is None:
        return hidden_states, extra_tensors
    extra = [] if extra_tensors is None else extra_tensors
    if quantize not in FORMATS:
        return Unquantized(f"rows to quantize as {quantize!r:.20}; it is one of {list(FORMATS)}"), extra
    try:
        rows, scales = quantize_rows(hidden_states)
    except InvalidRequest as exc:
        return Unquantized(str(exc)), extra
    return rows, [*extra, scales] if isinstance(extra, list | tuple) else extra  # what is no list is refused
