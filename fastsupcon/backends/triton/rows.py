"""What comes before the pairs, of rows alone: inverse norms and codes of keys. And quantities of rows, as every kernel finds them."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import aligned, code_of, one_of, pair_of


@triton.jit(do_not_specialize=["n", "m", "row_programs"])
def rows_kernel(
    a_ptr, b_ptr, a_key_ptr, b_key_ptr, inverse_ptr, numbers_ptr, done_ptr, n, m, row_programs,
    D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1 / |a_i| and after them 1 / |b_j|: inverse [n + m] if asked for, and the numbers of rows, of columns: (inverse, code of key).

    An inverse is 0 for a row without a number in fp32's normal range, which stays zero. The largest element's power of two is divided out
    first: squares of rows near 1e20 or 1e-23 leave fp32's range. done is made 0, if there is one.
    """
    pid = tl.program_id(0)
    if done_ptr is not None:
        tl.store(done_ptr, 0, mask=pid == 0)
    of_columns = pid >= row_programs
    count = tl.where(of_columns, m, n)
    row = tl.where(of_columns, pid - row_programs, pid) * ROWS + tl.arange(0, ROWS)
    inverse = tl.full([ROWS], 1.0, tl.float32)
    if inverse_ptr is not None:
        column = tl.arange(0, DEPTH)[None, :]
        inside = (row < count)[:, None] & (column < D)
        x = tl.load(one_of(a_ptr, b_ptr, of_columns) + row[:, None].to(tl.int64) * D + column, mask=inside, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(x), 1)
        zero = largest < 1.1754943508222875e-38
        power = (tl.where(zero, 1.0, largest).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        x /= power[:, None]
        inverse = tl.where(zero, 0.0, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1)) * power))
        tl.store(inverse_ptr + tl.where(of_columns, n, 0) + row, inverse, mask=row < count)
    code = tl.zeros([ROWS], tl.float32)
    if a_key_ptr is not None:
        code = code_of(tl.load(one_of(a_key_ptr, b_key_ptr, of_columns) + row, mask=row < count, other=0))
    tl.store(numbers_ptr + tl.where(of_columns, aligned(n), 0) + row, pair_of(inverse, code), mask=row < count)


@triton.jit
def load_quantity(ptr, row, n, QUANTITY: tl.constexpr, PLACES: tl.constexpr):
    """A quantity of values [len(names), n]; 0 where it is not among the names."""
    PLACE: tl.constexpr = (PLACES >> (4 * QUANTITY)) & 15
    if PLACE == 15:
        return tl.zeros([row.shape[0]], tl.float32)
    else:
        return tl.load(ptr + PLACE * n + row, mask=row < n, other=0.0)


@triton.jit
def store_quantity(ptr, row, n, value, QUANTITY: tl.constexpr, PLACES: tl.constexpr):
    PLACE: tl.constexpr = (PLACES >> (4 * QUANTITY)) & 15
    if PLACE != 15:
        tl.store(ptr + PLACE * n + row, value, mask=row < n)
