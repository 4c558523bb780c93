"""What the kernels share: how rows are loaded, and how two tiles of rows make a tile of pairs.

Every kernel owns a tile of rows x (i < n) and streams tiles of rows y (j < m) past it. In one launch, x are the problem's rows in some
programs and its columns in the others (``swap``): a quantity of a column is that of a row with the roles exchanged.

    c_ij = x_i . y_j          t_ij = scale * c_ij + bias,        -inf where (i, j) is no pair

Unit length comes in by the rows' inverse norms: as factors of c for half-precision rows, which stay as they came (FACTORS); fp32 rows are
multiplied as they are loaded, so that rows of norm 1e-18 keep to the normal range (SCALED). Where exp(t) needs no shift ("bounded") t
carries log2(e), and the exponential is the hardware's exp2 alone. Elsewhere |t| may be thousands: the shift is subtracted first, in one
rounding, and log2(e) multiplies the small difference.

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
def load_rows(ptr, inverse, first, count, column, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """rows[first : first + ROWS, column : column + COLUMNS] of rows [count, D], zeros outside; times inverse [ROWS] if UNIT is SCALED."""
    row = tl.arange(0, ROWS)[:, None]
    offset = column + tl.arange(0, COLUMNS)[None, :]
    inside = row < count - first if D % COLUMNS == 0 else (row < count - first) & (offset < D)
    x = tl.load(ptr + first.to(tl.int64) * D + (row * D + offset), mask=inside, other=0.0)
    return x * inverse[:, None] if UNIT == SCALED else x


@triton.jit
def load_values(ptr, first, count, ROWS: tl.constexpr):
    """values[first : first + ROWS] of values [count], zeros outside."""
    row = tl.arange(0, ROWS)
    return tl.load(ptr + first + row, mask=row < count - first, other=0)


@triton.jit
def load_inverse(of_rows_ptr, of_columns_ptr, first, count, of_columns, ROWS: tl.constexpr, UNIT: tl.constexpr):
    """Inverse norms; 1 for rows that stay as they are."""
    if UNIT == AS_THEY_ARE:
        return tl.full([ROWS], 1.0, tl.float32)
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
def load_sides(row_key_ptr, column_key_ptr, own_ptr, bias_ptr, first, count, of_columns, ROWS: tl.constexpr):
    """Keys, own columns and bias of rows, as :func:`pairs` takes them; 0 where there are none."""
    key = load_values(one_of(row_key_ptr, column_key_ptr, of_columns), first, count, ROWS) if row_key_ptr is not None else 0
    own = load_own(own_ptr, first, count, of_columns, ROWS) if own_ptr is not None else 0
    bias = load_bias(bias_ptr, first, count, of_columns, ROWS) if bias_ptr is not None else 0.0
    return key, own, bias


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
def cosines(
    x, y, x_inverse, y_inverse, x_ptr, y_ptr, x_first, y_first, n, m,
    D: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, DEPTH: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x_i . y_j of rows of unit length where UNIT says so: [X_ROWS, Y_ROWS], and in the symmetric self shape c_ij = c_ji to the bit.

    Rows that one tile holds (D <= DEPTH) come in as x and y; of longer ones DEPTH columns at a time are read here.
    """
    total = tl.zeros([X_ROWS, Y_ROWS], tl.float32)
    if D <= DEPTH:
        total = product(x, tl.trans(y), total, PRECISION)
    else:
        for column in range(0, D, DEPTH):
            x_part = load_rows(x_ptr, x_inverse, x_first, n, column, D, X_ROWS, DEPTH, UNIT)
            y_part = load_rows(y_ptr, y_inverse, y_first, m, column, D, Y_ROWS, DEPTH, UNIT)
            total = product(x_part, tl.trans(y_part), total, PRECISION)
    return total * (x_inverse[:, None] * y_inverse[None, :]) if UNIT == FACTORS else total


@triton.jit
def is_whole(x_first, y_first, m, OWNED: tl.constexpr, STREAMED: tl.constexpr, DIAGONAL: tl.constexpr):
    """Whether every (i, j) of a tile is a pair, but for own columns: most are, and need not look at indices."""
    whole = y_first + STREAMED <= m
    if DIAGONAL:
        whole = whole & ((y_first >= x_first + OWNED) | (x_first >= y_first + STREAMED))
    return whole


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
def equal_keys(x_key, y_key, OWNED: tl.constexpr, STREAMED: tl.constexpr, KEYS: tl.constexpr):
    if KEYS:
        return x_key[:, None] == y_key[None, :]
    else:
        return tl.full([OWNED, STREAMED], 0, tl.int1)


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
