"""A few small calls of every CUDA kernel, for compute-sanitizer: ``compute-sanitizer --tool memcheck python bench/sanitize_cuda.py``."""

import torch

from fastsupcon.backends import cuda


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for count, depth in [(70, 33), (300, 64), (300, 128), (150, 256), (100, 320), (70, 768), (40, 1024)]:
            z = torch.nn.functional.normalize(torch.randn(count, depth, device="cuda")).to(dtype)
            grad = torch.rand(count, device="cuda") / count
            for unit in (True, False):
                lse = cuda.self_forward(z, 10.0, unit)
                cuda.self_backward(z, lse, grad, 10.0, unit)
            columns = torch.randn(77, depth, device="cuda").to(dtype)
            skip = torch.randint(-1, 77, (count,), device="cuda")
            bias = torch.randn(77, device="cuda")
            lse = cuda.cross_forward(z, columns, bias, skip, None, None, 1.0)
            cuda.cross_backward(z, columns, bias, skip, None, None, lse, grad, 1.0, (True, True, True))
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()
