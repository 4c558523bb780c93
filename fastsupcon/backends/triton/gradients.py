"""Backward: each program owns rows x_i, recomputes their logits tile by tile, and sums dx_i = scale * sum_j w_ij y_j.

w_ij is, over the log-sums q that (i, j) is in, g_i exp(t_ij - q_i) + h_j exp(t_ij - q'_j), and [equal keys] (u_i + v_j). The symmetric self
shape has h = g, q' = q, v = u. One recomputed tile, one second product from the same tile of y, no atomics: 4 N M D flops a side.

    program  a tile of rows (or of columns), a split of the other side's tiles; second index: a chunk of D
    writes   the gradient itself, or where the stream has splits or D has chunks its parts [splits, n, D], which :func:`finish_kernel` sums;
             parts of the bias' gradient [splits, m] and, of the scale's, sums over j [splits, n]

A pair is either of different or of equal keys, and all >= different, equal. So g_all exp(t - all) + g_different exp(t - different) is one
exponential, exp(t - different) (g_different + g_all exp(different - all)), and none of its factors exceeds 1. Where exp(t) is bounded
(tiles.py) it serves both sides: w = exp(t) (r_i + r_j) with r = c exp(-q). |t| and |q| are below 63 ln 2 + log N, so r is in fp32's range
for every c from 2^-40 to 2^40.

w enters the product in the rows' dtype, y's inverse norms as a factor of it. fp16 could not hold g P (about 1/N^2): there the incoming
gradients are divided by the largest of them and lifted by 2^15, inverse norms divided by the largest, which leaves w between 2^15 and a
subnormal 2^-24; all come back in the epilogue, in fp32. Where a sum has few terms (RESIDUAL) their roundings do not average out, and what w
lost goes in as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_quantity
from .tiles import (
    AS_THEY_ARE,
    DIFFERENT,
    FACTORS,
    LOG2_E,
    SPLIT,
    cosines,
    equal_keys,
    is_whole,
    load_inverse,
    load_rows,
    load_sides,
    narrowed,
    one_of,
    pair_mask,
    product,
    program_of,
    scale_of,
)

LIFT = tl.constexpr(32768.0)

#: Which sides have log-sums.
BOTH_SIDES, OF_ROWS, OF_COLUMNS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_incoming(
    ptr, other, first, count, of_columns, ROWS: tl.constexpr, QUANTITY: tl.constexpr, ROW_PLACES: tl.constexpr, COLUMN_PLACES: tl.constexpr
):
    """A quantity of rows or of columns, ``other`` where it was not asked of them."""
    ROW_PLACE: tl.constexpr = (ROW_PLACES >> (4 * QUANTITY)) & 15
    COLUMN_PLACE: tl.constexpr = (COLUMN_PLACES >> (4 * QUANTITY)) & 15
    if ROW_PLACE == 15 and COLUMN_PLACE == 15:
        return tl.zeros([ROWS], tl.float32) + other
    else:
        place = tl.where(of_columns, COLUMN_PLACE, ROW_PLACE)
        row = tl.arange(0, ROWS)
        return tl.load(ptr + place * count + first + row, mask=row < tl.where(place < 15, count - first, 0), other=other)


@triton.jit
def load_weights(
    values_ptr, grads_ptr, first, count, of_columns, bounded, lift,
    ROWS: tl.constexpr, KIND: tl.constexpr, ONE_SIDED: tl.constexpr, ROW_PLACES: tl.constexpr, COLUMN_PLACES: tl.constexpr,
):  # fmt: skip
    """(q, c) of each row for its pairs of different keys, (q, c) for those of equal keys, and the similarity's gradient.

    Such that c exp(t - q) is the weight of a pair; or c exp(t), where exp(t) is bounded. c and the gradient are lifted. A log-sum of -inf
    is over no pair and passes nothing: c = 0 and q = +inf; q = 0 on the side that has no log-sums, where the other's is added to it.
    """
    no_pair = float("-inf")
    nothing = float("inf")
    if ONE_SIDED != BOTH_SIDES:
        nothing = tl.where(of_columns == (ONE_SIDED == OF_ROWS), 0.0, float("inf"))
    if KIND == SPLIT:
        whole = load_incoming(values_ptr, no_pair, first, count, of_columns, ROWS, 0, ROW_PLACES, COLUMN_PLACES)
        different = load_incoming(values_ptr, no_pair, first, count, of_columns, ROWS, 1, ROW_PLACES, COLUMN_PLACES)
        equal = load_incoming(values_ptr, no_pair, first, count, of_columns, ROWS, 2, ROW_PLACES, COLUMN_PLACES)
        g_whole = load_incoming(grads_ptr, 0.0, first, count, of_columns, ROWS, 0, ROW_PLACES, COLUMN_PLACES)
        g_different = load_incoming(grads_ptr, 0.0, first, count, of_columns, ROWS, 1, ROW_PLACES, COLUMN_PLACES)
        g_equal = load_incoming(grads_ptr, 0.0, first, count, of_columns, ROWS, 2, ROW_PLACES, COLUMN_PLACES)
        g_whole = tl.where(whole == no_pair, 0.0, g_whole)
        q = tl.where(different == no_pair, whole, different)
        c = tl.where(different == no_pair, 0.0, g_different) + tl.where(g_whole == 0, 0.0, g_whole * tl.exp2((q - whole) * LOG2_E))
        q_equal = tl.where(equal == no_pair, whole, equal)
        c_equal = tl.where(equal == no_pair, 0.0, g_equal) + tl.where(g_whole == 0, 0.0, g_whole * tl.exp2((q_equal - whole) * LOG2_E))
        q_equal = tl.where(q_equal == no_pair, nothing, q_equal)
        if bounded:
            c_equal *= tl.exp2(-q_equal * LOG2_E)
        q = tl.where(q == no_pair, nothing, q)
        if bounded:
            c *= tl.exp2(-q * LOG2_E)
    else:
        q = load_incoming(values_ptr, 0.0, first, count, of_columns, ROWS, KIND, ROW_PLACES, COLUMN_PLACES)
        c = load_incoming(grads_ptr, 0.0, first, count, of_columns, ROWS, KIND, ROW_PLACES, COLUMN_PLACES)
        if bounded:
            c = tl.where(q == no_pair, 0.0, c * tl.exp2(-q * LOG2_E))
        else:
            c = tl.where(q == no_pair, 0.0, c)
            q = tl.where(q == no_pair, float("inf"), q)
        q_equal = q
        c_equal = c
    linear = load_incoming(grads_ptr, 0.0, first, count, of_columns, ROWS, 3, ROW_PLACES, COLUMN_PLACES)
    return q, c * lift, q_equal, c_equal * lift, linear * lift


@triton.jit
def largest_gradient(grads_ptr, n, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """The largest sum of |incoming gradients| of a row."""
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total = tl.abs(load_quantity(grads_ptr, row, n, 0, PLACES)) + tl.abs(load_quantity(grads_ptr, row, n, 1, PLACES))
        total += tl.abs(load_quantity(grads_ptr, row, n, 2, PLACES)) + tl.abs(load_quantity(grads_ptr, row, n, 3, PLACES))
        largest = tl.maximum(largest, total)
    return tl.max(largest, 0)


@triton.jit
def largest_inverse(ptr, n, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(ptr + row, mask=row < n, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def through_unit(dx, x, inverse, UNIT: tl.constexpr):
    """From the gradient of x / |x| that of x: (g_i - u_i (u_i . g_i)) / |x_i|. A row of zeros stays as it is."""
    if UNIT == AS_THEY_ARE:
        return dx
    else:
        unit = x.to(tl.float32) * inverse[:, None]
        return (dx - unit * tl.sum(unit * dx, 1)[:, None]) * tl.where(inverse == 0, 1.0, inverse)[:, None]


@triton.jit
def weights(t, equal, x_q, x_c, x_q_equal, x_c_equal, y_q, y_c, y_q_equal, y_c_equal, bounded, KIND: tl.constexpr, ONE_SIDED: tl.constexpr):
    """w_ij without the similarities' part, of all (i, j). Where only one side has log-sums, the other's q and c are 0."""
    w = t
    factors = x_c[:, None] + y_c[None, :]
    if KIND == SPLIT:
        factors = tl.where(equal, x_c_equal[:, None] + y_c_equal[None, :], factors)
    if bounded:
        w = tl.exp2(t) * factors
    elif ONE_SIDED != BOTH_SIDES:
        q = x_q[:, None] + y_q[None, :]
        if KIND == SPLIT:
            q = tl.where(equal, x_q_equal[:, None] + y_q_equal[None, :], q)
        w = tl.exp2((t - q) * LOG2_E) * factors
    else:
        w = one_sided(t, equal, x_q[:, None], x_c[:, None], x_q_equal[:, None], x_c_equal[:, None], KIND)
        w += one_sided(t, equal, y_q[None, :], y_c[None, :], y_q_equal[None, :], y_c_equal[None, :], KIND)
    if KIND == DIFFERENT:
        w = tl.where(equal, 0.0, w)
    return w


@triton.jit
def one_sided(t, equal, q, c, q_equal, c_equal, KIND: tl.constexpr):
    """c exp(t - q), with those of equal keys where these have their own."""
    if KIND == SPLIT:
        return tl.exp2((t - tl.where(equal, q_equal, q)) * LOG2_E) * tl.where(equal, c_equal, c)
    else:
        return tl.exp2((t - q) * LOG2_E) * c


@triton.jit(do_not_specialize=["n", "m", "row_owners", "column_owners", "row_programs", "row_tiles", "column_tiles"])
def gradient_kernel(
    a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, bias_ptr, a_key_ptr, b_key_ptr, own_ptr, scale_ptr,
    row_values_ptr, row_grads_ptr, column_values_ptr, column_grads_ptr, da_ptr, db_ptr, dbias_ptr, dscale_ptr,
    n, m, scale, row_owners, column_owners, row_programs, row_tiles, column_tiles,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    DIAGONAL: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr, SIMILARITY: tl.constexpr,
    ONE_SIDED: tl.constexpr, ROW_PLACES: tl.constexpr, COLUMN_PLACES: tl.constexpr, RESIDUAL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    swap, x_first, split, tiles, x_count, y_count = program_of(
        n, m, row_owners, column_owners, row_programs, row_tiles, column_tiles, OWNED
    )
    chunk = tl.program_id(1) * WIDTH
    x_ptr = one_of(a_ptr, b_ptr, swap)
    y_ptr = one_of(a_ptr, b_ptr, swap == 0)
    x_values_ptr = one_of(row_values_ptr, column_values_ptr, swap)
    y_values_ptr = one_of(row_values_ptr, column_values_ptr, swap == 0)
    x_grads_ptr = one_of(row_grads_ptr, column_grads_ptr, swap)
    y_grads_ptr = one_of(row_grads_ptr, column_grads_ptr, swap == 0)
    scale, bounded = scale_of(scale_ptr, scale, BOUNDED)
    lift = 1.0
    unlift = 1.0
    narrow = 1.0
    if a_ptr.dtype.element_ty == tl.float16:
        largest = largest_gradient(row_grads_ptr, n, ROW_PLACES, 1024)
        if column_grads_ptr is None:
            largest *= 2
        else:
            largest += largest_gradient(column_grads_ptr, m, COLUMN_PLACES, 1024)
        largest = tl.maximum(largest, 1e-30)
        lift = LIFT / largest
        unlift = largest / LIFT
        if UNIT == FACTORS:
            longest = tl.maximum(largest_inverse(one_of(a_inverse_ptr, b_inverse_ptr, swap == 0), y_count, 1024), 1e-30)
            narrow = 1.0 / longest
            unlift *= longest
    x_inverse = load_inverse(a_inverse_ptr, b_inverse_ptr, x_first, x_count, swap, OWNED, UNIT)
    x = load_rows(x_ptr, x_inverse, x_first, x_count, 0, D, OWNED, DEPTH, UNIT) if D <= DEPTH else 0
    x_key, x_own, x_bias = load_sides(a_key_ptr, b_key_ptr, own_ptr, bias_ptr, x_first, x_count, swap, OWNED)
    factor = scale * tl.where(bounded, LOG2_E, 1.0)
    x_q, x_c, x_q_equal, x_c_equal, x_linear = load_weights(
        x_values_ptr, x_grads_ptr, x_first, x_count, swap, bounded, lift, OWNED, KIND, ONE_SIDED, ROW_PLACES, COLUMN_PLACES
    )
    dx = tl.zeros([OWNED, WIDTH], tl.float32)
    dbias = tl.zeros([OWNED], tl.float32)
    dscale = tl.zeros([OWNED], tl.float32)
    first_tile = split * tiles
    for u in range(tl.minimum(tiles, tl.cdiv(y_count, STREAMED) - first_tile)):
        y_first = (first_tile + u) * STREAMED
        y_inverse = load_inverse(a_inverse_ptr, b_inverse_ptr, y_first, y_count, swap == 0, STREAMED, UNIT)
        y = load_rows(y_ptr, y_inverse, y_first, y_count, chunk, D, STREAMED, WIDTH, UNIT)
        c = cosines(
            x, y, x_inverse, y_inverse, x_ptr, y_ptr, x_first, y_first, x_count, y_count, D, OWNED, STREAMED, DEPTH, UNIT, PRECISION
        )
        y_key, y_own, y_bias = load_sides(a_key_ptr, b_key_ptr, own_ptr, bias_ptr, y_first, y_count, swap == 0, STREAMED)
        y_q, y_c, y_q_equal, y_c_equal, y_linear = load_weights(
            y_values_ptr, y_grads_ptr, y_first, y_count, swap == 0, bounded, lift, STREAMED, KIND, ONE_SIDED, ROW_PLACES, COLUMN_PLACES
        )
        t = c * factor
        equal = equal_keys(x_key, y_key, OWNED, STREAMED, a_key_ptr is not None)
        if bias_ptr is not None:
            t += x_bias[:, None] + y_bias[None, :]
        w = weights(t, equal, x_q, x_c, x_q_equal, x_c_equal, y_q, y_c, y_q_equal, y_c_equal, bounded, KIND, ONE_SIDED)
        # what is no pair is cleared in the weights, be they infinite: t and the comparison of keys need not live as long
        if bias_ptr is not None:
            w = tl.where(pair_mask(x_first, y_first, y_count, OWNED, STREAMED, DIAGONAL), w, 0.0)
            if own_ptr is not None:
                w = tl.where(x_own[:, None] != y_own[None, :], w, 0.0)
            dbias += tl.sum(w, 1)
        if SIMILARITY:
            w += tl.where(equal, x_linear[:, None] + y_linear[None, :], 0.0)
        if own_ptr is not None:
            w = tl.where(x_own[:, None] != y_own[None, :], w, 0.0)
        if is_whole(x_first, y_first, y_count, OWNED, STREAMED, DIAGONAL) == 0:
            w = tl.where(pair_mask(x_first, y_first, y_count, OWNED, STREAMED, DIAGONAL), w, 0.0)
        if dscale_ptr is not None:
            dscale += tl.sum(w * c, 1)
        if UNIT == FACTORS:
            w *= (y_inverse * narrow)[None, :]
        rounded = narrowed(w, y.dtype, PRECISION)
        dx = product(rounded, y, dx, PRECISION)
        if RESIDUAL:
            dx = product(narrowed(w - rounded.to(tl.float32), y.dtype, PRECISION), y, dx, PRECISION)

    row = tl.arange(0, OWNED)
    exists = row < x_count - x_first
    column = chunk + tl.arange(0, WIDTH)[None, :]
    dx *= scale * unlift
    dx_ptr = one_of(da_ptr, db_ptr, swap)
    if PARTS:
        pointers = dx_ptr + (split.to(tl.int64) * x_count + x_first) * D + (row[:, None] * D + column)
        tl.store(pointers, dx, mask=exists[:, None] & (column < D))
    else:
        x = load_rows(x_ptr, x_inverse, x_first, x_count, 0, D, OWNED, WIDTH, AS_THEY_ARE)
        dx = through_unit(dx, x, x_inverse, UNIT)
        pointers = dx_ptr + x_first.to(tl.int64) * D + (row[:, None] * D + column)
        tl.store(pointers, narrowed(dx, dx_ptr.dtype.element_ty, PRECISION), mask=exists[:, None] & (column < D))
    place = split.to(tl.int64) * x_count + x_first + row
    unlift = 1.0 / lift
    if dbias_ptr is not None:
        tl.store(dbias_ptr + place, dbias * unlift, mask=row < tl.where(swap & (chunk == 0), x_count - x_first, 0))
    if dscale_ptr is not None:
        tl.store(dscale_ptr + place, dscale * unlift, mask=row < tl.where(swap | (chunk > 0), 0, x_count - x_first))


@triton.jit(do_not_specialize=["n", "m", "row_splits", "column_splits", "row_programs", "row_and_column_programs", "scale_numbers"])
def finish_kernel(
    a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, da_parts_ptr, db_parts_ptr, dbias_parts_ptr, dscale_parts_ptr,
    da_ptr, db_ptr, dbias_ptr, dscale_ptr, n, m, row_splits, column_splits, row_programs, row_and_column_programs, scale_numbers, share,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums the parts, in one order: gradients of rows, of columns and bias, and by the last program that of the scale.

    Without db_parts the rows' parts are of both sides (a self shape with a bias).
    """
    program = tl.program_id(0)
    if program < row_and_column_programs:
        swap = program >= row_programs
        x_ptr = one_of(a_ptr, b_ptr, swap)
        parts_ptr = one_of(da_parts_ptr, db_parts_ptr, swap)
        dx_ptr = one_of(da_ptr, db_ptr, swap)
        count = tl.where(swap, m, n)
        splits = tl.where(swap, column_splits, row_splits)
        first = tl.where(swap, program - row_programs, program) * ROWS
        row = tl.arange(0, ROWS)
        exists = row < count - first
        column = tl.arange(0, WIDTH)[None, :]
        inside = exists[:, None] & (column < D)
        offsets = first.to(tl.int64) * D + (row[:, None] * D + column)
        dx = tl.zeros([ROWS, WIDTH], tl.float32)
        for _ in range(splits):
            dx += tl.load(parts_ptr + offsets, mask=inside, other=0.0)
            parts_ptr += count.to(tl.int64) * D
        inverse = load_inverse(a_inverse_ptr, b_inverse_ptr, first, count, swap, ROWS, UNIT)
        x = load_rows(x_ptr, inverse, first, count, 0, D, ROWS, WIDTH, AS_THEY_ARE)
        dx = through_unit(dx, x, inverse, UNIT)
        tl.store(dx_ptr + offsets, narrowed(dx, dx_ptr.dtype.element_ty, PRECISION), mask=inside)
        if dbias_parts_ptr is not None:
            of_bias = tl.zeros([ROWS], tl.float32)
            of_columns = row < (count - first if db_parts_ptr is None else tl.where(swap, count - first, 0))
            for _ in range(column_splits):
                of_bias += tl.load(dbias_parts_ptr + first + row, mask=of_columns, other=0.0)
                dbias_parts_ptr += count
            tl.store(dbias_ptr + first + row, of_bias, mask=of_columns)
    elif dscale_parts_ptr is not None:
        total = tl.zeros([1024], tl.float32)
        for first in range(0, scale_numbers, 1024):
            place = first + tl.arange(0, 1024)
            total += tl.load(dscale_parts_ptr + place, mask=place < scale_numbers, other=0.0)
        tl.store(dscale_ptr, tl.sum(total, 0) * share)
