"""The quantities of rows that meet several blocks of columns: a batch and a queue, a batch and its prototypes, a batch and the next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

import torch
from torch import Tensor

from . import operators
from .backends import select, sum_dtype
from .problem import LOG_SUMS, QUANTITIES, Pairs

if TYPE_CHECKING:
    from .distributed import Shared

Block: TypeAlias = Union[Pairs, "Shared"]  # this process's columns, or those of several


class Quantities(NamedTuple):
    """Of each row, [N] in the sum dtype; [0] where it was not asked for. problem.QUANTITIES says what they are."""

    all: Tensor
    different: Tensor
    equal: Tensor
    similarity: Tensor
    count: Tensor  # type: ignore[assignment]  # in the place of a tuple's count()


def quantities(blocks: Sequence[Block], *names: str, backend: str = "auto") -> Quantities:
    """Of the rows that all blocks share, over the columns of all blocks together: one call of the operator for each block."""
    asked = tuple(name for name in QUANTITIES if name in names)
    values = list(terms(blocks[0], asked, backend=backend)[0])
    for block in blocks[1:]:
        values = join(asked, values, terms(block, asked, backend=backend)[0])
    of = dict(zip(asked, values, strict=True))
    return Quantities(*(of[name] if name in of else values[0].new_empty(0) for name in QUANTITIES))


def terms(block: Block, row_names: tuple[str, ...], column_names: tuple[str, ...] = (), *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """operators.terms of a block, also of one that other processes have columns of, and of no rows, as a rank of those may have."""
    if not isinstance(block, Pairs):
        shared: tuple[Tensor, Tensor] = block.terms(row_names, column_names, backend=backend)
        return shared
    if len(block.rows):
        return operators.terms(block, row_names, column_names, backend=backend)
    rows, columns, bias = block.rows, block.columns, block.bias
    if not torch.compiler.is_compiling():  # which would trace how a backend is found
        select(backend, rows.device, rows.dtype, rows.shape[1])  # refuses here what the other ranks' rows are refused
    zero = sum((x.sum(dtype=sum_dtype(rows.dtype)) * 0 for x in (rows, columns, bias) if x is not None), rows.new_zeros(()))
    return zero.expand(len(row_names), 0), zero.expand(len(column_names), 0)  # their gradients are zeros


def join(names: Sequence[str], a: Iterable[Tensor], b: Iterable[Tensor]) -> list[Tensor]:
    """The quantities ``names`` over the columns of two blocks, from those over each."""
    return [logaddexp(x, y) if name in LOG_SUMS else x + y for name, x, y in zip(names, a, b, strict=True)]


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), where -inf, the log of an empty sum, leaves the other as it is.

    torch.logaddexp's first derivative is NaN where both are -inf, its second where one is.
    """
    no_a, no_b = a == -torch.inf, b == -torch.inf
    both = torch.logaddexp(a.masked_fill(no_a, 0), b.masked_fill(no_b, 0))
    return torch.where(no_a, b, torch.where(no_b, a, both))
