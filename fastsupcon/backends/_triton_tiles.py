"""What the Triton kernels share: how rows are loaded, how two tiles of rows make a tile of logits, which pairs a tile may hold.

Every kernel owns a tile of rows x (indices i < n) and streams tiles of rows y (j < m) past it, with

    s_ij = x_i . y_j * scale + bias,        -inf where the pair is not allowed.

Where exp(s) needs no shift, scale carries log2(e) and the exponential is the hardware's exp2 alone. Elsewhere |s| may be thousands: the
shift is subtracted first, in one rounding, and log2(e) multiplies the small difference. Lengths that the tiles do not divide are padded
with zeros inside the tile. Row indices have 32 bits, addresses 64. A pointer that is None costs nothing: the kernel is compiled without it.
Triton compiles what follows an `if` whose branch returns, even where it cannot be reached, so such branches have an `else`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

#: Which pairs are not allowed: none, the pair (i, i), or pairs with equal keys (a row's one excluded column, or two labels).
NONE, ITSELF, EQUAL_KEYS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def load_rows(ptr, first, count, column, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr):
    """rows[first : first + ROWS, column : column + COLUMNS] of rows [count, D], zeros outside. Not RAGGED: all these rows exist."""
    row = tl.arange(0, ROWS)[:, None]
    offset = column + tl.arange(0, COLUMNS)[None, :]
    pointers = ptr + first.to(tl.int64) * D + (row * D + offset)
    if D % COLUMNS == 0:
        return tl.load(pointers, mask=row < count - first, other=0.0) if RAGGED else tl.load(pointers)
    else:
        inside = (row < count - first) & (offset < D) if RAGGED else offset < D
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_values(ptr, first, count, ROWS: tl.constexpr, RAGGED: tl.constexpr):
    """values[first : first + ROWS] of values [count], zeros outside. Not RAGGED: all of them exist."""
    row = tl.arange(0, ROWS)
    return tl.load(ptr + first + row, mask=row < count - first, other=0) if RAGGED else tl.load(ptr + first + row)


@triton.jit
def load_keys(ptr, other_ptr, first, count, ROWS: tl.constexpr):
    """Keys of rows first...: what is stored, or the rows' own indices. An excluded column meets indices, so it too needs only 32 bits."""
    if ptr is None:
        return first + tl.arange(0, ROWS)
    else:
        keys = load_values(ptr, first, count, ROWS, True)
        return keys.to(tl.int32) if other_ptr is None else keys


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in fp32.

    The interpreter holds bf16 as integers and would multiply those: there the operands are widened, as far as fp64, because a CPU's fp32
    product depends on the tile's shape, and x_i . y_j and y_j . x_i would differ.
    """
    if PRECISION == "interpreter":
        return total + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def similarities(
    x, y, x_ptr, y_ptr, x_first, y_first, n, m,
    D: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i . y_j: [X_ROWS, Y_ROWS]. Rows that one tile holds (D <= DEPTH) come in as x and y; longer ones are read here, DEPTH at a time."""
    total = tl.zeros([X_ROWS, Y_ROWS], tl.float32)
    if D <= DEPTH:
        return product(x, tl.trans(y), total, PRECISION)
    else:
        for column in range(0, D, DEPTH):
            x_part = load_rows(x_ptr, x_first, n, column, D, X_ROWS, DEPTH, True)
            y_part = load_rows(y_ptr, y_first, m, column, D, Y_ROWS, DEPTH, True)
            total = product(x_part, tl.trans(y_part), total, PRECISION)
        return total


@triton.jit
def mask_pairs(
    s, x_key, y_key, x_first, y_first, n, m,
    X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, FORBIDDEN: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """s with -inf at the pairs that are not allowed. Only CAREFUL tiles can hold a pair (i, i) or rows that do not exist."""
    if FORBIDDEN == EQUAL_KEYS:
        s = tl.where(x_key[:, None] == y_key[None, :], float("-inf"), s)
    if CAREFUL:
        i = x_first + tl.arange(0, X_ROWS)[:, None]
        j = y_first + tl.arange(0, Y_ROWS)[None, :]
        allowed = (i < n) & (j < m) & (i != j) if FORBIDDEN == ITSELF else (i < n) & (j < m)
        s = tl.where(allowed, s, float("-inf"))
    return s


@triton.jit
def stream_plan(owned_first, split, tiles_per_split, m, OWNED: tl.constexpr, STREAMED: tl.constexpr, FORBIDDEN: tl.constexpr):
    """One split's tiles of the stream: (first, plain ones, meeting the diagonal from, how many of these, careful ones in all).

    Most tiles are plain: all their rows exist, and no pair in them is (i, i). The others are careful: those that meet the diagonal, and the
    ragged last one.
    """
    whole = m // STREAMED
    first = tl.minimum(split * tiles_per_split, whole)
    end = tl.minimum(first + tiles_per_split, whole)
    diagonal = first
    on_diagonal = 0
    if FORBIDDEN == ITSELF:
        diagonal = tl.minimum(tl.maximum(owned_first // STREAMED, first), end)
        on_diagonal = tl.minimum(tl.maximum((owned_first + OWNED - 1) // STREAMED + 1, diagonal), end) - diagonal
    has_ragged = (m % STREAMED != 0) & (split == whole // tiles_per_split)
    return first, end - first - on_diagonal, diagonal, on_diagonal, on_diagonal + has_ragged.to(tl.int32)


@triton.jit
def plain_tile(u, first, diagonal, on_diagonal, STREAMED: tl.constexpr):
    """First row of plain tile u: the tiles in order, without those that meet the diagonal."""
    tile = first + u
    return tl.where(tile < diagonal, tile, tile + on_diagonal) * STREAMED


@triton.jit
def careful_tile(u, diagonal, on_diagonal, m, STREAMED: tl.constexpr):
    """First row of careful tile u: those that meet the diagonal, then the ragged last one."""
    return tl.where(u < on_diagonal, diagonal + u, m // STREAMED) * STREAMED
