"""Compiles kernels and launches them at little cost.

Triton binds and compares all arguments at every launch, which takes the host longer than the device needs for a small
exchange. Here Triton only compiles; the driver launches, with arguments laid out once and changed in place. What was
compiled serves the whole process, so that it can be compiled before it is needed.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from epmesh_server.kernels.driver import call, check, driver, use_device
from epmesh_server.kernels.precompile import Precompiler

_WARPS = 8
_THREADS = 32 * _WARPS
_INVALID_CONTEXT = 201
_MOST_SHARED_BYTES = 48 << 10
_MOST_SCRATCH = 2  # pointers that Triton adds behind a kernel's own parameters; ours need no such memory
_PLAIN_ADDRESS, _PLAIN_OFFSET = (1 << 40) + 1, 3
_ENTRY = re.compile(r"\.entry\s+\w+\s*\((.*?)\)", re.DOTALL)

# Public ways to the current stream make an object of it, which takes longer than a launch.
stream_of: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)

Arguments = tuple[Any, ...]  # whole numbers, and tuples of them
Constants = Callable[[], Mapping[str, Any]]

_lock = threading.Lock()  # one thread at a time compiles, and adds to what follows
_compiled: dict[Hashable, Any] = {}
_loaded: dict[Hashable, Function] = {}

precompiler = Precompiler()


class Function:
    """A compiled kernel in a device's memory."""

    def __init__(self, compiled: Any) -> None:
        """Loads it in the current context, which waits for kernels that run.

        Raises:
            RuntimeError: this Triton compiles to something that needs more than its parameters.
        """
        metadata = compiled.metadata
        scratch = (metadata.global_scratch_size or 0) + (getattr(metadata, "profile_scratch_size", 0) or 0)
        if scratch or metadata.shared > _MOST_SHARED_BYTES:
            raise RuntimeError(f"{metadata.name} wants {metadata.shared} bytes of shared memory, {scratch} of scratch")
        self.num_parameters = count_parameters(compiled.asm["ptx"])
        self.shared_bytes = int(metadata.shared)
        self.handle, self._module = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), compiled.asm["cubin"])
        call("cuModuleGetFunction", ctypes.byref(self.handle), self._module, metadata.name.encode())


class _Config(ctypes.Structure):
    """How the driver launches: `CUlaunchConfig`."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Launch:
    """A kernel with its arguments laid out.

    Attributes:
        values: the arguments in the kernel's order, tuples flattened; they may be changed between launches.
        places: where each argument, or the first of a tuple, stands among them.
    """

    def __init__(self, function: Function, names: Sequence[str], programs: int, arguments: Arguments) -> None:
        """Lays out `arguments`."""
        flat = list(_flat(arguments))
        count = function.num_parameters
        if not len(flat) <= count <= len(flat) + _MOST_SCRATCH:
            raise RuntimeError(f"a kernel of {count} parameters was given {len(flat)} arguments")
        self.values = (ctypes.c_int64 * count)(*flat)
        self.places = dict(zip(names, _starts(arguments), strict=False))
        self._given = len(flat)
        start = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_void_p * count)(*(start + 8 * index for index in range(count)))
        self._config = _Config((programs, 1, 1), (_THREADS, 1, 1), function.shared_bytes, None, None, 0)
        self._stream = 0
        self._launch = functools.partial(
            driver().cuLaunchKernelEx, ctypes.byref(self._config), function.handle, self._pointers, None
        )

    def fill(self, programs: int, arguments: Arguments) -> None:
        """Replaces all arguments."""
        self._config.grid[0] = programs
        self.values[: self._given] = list(_flat(arguments))

    def run_programs(self, programs: int) -> None:
        """Changes how many programs run."""
        self._config.grid[0] = programs

    def __call__(self, stream: int) -> None:
        """Launches on `stream`, a raw handle of the current device; arguments are read before this returns."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        code = self._launch()
        if code == _INVALID_CONTEXT:  # this thread has not used the device yet
            use_device(torch.cuda.current_device())
            code = self._launch()
        if code:
            check("cuLaunchKernelEx", code)


class Launcher:
    """Launches on one device, from one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._index = device.index or 0
        self._launches: dict[Hashable, Launch] = {}

    def __call__(self, kernel: Any, key: Hashable, programs: int, arguments: Arguments, constants: Constants) -> None:
        """Launches on the device's current stream; the device is the current one.

        Args:
            key: differs where `constants` do.
            arguments: in the kernel's order.
            constants: makes what it is compiled for, in its order; called for a new key.
        """
        if self._device.type != "cuda":
            kernel[(programs,)](*arguments, **constants())
            return
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self.prepare(kernel, programs, arguments, constants)
        else:
            launch.fill(programs, arguments)
        launch(stream_of(self._index))

    def prepare(self, kernel: Any, programs: int, arguments: Arguments, constants: Constants) -> Launch:
        """A launch of the caller's own."""
        made = dict(constants())
        function = _load(kernel, arguments, made, self._device)
        launch = Launch(function, kernel.arg_names, programs, arguments)
        for world_size in range(made.get("WORLD", 1) - 1, 0, -1):
            precompiler.add(world_size, functools.partial(_compile_for, world_size, kernel, arguments, made))
        return launch


def count_parameters(ptx: str) -> int:
    """How many parameters a kernel takes."""
    found = _ENTRY.search(ptx)
    if found is None:
        raise RuntimeError("Triton compiled to something that has no entry")
    return found.group(1).count(".param")


def _load(kernel: Any, arguments: Arguments, constants: Mapping[str, Any], device: torch.device) -> Function:
    key = (kernel.__name__, device, *constants.values())
    found = _loaded.get(key)
    if found is not None:
        return found  # without the lock, which is held as long as something else is compiled
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = Function(_compile(kernel, arguments, constants))
        return found


def _compile_for(world_size: int, kernel: Any, arguments: Arguments, constants: Mapping[str, Any]) -> None:
    """Compiles what is launched with these arguments among `world_size` ranks; they are for more."""
    of_ranks = kernel.arg_names.index("bases") if "bases" in kernel.arg_names else -1
    fewer = tuple(each[:world_size] if at == of_ranks else each for at, each in enumerate(arguments))
    with _lock:
        _compile(kernel, fewer, {**constants, "WORLD": world_size})


def _compile(kernel: Any, arguments: Arguments, constants: Mapping[str, Any]) -> Any:
    key = (kernel.__name__, *constants.values())
    found = _compiled.get(key)
    if found is None:
        plain = [_plain(name, each) for name, each in zip(kernel.arg_names, arguments, strict=False)]
        found = _compiled[key] = kernel.warmup(*plain, **constants, num_warps=_WARPS, grid=(1,))
    return found


def _plain(name: str, argument: Any) -> Any:
    """What the compiler is shown in place of an argument: of the same width, and nothing can be concluded from it.

    Triton makes a constant of a 1, and counts on multiples of 16, in tuples always; but one variant is to serve all.
    """
    if not isinstance(argument, tuple):
        return _PLAIN_ADDRESS  # where a parameter says its type, that counts
    return (_PLAIN_OFFSET if name == "offsets" else _PLAIN_ADDRESS,) * len(argument)


def _starts(arguments: Arguments) -> Iterator[int]:
    start = 0
    for each in arguments:
        yield start
        start += len(each) if isinstance(each, tuple) else 1


def _flat(arguments: Iterable[Any]) -> Iterator[int]:
    for each in arguments:
        if isinstance(each, tuple):
            yield from each
        else:
            yield each
