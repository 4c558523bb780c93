"""What the kernels share: how rows are loaded, and how two tiles of rows make a tile of pairs.

Every kernel owns a tile of rows x (i < n) and streams tiles of rows y (j < m) past it. In one launch, x are the problem's rows in some
programs and its columns in the others (``swap``): a quantity of a column is that of a row with the roles exchanged.

    c_ij = x_i . y_j          t_ij = scale * c_ij + bias,        -inf where (i, j) is no pair

Unit length comes in by the rows' inverse norms: as factors of c for half-precision rows, which stay as they came (FACTORS); fp32 rows are
multiplied as they are loaded, so that rows of norm 1e-18 keep to the normal range (SCALED). Where exp(t) needs no shift ("bounded") t
carries log2(e), and the exponential is the hardware's exp2 alone. Elsewhere |t| may be thousands: the shift is subtracted first, in one
rounding, and log2(e) multiplies the small difference.

A pair's instructions cost time beside its products, so a loop runs twice: over the tiles that are whole, without masks and with codes for
keys, and over the few others. Sums over a row stay eight columns wide until the loops end.

Lengths that the tiles do not divide are padded with zeros inside the tile. Row indices have 32 bits, addresses 64. A pointer that is None
costs nothing: the kernel is compiled without it. Triton compiles what follows an `if` whose branch returns, even where it cannot be
reached, so such branches have an `else`. A condition that is the same for all rows goes into a mask's bound: the interpreter makes an
integer of a bool that it broadcasts.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
BOUND = tl.constexpr(42.81)  # of |scale|, for unit rows: that of _dtypes.is_bounded

#: How rows become unit vectors.
AS_THEY_ARE, FACTORS, SCALED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

#: Which log-sums there are: at most "all"; "different" alone; "equal", or "all" beside "different".
ALL, DIFFERENT, SPLIT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def one_of(of_rows, of_columns, swap):
    """One of two pointers; the first serves both sides where the other is None."""
    if of_columns is None:
        return of_rows
    else:
        return tl.where(swap, of_columns, of_rows)


@triton.jit
def load_rows(
    ptr, inverse, first, count, column,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr = True,
):  # fmt: skip
    """rows[first : first + ROWS, column : column + COLUMNS] of rows [count, D], zeros outside; times inverse [ROWS] if UNIT is SCALED.

    Not MASKED: none of these rows is outside.
    """
    row = tl.arange(0, ROWS)[:, None]
    offset = column + tl.arange(0, COLUMNS)[None, :]
    pointers = ptr + first.to(tl.int64) * D + (row * D + offset)
    if D % COLUMNS == 0:
        x = tl.load(pointers, mask=row < count - first, other=0.0) if MASKED else tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(row < count - first if MASKED else row >= 0) & (offset < D), other=0.0)
    return x * inverse[:, None] if UNIT == SCALED else x


@triton.jit
def load_values(ptr, first, count, ROWS: tl.constexpr, MASKED: tl.constexpr = True):
    """values[first : first + ROWS] of values [count], zeros outside."""
    row = tl.arange(0, ROWS)
    return tl.load(ptr + first + row, mask=row < count - first, other=0) if MASKED else tl.load(ptr + first + row)


@triton.jit
def pair_of(low, high):
    """Two floats as one integer, which is how the loops read the numbers of a row: half as many loads, and wide ones."""
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def load_pair(ptr, first, count, ROWS: tl.constexpr, MASKED: tl.constexpr = True):
    pair = load_values(ptr, first, count, ROWS, MASKED)
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_numbers(ptr, at, first, count, ROWS: tl.constexpr, UNIT: tl.constexpr, MASKED: tl.constexpr = True):
    """Inverse norms, 1 for rows that stay as they are, and codes of keys, 0 where there are none."""
    if ptr is None:
        return tl.full([ROWS], 1.0, tl.float32), tl.zeros([ROWS], tl.float32)
    else:
        inverse, code = load_pair(ptr + at, first, count, ROWS, MASKED)
        return tl.full([ROWS], 1.0, tl.float32) if UNIT == AS_THEY_ARE else inverse, code


@triton.jit
def aligned(n):
    """Where the columns' numbers stand after those of n rows: wide loads need to know their alignment."""
    return tl.cdiv(n, 16) * 16


