"""Backward: each program owns rows x_i, recomputes their logits tile by tile, and sums dx_i = scale * sum_j w_ij y_j.

w_ij is, over the log-sums q that (i, j) is in, g_i exp(t_ij - q_i) + h_j exp(t_ij - q'_j), and [equal keys] (u_i + v_j). The symmetric self
shape has h = g, q' = q, v = u. One recomputed tile, one second product from the same tile of y, no atomics: 4 N M D flops a side, and
2 N M D more for each further chunk of D; or 4 N M D for any D where w is written down for a block of rows, and :func:`product_kernel`
multiplies it with y. What depends on a row alone is made once: of a loss by the forward's last launch (lines.py), else by
:func:`weights_kernel`.

    program  a tile of rows (or of columns), a split of the other side's tiles; second index: a chunk of D
    writes   the gradient itself, or where the stream has splits or D has chunks its parts [splits, n, D], which :func:`finish_kernel` sums;
             parts of the bias' gradient [splits, m] and, of the scale's, sums over j [splits, n]

A pair is either of different or of equal keys, and all >= different, equal. So g_all exp(t - all) + g_different exp(t - different) is one
exponential, exp(t - different) (g_different + g_all exp(different - all)), and none of its factors exceeds 1. Where exp(t) is bounded
(tiles.py) it serves both sides: w = exp(t) (r_i + r_j) with r = c exp(-q). |t| and |q| are below 63 ln 2 + log N, so r is in fp32's range
for every c from 2^-40 to 2^40.

w enters the product in the rows' dtype, y's inverse norms as a factor of it. fp16 could not hold g P (about 1/N^2): there the incoming
gradients are divided by the largest of them and lifted by 2^15, inverse norms divided by the largest, which leaves w between 2^15 and a
subnormal 2^-24; all come back in the epilogue, in fp32. So does the gradient of a loss, which is one number: until there, w is that of the
line's coefficients alone. Where a sum has few terms (RESIDUAL) their roundings do not average out, and what w lost goes in as well.
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
    aligned,
    code_of,
    columns_of,
    equal_keys,
    folded,
    is_narrow,
    load_inverse,
    load_keys,
    load_pair,
    load_rows,
    load_sides,
    logits,
    narrowed,
    numbers_at,
    one_of,
    pair_mask,
    pair_of,
    product,
    program_of,
    scale_of,
    tile_at,
    whole_tiles,
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
def weights_of(first, second, whole, g_first, g_second, g_whole, nothing, bounded, KIND: tl.constexpr):
    """(q, c) of a row for its pairs of different keys, (q, c) for those of equal keys.

    From the log-sums of either and of all, and their gradients; first alone if KIND is not SPLIT. Such that c exp(t - q) is the weight of a
    pair; or c exp(t), where exp(t) is bounded. A log-sum of -inf is over no pair and passes nothing: c = 0 and q = ``nothing``.
    """
    no_pair = float("-inf")
    if KIND == SPLIT:
        g_whole = tl.where(whole == no_pair, 0.0, g_whole)
        q = tl.where(first == no_pair, whole, first)
        c = tl.where(first == no_pair, 0.0, g_first) + tl.where(g_whole == 0, 0.0, g_whole * tl.exp2((q - whole) * LOG2_E))
        q_equal = tl.where(second == no_pair, whole, second)
        c_equal = tl.where(second == no_pair, 0.0, g_second) + tl.where(g_whole == 0, 0.0, g_whole * tl.exp2((q_equal - whole) * LOG2_E))
        q_equal = tl.where(q_equal == no_pair, nothing, q_equal)
        if bounded:
            c_equal *= tl.exp2(-q_equal * LOG2_E)
        q = tl.where(q == no_pair, nothing, q)
        if bounded:
            c *= tl.exp2(-q * LOG2_E)
    else:
        q = first
        if bounded:
            c = tl.where(q == no_pair, 0.0, g_first * tl.exp2(-q * LOG2_E))
        else:
            c = tl.where(q == no_pair, 0.0, g_first)
            q = tl.where(q == no_pair, float("inf"), q)
        q_equal = q
        c_equal = c
    return q, c, q_equal, c_equal


@triton.jit
def store_weights(numbers_ptr, size, row, inside, q, c, q_equal, c_equal, linear, lift):
    """Of the numbers [4, size] of a row all but the first, lifted: (c, similarity's gradient), (q, q_equal), (c_equal, c)."""
    tl.store(numbers_ptr + size + row, pair_of(c * lift, linear * lift), mask=inside)
    tl.store(numbers_ptr + 2 * size + row, pair_of(q, q_equal), mask=inside)
    tl.store(numbers_ptr + 3 * size + row, pair_of(c_equal * lift, c * lift), mask=inside)


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
def largest_incoming(row_grads_ptr, column_grads_ptr, n, m, ROW_PLACES: tl.constexpr, COLUMN_PLACES: tl.constexpr):
    """A bound of a pair's incoming gradients: the rows' largest and the columns' largest, added."""
    largest = largest_gradient(row_grads_ptr, n, ROW_PLACES, 1024)
    if column_grads_ptr is None:
        largest *= 2
    else:
        largest += largest_gradient(column_grads_ptr, m, COLUMN_PLACES, 1024)
    return tl.maximum(largest, 1e-30)


@triton.jit
def largest_of(ptr, n, BLOCK: tl.constexpr):
    """The largest |value| of values [n]."""
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        row = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(ptr + row, mask=row < n, other=0.0)))
    return tl.maximum(tl.max(largest, 0), 1e-30)


