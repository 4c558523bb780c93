"""The CUDA C++ kernels of csrc/cuda: mma.sync from compute capability 8.0 on, TMA and wgmma on 9.0.

Nothing here waits for the device. Scratch memory comes from torch's allocator, so a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..problem import Gradients, Line, Pairs, Side, Terms
from ._dtypes import tf32_allowed
from ._extension import incoming, mask, outgoing, problem, quantities
from ._extension import line as make_line
from ._extension import missing as extension_missing
from ._extension import module as _C

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MINIMUM_CAPABILITY = (8, 0)


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    if extension_missing:
        return extension_missing
    if why := _C.without_cuda():
        return f"the compiled extension has no CUDA kernels: {why}"
    if device.type != "cuda":
        return f"runs on cuda tensors, not {device.type}"
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA GPUs"
    if dtype not in _DTYPES:
        return f"dtype {dtype} is none of {_DTYPES}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _MINIMUM_CAPABILITY:
        return f"needs compute capability 8.0, {device} has {'.'.join(map(str, capability))}"
    return _driver_unusable(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _driver_unusable(index: int) -> str | None:
    with torch.cuda.device(index):  # and back: the extension has its own CUDA runtime, in which it makes the device current
        reason = _C.cuda.unusable(index)
    return f"the GPU's driver cannot run kernels of the nvcc that built them: {reason}" if reason else None


def _where(like: Tensor) -> tuple[int, int]:
    """The device of a tensor, and its current stream's handle, without the Stream object that torch.cuda.current_stream makes."""
    index = like.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def _on(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """The extension makes the tensor's device current, which PyTorch shall find as it was."""
    return torch.cuda.device_of(like) if torch.cuda.current_device() != like.device.index else contextlib.nullcontext()


def _run(plan: _C.cuda.Plan, like: Tensor) -> None:
    scratch = torch.empty(plan.bytes, dtype=torch.uint8, device=like.device)
    with _on(like):
        plan.run(scratch.data_ptr(), *_where(like))


def _tf32(pairs: Pairs) -> bool:
    return pairs.rows.dtype == torch.float32 and tf32_allowed()


def forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], keep: bool) -> Terms:
    n, m, _ = pairs.shape

    def empty(*shape: int) -> Tensor:
        return pairs.rows.new_empty(shape, dtype=torch.float32)

    norms = empty(pairs.norms_size)
    terms = Terms(empty(len(row_names), n), empty(len(column_names), m), norms, empty(0))
    of_rows, of_columns = quantities(row_names, terms.rows), quantities(column_names, terms.columns)
    device, _ = _where(norms)
    _run(_C.cuda.forward(problem(pairs), of_rows, of_columns, norms.data_ptr(), _tf32(pairs), device), norms)
    return terms


def backward(pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    out, addresses = outgoing(pairs, needs)
    device, _ = _where(norms)
    plan = _C.cuda.backward(problem(pairs), incoming(rows), incoming(columns), norms.data_ptr(), addresses, _tf32(pairs), device)
    _run(plan, norms)
    return out


def loss(pairs: Pairs, names: tuple[str, ...], line: Line, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What is kept is one array: the quantities [len(names), N], the norms, and the number of rows with a pair of equal keys."""
    n, device = pairs.shape[0], pairs.rows.device
    kept = torch.empty(len(names) * n + pairs.norms_size + 1, dtype=torch.float32, device=device)
    loss = torch.empty(n if line.reduction == "none" else (), dtype=torch.float32, device=device)
    plan = _C.cuda.loss(problem(pairs), make_line(line), mask(names), kept.data_ptr(), loss.data_ptr(), _tf32(pairs), _where(kept)[0])
    _run(plan, kept)
    return loss, (kept,)


def loss_backward(
    pairs: Pairs, names: tuple[str, ...], line: Line, kept: Sequence[Tensor], grad: Tensor, needs: tuple[bool, bool, bool, bool]
) -> Gradients:
    (all_kept,) = kept
    out, addresses = outgoing(pairs, needs)
    given = problem(pairs), make_line(line), mask(names), all_kept.data_ptr(), grad.data_ptr()
    _run(_C.cuda.loss_backward(*given, addresses, _tf32(pairs), _where(all_kept)[0]), all_kept)
    return out


def line(names: tuple[str, ...], values: Tensor, line: Line) -> Tensor:
    rows = values.shape[1]
    loss = values.new_empty(rows if line.reduction == "none" else ())
    with _on(values):
        _C.cuda.line(make_line(line), rows, quantities(names, values), loss.data_ptr(), *_where(values))
    return loss


def line_backward(names: tuple[str, ...], values: Tensor, grad: Tensor, line: Line) -> Tensor:
    grads, grad = torch.empty_like(values), grad.contiguous()
    of_values, of_grads = quantities(names, values), quantities(names, grads)
    with _on(values):
        _C.cuda.line_backward(make_line(line), values.shape[1], of_values, grad.data_ptr(), of_grads, *_where(values))
    return grads