@triton.jit
def numbers_at(n, of_columns, CROSS: tl.constexpr):
    """Where the numbers of rows or of columns begin, which are the same in the self shape. No pointer, as Triton 3.6 returns no None."""
    return tl.where(of_columns, aligned(n), 0) if CROSS else 0


@triton.jit
def load_inverse(of_rows_ptr, of_columns_ptr, first, count, of_columns, ROWS: tl.constexpr):
    """Inverse norms; 1 for rows that stay as they are."""
    if of_rows_ptr is None:
        return tl.full([ROWS], 1.0, tl.float32)
    else:
        return load_values(one_of(of_rows_ptr, of_columns_ptr, of_columns), first, count, ROWS)


@triton.jit
def load_keys(of_rows_ptr, of_columns_ptr, first, count, of_columns, ROWS: tl.constexpr):
    """Keys; zeros where there are none."""
    if of_rows_ptr is None:
        return tl.zeros([ROWS], tl.int64)
    else:
        return load_values(one_of(of_rows_ptr, of_columns_ptr, of_columns), first, count, ROWS)


@triton.jit
def load_bias(ptr, first, count, of_columns, ROWS: tl.constexpr):
    """The bias of columns, 0 for rows."""
    row = tl.arange(0, ROWS)
    return tl.load(ptr + first + row, mask=row < tl.where(of_columns, count - first, 0), other=0.0)


@triton.jit
def load_own(ptr, first, count, of_columns, ROWS: tl.constexpr):
    """Of rows the column that is none of theirs, of columns their own index: where the two are equal, there is no pair."""
    row = tl.arange(0, ROWS)
    own = tl.load(ptr + first + row, mask=row < tl.where(of_columns, 0, count - first), other=-1).to(tl.int32)
    return tl.where(of_columns, first + row, own)


@triton.jit
def load_sides(own_ptr, bias_ptr, first, count, of_columns, ROWS: tl.constexpr):
    """Own columns and bias of rows; 0 where there are none."""
    own = load_own(own_ptr, first, count, of_columns, ROWS) if own_ptr is not None else 0
    bias = load_bias(bias_ptr, first, count, of_columns, ROWS) if bias_ptr is not None else 0.0
    return own, bias


@triton.jit
def program_of(n, m, row_owners, column_owners, row_programs, row_tiles, column_tiles, OWNED: tl.constexpr):
    """What this program owns and how far it streams: (columns?, first owned, split, tiles in a split, how many of its kind, of the others).

    The programs of the rows come first: for each split in turn, every tile of them.
    """
    program = tl.program_id(0)
    swap = program >= row_programs
    program = tl.where(swap, program - row_programs, program)
    owners = tl.where(swap, column_owners, row_owners)
    tiles = tl.where(swap, column_tiles, row_tiles)
    return swap, program % owners * OWNED, program // owners, tiles, tl.where(swap, m, n), tl.where(swap, n, m)


