"""Dispatch by put and flag, combine by pull and sum: Triton source.

Memory is as `plan` divides it. Every kernel runs with the same number of programs on all ranks. Program p has the rows
p, p + P, ... of every source, in the dispatch and in the combine: it releases one flag to each peer after its puts, and
awaits one of each peer, so no program waits for its whole grid. A flag is the stamp of its exchange and only grows,
nothing is reset between calls; the counted kernels take the stamp from a counter on the device, so a graph may replay
them.

Every wait ends: when the flag comes, when the limit is over, or when the host's abort word reaches the stamp.
Addresses are 64-bit integers; `words` is host memory that the device can reach.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

# Codes as in `status.Code`.
BAD_ID = tl.constexpr(1)
NO_HOLDER = tl.constexpr(2)
MISMATCH = tl.constexpr(4)
LATE = tl.constexpr(5)
ABORTED = tl.constexpr(6)
AHEAD = tl.constexpr(7)
OLD_TABLE = tl.constexpr(8)

# `words`: host to device, then device to host. `local`: of this rank's device alone.
ABORT = tl.constexpr(0)
REPORT = tl.constexpr(1)
TURN = tl.constexpr(2)  # of each turn: how it ended, then the counts by source
WORST = tl.constexpr(0)  # of the dispatch under way, in exact mode
WORST_SHOWN = tl.constexpr(1)  # of everything whose outcome the host does not wait for
ARRIVED = tl.constexpr(4)  # programs of the dispatch under way that awaited everything, in exact mode
BROKEN = tl.constexpr(2)  # counting: number of the dispatch, then of the combine, in which something went wrong
COUNTERS = tl.constexpr(8)

TURNS = tl.constexpr(3)
OFFSET_UNIT = tl.constexpr(128)
INDEX_BLOCK = tl.constexpr(1024)
POLLS = tl.constexpr(64)  # between two looks at the clock and the abort word


@triton.jit
def _words(address):
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def _halves(address):
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def _wide(number):
    """As 64 bits; the interpreter's loops count in Python's numbers."""
    return tl.full((), 0, tl.int64) + number


@triton.jit
def _report(local, words, source, code, value, SHOW: tl.constexpr):
    """Keeps the greatest report; with `SHOW` the host sees it at once."""
    word = (127 - source).to(tl.int64) << 32 | code.to(tl.int64) << 28 | value.to(tl.int64) & 0xFFFFFFF
    if SHOW:
        before = tl.atomic_max(_words(local) + WORST_SHOWN, word)
        tl.store(_words(words) + REPORT, tl.maximum(before, word))
    else:
        tl.atomic_max(_words(local) + WORST, word)


@triton.jit
def _usable(local, number, which):
    """Counting: whether nothing went wrong in an earlier dispatch (`which` 0) or combine (1)."""
    dispatch = tl.load(_words(local) + BROKEN)
    combine = tl.load(_words(local) + BROKEN + 1)
    # What goes wrong in this very exchange must not keep its other programs from signalling.
    if which == 0:
        usable = ((dispatch == 0) | (dispatch >= number)) & (combine == 0)
    else:
        usable = (dispatch == 0) & ((combine == 0) | (combine >= number))
    return usable


@triton.jit
def _await(flag, stamp, words, limit, CLOCK: tl.constexpr):
    """Waits until the flag has the stamp; 0, or a code."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if CLOCK:
        started = cuda.globaltimer()
    else:
        started = seen * 0
    code = (seen * 0).to(tl.int32)
    polls = code
    while (seen < stamp) & (code == 0):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        polls += 1
        if polls % POLLS == 0:
            if CLOCK:
                spent = cuda.globaltimer() - started
            else:
                spent = polls.to(tl.int64)
            if spent > limit:
                code = tl.full((), LATE, tl.int32)
            if tl.load(_words(words) + ABORT, volatile=True) >= stamp:
                code = tl.full((), ABORTED, tl.int32)
    if seen > stamp:
        code = tl.full((), AHEAD, tl.int32)
    return code


