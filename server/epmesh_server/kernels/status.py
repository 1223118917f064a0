"""What a kernel reports when an exchange goes wrong: a source, a code and a value in 39 bits. Pure.

Of several reports the greatest counts: the lowest source's, so that all ranks raise the same.
"""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass

from epmesh.errors import DeadlineExceeded, EpmeshError, ExpertUnavailable, InvalidRequest

_SOURCE_AT, _CODE_AT = 32, 28
_MOST_SOURCE, _VALUE_MASK, _VALUE_SIGN = 127, (1 << 28) - 1, 1 << 27
_STAMP_AT, _STAMP_MASK, _COUNT_MASK = 40, (1 << 23) - 1, (1 << 32) - 1


class Code(enum.IntEnum):
    """What went wrong, seen from the rank that reports it."""

    BAD_ID = 1  # the source has an id out of range; value: the id
    NO_HOLDER = 2  # the source has an id that no living rank holds; value: the id
    REFUSED = 3  # the source's host refused its input
    MISMATCH = 4  # the source called with other shapes or dtypes
    LATE = 5  # the source did not come within the limit
    ABORTED = 6  # the host gave up
    AHEAD = 7  # the source went on without this rank
    OLD_TABLE = 8  # the source replayed a graph whose routing table a placement of another form has replaced


@dataclass(frozen=True)
class Report:
    """One report."""

    source: int
    code: Code
    value: int


def encode(source: int, code: int, value: int = 0) -> int:
    """As the kernels write it; 0 means that nothing is wrong."""
    return (_MOST_SOURCE - source) << _SOURCE_AT | code << _CODE_AT | value & _VALUE_MASK


def decode(word: int) -> Report | None:
    """The report in a word, or `None`."""
    if not word:
        return None
    value = word & _VALUE_MASK
    signed = value - (1 << 28) if value & _VALUE_SIGN else value
    return Report(_MOST_SOURCE - (word >> _SOURCE_AT & 127), Code(word >> _CODE_AT & 15), signed)


def done_report(word: int, stamp: int) -> tuple[bool, Report | None]:
    """Whether the word that ends an exchange is that of `stamp`, and its report."""
    if (word >> _STAMP_AT) & _STAMP_MASK != stamp & _STAMP_MASK:
        return False, None
    return True, decode(word & ((1 << _STAMP_AT) - 1))


def count_in(word: int, stamp: int) -> int | None:
    """The count in a word that belongs to `stamp`, or `None` if it is an older one's."""
    return word & _COUNT_MASK if (word >> 32) & _COUNT_MASK == stamp & _COUNT_MASK else None


def signature(text: str) -> int:
    """31 bits that differ where what ranks must agree on differs (but for one case in two thousand million)."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def error_of(report: Report, rank: int, what: str) -> EpmeshError:
    """What a report means to its caller; the same on every rank that has the same report.

    Args:
        rank: the global rank of the report's source.
        what: the call, as it stands in the text.
    """
    if report.code is Code.BAD_ID:
        return InvalidRequest(f"{what} on rank {rank}: topk_ids has {report.value}; ids are -1 (none) or an expert's")
    if report.code is Code.NO_HOLDER:
        return ExpertUnavailable([report.value])
    if report.code is Code.REFUSED:
        return InvalidRequest(f"{what} on rank {rank} was refused; the error that was raised there says why")
    if report.code is Code.MISMATCH:
        return InvalidRequest(f"{what}: rank {rank} called with other shapes, dtypes or arguments than this rank")
    if report.code is Code.OLD_TABLE:
        return InvalidRequest(
            f"a CUDA graph was replayed on rank {rank} whose placement had other numbers of experts or replicas; "
            f"capture anew"
        )
    text = {Code.LATE: "did not arrive in time", Code.AHEAD: "went on without this rank"}
    problem = text.get(report.code, "was waited for when the call was given up")
    return DeadlineExceeded(rank, message=f"{what}: rank {rank} {problem}")
