"""Rows to fp8 in one pass: Triton source. The same numbers as `epmesh.quantization.quantize_rows`, to the bit."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["source", "values", "scales", "num_groups"])
def quantize(
    source,  # [num_groups * GROUP] in `FROM`
    values,  # as many, in e4m3
    scales,  # [num_groups] float32
    num_groups: tl.int32,
    FROM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # of one program
    LARGEST: tl.constexpr,
    SMALLEST_PEAK: tl.constexpr,
):
    """Each group is divided by its scale, which makes its largest absolute value `LARGEST`."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < num_groups
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    given = tl.multiple_of(source.to(tl.pointer_type(FROM)), 16)
    wide = tl.load(given + at, mask=inside[:, None], other=0).to(tl.float32)
    peak = tl.max(tl.where(wide == wide, tl.abs(wide), 0.0), axis=1)
    scale = tl.div_rn(tl.where(peak < SMALLEST_PEAK, SMALLEST_PEAK, peak), tl.full((GROUPS,), LARGEST, tl.float32))
    nan = tl.max((wide != wide).to(tl.int32), axis=1) != 0  # a maximum does not say so
    scale = tl.where(nan, float("nan"), scale)
    narrow = tl.div_rn(wide, tl.broadcast_to(scale[:, None], (GROUPS, GROUP)))
    narrow = tl.where(narrow > LARGEST, LARGEST, tl.where(narrow < -LARGEST, -LARGEST, narrow))
    made = tl.multiple_of(values.to(tl.pointer_type(tl.float8e4nv)), 16)
    tl.store(made + at, narrow.to(tl.float8e4nv), mask=inside[:, None])
    tl.store(scales.to(tl.pointer_type(tl.float32)) + group, scale, mask=inside)
