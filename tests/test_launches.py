"""What a step on a GPU launches beside the backend's own kernels, counted without a GPU: on meta tensors, which take the same path.

The backends' own launches, at most seven, are counted by test_cuda_emulation.py and test_triton.py.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsupcon import InfoNCELoss, PSCLoss, SupConLoss, operators
from fastsupcon.backends import sum_dtype
from fastsupcon.problem import Gradients, Terms

META = torch.device("meta")
NO_LAUNCH = {
    "empty",
    "empty_like",
    "new_empty",
    "detach",
    "view",
    "alias",
    "t",
    "expand",
    "select",
    "slice",
    "squeeze",
    "unbind",
    "unsqueeze",
}


class Nothing:
    """A backend that makes the outputs, as the compiled ones do, and launches nothing."""

    @staticmethod
    def forward(pairs, row_names, column_names, keep):
        n, m, _ = pairs.shape

        def empty(*shape):
            return torch.empty(shape, dtype=sum_dtype(pairs.rows.dtype), device=META)

        return Terms(empty(len(row_names), n), empty(len(column_names), m), empty(n), empty(0))

    @staticmethod
    def backward(pairs, rows, columns, norms, kept, needs):
        tensors = (pairs.rows, pairs.columns, pairs.bias, pairs.scale)
        return Gradients(*(torch.empty_like(x) if need else None for x, need in zip(tensors, needs, strict=True)))

    @staticmethod
    def line(names, values, line):
        return values.new_empty(())

    @staticmethod
    def line_backward(names, values, grad, line):
        return torch.empty_like(values)


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", ["scl", "psc"])
def test_a_step_launches_one_operator_of_pytorch_the_seed_of_backward(monkeypatch, loss, dtype):
    monkeypatch.setattr(operators, "traced", lambda arguments: False)
    monkeypatch.setattr(operators, "_backend", lambda name, rows: Nothing)
    module = SupConLoss(0.1, normalize=True) if loss == "scl" else PSCLoss(10, 128)
    module = module.to(META, dtype)
    features = torch.empty(1024, 128, device=META, dtype=dtype, requires_grad=True)
    labels = torch.empty(1024, device=META, dtype=torch.int64)
    with Launches() as launches:
        module(features, labels).backward()
    assert launches.names == ["ones_like"]
    assert features.grad.shape == features.shape


def test_launches_of_both_directions_of_pairs(monkeypatch):
    """A line over quantities of rows and of columns is made by PyTorch, one of rows alone by the backend."""
    monkeypatch.setattr(operators, "traced", lambda arguments: False)
    monkeypatch.setattr(operators, "_backend", lambda name, rows: Nothing)
    a, b = (torch.empty(1024, 128, device=META, requires_grad=True) for _ in range(2))
    with Launches() as launches:
        loss = InfoNCELoss()(a, b)
    assert launches.names == ["arange", "add", "div", "sub", "mean"]
    with Launches() as launches:
        loss.backward()
    assert launches.names == ["ones_like", "div", "neg", "div", "stack"]
    with Launches() as launches:
        InfoNCELoss(symmetric=False)(a, b)
    assert launches.names == ["arange"]
