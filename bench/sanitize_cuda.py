"""A few small calls of every kernel, for compute-sanitizer: ``compute-sanitizer --tool memcheck python bench/sanitize_cuda.py``.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1: out of a block of torch's cache, the neighbour's memory is no error to see.
"""

from itertools import product

import torch

from fastsupcon.backends import BACKENDS

SHAPES = [(70, 33), (300, 64), (300, 128), (150, 256), (100, 320), (70, 768), (40, 1024)]
ALL, EACH = [(True, True, True)], [(True, False, False), (False, True, False), (False, False, True)]


def rows(count: int, depth: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Unit rows [count, depth] that begin ``offset`` elements into their memory: from 1 on, they are not aligned to 16 bytes."""
    z = torch.empty(offset + count * depth, device="cuda", dtype=dtype)[offset:].view(count, depth)
    return z.copy_(torch.nn.functional.normalize(torch.randn(count, depth, device="cuda")))


def call(name: str, count: int, depth: int, dtype: torch.dtype, offset: int = 0) -> None:
    """Both shapes, forward and backward: rows of any norm and unit ones; columns excluded by place and by label; each gradient alone."""
    backend, columns = BACKENDS[name], 77
    z, b = rows(count, depth, dtype, offset), rows(columns, depth, dtype, offset)
    grad, bias = torch.rand(count, device="cuda") / count, torch.randn(columns, device="cuda")
    for unit in (True, False):
        lse = backend.self_forward(z, 10.0, unit)
        backend.self_backward(z, lse, grad, 10.0, unit)
    skip = torch.randint(-1, columns, (count,), device="cuda")
    labels = [torch.randint(0, 7, (n,), device="cuda") for n in (count, columns)]
    for excluded, needs in (((skip, None, None), ALL), ((None, *labels), EACH)):
        lse = backend.cross_forward(z, b, bias, *excluded, 1.0)
        for need in needs:
            backend.cross_backward(z, b, bias, *excluded, lse, grad, 1.0, need)


def main() -> None:
    for dtype, shape in product((torch.bfloat16, torch.float16, torch.float32), SHAPES):
        call("cuda", *shape, dtype)
    call("cuda", 300, 128, torch.bfloat16, offset=1)
    for offset in (0, 1):
        call("triton", 300, 128, torch.bfloat16, offset)
    call("triton", 100, 320, torch.float32)
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()
