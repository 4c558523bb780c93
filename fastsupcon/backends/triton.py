"""The Triton kernels. Not written yet: always unusable."""

from __future__ import annotations

import torch


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    return "not written yet"
