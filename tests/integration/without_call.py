"""Runs a command for which the kernel refuses one system call, as a container's seccomp profile does.

``python -m tests.integration.without_call memfd_create COMMAND ...``
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

NUMBERS = {
    "x86_64": {"memfd_create": 319, "eventfd2": 290, "sendmsg": 46},
    "aarch64": {"memfd_create": 279, "eventfd2": 19, "sendmsg": 211},
}
_SET_SECCOMP, _FILTER, _NO_NEW_PRIVILEGES = 22, 2, 38
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL_WITH = 0x7FFF0000, 0x00050000
_EPERM = 1


def refuse(call: str) -> None:
    """From now on `call` fails with EPERM in this process and all it becomes."""
    number = NUMBERS[platform.machine()][call]
    program = b"".join(
        struct.pack("=HBBI", *step)
        for step in (
            (_LOAD_WORD, 0, 0, 0),
            (_JUMP_IF_EQUAL, 0, 1, number),
            (_RETURN, 0, 0, _FAIL_WITH | _EPERM),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    steps = ctypes.create_string_buffer(program)
    filtered = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(steps)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, filtered)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")


if __name__ == "__main__":
    refuse(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
