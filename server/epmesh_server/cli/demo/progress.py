"""How far the ranks are: small JSON datagrams over a unix socket in a directory of this user's alone.

A datagram holds all that its rank has generated, so one that is lost costs nothing: the next one says it too. A rank
never waits for the display. Routers are threads of the display's own process, and `LocalProgress` is both ends.
"""

from __future__ import annotations

import contextlib
import json
import queue
import select
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_MAX_BYTES = 1 << 16
_NOBODY_READS = (BlockingIOError, ConnectionRefusedError, FileNotFoundError)


class ProgressSender:
    """A rank's end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    def send(self, tokens: dict[int, list[int]]) -> None:
        """Says what was generated so far: token ids by number of the prompt. Never waits."""
        with contextlib.suppress(*_NOBODY_READS):
            self._socket.sendto(json.dumps(tokens).encode(), self._path)

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


class ProgressReceiver:
    """The display's end; its socket and directory are there while it is entered."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="epmesh-demo-")
        self.path = str(Path(self._folder.name, "progress"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(self.path)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes socket and directory."""
        self._socket.close()
        self._folder.cleanup()

    def receive(self, timeout_s: float) -> list[dict[int, list[int]]]:
        """What came in, waiting up to `timeout_s` for the first; what is no progress is left out."""
        select.select([self._socket], [], [], timeout_s)
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                progress = parse(self._socket.recv(_MAX_BYTES))
                if progress is not None:
                    found.append(progress)
        return found


class LocalProgress:
    """Both ends, for threads of one process."""

    def __init__(self) -> None:
        self._sent: queue.SimpleQueue[dict[int, list[int]]] = queue.SimpleQueue()

    def send(self, tokens: dict[int, list[int]]) -> None:
        """Says what was generated so far: token ids by number of the prompt."""
        self._sent.put(tokens)

    def receive(self, timeout_s: float) -> list[dict[int, list[int]]]:
        """What came in, waiting up to `timeout_s` for the first."""
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._sent.get(timeout=timeout_s))
            while True:
                found.append(self._sent.get_nowait())
        return found


def parse(datagram: bytes) -> dict[int, list[int]] | None:
    """The tokens by prompt that a datagram holds; `None` if it is something else."""
    try:
        tokens = {int(prompt): list(map(int, ids)) for prompt, ids in json.loads(datagram).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return tokens


class Progress:
    """All that was generated so far, and how fast."""

    def __init__(self, num_prompts: int) -> None:
        self.tokens: list[Sequence[int]] = [()] * num_prompts
        self._first: tuple[float, int] | None = None  # when the first token was seen here, and how many came with it
        self._last = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_s(self) -> float:
        """Rate since the first tokens were seen; 0 until there are more."""
        if self._first is None or self._last <= self._first[0]:
            return 0.0
        since, already = self._first
        return (self.num_tokens - already) / (self._last - since)

    def update(self, tokens: dict[int, list[int]], now: float | None = None) -> None:
        """Takes in what a rank said; older news than what is known changes nothing."""
        for prompt, ids in tokens.items():
            if 0 <= prompt < len(self.tokens) and len(ids) > len(self.tokens[prompt]):
                self.tokens[prompt] = ids
        self._last = time.monotonic() if now is None else now
        if self._first is None:
            self._first = self._last, self.num_tokens
