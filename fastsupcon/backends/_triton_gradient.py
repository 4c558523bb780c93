"""Backward, every gradient of the primitive: each program owns rows x_i, recomputes their logits tile by tile, and sums

    dx_i = scale * sum_j W_ij y_j          dbias_i = sum_j W_ij

with P the softmax, g the incoming gradient of lse, and W one of

    ROWS       the owned rows have the lse:           W_ij = g_i P_ij                         (da)
    COLUMNS    the streamed rows have it:             W_ij = g_j P_ji                         (db, dbias)
    BOTH       self-similarity, norms unknown:        W_ij = g_i P_ij + g_j P_ji              (dz, two exponentials)
    SYMMETRIC  self-similarity, exp(s) in range:      W_ij = exp(s_ij) (w_i + w_j)            (dz, one exponential), w = g exp(-lse)

One recomputed tile, one second product from the same tile of y, no atomics: 4 N M D flops, the shape of attention's forward with K = V = y.

    grid     (tiles of rows, chunks of D, splits of the stream)
    writes   dx [splits, n, D] and dbias [splits, n]

Range in SYMMETRIC: |log exp(s)| and |lse| are below 63 ln 2 + log N, so w is in fp32's range for every g from 2^-40 to 2^40.
W enters the product in the rows' dtype. fp16 could not hold g P (about 1/N^2): there g is divided by the largest |g| of all rows, and W
lifted by 2^14, which leaves it between 2^15 and a subnormal 2^-24; both come back in the epilogue, in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import (
    EQUAL_KEYS,
    LOG2_E,
    careful_tile,
    load_keys,
    load_rows,
    load_values,
    mask_pairs,
    plain_tile,
    product,
    similarities,
    stream_plan,
)

ROWS, COLUMNS, BOTH, SYMMETRIC = (tl.constexpr(weight) for weight in range(4))
LIFT = tl.constexpr(14.0)  # log2, for fp16


@triton.jit(do_not_specialize=["n"])
def prepare_kernel(lse_ptr, grad_ptr, safe_lse_ptr, weight_ptr, peak_ptr, n, BLOCK: tl.constexpr):
    """What tiles need of every row, computed once: lse, and g, or w = g exp(-lse) without safe_lse_ptr; with peak_ptr g / max |g|.

    A row that allows no column has lse -inf; +inf instead makes its P and its w 0. max |g| is never taken as 0, so finite g stay finite.
    """
    block = tl.arange(0, BLOCK)
    row = tl.program_id(0) * BLOCK + block
    lse = tl.load(lse_ptr + row, mask=row < n, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    weight = tl.load(grad_ptr + row, mask=row < n, other=0.0)
    if peak_ptr is not None:
        largest = tl.full([BLOCK], 1e-30, tl.float32)
        for first in range(0, n, BLOCK):
            largest = tl.maximum(largest, tl.abs(tl.load(grad_ptr + first + block, mask=block < n - first, other=0.0)))
        peak = tl.max(largest, 0)
        weight /= peak
        tl.store(peak_ptr, peak)  # the same value from every program
    if safe_lse_ptr is None:
        weight *= tl.exp2(-lse * LOG2_E)
    else:
        tl.store(safe_lse_ptr + row, lse, mask=row < n)
    tl.store(weight_ptr + row, weight, mask=row < n)


@triton.jit
def weights(s, x_lse, y_lse, x_weight, y_weight, lift, WEIGHT: tl.constexpr):
    """W_ij * 2^lift; in ROWS without g_i, which waits for the epilogue; in SYMMETRIC s is in base 2."""
    if WEIGHT == ROWS:
        return tl.exp2((s - x_lse[:, None]) * LOG2_E + lift)
    elif WEIGHT == COLUMNS:
        return tl.exp2((s - y_lse[None, :]) * LOG2_E + lift) * y_weight[None, :]
    elif WEIGHT == BOTH:
        own = tl.exp2((s - x_lse[:, None]) * LOG2_E + lift) * x_weight[:, None]
        return own + tl.exp2((s - y_lse[None, :]) * LOG2_E + lift) * y_weight[None, :]
    else:
        return tl.exp2(s + lift) * (x_weight[:, None] + y_weight[None, :])


@triton.jit
def tile_weights(
    x, y, x_lse, x_weight, x_key, x_bias, x_ptr, y_ptr, lse_ptr, weight_ptr, y_bias_ptr, x_key_ptr, y_key_ptr,
    x_first, y_first, n, m, factor, lift,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr,
    FORBIDDEN: tl.constexpr, WEIGHT: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = similarities(x, y, x_ptr, y_ptr, x_first, y_first, n, m, D, OWNED, STREAMED, DEPTH, PRECISION) * factor
    if x_bias is not None:
        s += x_bias[:, None]
    if y_bias_ptr is not None:
        s += load_values(y_bias_ptr, y_first, m, STREAMED, CAREFUL)[None, :]
    y_key = load_keys(y_key_ptr, x_key_ptr, y_first, m, STREAMED) if FORBIDDEN == EQUAL_KEYS else 0
    s = mask_pairs(s, x_key, y_key, x_first, y_first, n, m, OWNED, STREAMED, FORBIDDEN, CAREFUL)
    y_lse = x_lse
    y_weight = x_weight
    if WEIGHT != ROWS and WEIGHT != SYMMETRIC:
        y_lse = load_values(lse_ptr, y_first, m, STREAMED, CAREFUL)
    if WEIGHT != ROWS:
        y_weight = load_values(weight_ptr, y_first, m, STREAMED, CAREFUL)
    return weights(s, x_lse, y_lse, x_weight, y_weight, lift, WEIGHT)


@triton.jit(do_not_specialize=["n", "m", "tiles_per_split"])
def gradient_kernel(
    x_ptr, y_ptr, lse_ptr, weight_ptr, peak_ptr, x_bias_ptr, y_bias_ptr, x_key_ptr, y_key_ptr, dx_ptr, dbias_ptr,
    n, m, scale, tiles_per_split,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    FORBIDDEN: tl.constexpr, WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x_first = tl.program_id(0) * OWNED
    chunk = tl.program_id(1) * WIDTH
    split = tl.program_id(2)
    factor = scale * LOG2_E if WEIGHT == SYMMETRIC else scale
    lift = LIFT if x_ptr.dtype.element_ty == tl.float16 else 0.0
    x = load_rows(x_ptr, x_first, n, 0, D, OWNED, DEPTH, True) if D <= DEPTH else 0
    x_key = load_keys(x_key_ptr, y_key_ptr, x_first, n, OWNED) if FORBIDDEN == EQUAL_KEYS else 0
    x_bias = load_values(x_bias_ptr, x_first, n, OWNED, True) if x_bias_ptr is not None else None
    x_lse = load_values(lse_ptr, x_first, n, OWNED, True) if WEIGHT != COLUMNS and WEIGHT != SYMMETRIC else 0.0
    x_weight = load_values(weight_ptr, x_first, n, OWNED, True) if WEIGHT != COLUMNS else 0.0
    dx = tl.zeros([OWNED, WIDTH], tl.float32)
    dbias = tl.zeros([OWNED], tl.float32)

    first, plain, diagonal, on_diagonal, careful = stream_plan(x_first, split, tiles_per_split, m, OWNED, STREAMED, FORBIDDEN)
    for u in range(plain):
        y_first = plain_tile(u, first, diagonal, on_diagonal, STREAMED)
        y = load_rows(y_ptr, y_first, m, chunk, D, STREAMED, WIDTH, False)
        w = tile_weights(
            x, y, x_lse, x_weight, x_key, x_bias, x_ptr, y_ptr, lse_ptr, weight_ptr, y_bias_ptr, x_key_ptr, y_key_ptr,
            x_first, y_first, n, m, factor, lift, D, OWNED, STREAMED, DEPTH, FORBIDDEN, WEIGHT, False, PRECISION,
        )  # fmt: skip
        if dbias_ptr is not None:
            dbias += tl.sum(w, 1)
        if dx_ptr is not None:
            dx = product(w.to(y.dtype), y, dx, PRECISION)
    for u in range(careful):
        y_first = careful_tile(u, diagonal, on_diagonal, m, STREAMED)
        y = load_rows(y_ptr, y_first, m, chunk, D, STREAMED, WIDTH, True)
        w = tile_weights(
            x, y, x_lse, x_weight, x_key, x_bias, x_ptr, y_ptr, lse_ptr, weight_ptr, y_bias_ptr, x_key_ptr, y_key_ptr,
            x_first, y_first, n, m, factor, lift, D, OWNED, STREAMED, DEPTH, FORBIDDEN, WEIGHT, True, PRECISION,
        )  # fmt: skip
        if dbias_ptr is not None:
            dbias += tl.sum(w, 1)
        if dx_ptr is not None:
            dx = product(w.to(y.dtype), y, dx, PRECISION)

    unlift = tl.exp2(-lift)
    if peak_ptr is not None:
        unlift *= tl.load(peak_ptr)
    row = tl.arange(0, OWNED)
    exists = row < n - x_first
    if dx_ptr is not None:
        column = chunk + tl.arange(0, WIDTH)[None, :]
        dx *= scale * unlift
        if WEIGHT == ROWS:
            dx *= x_weight[:, None]
        pointers = dx_ptr + (split.to(tl.int64) * n + x_first) * D + (row[:, None] * D + column)
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=exists[:, None] & (column < D))
    if dbias_ptr is not None:  # noqa: SIM102
        if chunk == 0:
            tl.store(dbias_ptr + split.to(tl.int64) * n + x_first + row, dbias * unlift, mask=exists)
