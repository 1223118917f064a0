"""Launches kernels at little cost: Triton binds and compares all arguments at every launch, which takes the host longer
than the device needs for a small exchange. Here a kernel that was compiled once is launched as it is."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

_WARPS = 8


class Launcher:
    """Remembers what was compiled; for one device, and for addresses and sizes that stay what the key says they are."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        kernel: Any,
        programs: int,
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        alignment: tuple[Any, ...] = (),
    ) -> None:
        """Launches on the current stream.

        Args:
            arguments: in the kernel's order.
            constants: what it is compiled for, in its order.
            alignment: differs where Triton would compile another variant for `arguments`: for each that it looks at,
                whether 16 divides it, and the dtypes of tensors.
        """
        key = (kernel, *constants.values(), *alignment)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[(programs, 1, 1)](*arguments, *constants.values())
            return
        compiled = kernel[(programs,)](*arguments, **constants, num_warps=_WARPS)
        if compiled is not None:  # the interpreter compiles nothing
            self._compiled[key] = compiled