@triton.jit(do_not_specialize=["n", "m", "row_programs"])
def weights_kernel(
    row_values_ptr, row_grads_ptr, column_values_ptr, column_grads_ptr, a_key_ptr, b_key_ptr, a_inverse_ptr, b_inverse_ptr, scale_ptr,
    numbers_ptr, n, m, scale, row_programs, BOUNDED: tl.constexpr, KIND: tl.constexpr, ONE_SIDED: tl.constexpr,
    ROW_PLACES: tl.constexpr, COLUMN_PLACES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The numbers of rows, and of columns, in pairs [4, size]: (inverse, code), (c, similarity's gradient), (q, q_equal), (c_equal, c).

    HALF, of fp16: after them what undoes the lift, and the largest inverse norms of rows and of columns. Each program finds its lift.
    """
    program = tl.program_id(0)
    swap = program >= row_programs
    count = tl.where(swap, m, n)
    first = tl.where(swap, program - row_programs, program) * BLOCK
    size = numbers_size(n, m, column_grads_ptr is not None)
    scale, bounded = scale_of(scale_ptr, scale, BOUNDED)
    lift = 1.0
    if HALF:
        largest = largest_incoming(row_grads_ptr, column_grads_ptr, n, m, ROW_PLACES, COLUMN_PLACES)
        lift = LIFT / largest
        if program == 0:
            tl.store(numbers_ptr + 4 * size, pair_of(largest / LIFT, largest))
            if a_inverse_ptr is not None:
                tl.store(numbers_ptr + 4 * size + 1, pair_of(largest_of(a_inverse_ptr, n, 1024), largest_of(b_inverse_ptr, m, 1024)))
    values_ptr = one_of(row_values_ptr, column_values_ptr, swap)
    grads_ptr = one_of(row_grads_ptr, column_grads_ptr, swap)
    no_pair = float("-inf")
    nothing = float("inf")  # q = 0 on the side that has no log-sums, where the other's is added to it
    if ONE_SIDED != BOTH_SIDES:
        nothing = tl.where(swap == (ONE_SIDED == OF_ROWS), 0.0, float("inf"))
    FIRST: tl.constexpr = 1 if KIND == SPLIT else KIND  # its quantity
    log_sum = load_incoming(values_ptr, no_pair if KIND == SPLIT else 0.0, first, count, swap, BLOCK, FIRST, ROW_PLACES, COLUMN_PLACES)
    gradient = load_incoming(grads_ptr, 0.0, first, count, swap, BLOCK, FIRST, ROW_PLACES, COLUMN_PLACES)
    second, whole, g_second, g_whole = log_sum, log_sum, gradient, gradient
    if KIND == SPLIT:
        whole = load_incoming(values_ptr, no_pair, first, count, swap, BLOCK, 0, ROW_PLACES, COLUMN_PLACES)
        second = load_incoming(values_ptr, no_pair, first, count, swap, BLOCK, 2, ROW_PLACES, COLUMN_PLACES)
        g_whole = load_incoming(grads_ptr, 0.0, first, count, swap, BLOCK, 0, ROW_PLACES, COLUMN_PLACES)
        g_second = load_incoming(grads_ptr, 0.0, first, count, swap, BLOCK, 2, ROW_PLACES, COLUMN_PLACES)
    q, c, q_equal, c_equal = weights_of(log_sum, second, whole, gradient, g_second, g_whole, nothing, bounded, KIND)
    linear = load_incoming(grads_ptr, 0.0, first, count, swap, BLOCK, 3, ROW_PLACES, COLUMN_PLACES)
    row = first + tl.arange(0, BLOCK)
    inside = row < count
    numbers_ptr += tl.where(swap, aligned(n), 0)
    inverse = load_inverse(a_inverse_ptr, b_inverse_ptr, first, count, swap, BLOCK)
    code = code_of(load_keys(a_key_ptr, b_key_ptr, first, count, swap, BLOCK))
    tl.store(numbers_ptr + row, pair_of(inverse, code), mask=inside)
    store_weights(numbers_ptr, size, row, inside, q, c, q_equal, c_equal, linear, lift)


@triton.jit
def numbers_size(n, m, CROSS: tl.constexpr):
    return aligned(n) + aligned(m) if CROSS else aligned(n)


@triton.jit
def load_all(
    numbers_ptr, size, grad_ptr, share, n, first, count, of_columns,
    ROWS: tl.constexpr, CROSS: tl.constexpr, KIND: tl.constexpr, EACH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Inverse, code, (q, c), (q_equal, c_equal) and the similarity's gradient."""
    ptr = numbers_ptr + numbers_at(n, of_columns, CROSS)
    inverse, code = load_pair(ptr, first, count, ROWS, MASKED)
    c, linear = load_pair(ptr + size, first, count, ROWS, MASKED)
    q, q_equal = load_pair(ptr + 2 * size, first, count, ROWS, MASKED)
    c_equal = c
    if KIND == SPLIT:
        c_equal, _ = load_pair(ptr + 3 * size, first, count, ROWS, MASKED)
    if EACH:  # columns have no loss, and weights of 0
        row = tl.arange(0, ROWS)
        rows = tl.where(of_columns, 0, count - first) if CROSS else count - first
        g = share * tl.load(grad_ptr + first + row, mask=row < rows, other=0.0)
        c, c_equal, linear = times(c, g), times(c_equal, g), times(linear, g)
    return inverse, code, q, c, q_equal, c_equal, linear


@triton.jit
def largest_factors(numbers_ptr, size, grad_ptr, n, swap, HALF: tl.constexpr, UNIT: tl.constexpr, EACH: tl.constexpr):
    """What fp16's weights are divided by: the largest gradient of a row's loss, and the largest inverse norm of the other side."""
    largest = 1.0
    longest = 1.0
    if HALF and EACH:
        largest = largest_of(grad_ptr, n, 1024)
    if HALF and UNIT == FACTORS:
        of_rows, of_columns = load_pair(numbers_ptr, 4 * size + 1, 0, 1, False)
        longest = tl.max(tl.where(swap, of_rows, of_columns), 0)
    return largest, longest


@triton.jit
def unlift_of(numbers_ptr, size, grad_ptr, largest, HALF: tl.constexpr, EACH: tl.constexpr):
    """What a sum of weights is multiplied by."""
    unlift = largest
    if HALF or grad_ptr is not None:
        undo, _ = load_pair(numbers_ptr, 4 * size, 0, 1, False)
        unlift *= tl.max(undo, 0)
    if grad_ptr is not None and not EACH:
        unlift *= tl.load(grad_ptr)
    return unlift


@triton.jit
def times(c, g):
    """What passes nothing does so whatever it is asked to pass."""
    return tl.where(c == 0, 0.0, c * g)


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
    """w_ij without the similarities' part, of all (i, j), if KIND is DIFFERENT too. Where one side has no log-sums, its q and c are 0."""
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
    return w


@triton.jit
def one_sided(t, equal, q, c, q_equal, c_equal, KIND: tl.constexpr):
    """c exp(t - q), with those of equal keys where these have their own."""
    if KIND == SPLIT:
        return tl.exp2((t - tl.where(equal, q_equal, q)) * LOG2_E) * tl.where(equal, c_equal, c)
    else:
        return tl.exp2((t - q) * LOG2_E) * c


@triton.jit(do_not_specialize=["n", "m", "base", "row_owners", "column_owners", "row_programs", "row_tiles", "column_tiles"])
def gradient_kernel(
    a_ptr, b_ptr, bias_ptr, a_key_ptr, b_key_ptr, own_ptr, scale_ptr, a_inverse_ptr, b_inverse_ptr, numbers_ptr, grad_ptr,
    w_ptr, da_ptr, db_ptr, dbias_ptr, dscale_ptr,
    n, m, scale, base, row_owners, column_owners, row_programs, row_tiles, column_tiles,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    DIAGONAL: tl.constexpr, BOUNDED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    SIMILARITY: tl.constexpr, ONE_SIDED: tl.constexpr, EACH: tl.constexpr, RESIDUAL: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad: that of the loss, or with EACH of each row's, where the numbers are of a line's coefficients; None where they are all of w.

    With w [rows, aligned(m or n)] the programs own the rows from base on, and leave their weights, for product_kernel, in place of dx.
    """
    swap, x_first, split, tiles, x_count, y_count = program_of(
        n, m, row_owners, column_owners, row_programs, row_tiles, column_tiles, OWNED
    )
    x_first += base
    chunk = tl.program_id(1) * WIDTH
    x_ptr = one_of(a_ptr, b_ptr, swap)
    y_ptr = one_of(a_ptr, b_ptr, swap == 0)
    size = numbers_size(n, m, b_ptr is not None)
    scale, bounded = scale_of(scale_ptr, scale, BOUNDED)
    HALF: tl.constexpr = a_ptr.dtype.element_ty == tl.float16
    largest, longest = largest_factors(numbers_ptr, size, grad_ptr, n, swap, HALF, UNIT, EACH)
    share = 1.0 / largest
    narrow = 1.0 / longest
    CROSS: tl.constexpr = b_ptr is not None
    x_inverse, x_code, x_q, x_c, x_q_equal, x_c_equal, x_linear = load_all(
        numbers_ptr, size, grad_ptr, share, n, x_first, x_count, swap, OWNED, CROSS, KIND, EACH, True
    )
    x = load_rows(x_ptr, x_inverse, x_first, x_count, 0, D, OWNED, DEPTH, UNIT)
    x_own, x_bias = load_sides(own_ptr, bias_ptr, x_first, x_count, swap, OWNED)
    factor = scale * tl.where(bounded, LOG2_E, 1.0)
    x_factor = x_inverse * factor if FOLD else x_inverse
    dx = tl.zeros([OWNED, WIDTH], tl.float32)
    dbias = tl.zeros([OWNED, 8], tl.float32)
    dscale = tl.zeros([OWNED, 8], tl.float32)
    start = split * tiles
    end = tl.minimum(start + tiles, tl.cdiv(y_count, STREAMED))
    lo, hi, stop = whole_tiles(start, end, is_narrow(x_code), x_first, y_count, OWNED, STREAMED, DIAGONAL)
    PIECES: tl.constexpr = (D + DEPTH - 1) // DEPTH
    CHUNKED: tl.constexpr = PIECES > 1 or WIDTH != DEPTH
    for MASKED in tl.static_range(2):
        x_key = load_keys(a_key_ptr, b_key_ptr, x_first, x_count, swap, OWNED) if MASKED else x_code
        number = (hi - lo) + (end - stop) if MASKED else (lo - start) + (stop - hi)
        raw = tl.zeros([OWNED, STREAMED], tl.float32)
        for u in range(number * PIECES):
            y_first = tile_at(u // PIECES, start, lo, hi, stop, MASKED) * STREAMED
            y_inverse = load_inverse(a_inverse_ptr, b_inverse_ptr, y_first, y_count, swap == 0, STREAMED)
            piece = u % PIECES * DEPTH
            if PIECES > 1:
                x = load_rows(x_ptr, x_inverse, x_first, x_count, piece, D, OWNED, DEPTH, UNIT)
            y = load_rows(y_ptr, y_inverse, y_first, y_count, piece, D, STREAMED, DEPTH, UNIT, MASKED)
            raw = product(x, tl.trans(y), raw, PRECISION)
            if (u + 1) % PIECES == 0:
                z = y
                if CHUNKED and w_ptr is None:
                    z = load_rows(y_ptr, y_inverse, y_first, y_count, chunk, D, STREAMED, WIDTH, UNIT, MASKED)
                for PART in tl.static_range(STREAMED // COLUMNS):
                    first = y_first + PART * COLUMNS
                    y_factor, y_code, y_q, y_c, y_q_equal, y_c_equal, y_linear = load_all(
                        numbers_ptr, size, grad_ptr, share, n, first, y_count, swap == 0, COLUMNS, CROSS, KIND, EACH, MASKED
                    )
                    y_key = load_keys(a_key_ptr, b_key_ptr, first, y_count, swap == 0, COLUMNS) if MASKED else y_code
                    y_own, y_bias = load_sides(own_ptr, bias_ptr, first, y_count, swap == 0, COLUMNS)
                    c = columns_of(raw, PART, OWNED, STREAMED, COLUMNS)
                    c, t = logits(c, x_factor, y_factor, factor, x_bias, y_bias, bias_ptr is not None, UNIT, FOLD)
                    equal = equal_keys(x_key, y_key, OWNED, COLUMNS, a_key_ptr is not None)
                    w = weights(t, equal, x_q, x_c, x_q_equal, x_c_equal, y_q, y_c, y_q_equal, y_c_equal, bounded, KIND, ONE_SIDED)
                    # what is no pair is cleared in the weights, be they infinite: t and the comparison of keys need not live as long
                    if KIND == DIFFERENT:
                        w = tl.where(equal, 0.0, w)
                    if bias_ptr is not None:
                        if MASKED:
                            w = tl.where(pair_mask(x_first, first, y_count, OWNED, COLUMNS, DIAGONAL), w, 0.0)
                        if own_ptr is not None:
                            w = tl.where(x_own[:, None] != y_own[None, :], w, 0.0)
                        dbias += folded(w, OWNED, COLUMNS)
                    if SIMILARITY:
                        w += tl.where(equal, 1.0, 0.0) * (x_linear[:, None] + y_linear[None, :])
                    if own_ptr is not None:
                        w = tl.where(x_own[:, None] != y_own[None, :], w, 0.0)
                    if MASKED:
                        w = tl.where(pair_mask(x_first, first, y_count, OWNED, COLUMNS, DIAGONAL), w, 0.0)
                    if dscale_ptr is not None:
                        dscale += folded(w * c, OWNED, COLUMNS)
                    if UNIT == FACTORS:
                        w *= (y_factor * narrow)[None, :]
                    rounded = narrowed(w, z.dtype, PRECISION)
                    if w_ptr is None:
                        dx = product(rounded, z, dx, PRECISION)
                    else:
                        pointers = w_ptr + (x_first - base).to(tl.int64) * aligned(y_count) + first
                        pointers += tl.arange(0, OWNED)[:, None] * aligned(y_count) + tl.arange(0, COLUMNS)[None, :]
                        if MASKED:
                            tl.store(pointers, rounded, mask=(first + tl.arange(0, COLUMNS) < y_count)[None, :])
                        else:
                            tl.store(pointers, rounded)
                    if RESIDUAL:
                        dx = product(narrowed(w - rounded.to(tl.float32), z.dtype, PRECISION), z, dx, PRECISION)
                raw = tl.zeros([OWNED, STREAMED], tl.float32)

    unlift = unlift_of(numbers_ptr, size, grad_ptr, largest, HALF, EACH)
    row = tl.arange(0, OWNED)
    exists = row < x_count - x_first
    if w_ptr is None:
        column = chunk + tl.arange(0, WIDTH)[None, :]
        dx *= scale * unlift * longest
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
    if dbias_ptr is not None:
        tl.store(dbias_ptr + place, tl.sum(dbias, 1) * unlift, mask=row < tl.where(swap & (chunk == 0), x_count - x_first, 0))
    if dscale_ptr is not None:
        tl.store(dscale_ptr + place, tl.sum(dscale, 1) * unlift, mask=row < tl.where(swap | (chunk > 0), 0, x_count - x_first))


@triton.jit(do_not_specialize=["n", "m", "rows", "tiles"])
def product_kernel(
    w_ptr, y_ptr, parts_ptr, scale_ptr, numbers_ptr, grad_ptr, n, m, rows, tiles, scale,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, WIDTH: tl.constexpr, OF_COLUMNS: tl.constexpr, CROSS: tl.constexpr,
    UNIT: tl.constexpr, EACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts [splits, rows, D] of the gradients of a block of rows, or OF_COLUMNS, from their weights. Second index: a split of the sum."""
    y_count = n if OF_COLUMNS else m
    chunks = tl.cdiv(D, WIDTH)  # neighbours share w
    x_first = tl.program_id(0) // chunks * OWNED
    chunk = tl.program_id(0) % chunks * WIDTH
    start = tl.program_id(1) * tiles
    end = tl.minimum(start + tiles, tl.cdiv(y_count, STREAMED))
    whole = tl.minimum(end, y_count // STREAMED)
    row = tl.arange(0, OWNED)
    w_ptr += x_first.to(tl.int64) * aligned(y_count)
    dx = tl.zeros([OWNED, WIDTH], tl.float32)
    for MASKED in tl.static_range(2):
        for u in range(whole if MASKED else start, end if MASKED else whole):
            y_first = u * STREAMED
            place = y_first + tl.arange(0, STREAMED)[None, :]
            pointers = w_ptr + (row[:, None] * aligned(y_count) + place)
            w = tl.load(pointers, mask=place < y_count, other=0.0) if MASKED else tl.load(pointers)
            y = load_rows(y_ptr, 1.0, y_first, y_count, chunk, D, STREAMED, WIDTH, AS_THEY_ARE, MASKED)
            dx = product(w, y, dx, PRECISION)
    HALF: tl.constexpr = y_ptr.dtype.element_ty == tl.float16
    size = numbers_size(n, m, CROSS)
    largest, longest = largest_factors(numbers_ptr, size, grad_ptr, n, OF_COLUMNS, HALF, UNIT, EACH)
    scale, _ = scale_of(scale_ptr, scale, False)
    dx *= scale * unlift_of(numbers_ptr, size, grad_ptr, largest, HALF, EACH) * longest
    column = chunk + tl.arange(0, WIDTH)[None, :]
    pointers = parts_ptr + (tl.program_id(1).to(tl.int64) * rows + x_first) * D + (row[:, None] * D + column)
    tl.store(pointers, dx, mask=(row < rows - x_first)[:, None] & (column < D))


@triton.jit(do_not_specialize=["n", "m", "row_splits", "column_splits", "row_programs", "row_and_column_programs", "scale_numbers"])
def finish_kernel(
    a_ptr, b_ptr, a_inverse_ptr, b_inverse_ptr, da_parts_ptr, db_parts_ptr, dbias_parts_ptr, dscale_parts_ptr,
    da_ptr, db_ptr, dbias_ptr, dscale_ptr, n, m, row_splits, column_splits, row_programs, row_and_column_programs, scale_numbers, share,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums the parts, in one order: gradients of rows, of columns and bias, and by the last program that of the scale.

    Without db_parts the rows' parts are of both sides (a self shape with a bias), without da_parts those of the bias are all there are.
    """
    program = tl.program_id(0)
    if program < row_and_column_programs:
        swap = program >= row_programs
        count = tl.where(swap, m, n)
        splits = tl.where(swap, column_splits, row_splits)
        first = tl.where(swap, program - row_programs, program) * ROWS
        row = tl.arange(0, ROWS)
        if da_parts_ptr is not None:
            column = tl.arange(0, WIDTH)[None, :]
            inside = (row < count - first)[:, None] & (column < D)
            offsets = first.to(tl.int64) * D + (row[:, None] * D + column)
            dx = tl.zeros([ROWS, WIDTH], tl.float32)
            parts_ptr = one_of(da_parts_ptr, db_parts_ptr, swap)
            for _ in range(splits):
                dx += tl.load(parts_ptr + offsets, mask=inside, other=0.0)
                parts_ptr += count.to(tl.int64) * D
            inverse = load_inverse(a_inverse_ptr, b_inverse_ptr, first, count, swap, ROWS)
            x = load_rows(one_of(a_ptr, b_ptr, swap), inverse, first, count, 0, D, ROWS, WIDTH, AS_THEY_ARE)
            dx = through_unit(dx, x, inverse, UNIT)
            dx_ptr = one_of(da_ptr, db_ptr, swap)
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
