"""A name server on 127.0.0.1 that knows one address for every name, and says so only after it was asked some times.

``python -m tests.integration.name_server ADDRESS REFUSALS``
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_HEADER_BYTES = 12
_NO_SUCH_NAME, _A = 3, 1


def answer(query: bytes, address: str, *, known: bool) -> bytes:
    """The response to `query`: the address for an A question, nothing for others, or that there is no such name."""
    end = query.index(0, _HEADER_BYTES) + 5
    question = query[_HEADER_BYTES:end]
    wants = int.from_bytes(question[-4:-2], "big") == _A
    flags = 0x8180 | (0 if known else _NO_SUCH_NAME)
    counts = [1, int(known and wants), 0, 0]
    response = query[:2] + b"".join(number.to_bytes(2, "big") for number in (flags, *counts)) + question
    if counts[1]:
        response += b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x00\x00\x04" + socket.inet_aton(address)
    return response


def main(address: str, refusals: int) -> None:
    """Answers until it is killed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        (Path(os.environ["PLACE"]) / "ready").write_text("ready\n")
        asked = 0
        while True:
            query, who = server.recvfrom(512)
            asked += 1
            server.sendto(answer(query, address, known=asked > 2 * refusals), who)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
