"""Times the forward and the backward of each fused backend by CUDA graph replay, against this GPU's matrix-product rate; prints JSON."""

import json
import statistics

import torch

from fastsupcon.backends import BACKENDS

SHAPES = [(2048, 128), (8192, 128), (65536, 64), (65536, 128), (65536, 256), (65536, 512), (65536, 768)]


def milliseconds(call, replays: int = 7) -> list[float]:
    """Of one replay each: [median, least, most]."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return [statistics.median(times), min(times), max(times)]


def main() -> None:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    rate = 2 * 8192**3 / product[0] / 1e9  # TFLOP/s
    results = {"device": torch.cuda.get_device_name(), "bf16_product_tflops": rate, "kernels": []}
    for count, depth in SHAPES:
        z = torch.nn.functional.normalize(torch.randn(count, depth, device="cuda")).bfloat16()
        grad = torch.rand(count, device="cuda") / count
        for name in ("cuda", "triton"):
            backend = BACKENDS[name]
            if backend.unusable(z.device, z.dtype, depth) is not None:
                continue
            lse = backend.self_forward(z, 10.0, True)
            forward = milliseconds(lambda: backend.self_forward(z, 10.0, True))  # noqa: B023
            backward = milliseconds(lambda: backend.self_backward(z, lse, grad, 10.0, True))  # noqa: B023
            results["kernels"].append(
                {
                    "backend": name,
                    "rows": count,
                    "depth": depth,
                    "forward_ms": forward,
                    "backward_ms": backward,
                    "forward_percent_of_2N2D": 100 * 2 * count**2 * depth / forward[0] / 1e9 / rate,
                    "backward_percent_of_4N2D": 100 * 4 * count**2 * depth / backward[0] / 1e9 / rate,
                }
            )
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
