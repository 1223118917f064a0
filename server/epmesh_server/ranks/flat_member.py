"""A member of a group of which nothing is known but its process group: every other member is one message away.

A call begins with a round, in which every member tells every other one what it called, and how many rows it has for
it. Nothing else moves before the calls were compared, so all raise the same error where they do not agree.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from epmesh.errors import DeadlineExceeded, EpmeshError, InvalidRequest
from epmesh.layout import Topology
from epmesh_server.ranks.calls import Call, describe, verdict
from epmesh_server.ranks.mail import Mail
from epmesh_server.ranks.open_exchange import BROKEN
from epmesh_server.ranks.tensors import Bytes
from epmesh_server.worker import Worker

_T = TypeVar("_T")
_FORMAT = 1  # of blocks and rows; another one is refused
# Format, bytes of the call, sequence number, rows for the receiver, messages that were taken of it.
_HEAD = struct.Struct("<IIQQQ")
BLOCK_BYTES = 1024
_FIRST_BYTES = BLOCK_BYTES - _HEAD.size  # of a call that go with the head; the rest follows where there is more
MAX_CALL_BYTES = 1 << 20


class FlatMember:
    """One rank in one group; used by one thread at a time, and by the courier that works for it.

    Attributes:
        topology: of the group, all on one node.
        mail: to the other members.
        taken: how many messages of each member this one took out of its mail.
        acknowledged: how many of this one's each member took, as far as known.
        bytes_sent: to other members, rounds included.
    """

    def __init__(self, topology: Topology, mail: Mail) -> None:
        """Starts at number 0."""
        self.topology = topology
        self.mail = mail
        self.taken = [0] * topology.world_size
        self.acknowledged = [0] * topology.world_size
        self.bytes_sent = 0
        self._done = 0
        self._open: set[int] = set()
        self._courier = Worker("epmesh-courier")

    # Sequence numbers ------------------------------------------------------------------------------------------

    @property
    def completed(self) -> int:
        """The last number up to which everything is over."""
        return min(self._open) - 1 if self._open else self._done

    def begin(self) -> int:
        """Takes the next number."""
        self.mail.check()
        sequence = max(self._done, *self._open) + 1 if self._open else self._done + 1
        self._open.add(sequence)
        return sequence

    def dispatched(self, sequence: int) -> None:
        """The first half of an exchange is done."""

    def complete(self, sequence: int) -> None:
        """A call is over, well or refused on all members."""
        self._open.discard(sequence)
        self._done = max(self._done, sequence)

    def pass_over(self, sequence: int, error: EpmeshError | None = None) -> None:
        """Nothing to do: a round in which members did not agree passes over the numbers of all of them."""

    def forget_open(self) -> None:
        """Ends all calls that are open."""
        for sequence in list(self._open):
            self.complete(sequence)

    @contextmanager
    def guard(self, sequence: int) -> Iterator[None]:
        """Ends a number whose call was refused; that of one that failed stays open, as the group is of no use then."""
        try:
            yield
        except (*BROKEN, DeadlineExceeded):
            raise
        except BaseException:
            self.complete(sequence)
            raise

    # Order -----------------------------------------------------------------------------------------------------

    def in_turn(self, job: Callable[[], _T]) -> _T:
        """Runs what uses the mail after all that was given to the courier before."""
        if self._courier.busy:
            result: _T = self._courier.submit(job).result()
            return result
        return job()

    def send_courier(self, job: Callable[[], _T]) -> Callable[[], _T]:
        """Has the courier run what uses the mail; returns what waits for its result."""
        return self._courier.submit(job).result

    def close(self) -> None:
        """Lets the courier go, after what it has to do; idempotent."""
        self._courier.close(wait=False)

    # Rounds ----------------------------------------------------------------------------------------------------

    def round(self, sequence: int, call: Call, rows: Sequence[int] = ()) -> tuple[dict[int, Call], list[int]]:
        """Tells every member what this one called, and learns the same of them; to be run in turn.

        Args:
            rows: this member's rows for each position; none by default.

        Returns:
            Every member's call by global rank, and the rows that each position has for this member.

        Raises:
            EpmeshError: the calls do not agree, or a member refused: the same on all members.
        """
        encoded = _encode(call)
        heads, firsts = self._tell(sequence, encoded, rows or [0] * self.topology.world_size)
        rests = self._tell_rest(encoded, [head[1] for head in heads])
        for position, head in enumerate(heads):
            self.acknowledged[position] = max(self.acknowledged[position], head[4])
        calls = _decode([first + rest for first, rest in zip(firsts, rests, strict=True)], self.topology.ranks)
        error = verdict(calls)
        if error is not None:
            self._done = max(self._done, *(head[2] for head in heads))
            raise error
        return calls, [head[3] for head in heads]

    def _tell(self, sequence: int, encoded: bytes, rows: Sequence[int]) -> tuple[list[tuple[int, ...]], list[bytes]]:
        """Exchanges the heads and first bytes of calls, by position."""
        world_size = self.topology.world_size
        blocks = np.zeros((world_size, BLOCK_BYTES), np.uint8)
        for position, block in enumerate(blocks):
            text = _HEAD.pack(_FORMAT, len(encoded), sequence, rows[position], self.taken[position])
            text += encoded[:_FIRST_BYTES]
            block[: len(text)] = np.frombuffer(text, np.uint8)
        even = [BLOCK_BYTES] * world_size
        came = cut(self._scatter(blocks.reshape(-1), even, even), even)
        heads = [_HEAD.unpack_from(block.data) for block in came]
        for rank, head in zip(self.topology.ranks, heads, strict=True):
            _check_head(rank, *head[:2])
        firsts = [block[_HEAD.size :][: head[1]].tobytes() for block, head in zip(came, heads, strict=True)]
        return heads, firsts

    def _tell_rest(self, encoded: bytes, lengths: Sequence[int]) -> list[bytes]:
        """Exchanges what of the calls did not fit into a block, which all members know of."""
        coming = [max(0, length - _FIRST_BYTES) for length in lengths]
        if not any(coming):
            return [b""] * len(coming)
        rest = encoded[_FIRST_BYTES:]
        data = np.frombuffer(rest * len(coming), np.uint8).copy()
        return [piece.tobytes() for piece in cut(self._scatter(data, [len(rest)] * len(coming), coming), coming)]

    def move(self, data: Bytes, sizes: Sequence[int], coming: Sequence[int]) -> list[Bytes]:
        """Gives every member its segment of flat `data`; what came, by position. To be run in turn, after a round."""
        return cut(self._scatter(data, sizes, coming), coming)

    def _scatter(self, data: Bytes, sizes: Sequence[int], coming: Sequence[int]) -> Bytes:
        self.bytes_sent += sum(sizes) - sizes[self.topology.me]
        return self.mail.scatter(data, sizes, coming)


def cut(data: Bytes, sizes: Sequence[int]) -> list[Bytes]:
    """Consecutive segments of flat `data`."""
    ends = np.cumsum(sizes)
    return [data[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _check_head(rank: int, format_: int, length: int) -> None:
    if format_ != _FORMAT:
        text = f"rank {rank} speaks format {format_}, this one {_FORMAT}"
        raise InvalidRequest(f"{text}; install the same version of epmesh on all ranks")
    if length > MAX_CALL_BYTES:
        raise InvalidRequest(f"rank {rank} announced a call of {length} bytes; at most {MAX_CALL_BYTES} fit")


def _encode(call: Call) -> bytes:
    encoded = call.SerializeToString()
    if len(encoded) <= MAX_CALL_BYTES:
        return encoded
    refusal = InvalidRequest(f"arguments take {len(encoded)} bytes; {MAX_CALL_BYTES} fit")
    return describe(call.method, refusal=refusal).SerializeToString()


def _decode(encoded: Sequence[bytes], ranks: Sequence[int]) -> dict[int, Call]:
    """Calls by global rank; those that are the same to the byte are one object."""
    known: dict[bytes, Any] = {}
    for each in encoded:
        if each not in known:
            known[each] = Call.FromString(each)
    return {rank: known[each] for rank, each in zip(ranks, encoded, strict=True)}
