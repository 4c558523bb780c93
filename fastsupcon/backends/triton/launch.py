"""The launches of a call: planned once for a form of problems, then made with nothing but addresses.

``kernel[grid](...)`` binds, inspects and hashes every argument each time, which takes longer than a kernel of a thousand rows runs. It
returns the kernel it compiled, which is launched with the same arguments in a tenth of that time, launch hooks and all. What it is compiled
for follows from the plan and the addresses: dtypes, constants, which pointers there are, and which of them are multiples of 16. Where
Triton specialises on more (AMD: on a tensor's size), wants other arguments (before 3.3) or interprets, each launch is an ordinary one.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: By how many bytes the addresses of which tensors are off multiples of 16; those that are not are left out.
Off = tuple[tuple[str, int], ...]
_ALIGNED = 16  # bytes: what Triton looks at in an address
_kept: dict[tuple[object, ...], Any] = {}  # compiled kernels, by what they are compiled for


class At(NamedTuple):
    """A pointer to elements of ``dtype``, ``offset`` bytes behind the beginning of the call's tensor ``name``."""

    name: str
    dtype: torch.dtype
    offset: int = 0

    def after(self, elements: int) -> At:
        return self._replace(offset=self.offset + elements * self.dtype.itemsize)

    def tensor(self, values: dict[str, Any]) -> Tensor:
        x: Tensor = values[self.name]
        if self.offset or x.dtype != self.dtype:
            x = x.view(torch.uint8)[self.offset :].view(self.dtype)
        return x


class Number(NamedTuple):
    """The call's float ``name``."""

    name: str


class Launch:
    """``arguments`` by name: At, Number, None, integers, floats, constants."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: Any) -> None:
        self.kernel, self.grid, self.arguments, self.options = kernel, (*grid, 1, 1)[:3], arguments, options
        self.runs: dict[Off, Callable[..., object]] = {}  # the kept kernels, by how far which addresses are off multiples of 16
        self.given = [(name, x) for name, x in arguments.items() if isinstance(x, (At, Number))]

    def ordinarily(self, values: dict[str, Any]) -> Any:
        given = {name: x.tensor(values) if isinstance(x, At) else values[x.name] for name, x in self.given}
        return self.kernel[self.grid](**{**self.arguments, **given}, **self.options)

    def key(self, off: Off, device: torch.device) -> tuple[object, ...]:
        """The same for launches of one compiled kernel: of addresses that are ``off`` multiples of 16 by so many bytes."""
        constants = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        bytes_off = dict(off)
        of = (x if name in constants else _specialised(x, bytes_off) for name, x in self.arguments.items())
        return self.kernel.fn, device, *self.options.items(), *self.arguments, *of

    def keep(self, off: Off, device: torch.device, compiled: Any = None) -> Callable[..., object] | None:
        """Launch ``compiled`` from now on, or what another plan has kept of the same."""
        key = self.key(off, device)
        compiled = _kept.setdefault(key, compiled) if compiled is not None else _kept.get(key)
        if compiled is None:
            return None
        names = self.kernel.arg_names
        self.template = [self.arguments[name] for name in names]
        self.places = [(names.index(name), x.name, getattr(x, "offset", 0)) for name, x in self.given]
        # no subscript: of a kernel that Triton compiles in another thread (AsyncCompileMode), only attributes are the compiled one's
        return self.runs.setdefault(off, compiled.__getitem__(self.grid))


def _specialised(x: object, off: dict[str, int]) -> object:
    """What of an argument that is no constant decides how the kernel is compiled. Our kernels are not specialised on integers."""
    if isinstance(x, At):
        return x.dtype, (x.offset + off.get(x.name, 0)) % _ALIGNED == 0
    if isinstance(x, int):
        return x.bit_length() > 31
    return None if x is None else float


@functools.cache
def _keeps(device: torch.device) -> bool:
    import triton

    if device.type != "cuda" or torch.version.hip is not None or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


class Buffer:
    """A tensor of bytes that a call allocates, and what lies in it, each 16 bytes aligned."""

    def __init__(self, name: str) -> None:
        self.name, self.bytes = name, 0

    def take(self, elements: int, dtype: torch.dtype = torch.float32) -> At:
        at = At(self.name, dtype, self.bytes)
        self.bytes += -(-elements * dtype.itemsize // _ALIGNED) * _ALIGNED
        return at

    def empty(self, like: Tensor) -> Tensor:
        return like.new_empty(self.bytes, dtype=torch.uint8)


class Plan:
    """``kept``: what a loss' forward leaves for its backward; ``outputs``: whether a backward writes gradients of rows, of columns."""

    def __init__(
        self, launches: list[Launch], scratch: Buffer, kept: Buffer | None = None, outputs: tuple[bool, bool] = (False, False)
    ) -> None:
        self.launches, self.scratch, self.kept, self.outputs = launches, scratch, kept or Buffer("kept"), outputs
        given = [x for launch in launches for _, x in launch.given]
        self.tensors = sorted({x.name for x in given if isinstance(x, At)})
        self.numbers = sorted({x.name for x in given if isinstance(x, Number)})

    def run(self, values: dict[str, Any], device: torch.device) -> None:
        """With the call's tensors and numbers, on the current stream of the device, which is current."""
        off: Off = ()
        keeps = _keeps(device)
        if keeps:
            addresses = {name: values[name].data_ptr() for name in self.tensors}
            if functools.reduce(operator.or_, addresses.values()) % _ALIGNED:  # an element of a larger tensor, such as a loss of several
                off = tuple((name, address % _ALIGNED) for name, address in addresses.items() if address % _ALIGNED)
            addresses.update((name, values[name]) for name in self.numbers)
            stream = torch._C._cuda_getCurrentRawStream(device.index)
        for launch in self.launches:
            run = None
            if keeps and not launch.kernel.pre_run_hooks:
                run = launch.runs.get(off) or launch.keep(off, device)
            if run is None:
                compiled = launch.ordinarily(values)
                if keeps and compiled is not None:  # None: a hook of Triton's compiler refused it
                    launch.keep(off, device, compiled)
                continue
            arguments = launch.template.copy()
            for place, name, offset in launch.places:
                arguments[place] = addresses[name] + offset
            run(*arguments, stream=stream)
