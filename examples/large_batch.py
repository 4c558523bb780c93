"""A batch larger than the encoder's activations allow, by chunks: python examples/large_batch.py [pictures]

One step of a small residual network and SupConLoss, direct and through grad_cache: memory, time, and how far the gradients are apart.
docs/scaling.md has what 4096 pictures take.
"""

import itertools
import sys
import time
from collections.abc import Callable

import torch
from memory import peak_bytes, shown
from torch import Tensor, nn

from fastsupcon import SupConLoss, grad_cache


class Block(nn.Module):
    """Group norms: batch norms would take the statistics of a chunk, and the gradients could not be compared."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, out, 3, stride, 1), nn.GroupNorm(8, out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(8, out))
        self.skip = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


def network() -> nn.Sequential:
    widths = (16, 32, 64, 128)
    blocks = (Block(width, out, 2) for width, out in itertools.pairwise(widths))
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128))


def main(count: int) -> None:
    torch.manual_seed(0)
    encoder, loss = network(), SupConLoss(temperature=0.1, normalize=True)
    pictures, labels = torch.randn(count, 3, 32, 32), torch.randint(100, (count,))
    ways: dict[str, Callable[[], Tensor]] = {"direct": lambda: encoder(pictures)}
    for chunk in (count // 4, count // 16, count // 64):
        ways[f"chunks of {chunk}"] = lambda chunk=chunk: grad_cache(encoder, pictures, chunk=chunk)

    loss(grad_cache(encoder, pictures[:64], chunk=32), labels[:64]).backward()  # what the first step prepares is nobody's memory
    want: list[Tensor] = []
    for name, embed in ways.items():
        encoder.zero_grad(set_to_none=False)
        start = time.process_time()
        peak = peak_bytes(lambda embed=embed: loss(embed(), labels).backward())
        seconds = time.process_time() - start
        got = [parameter.grad.clone() for parameter in encoder.parameters()]
        want = want or got
        apart = sum((x - y).square().sum() for x, y in zip(got, want, strict=True)) / sum(y.square().sum() for y in want)
        print(f"{count} pictures, {name}: {shown(peak)}, {seconds:.1f} s of a processor, gradients {float(apart) ** 0.5:.1e} apart")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
