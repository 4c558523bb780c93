"""A loss (problem.Line) from its rows' sums: the forward's last launch, which also leaves what the backward needs of each row.

    program  some rows, or some columns
    reads    the parts [splits, PARTS, n] of its rows
    writes   the numbers of the gradient (gradients.py), as if that of the loss were 1; the last program to be done, the loss

That last one adds the programs' sums in one order, whichever it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gradients import largest_of, store_weights, weights_of
from .quantities import join_log_sums, load_parts
from .tiles import LN_2, LOG2_E, SPLIT, aligned, finite, pair_of, scale_of


@triton.jit
def row_loss(
    whole, first, second, similarity, count, of_all, of_different, of_equal, of_similarity, of_log_count, factor, lone, NAMES: tl.constexpr
):
    """The line's value in a row. What is not finite because the input is not stays so."""
    some = tl.where(count > 0, count, 1.0)
    loss = of_similarity * (similarity / some)
    if of_log_count != 0:
        loss += of_log_count * tl.log2(some) * LN_2
    infinite = loss
    if NAMES & 1:
        loss += of_all * whole
        infinite = tl.maximum(infinite, whole)
    if NAMES & 2:
        loss += of_different * first
        infinite = tl.maximum(infinite, first)
    if NAMES & 4:
        loss += of_equal * second
    loss *= factor
    return tl.where((count > 0) | (loss != loss) | (infinite == float("inf")), loss, lone)


@triton.jit
def store_undo(ptr, unlift):
    """What brings the gradient's sums to that of the loss."""
    one = tl.full([1], 1.0, tl.float32)  # of a float alone, the interpreter makes no tensor
    tl.store(ptr + tl.arange(0, 1), pair_of(one * unlift, one))


@triton.jit(do_not_specialize=["n", "m", "splits", "row_programs"])
def loss_kernel(
    parts_ptr, numbers_ptr, inverse_ptr, scale_ptr, sums_ptr, done_ptr, loss_ptr, n, m, splits, row_programs,
    scale, of_all, of_different, of_equal, of_similarity, of_log_count, factor, lone, lift, unlift,
    PARTS: tl.constexpr, KIND: tl.constexpr, BOUNDED: tl.constexpr, NAMES: tl.constexpr, REDUCTION: tl.constexpr, SKIP: tl.constexpr,
    HALF: tl.constexpr, CROSS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """sums [2, row_programs]: of the losses, and of the rows that have a pair. HALF: fp16 rows of unit length. m: 0 if not CROSS."""
    program = tl.program_id(0)
    size = aligned(n) + aligned(m)
    if program >= row_programs:
        row = (program - row_programs) * ROWS + tl.arange(0, ROWS)
        zero = tl.zeros([ROWS], tl.float32)
        store_weights(numbers_ptr + aligned(n), size, row, row < m, zero, zero, zero, zero, zero, 0.0)
    else:
        row = program * ROWS + tl.arange(0, ROWS)
        inside = row < n
        first = join_log_sums(parts_ptr, row, n, splits, 1, PARTS, ROWS, SPLITS)
        second = join_log_sums(parts_ptr, row, n, splits, 2, PARTS, ROWS, SPLITS)
        similarity = tl.sum(load_parts(parts_ptr, row, n, splits, 0.0, 3, PARTS, ROWS, SPLITS), 0)
        count = tl.sum(load_parts(parts_ptr, row, n, splits, 0.0, 4, PARTS, ROWS, SPLITS), 0)
        whole = first
        if KIND == SPLIT:
            shift = finite(tl.maximum(first, second))
            whole = shift + tl.log2(tl.exp2((first - shift) * LOG2_E) + tl.exp2((second - shift) * LOG2_E)) * LN_2
        loss = row_loss(
            whole, first, second, similarity, count, of_all, of_different, of_equal, of_similarity, of_log_count, factor, lone, NAMES
        )
        # the gradient's: a row without a pair of equal keys passes nothing, or NaN
        paired = count > 0
        share = tl.where(paired, 1.0, lone)
        scale, bounded = scale_of(scale_ptr, scale, BOUNDED)
        g_first = share * (of_different if KIND == SPLIT else of_all + of_different)
        q, c, q_equal, c_equal = weights_of(first, second, whole, g_first, share * of_equal, share * of_all, float("inf"), bounded, KIND)
        linear = share * of_similarity / tl.where(paired, count, 1.0)
        store_weights(numbers_ptr, size, row, inside, q, c, q_equal, c_equal, linear, lift)
        if HALF and program == 0:
            of_rows = largest_of(inverse_ptr, n, 1024)
            of_columns = largest_of(inverse_ptr + n, m, 1024) if CROSS else of_rows
            tl.store(numbers_ptr + 4 * size + 1, pair_of(of_rows, of_columns))
        if REDUCTION == "none":
            tl.store(loss_ptr + row, loss, mask=inside)
            if program == 0:
                store_undo(numbers_ptr + 4 * size, unlift)
        else:
            tl.store(sums_ptr + program, tl.sum(tl.where(inside, loss, 0.0), 0))
            tl.store(sums_ptr + row_programs + program, tl.sum((inside & paired).to(tl.float32), 0))
            tl.debug_barrier()  # one thread counts for all
            if tl.atomic_add(done_ptr, 1, sem="acq_rel") == row_programs - 1:
                total = tl.zeros([128], tl.float32)
                rows = tl.zeros([128], tl.float32)
                for start in range(0, row_programs, 128):
                    place = start + tl.arange(0, 128)
                    total += tl.load(sums_ptr + place, mask=place < row_programs, other=0.0, cache_modifier=".cg")
                    rows += tl.load(sums_ptr + row_programs + place, mask=place < row_programs, other=0.0, cache_modifier=".cg")
                divisor = 1.0
                if REDUCTION == "mean":
                    divisor = tl.maximum(tl.sum(rows, 0), 1.0) if SKIP else n + 0.0
                tl.store(loss_ptr, tl.sum(total, 0) / divisor)
                store_undo(numbers_ptr + 4 * size, unlift / divisor)
