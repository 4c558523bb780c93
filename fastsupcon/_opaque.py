"""Functions that are also ``torch.library`` operators: opaque to whatever traces, and called at once where nothing does.

The dispatcher costs 5 to 10 microseconds a call on the host, which a loss of a few hundred rows makes eight times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_library = torch.library.Library("fastsupcon", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def opaque(schema: str, run: Callable, fake: Callable, key: str = "CompositeExplicitAutograd") -> Callable:
    """Defines the operator ``schema``, which ``run`` computes, and returns what calls it. Its first argument is a tensor.

    Keyword arguments of a call are hints to ``run`` that an operator cannot be given, such as that it may overwrite an input.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, run, key)
    torch.library.register_fake(f"fastsupcon::{name}", fake, lib=_library)
    op = getattr(torch.ops.fastsupcon, name).default

    def call(x: Tensor, *rest, **hints):
        traced = torch.compiler.is_compiling() or type(x) not in _PLAIN or torch._C._len_torch_dispatch_stack() > 0
        return op(x, *rest) if traced else run(x, *rest, **hints)

    return call
