"""The CUDA backend over the emulator, as an object with the functions of fastsupcon.backends.Backend, on cpu tensors."""

from __future__ import annotations

import contextlib
import importlib.util
from types import ModuleType, SimpleNamespace

import torch

from fastsupcon.backends import cuda
from fastsupcon.backends._extension import outgoing


def emulated_backend(emulated: ModuleType) -> ModuleType:
    """A second fastsupcon.backends.cuda with the kernels of the module ``emulated``. What no kernel writes is NaN."""
    spec = importlib.util.spec_from_file_location("fastsupcon.backends.cuda_emulated", cuda.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(plan, like) -> None:
        scratch = torch.full((plan.bytes + 256,), 0xFF, dtype=torch.uint8)
        start = -(-scratch.data_ptr() // 256) * 256
        plan.run(start, 0, 0)
        assert (scratch[start - scratch.data_ptr() + plan.bytes :] == 0xFF).all(), "written past the scratch memory"

    def outgoing_of_nan(pairs, needs):
        out, addresses = outgoing(pairs, needs)
        for gradient in out:
            if gradient is not None:
                gradient.fill_(torch.nan)
        return out, addresses

    module._C = SimpleNamespace(cuda=emulated.cuda)
    module._run, module.outgoing = run, outgoing_of_nan
    module._where = lambda like: (0, 0)
    module._on = lambda like: contextlib.nullcontext()
    module.torch = _TorchOfTheHost()
    return module


class _TorchOfTheHost:
    """torch, whose new tensors are full of NaN."""

    @staticmethod
    def empty(shape, **options) -> torch.Tensor:
        return torch.full((shape,) if isinstance(shape, int) else shape, torch.nan, **options)

    @staticmethod
    def empty_like(like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, torch.nan)

    def __getattr__(self, name: str):
        return getattr(torch, name)
