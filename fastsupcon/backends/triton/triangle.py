"""Forward of self-similarity from half of the square: s_ij = s_ji, so each exponential is added to its row and to its column.

For unit rows at a temperature where exp(s) needs no shift (at most exp(1/0.0234) = e^43, and not below e^-43).

    grid     pairs of groups (lo <= hi) of GROUP rows
    program  owns OWNED rows of hi at a time, as columns, and streams the rows of lo past them, STREAMED at a time
    writes   sums over lo for the rows of hi  -> partial[lo, rows of hi]
             sums over hi for the rows of lo  -> partial[hi, rows of lo]
    flops    N^2 D, and 1 / groups of that more: a pair (hi, hi) is computed in full

partial [groups, n], at most 64 floats a row (:data:`MOST_GROUPS`), is written once in every place and then summed over the groups in order:
the same call gives the same bits. The columns' sums stay elementwise in registers until a stream ends, which needs no shuffles. A streamed
tile's row sums take two shuffles each, and go to their column of a register tile [STREAMED, GROUP / STREAMED].
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import ITSELF, LOG2_E, load_rows, mask_pairs, similarities

GROUPS = (256, 512, 1024)  # rows; 2048 spills at D = 256, where row_sums takes 8 registers a thread
MOST_GROUPS = 64
LARGEST = MOST_GROUPS * GROUPS[-1]  # rows


def group_rows(n: int) -> int:
    """GROUP for n rows, at most :data:`LARGEST`: enough pairs of groups to fill a GPU, and few enough for partial's memory."""
    return next(rows for rows in GROUPS if n <= MOST_GROUPS * rows)


@triton.jit
def exponentials(
    y, z_ptr, x_first, y_first, n, scale_log2,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """exp(s_ij) of streamed rows i and owned rows j: [STREAMED, OWNED], 0 where j = i or a row does not exist."""
    x = load_rows(z_ptr, x_first, n, 0, D, STREAMED, DEPTH, CAREFUL) if D <= DEPTH else y
    s = similarities(x, y, z_ptr, z_ptr, x_first, y_first, n, n, D, STREAMED, OWNED, DEPTH, PRECISION) * scale_log2
    return tl.exp2(mask_pairs(s, 0, 0, x_first, y_first, n, n, STREAMED, OWNED, ITSELF, CAREFUL))


@triton.jit(do_not_specialize=["n", "groups"])
def triangle_kernel(
    z_ptr, partial_ptr, n, groups, scale,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # groups in a ring: every pair is at a distance of at most half way round, and pairs exactly opposite would come twice
    one = tl.program_id(0)
    distance = tl.program_id(1)
    if (2 * distance == groups) & (one >= distance):
        return
    other = (one + distance) % groups
    lo_first = tl.minimum(one, other) * GROUP
    hi_first = tl.maximum(one, other) * GROUP
    scale_log2 = scale * LOG2_E
    hi_rows = tl.minimum(GROUP, n - hi_first)
    lo_tiles = tl.cdiv(tl.minimum(GROUP, n - lo_first), STREAMED)
    part = tl.arange(0, GROUP // STREAMED)[None, :]
    row_sums = tl.zeros([STREAMED, GROUP // STREAMED], tl.float32)
    for k in range(tl.cdiv(hi_rows, OWNED)):
        y_first = hi_first + k * OWNED
        y = load_rows(z_ptr, y_first, n, 0, D, OWNED, DEPTH, True) if D <= DEPTH else 0
        column_sums = tl.zeros([STREAMED, OWNED], tl.float32)
        careful = (lo_first == hi_first) | (y_first + OWNED > n)
        for u in range(tl.where(careful, 0, lo_tiles)):
            e = exponentials(y, z_ptr, lo_first + u * STREAMED, y_first, n, scale_log2, D, OWNED, STREAMED, DEPTH, False, PRECISION)
            column_sums += e
            row_sums += tl.where(part == u, tl.sum(e, 1)[:, None], 0.0)
        for u in range(tl.where(careful, lo_tiles, 0)):
            e = exponentials(y, z_ptr, lo_first + u * STREAMED, y_first, n, scale_log2, D, OWNED, STREAMED, DEPTH, True, PRECISION)
            column_sums += e
            row_sums += tl.where(part == u, tl.sum(e, 1)[:, None], 0.0)
        column = tl.arange(0, OWNED)
        sums = tl.sum(column_sums, 0)
        tl.store(partial_ptr + (lo_first // GROUP).to(tl.int64) * n + y_first + column, sums, mask=column < n - y_first)
    if lo_first < hi_first:  # every row of lo exists
        row = tl.arange(0, STREAMED)[:, None] + part * STREAMED
        tl.store(partial_ptr + (hi_first // GROUP).to(tl.int64) * n + lo_first + row, row_sums)
