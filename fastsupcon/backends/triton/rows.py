"""Kernels over rows alone: inverse norms and codes of keys, and the loss line by line (problem.Line)."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import aligned, code_of, one_of, pair_of


@triton.jit(do_not_specialize=["n", "m", "row_programs"])
def rows_kernel(
    a_ptr, b_ptr, a_key_ptr, b_key_ptr, inverse_ptr, numbers_ptr, n, m, row_programs,
    D: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1 / |a_i| and after them 1 / |b_j|: inverse [n + m] if asked for, and the numbers of rows, of columns: (inverse, code of key).

    An inverse is 0 for a row without a number in fp32's normal range, which stays zero. The largest element's power of two is divided out
    first: squares of rows near 1e20 or 1e-23 leave fp32's range.
    """
    pid = tl.program_id(0)
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


@triton.jit(do_not_specialize=["n"])
def line_kernel(
    values_ptr, loss_ptr, n, all, different, equal, similarity, log_count, factor, lone,
    PLACES: tl.constexpr, REDUCTION: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program sums all rows, in one order; without reduction, a program for each BLOCK of rows."""
    total = tl.zeros([BLOCK], tl.float32)
    paired_rows = tl.zeros([BLOCK], tl.int32)
    blocks = 1 if REDUCTION == "none" else tl.cdiv(n, BLOCK)
    for block in range(blocks):
        row = (tl.program_id(0) + block) * BLOCK + tl.arange(0, BLOCK)
        count = load_quantity(values_ptr, row, n, 4, PLACES)
        paired = count > 0
        some = tl.where(paired, count, 1.0)
        loss = similarity * (load_quantity(values_ptr, row, n, 3, PLACES) / some)
        if log_count != 0:
            loss += log_count * tl.log(some)
        # a quantity that is not asked for is 0 with coefficient 0
        all_value, different_value = load_quantity(values_ptr, row, n, 0, PLACES), load_quantity(values_ptr, row, n, 1, PLACES)
        infinite = tl.maximum(all_value, different_value) + tl.zeros([BLOCK], tl.float32)
        loss += all * all_value
        loss += different * different_value
        loss += equal * load_quantity(values_ptr, row, n, 2, PLACES)
        loss *= factor
        loss = tl.where(row < n, tl.where(paired | (loss != loss) | (infinite == float("inf")), loss, lone), 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + row, loss, mask=row < n)
        total += loss
        paired_rows += ((row < n) & paired).to(tl.int32)
    if REDUCTION != "none":
        loss = tl.sum(total, 0)
        if REDUCTION == "mean":
            loss /= tl.maximum(tl.sum(paired_rows, 0), 1) if SKIP else n
        tl.store(loss_ptr, loss)


@triton.jit(do_not_specialize=["n"])
def line_backward_kernel(
    values_ptr, grad_ptr, grads_ptr, n, all, different, equal, similarity, factor, lone,
    PLACES: tl.constexpr, REDUCTION: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the quantities, 0 for count."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = load_quantity(values_ptr, row, n, 4, PLACES)
    grad = factor * tl.load(grad_ptr + (row if REDUCTION == "none" else row * 0), mask=row < n, other=0.0)
    if REDUCTION == "mean":
        divisor = n
        if SKIP:
            paired_rows = tl.zeros([BLOCK], tl.int32)
            for block in range(tl.cdiv(n, BLOCK)):
                paired_rows += (load_quantity(values_ptr, block * BLOCK + tl.arange(0, BLOCK), n, 4, PLACES) > 0).to(tl.int32)
            divisor = tl.maximum(tl.sum(paired_rows, 0), 1)
        grad /= divisor
    grad = tl.where(count > 0, grad, lone)
    store_quantity(grads_ptr, row, n, all * grad, 0, PLACES)
    store_quantity(grads_ptr, row, n, different * grad, 1, PLACES)
    store_quantity(grads_ptr, row, n, equal * grad, 2, PLACES)
    store_quantity(grads_ptr, row, n, similarity * grad / tl.where(count > 0, count, 1.0), 3, PLACES)
    store_quantity(grads_ptr, row, n, grad * 0, 4, PLACES)


@triton.jit
def store_quantity(ptr, row, n, value, QUANTITY: tl.constexpr, PLACES: tl.constexpr):
    PLACE: tl.constexpr = (PLACES >> (4 * QUANTITY)) & 15
    if PLACE != 15:
        tl.store(ptr + PLACE * n + row, value, mask=row < n)
