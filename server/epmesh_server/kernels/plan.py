"""Where things stand in the memory that the ranks of a node share on GPUs. Pure arithmetic, the same on every rank.

An arena is one rank's share: flags and heads, receive regions by turn and source, and results by slot and source. Ranks
write into each other's receive regions and read each other's results; a row stands at its number in its source, so that
neither side has to know how many rows the other has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from epmesh.errors import InvalidRequest

MAX_WORLD_SIZE = 16
MAX_TENSORS = 16  # that travel in one dispatch
MAX_TOPK = 16
TURNS = 3  # see `epmesh_server.shared_memory.BufferLayout`: the order of calls is the same
SLOTS = 2
HEAD_WORDS = 4  # num_tokens, code, value, signature

_ALIGNMENT = 128
_WORD, _HALF_WORD = 8, 4


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class ArenaPlan:
    """How an arena is divided.

    Attributes:
        world_size: ranks that share.
        rows: most rows of one source.
        programs: of every kernel; each has a flag of its own for every source.
        region_bytes: of one source and turn.
        out_bytes: of the results for one source, in one slot.
    """

    world_size: int
    rows: int
    programs: int
    region_bytes: int
    out_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= MAX_WORLD_SIZE:
            raise InvalidRequest(f"{self.world_size} ranks share memory on a node; 1 to {MAX_WORLD_SIZE} can on GPUs")
        if min(self.rows, self.programs) < 1 or min(self.region_bytes, self.out_bytes) < _ALIGNMENT:
            raise InvalidRequest(
                f"an arena for {self.rows} rows by {self.programs} programs, {self.region_bytes} and {self.out_bytes} "
                f"bytes a source: all must be above 0"
            )

    @property
    def recv_flags_at(self) -> int:
        """Flags of receive regions: 64-bit words by turn, source, program."""
        return 0

    @property
    def out_flags_at(self) -> int:
        """Flags of results: 64-bit words by slot, source of the results, program."""
        return _aligned(TURNS * self.world_size * self.programs * _WORD)

    @property
    def recv_heads_at(self) -> int:
        """Heads of receive regions: `HEAD_WORDS` 32-bit words by turn, source, program."""
        return self.out_flags_at + _aligned(SLOTS * self.world_size * self.programs * _WORD)

    @property
    def out_heads_at(self) -> int:
        """Heads of results."""
        return self.recv_heads_at + _aligned(TURNS * self.world_size * self.programs * HEAD_WORDS * _HALF_WORD)

    @property
    def recv_at(self) -> int:
        """Receive regions, by turn and source."""
        return self.out_heads_at + _aligned(SLOTS * self.world_size * self.programs * HEAD_WORDS * _HALF_WORD)

    @property
    def out_at(self) -> int:
        """Results, by slot and the source they are for."""
        return self.recv_at + TURNS * self.world_size * _aligned(self.region_bytes)

    @property
    def region_stride(self) -> int:
        """Bytes from one receive region to the next."""
        return _aligned(self.region_bytes)

    @property
    def out_stride(self) -> int:
        """Bytes from one source's results to the next one's."""
        return _aligned(self.out_bytes)

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot's results to the next one's."""
        return self.world_size * self.out_stride

    @property
    def in_place_at(self) -> int:
        """In a slot, where results stand that their maker writes itself, as it returns them: its second half."""
        return _aligned(self.slot_stride // 2)

    @property
    def in_place_bytes(self) -> int:
        """Bytes of results that a slot has room for in place; copied ones, too, where they are no wider."""
        return self.slot_stride - self.in_place_at

    @property
    def total_bytes(self) -> int:
        """Bytes of the arena."""
        return self.out_at + SLOTS * self.world_size * self.out_stride


@dataclass(frozen=True)
class RowPlan:
    """How rows of some widths stand in a receive region.

    Attributes:
        rows: most rows of one source.
        offsets: where each tensor's rows start; the words that say which rows are there come first.
    """

    rows: int
    offsets: tuple[int, ...]

    @property
    def offset_units(self) -> tuple[int, ...]:
        """The offsets as kernels take them: in units of 128 bytes, so that 32 bits hold them."""
        return tuple(offset // _ALIGNMENT for offset in self.offsets)


def region_bytes_for(rows: int, widths: Sequence[int]) -> int:
    """Bytes that a region needs to hold `rows` rows of every tensor; `widths` in bytes."""
    return rows * (sum(widths) + _HALF_WORD) + _ALIGNMENT * (len(widths) + 1)


def plan_rows(region_bytes: int, widths: Sequence[int]) -> RowPlan:
    """Divides a region among tensors whose rows have `widths` bytes; `rows` is 0 where not one fits."""
    rows = max(0, (region_bytes - _ALIGNMENT * (len(widths) + 1)) // (sum(widths) + _HALF_WORD))
    start, offsets = _aligned(rows * _HALF_WORD), []
    for width in widths:
        offsets.append(start)
        start += _aligned(rows * width)
    return RowPlan(rows, tuple(offsets))


def unit_of(width: int, *addresses: int) -> int:
    """Bytes that can be moved at once: 16 (four words), 4 (one) or 1, by what divides the width and the addresses."""
    common = math.gcd(width, *addresses)
    return next(unit for unit in (16, 4, 1) if common % unit == 0)


def block_of(width: int, unit: int, most: int) -> int:
    """Elements that a program moves at once: a power of two, enough for a row, at most `most`."""
    elements = max(1, width if unit == 1 else width // 4)
    return min(most, 1 << (elements - 1).bit_length())
