"""Launches kernels at little cost: Triton binds and compares all arguments at every launch, which takes the host longer
than the device needs for a small exchange. Here a kernel that was compiled once is launched as it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_WARPS = 8
# Public ways to the current stream make an object of it, which takes longer than a launch.
_stream_of: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass(frozen=True)
class _Compiled:
    kernel: Any
    constants: tuple[Any, ...]


class Launcher:
    """Remembers what was compiled for one device."""

    def __init__(self, device: torch.device) -> None:
        self._index = device.index or 0
        self._compiled: dict[Hashable, _Compiled] = {}

    def __call__(
        self,
        kernel: Any,
        key: Hashable,
        programs: int,
        arguments: tuple[Any, ...],
        constants: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Launches on the device's current stream; the device is the current one.

        Args:
            key: differs where `constants` do, and where Triton would compile another variant for `arguments`: for each
                that it looks at, whether 16 divides it, and the dtypes of tensors.
            arguments: in the kernel's order.
            constants: makes what it is compiled for, in its order; called for a new key.
        """
        found = self._compiled.get(key)
        if found is None:
            made = constants()
            compiled = kernel[(programs,)](*arguments, **made, num_warps=_WARPS)
            if compiled is not None:  # the interpreter compiles nothing
                self._compiled[key] = _Compiled(compiled, tuple(made.values()))
            return
        each = found.kernel
        stream = _stream_of(self._index)
        each.run(
            programs, 1, 1, stream, each.function, each.packed_metadata, None, None, None, *arguments, *found.constants
        )