@triton.jit
def narrowed(x, kind: tl.constexpr, PRECISION: tl.constexpr):
    """x as ``kind``, rounded to nearest: the interpreter would cut the lower bits of a bf16 off."""
    if PRECISION == "interpreter" and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 32767 + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(kind)


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
def whole_tiles(first, end, narrow, x_first, m, OWNED: tl.constexpr, STREAMED: tl.constexpr, DIAGONAL: tl.constexpr):
    """(lo, hi, stop): of a program's tiles [first, end) those in [first, lo) and [hi, stop) are whole, the others are masked.

    In a whole tile every (i, j) is a pair, but for own columns, and codes stand for keys: so there is none if not ``narrow``. The loops
    over either kind are compiled apart, and nearly all tiles are whole.
    """
    stop = tl.where(narrow, tl.maximum(tl.minimum(end, m // STREAMED), first), first)
    if DIAGONAL:
        lo = tl.minimum(tl.maximum(x_first // STREAMED, first), stop)
        return lo, tl.minimum(tl.maximum(tl.cdiv(x_first + OWNED, STREAMED), lo), stop), stop
    else:
        return first, first, stop


@triton.jit
def tile_at(u, first, lo, hi, stop, MASKED: tl.constexpr):
    """The u-th tile of those that are whole, or of the others."""
    if MASKED:
        return u + tl.where(u < hi - lo, lo, stop - (hi - lo))
    else:
        return u + tl.where(u < lo - first, first, hi - (lo - first))


@triton.jit
def pair_mask(x_first, y_first, m, OWNED: tl.constexpr, STREAMED: tl.constexpr, DIAGONAL: tl.constexpr):
    """Where (i, j) is a pair, but for own columns."""
    j = y_first + tl.arange(0, STREAMED)[None, :]
    last = tl.full([OWNED], 0, tl.int32) + m
    pair = j < last[:, None]
    if DIAGONAL:
        pair = pair & (j != (x_first + tl.arange(0, OWNED))[:, None])
    return pair


@triton.jit
def code_of(key):
    """A key as a float where that is exact, else NaN: codes are compared in one instruction, and are equal only if the keys are.

    Of a row whose code is no NaN the converse holds too, whatever the other's key: such a row is called narrow.
    """
    return tl.where((key >= -16777216) & (key <= 16777216), key.to(tl.float32), float("nan"))


@triton.jit
def is_narrow(code):
    """Whether all rows of a program are narrow."""
    return tl.max((code != code).to(tl.int32), 0) == 0


@triton.jit
def logits(raw, x_factor, y_factor, factor, x_bias, y_bias, BIASED: tl.constexpr, UNIT: tl.constexpr, FOLD: tl.constexpr):
    """Of raw products x . y: with the factors of rows and columns, and the logits with scale and bias. FOLD: x_factor holds the scale."""
    c = raw * (x_factor[:, None] * y_factor[None, :]) if UNIT == FACTORS else raw
    t = c if FOLD else c * factor
    if BIASED:
        t += x_bias[:, None] + y_bias[None, :]
    return c, t


@triton.jit
def columns_of(x, PART: tl.constexpr, OWNED: tl.constexpr, STREAMED: tl.constexpr, COLUMNS: tl.constexpr):
    """Of x [OWNED, STREAMED] the PART-th COLUMNS: all, half or a quarter of them."""
    if COLUMNS == STREAMED:
        return x
    else:
        HALF: tl.constexpr = STREAMED // 2
        low, high = tl.split(tl.permute(tl.reshape(x, [OWNED, 2, HALF]), [0, 2, 1]))
        half = low if PART * COLUMNS < HALF else high
        if COLUMNS == HALF:
            return half
        else:
            low, high = tl.split(tl.permute(tl.reshape(half, [OWNED, 2, HALF // 2]), [0, 2, 1]))
            return low if PART % 2 == 0 else high


@triton.jit
def equal_keys(x_key, y_key, OWNED: tl.constexpr, STREAMED: tl.constexpr, KEYS: tl.constexpr):
    """Of keys or of their codes."""
    if KEYS:
        return x_key[:, None] == y_key[None, :]
    else:
        return tl.full([OWNED, STREAMED], 0, tl.int1)


@triton.jit
def folded(x, OWNED: tl.constexpr, STREAMED: tl.constexpr):
    """Partial sums [OWNED, 8] of rows: of what a thread holds anyway, where a sum over rows would exchange registers for every tile."""
    return tl.sum(tl.reshape(x, [OWNED, STREAMED // 8, 8]), 1)


@triton.jit
def finite(peak):
    """An infinite peak is no shift: inf - inf would be NaN."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def log_sum(peak, total):
    """log(total * exp(peak))."""
    return finite(peak) + tl.log2(total) * LN_2


@triton.jit
def scale_of(scale_ptr, scale, BOUNDED: tl.constexpr):
    """The scale, and whether exp(t) needs no shift: of a number the host knows; of a tensor it is seen here, if rows are of unit length."""
    bounded = BOUNDED
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
        if BOUNDED:
            bounded = tl.abs(scale) < BOUND
    return scale, bounded
