"""What the backends share about element types."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

from ..problem import Pairs

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, lse, bias and their gradients for rows of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Keeps autocast from rounding what operators of PyTorch make of x."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def exact(function: Callable[Concatenate[Pairs, _Rest], _Result]) -> Callable[Concatenate[Pairs, _Rest], _Result]:
    """Keeps autocast out of a backend made of PyTorch's operators, whose products it would round."""

    @functools.wraps(function)
    def call(pairs: Pairs, /, *rest: _Rest.args, **options: _Rest.kwargs) -> _Result:
        with no_autocast(pairs.rows):
            return function(pairs, *rest, **options)

    return call


def tf32_allowed() -> bool:
    """Whether fp32 products may use TF32, by whichever of torch's two interfaces it was set.

    torch.get_float32_matmul_precision() raises once the newer one (torch.backends...fp32_precision, from torch 2.9 on) was used.
    """
    matmul = torch.backends.cuda.matmul
    allowed: bool = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return allowed


#: exp(t) of a *bounded* logit, |t| <= this, needs no shift in fp32: it stays within 2^-63 and 2^63, so that sums of it over 2^60 pairs and
#: products with exp(-log-sum) stay in the normal range. Unit rows at temperature tau have |t| <= 1/tau, so tau >= 0.0234 is bounded.
MOST_BOUNDED = 63 * math.log(2)


def is_bounded(limit: float) -> bool:
    """Whether logits with |t| <= limit are bounded, less a margin of 2 % for rounded rows. NaN is not: running maxima show it."""
    return 1.02 * limit < MOST_BOUNDED
