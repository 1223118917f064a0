"""CUDA's driver API, by ctypes."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from epmesh.errors import InvalidRequest


@functools.cache
def driver() -> Any:
    """The library.

    Raises:
        InvalidRequest: there is none.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise InvalidRequest(f"CUDA's driver library cannot be loaded: {exc}; use device='cpu'") from exc


def call(name: str, *args: Any) -> None:
    """Calls a function of the library.

    Raises:
        InvalidRequest: it failed, with CUDA's text.
    """
    check(name, getattr(driver(), name)(*args))


def check(name: str, code: int) -> None:
    """Raises what `name` returned, unless that is success."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise InvalidRequest(f"{name}: {(text.value or b'unknown error').decode()} (CUDA error {code})")


def use_device(index: int) -> None:
    """Makes the context that torch uses on a device current in this thread."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call("cuDeviceGet", ctypes.byref(device), index)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call("cuCtxSetCurrent", context)


def allow_others_to_capture() -> None:
    """Lets this thread ask for events while another thread captures a graph, which by default would end the capture."""
    thread_local = ctypes.c_int(1)
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(thread_local))
