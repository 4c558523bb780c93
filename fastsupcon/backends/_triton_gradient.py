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
W enters the product in the rows' dtype. fp16 could not hold g P (about 1/N^2): there g is divided by its largest |g|, taken over all rows in
the kernel, and W lifted by 2^14, which leaves it between 2^15 and a subnormal 2^-24; both come back in the epilogue, in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import (
    EQUAL_KEYS, LOG2_E, careful_tile, load_keys, load_rows, load_values, mask_pairs, plain_tile, product, similarities, stream_plan,
)  # fmt: skip

ROWS, COLUMNS, BOTH, SYMMETRIC = (tl.constexpr(weight) for weight in range(4))


@triton.jit
def largest(ptr, count):
    """max |v| of v [count], and never 0, so that finite values can be divided by it."""
    block = tl.arange(0, 1024)
    result = tl.full([1024], 1e-30, tl.float32)
    for first in range(0, count, 1024):
        result = tl.maximum(result, tl.abs(tl.load(ptr + first + block, mask=block < count - first, other=0.0)))
    return tl.max(result, 0)


@triton.jit
def load_lse(ptr, first, count, LENGTH: tl.constexpr):
    """lse in base 2; +inf for a row that allows no column, whose P is then 0."""
    lse = load_values(ptr, first, count, LENGTH) * LOG2_E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def weights(s, x_lse, y_lse, x_grad, y_grad, lift, WEIGHT: tl.constexpr):
    """W_ij * 2^lift; in ROWS without g_i, which waits for the epilogue."""
    if WEIGHT == ROWS:
        return tl.exp2(s - (x_lse - lift)[:, None])
    if WEIGHT == COLUMNS:
        return tl.exp2(s - (y_lse - lift)[None, :]) * y_grad[None, :]
    if WEIGHT == BOTH:
        return tl.exp2(s - (x_lse - lift)[:, None]) * x_grad[:, None] + tl.exp2(s - (y_lse - lift)[None, :]) * y_grad[None, :]
    return tl.exp2(s + lift) * (x_grad[:, None] + y_grad[None, :])


