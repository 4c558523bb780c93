"""A few small calls of every kernel, for compute-sanitizer: ``compute-sanitizer --tool memcheck python -m bench.gpu_sanitize [DTYPE ...]``.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1: out of a block of torch's cache, the neighbour's memory is no error to see.
"""

import sys
from collections.abc import Sequence
from itertools import product

import torch

from fastsupcon.backends import BACKENDS
from fastsupcon.problem import QUANTITIES, Line, Pairs, Side

SHAPES = [(70, 33), (300, 64), (300, 128), (150, 256), (100, 320), (70, 768), (40, 1024)]
# Six row blocks or more in one group (triangle.h): each ring and the places of columns' sums come round, and x is fetched anew.
TRIANGLES = [(2000, 64), (2000, 128), (1501, 256), (900, 320), (900, 512), (900, 768), (500, 1024)]
COLUMNS = 77
DTYPES = ("bfloat16", "float16", "float32")


def rows(count: int, depth: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Rows [count, depth] that begin ``offset`` elements into their memory: from 1 on, they are not aligned to 16 bytes."""
    z = torch.empty(offset + count * depth, device="cuda", dtype=dtype)[offset:].view(count, depth)
    return z.copy_(torch.randn(count, depth, device="cuda"))


def keys_of(rows: int, count: int) -> torch.Tensor:
    return torch.randint(0, 7, (rows,), device="cuda") * (2**33 if count % 4 else 1)  # or keys that 32 bits do not hold


def each_pair_once(count: int, depth: int, dtype: torch.dtype) -> None:
    line = Line(all=1, similarity=-1)
    BACKENDS["cuda"].loss(Pairs(rows(count, depth, dtype), None, 10.0, True, None, keys_of(count, count)), line.names, line, False)


def call(name: str, count: int, depth: int, dtype: torch.dtype, offset: int = 0) -> None:
    """Both shapes, forward and backward: bounded and running sums, with and without keys, a bias, columns of the rows' own."""
    backend = BACKENDS[name]
    a, b = rows(count, depth, dtype, offset), rows(COLUMNS, depth, dtype, offset)
    keys = [keys_of(n, count) for n in (count, COLUMNS)]
    own = torch.randint(-1, COLUMNS, (count,), device="cuda")
    bias, learned = torch.randn(COLUMNS, device="cuda"), torch.tensor(3.0, device="cuda")
    for pairs in (
        Pairs(a, None, 10.0, True, None, keys[0]),
        Pairs(a, None, 0.1),
        Pairs(a, b, 10.0, True, None, *keys),
        Pairs(a, b, learned, True, bias, *keys, own),
    ):
        columns = () if pairs.columns is None else QUANTITIES
        terms = backend.forward(pairs, QUANTITIES, columns, False)
        sides = Side(QUANTITIES, terms.rows, torch.rand_like(terms.rows)), Side(columns, terms.columns, torch.rand_like(terms.columns))
        needs = (True, pairs.columns is not None, pairs.bias is not None, pairs.scale is learned)
        backend.backward(pairs, *sides, terms.norms, terms.kept, needs)
        for reduction in ("mean", "none") if hasattr(backend, "loss") else ():
            line = Line(all=1, similarity=-1, lone="skip", reduction=reduction)
            loss, kept = backend.loss(pairs, line.names, line, False)
            backend.loss_backward(pairs, line.names, line, kept, torch.ones_like(loss), needs)
    if hasattr(backend, "line"):
        line = Line(all=1, similarity=-1, lone="skip")
        values = torch.rand(len(line.names), count, device="cuda")
        backend.line_backward(line.names, values, backend.line(line.names, values, line), line)


def main(names: Sequence[str]) -> None:
    dtypes = [getattr(torch, name) for name in names or DTYPES]
    for dtype, shape in product(dtypes, SHAPES):
        call("cuda", *shape, dtype)
    for dtype, shape in product(dtypes, TRIANGLES):
        if dtype != torch.float32:
            each_pair_once(*shape, dtype)
    if torch.bfloat16 in dtypes:
        call("cuda", 300, 128, torch.bfloat16, offset=1)
        for offset in (0, 1):
            call("triton", 300, 128, torch.bfloat16, offset)
    if torch.float32 in dtypes:
        call("triton", 100, 320, torch.float32)
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main(sys.argv[1:])