@triton.jit
def _copy_row(
    source, target, present, FILL: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row from address to address; `FILL` in every byte where it is not `present`."""
    if UNIT == 1:
        start_from = source.to(tl.pointer_type(tl.uint8))
        start_to = target.to(tl.pointer_type(tl.uint8))
        ELEMENTS: tl.constexpr = WIDTH
    else:
        start_from = source.to(tl.pointer_type(tl.int32))
        start_to = target.to(tl.pointer_type(tl.int32))
        ELEMENTS: tl.constexpr = WIDTH // 4
    if UNIT == 16:
        start_from = tl.multiple_of(start_from, 16)
        start_to = tl.multiple_of(start_to, 16)
    for start in range(0, ELEMENTS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < ELEMENTS
        value = tl.load(start_from + at, mask=inside & present, other=FILL)
        tl.store(start_to + at, value, mask=inside)


@triton.jit
def _put_row(
    source, row, hits, bases, offset, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, WORLD: tl.constexpr
):
    """One row, loaded once and stored to every rank in `hits`."""
    address = source + _wide(row) * WIDTH
    if UNIT == 1:
        start_from = address.to(tl.pointer_type(tl.uint8))
        ELEMENTS: tl.constexpr = WIDTH
    else:
        start_from = address.to(tl.pointer_type(tl.int32))
        ELEMENTS: tl.constexpr = WIDTH // 4
    if UNIT == 16:
        start_from = tl.multiple_of(start_from, 16)
    for start in range(0, ELEMENTS, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < ELEMENTS
        value = tl.load(start_from + at, mask=inside, other=0)
        for peer in tl.static_range(WORLD):
            if (hits >> peer) & 1 != 0:
                put = bases[peer] + offset + _wide(row) * WIDTH
                if UNIT == 1:
                    start_to = put.to(tl.pointer_type(tl.uint8))
                else:
                    start_to = put.to(tl.pointer_type(tl.int32))
                if UNIT == 16:
                    start_to = tl.multiple_of(start_to, 16)
                tl.store(start_to + at, value, mask=inside)


@triton.jit
def _signal(bases, flags_at, heads_at, index, stamp, num_tokens, code, value, signature, WORLD: tl.constexpr, PROGRAMS):
    """Publishes what this program put, to every rank; `index` is that of turn or slot and source."""
    place = index * PROGRAMS + tl.program_id(0)
    for peer in tl.static_range(WORLD):
        head = _halves(bases[peer] + heads_at + _wide(place) * 16)
        tl.store(head, num_tokens)
        tl.store(head + 1, code)
        tl.store(head + 2, value)
        tl.store(head + 3, signature)
    tl.debug_barrier()  # all threads have stored before one of them releases
    for peer in tl.static_range(WORLD):
        tl.atomic_xchg(_words(bases[peer] + flags_at + _wide(place) * 8), stamp, sem="release", scope="sys")


@triton.jit
def _await_source(own, flags_at, heads_at, index, stamp, words, limit, signature, PROGRAMS, CLOCK: tl.constexpr):
    """Waits for one source's part: a code, its value, and the source's rows."""
    place = index * PROGRAMS + tl.program_id(0)
    code = _await(_words(own + flags_at + _wide(place) * 8), stamp, words, limit, CLOCK)
    tl.debug_barrier()
    head = _halves(own + heads_at + _wide(place) * 16)
    num_tokens = tl.load(head, mask=code == 0, other=0)
    value = tl.load(head + 2, mask=code == 0, other=0)
    theirs = tl.load(head + 3, mask=code == 0, other=signature)
    code = tl.where(code == 0, tl.load(head + 1, mask=code == 0, other=0), code)
    code = tl.where((code == 0) & (theirs != signature), MISMATCH, code)
    return code, value, tl.where(code == 0, num_tokens, 0)


@triton.jit
def _targets(
    ids, turns, row, table, num_experts, first_turn, TOPK: tl.constexpr, PAD: tl.constexpr, CHOICES: tl.constexpr
):
    """For each id of a row: the id, the rank it goes to (-1: none), whether it has replicas; then what is wrong."""
    k = tl.arange(0, PAD)
    number = tl.load(ids + _wide(row) * TOPK + k, mask=k < TOPK, other=-1).to(tl.int64)
    bad = (number < -1) | (number >= num_experts)
    wanted = (number >= 0) & (number < num_experts)
    entry = _halves(table) + tl.where(wanted, number, 0) * (CHOICES + 2)
    count = tl.load(entry, mask=wanted, other=1)
    gone = wanted & (count <= 0)
    replicated = tl.load(entry + 1, mask=wanted, other=0)
    if CHOICES > 1:
        place = tl.load(_halves(turns) + _wide(row) * TOPK + k, mask=wanted, other=0)
        turn = (place + first_turn) % tl.maximum(count, 1)
    else:
        turn = count * 0
    target = tl.load(entry + 2 + turn, mask=wanted & (count > 0), other=-1)
    clamped = tl.minimum(tl.maximum(number, -134217728), 134217727).to(tl.int32)
    code = tl.max(tl.where(bad, BAD_ID, tl.where(gone, NO_HOLDER, 0)), axis=0)
    code = tl.where(tl.max((wanted & (count < 0)).to(tl.int32), axis=0) != 0, OLD_TABLE, code)
    worst_bad = tl.max(tl.where(bad, clamped, -134217728), axis=0)
    worst_gone = tl.max(tl.where(gone, clamped, -134217728), axis=0)
    return number, target, replicated, code, tl.where(code == BAD_ID, worst_bad, worst_gone)


@triton.jit
def _index(
    own,
    words,
    local,
    tokens,
    positions,
    origins,
    stamp,
    num_rows,
    heads_at,
    recv_at,
    region_stride,
    PROGRAMS,
    WORLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exact mode, by one program: numbers the received rows, and tells the host their counts and what went wrong."""
    turn = (stamp % TURNS).to(tl.int32)
    shown = _words(words) + TURN + turn * (1 + WORLD)
    worst = tl.atomic_xchg(_words(local) + WORST, _wide(0))
    total = turn * 0
    for source in tl.static_range(WORLD):
        index = (turn * WORLD + source).to(tl.int64)
        region = _halves(own + recv_at + index * region_stride)
        rows = tl.load(_halves(own + heads_at + index * PROGRAMS * 16))
        rows = tl.where(worst == 0, rows, 0)
        before = total
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            here = tl.load(region + row, mask=row < rows, other=0)
            place = total + tl.cumsum(here, axis=0) - 1
            tl.store(_halves(positions) + source * num_rows + row, tl.where(here != 0, place, -1), mask=row < rows)
            tl.store(_halves(origins) + place, source * num_rows + row, mask=(here != 0) & (row < rows))
            total += tl.sum(here, axis=0)
        tl.store(_halves(tokens) + source, rows)
        count = (total - before).to(tl.int64)
        tl.store(shown + 1 + source, (stamp & 0xFFFFFFFF) << 32 | count)
    # The host looks at the last word first: the counts must be there when it is. What orders the two is on the device;
    # not every device has atomic operations on the host's memory.
    tl.debug_barrier()
    tl.atomic_xchg(_words(local) + ARRIVED, _wide(0), sem="acq_rel", scope="sys")
    tl.store(shown, (stamp & 0x7FFFFF) << 40 | worst)


# Sizes and places are arguments, and none is specialized: one variant serves whatever is moved in the same units among
# as many ranks, so that it can be compiled before it is needed. The types keep small values from making other variants.
@triton.jit(
    do_not_specialize=[
        *["sources", "outputs", "bases", "offsets", "own", "words", "local", "table", "turns", "hits_out", "positions"],
        *["tokens_out", "origins", "num_tokens", "stamp", "signature", "refusal", "limit", "first_turn", "num_experts"],
        *["me", "eligible", "rows", "flags_at", "heads_at", "recv_at", "region_stride"],
    ]
)
def dispatch(
    sources,  # addresses of the row tensors; the third one has the ids
    outputs,  # static mode: addresses of what is returned
    bases,  # every rank's arena
    offsets,  # of each tensor's rows in a region, in units of `OFFSET_UNIT` bytes
    own,  # this rank's arena
    words,
    local,
    table,  # [num_experts, 2 + CHOICES] int32: candidates, whether there are replicas, the candidates
    turns,  # [num_tokens, TOPK] int32: how many equal ids stand before each, where there are replicas
    hits_out,  # [num_tokens] int32: bit r: the row went to rank r
    positions,  # [WORLD * rows] int32, written: where a row stands among those returned, -1: nowhere
    tokens_out,  # exact mode: [WORLD] int32, written: rows of each source
    origins,  # exact mode: [WORLD * rows] int32, written: for each received row, source * rows + row
    num_tokens: tl.int32,
    stamp: tl.int64,  # counted: the stamp before the first
    signature: tl.int32,
    refusal: tl.int32,  # 0, or the code of why this rank puts nothing
    limit: tl.int64,
    first_turn: tl.int32,
    num_experts: tl.int32,
    me: tl.int32,
    eligible: tl.int32,  # without a table: bit r: rows go to rank r
    rows: tl.int32,  # row numbers of a source; in static mode that many are returned
    flags_at: tl.int64,
    heads_at: tl.int64,
    recv_at: tl.int64,
    region_stride: tl.int64,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM: tl.constexpr,
    ROUTED: tl.constexpr,
    CHOICES: tl.constexpr,
    TOPK: tl.constexpr,
    PAD: tl.constexpr,
    IDS: tl.constexpr,
    FILLS: tl.constexpr,
    WORLD: tl.constexpr,
    STATIC: tl.constexpr,
    COUNTED: tl.constexpr,
    PUT: tl.constexpr,
    TAKE: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Puts this rank's rows and awaits everybody's; in static mode copies them out, in exact mode numbers them."""
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    usable = tl.full((), 1, tl.int1)
    if COUNTED:
        number = tl.load(_words(local) + COUNTERS + p)
        if PUT:
            number += 1
            tl.store(_words(local) + COUNTERS + p, number)
        stamp += number
        usable = _usable(local, number, 0)
        if usable == 0:
            _report(local, words, p * 0 + me, p * 0 + ABORTED, p * 0, True)
    turn = (stamp % TURNS).to(tl.int32)
    if PUT:
        if usable:
            region = recv_at + (turn * WORLD + me).to(tl.int64) * region_stride
            code = refusal
            value = refusal * 0
            for row in range(p, num_tokens, programs):
                if ROUTED:
                    ids = sources[2].to(tl.pointer_type(IDS))
                    numbers, targets, replicated, wrong, which = _targets(
                        ids, turns, row, table, num_experts, first_turn, TOPK, PAD, CHOICES
                    )
                    if wrong > code:
                        code = wrong
                        value = which
                    hits = tl.full((), 0, tl.int32)
                    for peer in tl.static_range(WORLD):
                        hits |= tl.max((targets == peer).to(tl.int32), axis=0) << peer
                else:
                    hits = eligible + row * 0
                tl.store(_halves(hits_out) + row, hits)
                for peer in tl.static_range(WORLD):
                    tl.store(_halves(bases[peer] + region) + row, (hits >> peer) & 1)
                for i in tl.static_range(NUM):
                    if ROUTED and i == 2:
                        k = tl.arange(0, PAD)
                        for peer in tl.static_range(WORLD):
                            if (hits >> peer) & 1 != 0:
                                put = (bases[peer] + region + _wide(offsets[i]) * OFFSET_UNIT).to(tl.pointer_type(IDS))
                                shown = tl.where((replicated != 0) & (targets != peer), -1, numbers)
                                tl.store(put + _wide(row) * TOPK + k, shown.to(IDS), mask=k < TOPK)
                    else:
                        _put_row(
                            sources[i],
                            row,
                            hits,
                            bases,
                            region + _wide(offsets[i]) * OFFSET_UNIT,
                            WIDTHS[i],
                            UNITS[i],
                            BLOCKS[i],
                            WORLD,
                        )
            _signal(
                bases, flags_at, heads_at, turn * WORLD + me, stamp, num_tokens, code, value, signature, WORLD, programs
            )
    if TAKE:
        for source in tl.static_range(WORLD):
            tokens = turn * 0
            if usable:
                code, value, tokens = _await_source(
                    own, flags_at, heads_at, turn * WORLD + source, stamp, words, limit, signature, programs, CLOCK
                )
                if code != 0:
                    _report(local, words, p * 0 + source, code, value, COUNTED)
                    usable = code < LATE
                    if COUNTED:
                        tl.store(_words(local) + BROKEN, number)
            if STATIC:
                region = own + recv_at + (turn * WORLD + source).to(tl.int64) * region_stride
                for row in range(p, rows, programs):
                    here = tl.load(_halves(region) + row, mask=row < tokens, other=0) != 0
                    place = source * rows + row
                    tl.store(_halves(positions) + place, tl.where(here, place, -1))
                    for i in tl.static_range(NUM):
                        _copy_row(
                            region + _wide(offsets[i]) * OFFSET_UNIT + _wide(row) * WIDTHS[i],
                            outputs[i] + _wide(place) * WIDTHS[i],
                            here,
                            FILLS[i],
                            WIDTHS[i],
                            UNITS[i],
                            BLOCKS[i],
                        )
        if not STATIC:
            tl.debug_barrier()
            arrived = tl.atomic_add(_words(local) + ARRIVED, _wide(1), sem="acq_rel", scope="gpu")
            if arrived == programs - 1:  # the last one sees what all have awaited
                _index(
                    own,
                    words,
                    local,
                    tokens_out,
                    positions,
                    origins,
                    stamp,
                    rows,
                    heads_at,
                    recv_at,
                    region_stride,
                    programs,
                    WORLD,
                    INDEX_BLOCK,
                )


@triton.jit(
    do_not_specialize=[
        *["own", "origins", "outputs", "offsets", "num_rows", "stamp", "rows"],
        *["recv_at", "region_stride"],
    ]
)
def take_rows(
    outputs,
    offsets,
    own,
    origins,
    num_rows: tl.int32,
    stamp: tl.int64,
    rows: tl.int32,  # numbers that `origins` has for each source
    recv_at: tl.int64,
    region_stride: tl.int64,
    WIDTHS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    NUM: tl.constexpr,
    WORLD: tl.constexpr,
):
    """Exact mode: copies the received rows out, in their order."""
    turn = (stamp % TURNS).to(tl.int32)
    for place in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        origin = tl.load(_halves(origins) + place)
        region = own + recv_at + (turn * WORLD + origin // rows).to(tl.int64) * region_stride
        row = (origin % rows).to(tl.int64)
        for i in tl.static_range(NUM):
            _copy_row(
                region + _wide(offsets[i]) * OFFSET_UNIT + row * WIDTHS[i],
                outputs[i] + _wide(place) * WIDTHS[i],
                origin >= 0,
                0,
                WIDTHS[i],
                UNITS[i],
                BLOCKS[i],
            )


@triton.jit(
    do_not_specialize=[
        *["results", "output", "hits", "bases", "own", "words", "local", "tokens", "positions", "num_tokens", "stamp"],
        *["signature", "refusal", "limit", "slot", "me", "rows", "flags_at", "heads_at", "out_at", "out_stride"],
        *["slot_stride", "in_place", "in_place_at"],
    ]
)
def combine(
    results,  # address of [rows, HIDDEN], in the dtype of the sums
    output,  # address of [num_tokens, HIDDEN]
    hits,  # [num_tokens] int32: which ranks have results for a row
    bases,
    own,
    words,
    local,
    tokens,  # exact mode: rows of each source
    positions,  # where the result for a source's row stands in `results`, -1: nowhere
    num_tokens: tl.int32,
    stamp: tl.int64,
    signature: tl.int32,
    refusal: tl.int32,
    limit: tl.int64,
    slot: tl.int32,
    me: tl.int32,
    rows: tl.int32,  # row numbers that `positions` has for each source
    flags_at: tl.int64,
    heads_at: tl.int64,
    out_at: tl.int64,
    out_stride: tl.int64,  # between the results for one source and the next, packed
    slot_stride: tl.int64,
    in_place: tl.int32,  # 0: results are copied; 1 + slot: they stand in that slot's memory already
    in_place_at: tl.int64,  # in a slot
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    NARROW: tl.constexpr,  # the dtype of results and sums
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a sum
    COPY_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    WORLD: tl.constexpr,
    STATIC: tl.constexpr,
    COUNTED: tl.constexpr,
    PUT: tl.constexpr,
    TAKE: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Shows this rank's results to everybody, and sums everybody's for its own rows: in rank order, rounded once."""
    p = tl.program_id(0)
    programs = tl.num_programs(0)
    usable = tl.full((), 1, tl.int1)
    if COUNTED:
        number = tl.load(_words(local) + COUNTERS + programs + p)
        if PUT:
            number += 1
            tl.store(_words(local) + COUNTERS + programs + p, number)
        stamp += number
        slot = (number % 2).to(tl.int32)
        usable = _usable(local, number, 1)
    if PUT:
        if usable:
            for source in tl.static_range(WORLD):
                shown = own + out_at + slot.to(tl.int64) * slot_stride + out_stride * source
                if STATIC:
                    bound = slot * 0 + rows
                else:
                    bound = tl.load(_halves(tokens) + source)
                if (refusal != 0) | (STATIC & (in_place != 0)):
                    bound = 0
                for row in range(p, bound, programs):
                    place = tl.load(_halves(positions) + source * rows + row)
                    if in_place != 0:  # only where they stand is told, which in static mode everybody knows
                        tl.store(_halves(shown) + row, place)
                    elif place >= 0:
                        _copy_row(
                            results + _wide(place) * WIDTH,
                            shown + _wide(row) * WIDTH,
                            place >= 0,
                            0,
                            WIDTH,
                            UNIT,
                            COPY_BLOCK,
                        )
            _signal(
                bases,
                flags_at,
                heads_at,
                slot * WORLD + me,
                stamp,
                num_tokens,
                refusal,
                in_place,
                signature,
                WORLD,
                programs,
            )
    if TAKE:
        good = usable
        theirs_in_place = tl.full((), 0, tl.int32)  # two bits a rank: 0, or 1 + slot
        for source in tl.static_range(WORLD):
            if usable:
                code, value, _ = _await_source(
                    own, flags_at, heads_at, slot * WORLD + source, stamp, words, limit, signature, programs, CLOCK
                )
                if code != 0:
                    _report(local, words, p * 0 + source, code, p * 0, True)
                    usable = code < LATE
                    good = code < 0
                    if COUNTED:
                        tl.store(_words(local) + BROKEN + 1, number)
                else:
                    theirs_in_place |= value << (2 * source)
        if good:
            for row in range(p, num_tokens, programs):
                went = tl.load(_halves(hits) + row)
                for start in range(0, HIDDEN, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    inside = at < HIDDEN
                    total = tl.zeros((BLOCK,), WIDE)
                    for peer in tl.static_range(WORLD):
                        there = (went >> peer) & 1 != 0
                        shown = bases[peer] + out_at + slot.to(tl.int64) * slot_stride + out_stride * me
                        at_slot = (theirs_in_place >> (2 * peer)) & 3
                        from_row = shown + _wide(row) * WIDTH
                        if at_slot != 0:
                            if STATIC:
                                place = me * rows + row
                            else:
                                place = tl.load(_halves(shown) + row, mask=there, other=0)
                            made = bases[peer] + out_at + (at_slot - 1).to(tl.int64) * slot_stride + in_place_at
                            from_row = made + _wide(place) * WIDTH
                        theirs = from_row.to(tl.pointer_type(NARROW))
                        if UNIT == 16:
                            theirs = tl.multiple_of(theirs, 16)
                        total += tl.load(theirs + at, mask=inside & there, other=0).to(WIDE)
                    tl.store(
                        output.to(tl.pointer_type(NARROW)) + _wide(row) * HIDDEN + at, total.to(NARROW), mask=inside
                    )
