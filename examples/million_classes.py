"""Cross-entropy over a million classes, by cosines to prototypes, without the N x C logits: python examples/million_classes.py [rows]

As in face recognition or product search, each class has a prototype, and all of them stand in every denominator.
Trains a few steps and measures the memory of one: it grows with N + C, not with N C.
"""

import math
import sys

import torch
from memory import peak_bytes, shown
from torch import nn

from fastsupcon import PrototypeCrossEntropyLoss

CLASSES, DEPTH, STEPS = 1_000_000, 64, 3


def main(batch: int) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, DEPTH))
    loss = PrototypeCrossEntropyLoss(CLASSES, DEPTH, temperature=0.05)
    groups = [{"params": encoder.parameters(), "lr": 0.01}, {"params": loss.parameters(), "lr": 20.0}]
    optimizer = torch.optim.SGD(groups)  # without momentum, which would be as large as the prototypes
    pictures, labels = torch.randn(batch, 32), torch.randint(CLASSES, (batch,))
    values = []

    def step() -> None:
        value = loss(encoder(pictures + 0.1 * torch.randn_like(pictures)), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())

    peak = peak_bytes(step)
    for _ in range(STEPS - 1):
        step()
    print(f"loss step by step: {', '.join(f'{value:.2f}' for value in values)}; at chance {math.log(CLASSES):.2f}")
    print(f"a step of {batch} rows and {CLASSES:,} classes: {shown(peak)} over the {shown(loss.prototypes.nbytes)} of prototypes")
    matrices = 3 * batch * CLASSES * loss.prototypes.element_size()
    print(f"plain cross-entropy needs {shown(matrices)} for the log-softmax [N, C], its gradient and that of the logits")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
