"""Forward: the quantities of rows, and of columns; each side that asks computes all pairs once.

    program  a tile of rows (or of columns), and a split of the other side's tiles
    reads    the owned rows once, every other row once per tile of owned ones
    writes   the quantities [names, n], or where a side has splits their parts [splits, parts, n], which :func:`join_kernel` joins
    flops    2 N M D a side

Where exp(t) is bounded (tiles.py) the sums need no shift. Otherwise the row's running maximum is subtracted, and the sum so far rescaled
whenever that grows; the pairs of equal keys have a maximum of their own, for they may all be small. Log-sums of different and of equal keys
are summed apart, and all = log(exp different + exp equal): a difference would cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import store_quantity
from .tiles import (
    DIFFERENT,
    LN_2,
    LOG2_E,
    SPLIT,
    columns_of,
    equal_keys,
    finite,
    folded,
    is_narrow,
    load_keys,
    load_numbers,
    load_rows,
    load_sides,
    log_sum,
    logits,
    numbers_at,
    one_of,
    pair_mask,
    product,
    program_of,
    scale_of,
    tile_at,
    whole_tiles,
)


@triton.jit
def store_quantities(ptr, row, n, first, second, similarity, count, KIND: tl.constexpr, PLACES: tl.constexpr):
    """first: the log-sum of all pairs, or of those of different keys where KIND is not ALL; second: of those of equal keys."""
    whole = first
    if KIND == SPLIT:
        shift = finite(tl.maximum(first, second))
        whole = shift + tl.log2(tl.exp2((first - shift) * LOG2_E) + tl.exp2((second - shift) * LOG2_E)) * LN_2
    store_quantity(ptr, row, n, whole, 0, PLACES)
    store_quantity(ptr, row, n, first, 1, PLACES)
    store_quantity(ptr, row, n, second, 2, PLACES)
    store_quantity(ptr, row, n, similarity, 3, PLACES)
    store_quantity(ptr, row, n, count, 4, PLACES)


@triton.jit
def add_exponentials(
    t, equal, first_peak, first, second_peak, second, bounded, OWNED: tl.constexpr, STREAMED: tl.constexpr, KIND: tl.constexpr
):
    """One more tile of sum_j exp(t_ij) = first * exp(first_peak), in second of the pairs of equal keys; bounded: in base 2, the peaks 0.

    tl.max may ignore NaN; the sums do not.
    """
    e = t
    if bounded:
        e = tl.exp2(t)
    else:
        new = tl.maximum(first_peak, tl.max(tl.where(equal, float("-inf"), t) if KIND == SPLIT else t, 1))
        first *= tl.exp2((first_peak - finite(new)) * LOG2_E)[:, None]
        first_peak = new
        shift = finite(new)[:, None]
        if KIND == SPLIT:
            new = tl.maximum(second_peak, tl.max(tl.where(equal, t, float("-inf")), 1))
            second *= tl.exp2((second_peak - finite(new)) * LOG2_E)[:, None]
            second_peak = new
            shift = tl.where(equal, finite(new)[:, None], shift)
        e = tl.exp2((t - shift) * LOG2_E)
    if KIND == SPLIT:
        first += folded(tl.where(equal, 0.0, e), OWNED, STREAMED)
        second += folded(tl.where(equal, e, 0.0), OWNED, STREAMED)
    else:
        first += folded(e, OWNED, STREAMED)
    return first_peak, first, second_peak, second


@triton.jit(do_not_specialize=["n", "m", "row_owners", "column_owners", "row_programs", "row_tiles", "column_tiles"])
def forward_kernel(
    a_ptr, b_ptr, bias_ptr, a_key_ptr, b_key_ptr, own_ptr, scale_ptr, numbers_ptr, rows_ptr, columns_ptr,
    n, m, scale, row_owners, column_owners, row_programs, row_tiles, column_tiles,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr, DIAGONAL: tl.constexpr,
    BOUNDED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr, SIMILARITY: tl.constexpr,
    ROW_PLACES: tl.constexpr, COLUMN_PLACES: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    swap, x_first, split, tiles, x_count, y_count = program_of(
        n, m, row_owners, column_owners, row_programs, row_tiles, column_tiles, OWNED
    )
    x_ptr = one_of(a_ptr, b_ptr, swap)
    y_ptr = one_of(a_ptr, b_ptr, swap == 0)
    scale, bounded = scale_of(scale_ptr, scale, BOUNDED)
    x_numbers, y_numbers = numbers_at(n, swap, DIAGONAL == 0), numbers_at(n, swap == 0, DIAGONAL == 0)
    x_inverse, x_code = load_numbers(numbers_ptr, x_numbers, x_first, x_count, OWNED, UNIT)
    x = load_rows(x_ptr, x_inverse, x_first, x_count, 0, D, OWNED, DEPTH, UNIT)
    x_own, x_bias = load_sides(own_ptr, bias_ptr, x_first, x_count, swap, OWNED)
    factor = scale * tl.where(bounded, LOG2_E, 1.0)
    x_factor = x_inverse * factor if FOLD else x_inverse
    first_peak = tl.zeros([OWNED], tl.float32) + tl.where(bounded, 0.0, float("-inf"))
    second_peak = first_peak
    first = tl.zeros([OWNED, 8], tl.float32)
    second = tl.zeros([OWNED, 8], tl.float32)
    similarity = tl.zeros([OWNED, 8], tl.float32)
    count = tl.zeros([OWNED, 8], tl.float32)
    start = split * tiles
    end = tl.minimum(start + tiles, tl.cdiv(y_count, STREAMED))
    lo, hi, stop = whole_tiles(start, end, is_narrow(x_code), x_first, y_count, OWNED, STREAMED, DIAGONAL)
    PIECES: tl.constexpr = (D + DEPTH - 1) // DEPTH
    for MASKED in tl.static_range(2):
        x_key = load_keys(a_key_ptr, b_key_ptr, x_first, x_count, swap, OWNED) if MASKED else x_code
        number = (hi - lo) + (end - stop) if MASKED else (lo - start) + (stop - hi)
        raw = tl.zeros([OWNED, STREAMED], tl.float32)
        for u in range(number * PIECES):
            y_first = tile_at(u // PIECES, start, lo, hi, stop, MASKED) * STREAMED
            # they feed no product, so nothing fetches them ahead: before the product their latency is under its time
            y_inverse, y_code = load_numbers(numbers_ptr, y_numbers, y_first, y_count, STREAMED, UNIT, MASKED)
            piece = u % PIECES * DEPTH
            if PIECES > 1:
                x = load_rows(x_ptr, x_inverse, x_first, x_count, piece, D, OWNED, DEPTH, UNIT)
            y = load_rows(y_ptr, y_inverse, y_first, y_count, piece, D, STREAMED, DEPTH, UNIT, MASKED)
            raw = product(x, tl.trans(y), raw, PRECISION)
            if (u + 1) % PIECES == 0:
                for PART in tl.static_range(STREAMED // COLUMNS):
                    part = y_first + PART * COLUMNS
                    y_factor, code = y_inverse, y_code
                    if PIECES > 1:
                        y_factor, code = load_numbers(numbers_ptr, y_numbers, part, y_count, COLUMNS, UNIT, MASKED)
                    y_key = load_keys(a_key_ptr, b_key_ptr, part, y_count, swap == 0, COLUMNS) if MASKED else code
                    y_own, y_bias = load_sides(own_ptr, bias_ptr, part, y_count, swap == 0, COLUMNS)
                    c = columns_of(raw, PART, OWNED, STREAMED, COLUMNS)
                    c, t = logits(c, x_factor, y_factor, factor, x_bias, y_bias, bias_ptr is not None, UNIT, FOLD)
                    equal = equal_keys(x_key, y_key, OWNED, COLUMNS, a_key_ptr is not None)
                    if own_ptr is not None:
                        other = x_own[:, None] != y_own[None, :]
                        t = tl.where(other, t, float("-inf"))
                        equal = equal & other
                    if MASKED:
                        pair = pair_mask(x_first, part, y_count, OWNED, COLUMNS, DIAGONAL)
                        t = tl.where(pair, t, float("-inf"))
                        equal = equal & pair
                    if SIMILARITY:
                        # a one in the layout of c: a constant has none, and Triton would load and compare all keys once more in another
                        one = ((c.to(tl.int32, bitcast=True) | 0x3F800000) & 0x3F800000).to(tl.float32, bitcast=True)
                        one = tl.where(equal, one, 0.0)
                        similarity += folded(one * c if BOUNDED else tl.where(equal, c, 0.0), OWNED, COLUMNS)
                        count += folded(one, OWNED, COLUMNS)
                    if KIND == DIFFERENT:
                        t = tl.where(equal, float("-inf"), t)
                    first_peak, first, second_peak, second = add_exponentials(
                        t, equal, first_peak, first, second_peak, second, bounded, OWNED, COLUMNS, KIND
                    )
                raw = tl.zeros([OWNED, STREAMED], tl.float32)
    first = log_sum(first_peak, tl.sum(first, 1))
    second = log_sum(second_peak, tl.sum(second, 1))
    similarity = tl.sum(similarity, 1) * (LN_2 if FOLD else scale)
    count = tl.sum(count, 1)
    row = x_first + tl.arange(0, OWNED)
    if PARTS == 0:
        if swap:
            store_quantities(columns_ptr, row, m, first, second, similarity, count, KIND, COLUMN_PLACES)
        else:
            store_quantities(rows_ptr, row, n, first, second, similarity, count, KIND, ROW_PLACES)
    else:
        # parts are named as the quantities "different", "equal", "similarity" and "count", and there are (PARTS >> 20) of them
        ptr = tl.where(swap, columns_ptr, rows_ptr) + split.to(tl.int64) * (PARTS >> 20) * x_count
        store_quantities(ptr, row, x_count, first, second, similarity, count, KIND, PARTS)


@triton.jit(do_not_specialize=["n", "m", "row_splits", "column_splits", "row_programs"])
def join_kernel(
    row_parts_ptr, column_parts_ptr, rows_ptr, columns_ptr, n, m, row_splits, column_splits, row_programs,
    KIND: tl.constexpr, ROW_PLACES: tl.constexpr, COLUMN_PLACES: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The quantities of the rows, and of the columns, from the parts [splits, PARTS, n] of their splits."""
    program = tl.program_id(0)
    swap = program >= row_programs
    count_of = tl.where(swap, m, n)
    splits = tl.where(swap, column_splits, row_splits)
    row = tl.where(swap, program - row_programs, program) * ROWS + tl.arange(0, ROWS)
    ptr = tl.where(swap, column_parts_ptr, row_parts_ptr)
    first = join_log_sums(ptr, row, count_of, splits, 1, PARTS, ROWS, SPLITS)
    second = join_log_sums(ptr, row, count_of, splits, 2, PARTS, ROWS, SPLITS)
    similarity = tl.sum(load_parts(ptr, row, count_of, splits, 0.0, 3, PARTS, ROWS, SPLITS), 0)
    count = tl.sum(load_parts(ptr, row, count_of, splits, 0.0, 4, PARTS, ROWS, SPLITS), 0)
    if swap:
        store_quantities(columns_ptr, row, m, first, second, similarity, count, KIND, COLUMN_PLACES)
    else:
        store_quantities(rows_ptr, row, n, first, second, similarity, count, KIND, ROW_PLACES)


@triton.jit
def load_parts(ptr, row, n, splits, other, PART: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """One part of all splits [SPLITS, ROWS]; ``other`` where there is none."""
    PLACE: tl.constexpr = (PARTS >> (4 * PART)) & 15
    split = tl.arange(0, SPLITS)[:, None]
    if PLACE == 15:
        return tl.zeros([SPLITS, ROWS], tl.float32) + other
    else:
        pointers = ptr + (split.to(tl.int64) * (PARTS >> 20) + PLACE) * n + row[None, :]
        return tl.load(pointers, mask=(split < splits) & (row[None, :] < n), other=other)


@triton.jit
def join_log_sums(ptr, row, n, splits, PART: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    parts = load_parts(ptr, row, n, splits, float("-inf"), PART, PARTS, ROWS, SPLITS)
    peak = tl.max(parts, 0)
    return log_sum(peak, tl.sum(tl.exp2((parts - finite(peak)[None, :]) * LOG2_E), 0))
