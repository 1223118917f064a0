"""CUDA devices as the driver shows them, without torch. The driver is asked in a process of its own: it may hang."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

from epmesh_server.doctor.facts import GpuFacts

_WITHIN_S = 4.0
_MULTICAST_SUPPORTED = 132  # CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED
_NAME_BYTES = 128


def look_at_gpus() -> GpuFacts:
    """What the driver says, or why it says nothing."""
    version = Path("/proc/driver/nvidia/version")
    facts = GpuFacts(
        device_files=tuple(sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))),
        driver=driver_version(version.read_text()) if version.exists() else "",
        torch_cuda=_torch_cuda(),
    )
    try:
        asked = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            capture_output=True,
            text=True,
            timeout=_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return replace(facts, problem=f"the driver did not answer within {_WITHIN_S:g} s")
    if asked.returncode:
        return replace(facts, problem=asked.stderr.strip().splitlines()[-1])
    said = json.loads(asked.stdout)
    said["no_peer_access"] = tuple(tuple(pair) for pair in said["no_peer_access"])
    return replace(facts, **{**said, "names": tuple(said["names"])})


def driver_version(text: str) -> str:
    """The version in the first line of /proc/driver/nvidia/version; empty where there is none."""
    found = re.search(r"\b\d+\.\d+(\.\d+)*\b", text.partition("\n")[0])
    return found.group() if found else ""


def main() -> None:
    """Asks the driver in this process and writes what it says as JSON."""
    sys.stdout.write(json.dumps(_ask_driver()))


def _torch_cuda() -> str:
    """The CUDA version that torch was built for, read from its files: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else Path("/nowhere")
    found = re.search(r"^cuda\b.*= '([\d.]+)'", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1) if found else ""


class _Driver:
    """libcuda, a call a method; a code other than 0 ends this process with its name."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise SystemExit(f"{name} says {(text.value or b'error').decode()} ({code})")

    def number(self, name: str, *arguments: Any) -> int:
        value = ctypes.c_int()
        self(name, ctypes.byref(value), *arguments)
        return value.value


def _ask_driver() -> dict[str, Any]:
    try:
        driver = _Driver()
    except OSError as exc:
        raise SystemExit(str(exc)) from None
    driver("cuInit", 0)
    devices = [driver.number("cuDeviceGet", index) for index in range(driver.number("cuDeviceGetCount"))]
    return {
        "problem": "" if devices else "the driver shows no device",
        "cuda": driver.number("cuDriverGetVersion"),
        "names": [_name(driver, device) for device in devices],
        "no_peer_access": _apart(driver, devices),
        "multicast": all(driver.number("cuDeviceGetAttribute", _MULTICAST_SUPPORTED, device) for device in devices),
    }


def _apart(driver: _Driver, devices: Sequence[int]) -> list[tuple[int, int]]:
    pairs = permutations(devices, 2)
    return [pair for pair in pairs if pair[0] < pair[1] and not driver.number("cuDeviceCanAccessPeer", *pair)]


def _name(driver: _Driver, device: int) -> str:
    text = ctypes.create_string_buffer(_NAME_BYTES)
    driver("cuDeviceGetName", text, _NAME_BYTES, device)
    return text.value.decode()
