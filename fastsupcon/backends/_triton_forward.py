"""Forward, row by row: lse_i = log sum_{j allowed} exp(s_ij), each pair of the full square computed once, in its row.

    grid     (tiles of rows, splits of the columns)
    reads    the owned rows once, every column once per tile of rows
    writes   lse [splits, n]; :func:`join_kernel` joins the splits of few rows against many columns
    flops    2 N M D

With FIXED, the caller knows that exp(s) neither overflows nor underflows (unit rows, temperature >= 0.0234), and the sum needs no shift.
Otherwise the row's running maximum is subtracted, and the sum so far rescaled whenever that grows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import (
    EQUAL_KEYS,
    LN_2,
    LOG2_E,
    careful_tile,
    load_keys,
    load_rows,
    load_values,
    mask_pairs,
    plain_tile,
    similarities,
    stream_plan,
)  # fmt: skip


@triton.jit
def add_exponentials(peak, total, s, FIXED: tl.constexpr):
    """sum_j exp(s_ij) as total * exp(peak), one more tile of s added; with FIXED s is in base 2, and peak stays 0.

    An infinite peak is not subtracted: inf - inf would be NaN. tl.max may ignore NaN; the sum does not.
    """
    if FIXED:
        return peak, total + tl.sum(tl.exp2(s), 1)
    else:
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(tl.abs(new_peak) == float("inf"), 0.0, new_peak)
        return new_peak, total * tl.exp2((peak - shift) * LOG2_E) + tl.sum(tl.exp2((s - shift[:, None]) * LOG2_E), 1)


@triton.jit
def logits(
    a, a_key, a_ptr, b_ptr, bias_ptr, a_key_ptr, b_key_ptr, a_first, b_first, n, m, factor,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr,
    FORBIDDEN: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = load_rows(b_ptr, b_first, m, 0, D, STREAMED, DEPTH, CAREFUL) if D <= DEPTH else a
    s = similarities(a, b, a_ptr, b_ptr, a_first, b_first, n, m, D, OWNED, STREAMED, DEPTH, PRECISION) * factor
    if bias_ptr is not None:
        s += load_values(bias_ptr, b_first, m, STREAMED, CAREFUL)[None, :]
    b_key = load_keys(b_key_ptr, a_key_ptr, b_first, m, STREAMED) if FORBIDDEN == EQUAL_KEYS else a_key
    return mask_pairs(s, a_key, b_key, a_first, b_first, n, m, OWNED, STREAMED, FORBIDDEN, CAREFUL)


@triton.jit(do_not_specialize=["n", "m", "tiles_per_split"])
def forward_kernel(
    a_ptr, b_ptr, bias_ptr, a_key_ptr, b_key_ptr, lse_ptr, n, m, scale, tiles_per_split,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr,
    FORBIDDEN: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    a_first = tl.program_id(0) * OWNED
    split = tl.program_id(1)
    factor = scale * LOG2_E if FIXED else scale
    a = load_rows(a_ptr, a_first, n, 0, D, OWNED, DEPTH, True) if D <= DEPTH else 0
    a_key = load_keys(a_key_ptr, b_key_ptr, a_first, n, OWNED) if FORBIDDEN == EQUAL_KEYS else 0
    peak = tl.full([OWNED], 0.0 if FIXED else float("-inf"), tl.float32)
    total = tl.zeros([OWNED], tl.float32)
    first, plain, diagonal, on_diagonal, careful = stream_plan(a_first, split, tiles_per_split, m, OWNED, STREAMED, FORBIDDEN)
    for u in range(plain):
        b_first = plain_tile(u, first, diagonal, on_diagonal, STREAMED)
        s = logits(
            a, a_key, a_ptr, b_ptr, bias_ptr, a_key_ptr, b_key_ptr, a_first, b_first, n, m, factor,
            D, OWNED, STREAMED, DEPTH, FORBIDDEN, False, PRECISION,
        )  # fmt: skip
        peak, total = add_exponentials(peak, total, s, FIXED)
    for u in range(careful):
        b_first = careful_tile(u, diagonal, on_diagonal, m, STREAMED)
        s = logits(
            a, a_key, a_ptr, b_ptr, bias_ptr, a_key_ptr, b_key_ptr, a_first, b_first, n, m, factor,
            D, OWNED, STREAMED, DEPTH, FORBIDDEN, True, PRECISION,
        )  # fmt: skip
        peak, total = add_exponentials(peak, total, s, FIXED)
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    row = tl.arange(0, OWNED)
    tl.store(lse_ptr + split.to(tl.int64) * n + a_first + row, shift + tl.log2(total) * LN_2, mask=row < n - a_first)


@triton.jit(do_not_specialize=["n", "splits"])
def join_kernel(partial_ptr, lse_ptr, n, splits, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """lse_i = log sum_k exp(partial_ki) over the splits k < splits of partial [splits, n]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    inside = (split[:, None] < splits) & (row[None, :] < n)
    partial = tl.load(partial_ptr + split[:, None].to(tl.int64) * n + row[None, :], mask=inside, other=float("-inf"))
    peak = tl.max(partial, 0)
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    total = tl.sum(tl.exp2((partial - shift[None, :]) * LOG2_E), 0)
    tl.store(lse_ptr + row, shift + tl.log2(total) * LN_2, mask=row < n)