@triton.jit
def tile_weights(
    x, y, x_lse, x_grad, x_key, x_bias, x_ptr, y_ptr, y_lse_ptr, y_grad_ptr, y_bias_ptr, x_key_ptr, y_key_ptr,
    x_first, y_first, n, m, scale_log2, peak, lift,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr,
    FORBIDDEN: tl.constexpr, WEIGHT: tl.constexpr, CAREFUL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    s = similarities(x, y, x_ptr, y_ptr, x_first, y_first, n, m, D, OWNED, STREAMED, DEPTH, PRECISION) * scale_log2
    if x_bias is not None:
        s += x_bias[:, None]
    if y_bias_ptr is not None:
        s += load_values(y_bias_ptr, y_first, m, STREAMED)[None, :] * LOG2_E
    y_key = load_keys(y_key_ptr, x_key_ptr, y_first, m, STREAMED) if FORBIDDEN == EQUAL_KEYS else 0
    s = mask_pairs(s, x_key, y_key, x_first, y_first, m, OWNED, STREAMED, FORBIDDEN, CAREFUL)
    y_lse = x_lse
    y_grad = x_grad
    if WEIGHT != ROWS:
        y_lse = load_lse(y_lse_ptr, y_first, m, STREAMED)
        y_grad = load_values(y_grad_ptr, y_first, m, STREAMED) / peak
        if WEIGHT == SYMMETRIC:
            y_grad *= tl.exp2(-y_lse)
    return weights(s, x_lse, y_lse, x_grad, y_grad, lift, WEIGHT)


@triton.jit(do_not_specialize=["n", "m", "tiles_per_split"])
def gradient_kernel(
    x_ptr, y_ptr, x_lse_ptr, x_grad_ptr, y_lse_ptr, y_grad_ptr, x_bias_ptr, y_bias_ptr, x_key_ptr, y_key_ptr, dx_ptr, dbias_ptr,
    n, m, scale, tiles_per_split,
    D: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    FORBIDDEN: tl.constexpr, WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    x_first = tl.program_id(0) * OWNED
    chunk = tl.program_id(1) * WIDTH
    split = tl.program_id(2)
    scale_log2 = scale * LOG2_E
    lift = 0.0
    peak = 1.0
    if x_ptr.dtype.element_ty == tl.float16:
        lift = 14.0
        if WEIGHT != ROWS:
            peak = largest(y_grad_ptr, m)
    x = load_rows(x_ptr, x_first, n, 0, D, OWNED, DEPTH, True) if D <= DEPTH else 0
    x_key = load_keys(x_key_ptr, y_key_ptr, x_first, n, OWNED) if FORBIDDEN == EQUAL_KEYS else 0
    x_bias = load_values(x_bias_ptr, x_first, n, OWNED) * LOG2_E if x_bias_ptr is not None else None
    x_lse = 0.0
    x_grad = 0.0
    if WEIGHT != COLUMNS:
        x_lse = load_lse(x_lse_ptr, x_first, n, OWNED)
        x_grad = load_values(x_grad_ptr, x_first, n, OWNED) / peak
        if WEIGHT == SYMMETRIC:
            x_grad *= tl.exp2(-x_lse)
    dx = tl.zeros([OWNED, WIDTH], tl.float32)
    dbias = tl.zeros([OWNED], tl.float32)

    first, plain, diagonal, on_diagonal, careful = stream_plan(x_first, split, tiles_per_split, m, OWNED, STREAMED, FORBIDDEN)
    for u in range(plain):
        y_first = plain_tile(u, first, diagonal, on_diagonal, STREAMED)
        y = load_rows(y_ptr, y_first, m, chunk, D, STREAMED, WIDTH, False)
        w = tile_weights(
            x, y, x_lse, x_grad, x_key, x_bias, x_ptr, y_ptr, y_lse_ptr, y_grad_ptr, y_bias_ptr, x_key_ptr, y_key_ptr,
            x_first, y_first, n, m, scale_log2, peak, lift, D, OWNED, STREAMED, DEPTH, FORBIDDEN, WEIGHT, False, PRECISION,
        )  # fmt: skip
        if dbias_ptr is not None:
            dbias += tl.sum(w, 1)
        if dx_ptr is not None:
            dx = product(w.to(y.dtype), y, dx, PRECISION)
    for u in range(careful):
        y_first = careful_tile(u, diagonal, on_diagonal, m, STREAMED)
        y = load_rows(y_ptr, y_first, m, chunk, D, STREAMED, WIDTH, True)
        w = tile_weights(
            x, y, x_lse, x_grad, x_key, x_bias, x_ptr, y_ptr, y_lse_ptr, y_grad_ptr, y_bias_ptr, x_key_ptr, y_key_ptr,
            x_first, y_first, n, m, scale_log2, peak, lift, D, OWNED, STREAMED, DEPTH, FORBIDDEN, WEIGHT, True, PRECISION,
        )  # fmt: skip
        if dbias_ptr is not None:
            dbias += tl.sum(w, 1)
        if dx_ptr is not None:
            dx = product(w.to(y.dtype), y, dx, PRECISION)

    factor = peak * tl.exp2(-lift)
    row = tl.arange(0, OWNED)
    exists = row < n - x_first
    if dx_ptr is not None:
        column = chunk + tl.arange(0, WIDTH)[None, :]
        dx *= scale * factor
        if WEIGHT == ROWS:
            dx *= x_grad[:, None]
        pointers = dx_ptr + (split.to(tl.int64) * n + x_first) * D + (row[:, None] * D + column)
        tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=exists[:, None] & (column < D))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + split.to(tl.int64) * n + x_first + row, dbias * factor, mask=exists & (chunk == 0))
