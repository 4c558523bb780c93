"""Bad input, named: every error says which argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def readable(value: Tensor) -> Tensor | None:
    """Values that nobody has to wait for: on a CPU, where nothing traces. Of all problems at once where torch.func's vmap has many."""
    if not value.is_cpu or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # a FakeTensor has none
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def readable_nan(value: Tensor) -> bool:
    """Whether it holds a NaN that nobody has to wait for. One number alone is asked directly: operators would take ten times as long."""
    values = readable(value)
    if values is None:
        return False
    return math.isnan(values.item()) if values.numel() == 1 else bool(values.isnan().any())


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def dense(name: str, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got {kind}: make it one with {name}.to_dense(), or pad it")


def rows(name: str, value: object, columns: int | None = None, *, least: int = 1) -> None:
    """[N, D] of one of DTYPES with N >= ``least``, D >= 1, and D = ``columns`` where given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    dense(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must have dtype {', '.join(map(str, DTYPES))}, got {value.dtype}")
    if value.ndim != 2 or (columns is not None and value.shape[1] != columns):
        expected = f"[rows, {'dimension' if columns is None else columns}]"
        raise ValueError(f"{name} must have shape {expected}, got {list(value.shape)}")
    if value.shape[0] < least or value.shape[1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(value.shape)}")


def rows_like(name: str, value: Tensor, other_name: str, other: Tensor, *, least: int = 1) -> None:
    """[rows, D] of the D, dtype and device of the rows ``other``."""
    rows(name, value, columns=other.shape[1], least=least)
    on_device(name, value, other.device)
    if value.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {value.dtype}")


def vector(name: str, value: object, length: int, device: torch.device, *, floating: bool = False) -> None:
    """A [length] of integers (or of floats) on ``device``."""
    kind = "a floating-point" if floating else "an integer"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of {kind} dtype, got {type(value).__name__}")
    dense(name, value)
    if value.is_complex() or value.is_floating_point() != floating:
        raise TypeError(f"{name} must have {kind} dtype, got {value.dtype}")
    if value.ndim != 1 or value.shape[0] != length:
        raise ValueError(f"{name} must have shape [{length}], got {list(value.shape)}")
    on_device(name, value, device)


def on_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the rows, got {value.device}: move it there with {name}.to({str(device)!r})")


def within(name: str, value: Tensor, low: int, high: int) -> None:
    """low <= value < high. On a GPU and under torch.compile a breach is asserted by the device: reading the values would wait."""
    if value.numel() == 0:
        return
    message, values = f"{name} must lie in [{low}, {high})", readable(value)
    # A uint8 cannot be compared with -1 or 256, for the bound would be wrapped; a uint16 has no aminmax.
    wide = (value if values is None else values).long()
    if values is not None:
        least, greatest = (int(bound) for bound in wide.aminmax())
        if least < low or greatest >= high:
            raise ValueError(f"{message}, got values from {least} to {greatest}")
    else:
        torch._assert_async(((wide >= low) & (wide < high)).all(), message)


def not_negative(name: str, value: Tensor) -> None:
    """Real, and no element below 0; a NaN is none. On a GPU and under torch.compile a breach of the latter is asserted by the device."""
    if value.is_complex():
        raise TypeError(f"{name} must have a real dtype, got {value.dtype}")
    if not value.dtype.is_signed:  # PyTorch compares no uint16, uint32 or uint64
        return
    if (values := readable(value)) is not None:
        if (values < 0).any():
            raise ValueError(f"{name} must not be negative, got {values.min().item():g}")
    else:
        torch._assert_async(~(value < 0).any(), f"{name} must not be negative")


def whole(name: str, value: Tensor) -> None:
    """Whole numbers in a floating-point tensor, small enough to be told apart.

    On a GPU and under torch.compile a breach is asserted by the device.
    """
    message, values = f"{name} must be whole numbers below 2**53", readable(value)
    value = value if values is None else values
    broken = (value != value.round()) | ~(value.abs() < 2**53)
    if values is not None:
        if broken.any():
            raise ValueError(f"{message}, got {values[broken][0].item()}")
    else:
        torch._assert_async(~broken.any(), message)


def counts(name: str, value: Tensor, classes: int, device: torch.device, *, least: int = 1) -> None:
    """A [classes] of integers or floats, none below 0 and not all 0. Values on a GPU and under torch.compile are not read back.

    ``least`` = 0: these may all be 0, and there may be none of them.
    """
    vector(name, value, classes, device, floating=isinstance(value, Tensor) and value.is_floating_point())
    if least == 0:
        not_negative(name, value)
    elif (values := readable(value)) is not None:
        smallest, total = values.double().min().item(), values.sum().item()  # a uint16 has no min
        if not (smallest >= 0 and 0 < total < math.inf):
            raise ValueError(f"{name} must be finite, at least 0 and not all 0, got a least of {smallest:g} and a sum of {total:g}")


def is_integer(value: object) -> TypeGuard[int]:
    """An int, NumPy's, or a tensor of one."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def size(name: str, value: object, least: int = 1) -> None:
    """An int of at least ``least``."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def number(name: str, value: float, low: float, high: float) -> None:
    """A finite number in [low, high]; no tensor."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (low <= value <= high and value < math.inf):
        raise ValueError(f"{name} must be finite and lie in [{low:g}, {high:g}], got {value}")


def scale(name: str, value: float | Tensor) -> None:
    """A finite number, or a tensor of one element, whose value is not read back."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        if not -math.inf < value < math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
        return
    if not isinstance(value, Tensor) and not hasattr(value, "ndim"):  # NumPy's has one
        raise TypeError(f"{name} must be a number or a tensor of one element, got {type(value).__name__}")
    array = torch.as_tensor(value)
    dense(name, array)
    if array.numel() != 1 or array.is_complex() or array.dtype == torch.bool:
        raise TypeError(f"{name} must be a number or a tensor of one element, got {array.dtype} of shape {list(array.shape)}")


def temperature(name: str, value: float | Tensor) -> None:
    """A positive finite number, or a tensor of one element, whose value is not read back."""
    if type(value) is float and 0 < value < math.inf:  # ahead of the questions that cost a microsecond each
        return
    if isinstance(value, Tensor) or not isinstance(value, numbers.Real) or isinstance(value, bool):
        scale(name, value)
    elif not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
