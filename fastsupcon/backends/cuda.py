"""The CUDA C++ kernels of csrc/cuda: mma.sync from compute capability 8.0 on, TMA and wgmma on 9.0.

Nothing here waits for the device. Scratch memory comes from torch's allocator, so a call can be captured into a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._dtypes import tf32_allowed
from ._extension import make_problem
from ._extension import missing as extension_missing
from ._extension import module as _C

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MINIMUM_CAPABILITY = (8, 0)


def unusable(device: torch.device, dtype: torch.dtype, depth: int) -> str | None:
    if extension_missing:
        return extension_missing
    if not hasattr(_C, "cuda"):
        return "the compiled extension was built without nvcc, so without its CUDA kernels"
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


def _run(function, like: Tensor, problem, self_shape: bool, *addresses: int) -> None:
    """Calls ``function`` on ``like``'s device and current stream, with the scratch memory that it asks for."""
    with torch.cuda.device_of(like):
        stream = torch.cuda.current_stream(like.device).cuda_stream
        call = (problem, self_shape, tf32_allowed(), *addresses)
        needed = function(*call, 0, 0, like.device.index, stream)
        if needed:
            scratch = torch.empty(needed, dtype=torch.uint8, device=like.device)
            function(*call, scratch.data_ptr(), needed, like.device.index, stream)


def _forward(problem, a: Tensor, self_shape: bool) -> Tensor:
    lse = a.new_empty(len(a), dtype=torch.float32)
    _run(_C.cuda.forward, a, problem, self_shape, lse.data_ptr())
    return lse


def self_forward(z: Tensor, scale: float, unit_rows: bool) -> Tensor:
    return _forward(make_problem(z, z, scale=scale, unit_rows=unit_rows), z, True)


def self_backward(z: Tensor, lse: Tensor, grad: Tensor, scale: float, unit_rows: bool) -> Tensor:
    dz = torch.empty_like(z)
    problem = make_problem(z, z, scale=scale, unit_rows=unit_rows)
    _run(_C.cuda.backward, z, problem, True, lse.data_ptr(), grad.data_ptr(), dz.data_ptr(), 0, 0)
    return dz


def cross_forward(a, b, bias, skip, row_labels, column_labels, scale) -> Tensor:
    return _forward(make_problem(a, b, bias, skip, row_labels, column_labels, scale), a, False)


def cross_backward(a, b, bias, skip, row_labels, column_labels, lse, grad, scale, needs):
    da = torch.empty_like(a) if needs[0] else None
    db = torch.empty_like(b) if needs[1] else None
    dbias = torch.empty_like(bias) if needs[2] else None
    outputs = (0 if out is None else out.data_ptr() for out in (da, db, dbias))
    problem = make_problem(a, b, bias, skip, row_labels, column_labels, scale)
    _run(_C.cuda.backward, a, problem, False, lse.data_ptr(), grad.data_ptr(), *outputs)
    return da, db, dbias
