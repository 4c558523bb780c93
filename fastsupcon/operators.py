"""The one operator of the losses: a backend's forward and backward as ``torch.library`` operators, and autograd around them.

:func:`terms` gives the quantities of a problem (problem.py), for any formula. :func:`loss` gives a loss that is linear in them, as one
forward and one backward.

The operators are what tracers see (torch.compile, torch.export, make_fx, FakeTensor), and carry their autograd there. Where nothing
traces, autograd Functions call the backend directly: the dispatcher and ``register_autograd`` cost some 30 microseconds a step, which is as
long as the kernels of a hundred rows take.

Second derivatives come from the reference backend's gradient, which is made of differentiable operators: right, but with the N x M matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .backends import BACKENDS, cpu, reference, select
from .backends._dtypes import sum_dtype
from .problem import Gradients, Line, Pairs, Side, Terms

_library = torch.library.Library("fastsupcon", "DEF")
_PAIRS = (
    "Tensor rows, Tensor? columns, Tensor? bias, Tensor? scale_tensor, Tensor? row_keys, Tensor? column_keys, Tensor? own_column, "
    "float scale, bool unit"
)
_TENSORS = 7  # how many of them are tensors
_DIFFERENTIABLE = 4  # rows, columns, bias, scale_tensor


def terms(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...] = (), *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The quantities ``row_names`` of the rows [len(row_names), N] and ``column_names`` of the columns [len(column_names), M].

    Differentiable in rows, columns, bias and a scale that is a tensor. The names stand in the order of problem.QUANTITIES; columns'
    quantities are for the cross shape.
    """
    arguments = (*_flat(pairs), row_names, column_names, backend)
    if _traced(pairs):
        return _forward_op(*arguments)[:2]
    if _transformed():
        return _TransformedTerms.apply(*arguments)[:2]
    return _Terms.apply(*arguments, _keep(pairs, backend))[:2]


def loss(pairs: Pairs, line: Line, *, backend: str = "auto") -> Tensor:
    """``line`` over the problem's rows: 0-d, or [N] with reduction="none", in the sum dtype."""
    if _traced(pairs) or _transformed():
        return reference.line(line.names, terms(pairs, line.names, backend=backend)[0], line)
    return _Loss.apply(*_flat(pairs), line, backend, _keep(pairs, backend))


def _traced(arguments: Iterable[object]) -> bool:
    """Whether something looks on that must be shown operators: a compiler, a dispatch mode, a tensor without storage of its own."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(isinstance(x, Tensor) and (type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta) for x in arguments)
    )


def _transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _keep(pairs: Pairs, backend: str) -> bool:
    """Whether the forward shall keep exponentials for the backward: where there will be one, and only the C++ kernels do so.

    As an operator it never does: their number would have to be known from symbolic shapes.
    """
    trained = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in pairs)
    return (
        trained
        and backend in ("auto", "cpu")
        and pairs.rows.device.type == "cpu"
        and cpu.kept_size(*pairs.shape, pairs.columns is None) > 0
    )


def _flat(pairs: Pairs) -> tuple:
    """The arguments of _PAIRS."""
    rows, columns, scale, unit, bias, row_keys, column_keys, own_column = pairs
    learned = isinstance(scale, Tensor)
    return rows, columns, bias, scale if learned else None, row_keys, column_keys, own_column, 1.0 if learned else scale, unit


def _pairs(rows, columns, bias, scale_tensor, row_keys, column_keys, own_column, scale, unit) -> Pairs:
    return Pairs(rows, columns, scale if scale_tensor is None else scale_tensor, unit, bias, row_keys, column_keys, own_column)


def _contiguous(pairs: Pairs) -> Pairs:
    return Pairs(*(x.contiguous() if isinstance(x, Tensor) else x for x in pairs))


def _backend(name: str, rows: Tensor):
    """Chosen as the op runs, from the rows' true shape, so that torch.compile may keep shapes symbolic."""
    return BACKENDS[select(name, rows.device, rows.dtype, rows.shape[1])]


# ---- Operators ------------------------------------------------------------------------------------------------------------------------


def _forward(*arguments, keep: bool = False) -> Terms:
    *flat, row_names, column_names, backend = arguments
    pairs = _contiguous(_pairs(*flat))
    return _backend(backend, pairs.rows).forward(pairs, tuple(row_names), tuple(column_names), keep)


def _fake_forward(*arguments) -> Terms:
    *flat, row_names, column_names, _ = arguments
    pairs = _pairs(*flat)
    n, m, _ = pairs.shape

    def empty(*shape) -> Tensor:
        return pairs.rows.new_empty(shape, dtype=sum_dtype(pairs.rows.dtype))

    norms = (n if pairs.columns is None else n + m) if pairs.unit else 0
    return Terms(empty(len(row_names), n), empty(len(column_names), m), empty(norms), empty(0))


def _backward(*arguments) -> tuple[Tensor, ...]:
    *flat, row_names, column_names, row_values, row_grads, column_values, column_grads, norms, kept, needs, backend = arguments
    pairs = _contiguous(_pairs(*flat))
    rows = Side(tuple(row_names), row_values.contiguous(), row_grads.contiguous())
    columns = Side(tuple(column_names), column_values.contiguous(), column_grads.contiguous())
    gradients = _backend(backend, pairs.rows).backward(pairs, rows, columns, norms, kept, tuple(needs))
    return tuple(pairs.rows.new_empty(0) if gradient is None else gradient for gradient in gradients)  # an op cannot return None


def _fake_backward(*arguments) -> tuple[Tensor, ...]:
    needs = arguments[-2]
    outputs = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else arguments[0].new_empty(0)
        for tensor, need in zip(arguments[:_DIFFERENTIABLE], needs, strict=True)
    )
    return tuple(outputs)


def _define(name: str, schema: str, run, fake):
    _library.define(f"{name}({schema}")
    _library.impl(name, lambda *arguments: tuple(run(*arguments)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsupcon::{name}", lambda *arguments: tuple(fake(*arguments)), lib=_library)
    return getattr(torch.ops.fastsupcon, name).default


_forward_op = _define(
    "pairs",
    f"{_PAIRS}, str[] row_names, str[] column_names, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_backward_op = _define(
    "pairs_backward",
    f"{_PAIRS}, str[] row_names, str[] column_names, Tensor row_values, Tensor row_grads, Tensor column_values, Tensor column_grads, "
    "Tensor norms, Tensor kept, bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


# ---- Autograd -------------------------------------------------------------------------------------------------------------------------


def _setup_terms(ctx, inputs, output) -> None:
    *flat, row_names, column_names, backend = inputs
    row_terms, column_terms, norms, kept = output
    ctx.mark_non_differentiable(norms, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*flat[:_TENSORS], row_terms, column_terms, norms, kept)
    ctx.options = (*flat[_TENSORS:], tuple(row_names), tuple(column_names), backend)


def _terms_backward(ctx, row_grads, column_grads, *_):
    if row_grads is None and column_grads is None:
        return (None,) * len(ctx.needs_input_grad)
    *tensors, row_terms, column_terms, norms, kept = ctx.saved_tensors
    scale, unit, row_names, column_names, backend = ctx.options
    flat = (*tensors, scale, unit)
    row_grads = torch.zeros_like(row_terms) if row_grads is None else row_grads
    column_grads = torch.zeros_like(column_terms) if column_grads is None else column_grads
    needs = tuple(ctx.needs_input_grad[:_DIFFERENTIABLE])
    if torch.is_grad_enabled():  # create_graph=True
        gradients = _differentiable_backward(_pairs(*flat), row_names, column_names, lambda values: row_grads, column_grads, needs)
    else:
        _refuse_batches(row_grads)
        sides = (row_names, column_names, row_terms, row_grads, column_terms, column_grads)
        gradients = _call_backward(flat, sides, norms, kept, needs, backend)
    return *gradients, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)


def _refuse_batches(grad: Tensor) -> None:
    if not torch._C._has_storage(grad):
        raise NotImplementedError("fastsupcon's gradients cannot be batched by vmap (is_grads_batched=True): loop over them")


def _call_backward(flat, sides, norms, kept, needs, backend) -> list[Tensor | None]:
    arguments = (*flat, *sides, norms, kept, needs, backend)
    grads = sides[3]
    gradients = (_backward_op if _traced((grads,)) else _backward)(*arguments)
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _differentiable_backward(pairs: Pairs, row_names, column_names, row_grads_of, column_grads, needs) -> Gradients:
    """The gradient as a differentiable function of pairs and of the incoming gradients; row_grads_of(row terms) gives those of the rows."""
    row_terms, column_terms, norms, kept = reference.forward(pairs, row_names, column_names, False)
    rows = Side(row_names, row_terms, row_grads_of(row_terms))
    return reference.backward(pairs, rows, Side(column_names, column_terms, column_grads), norms, kept, needs)


class _TransformedTerms(torch.autograd.Function):
    """For torch.func.grad, which makes its gradients with create_graph=True. Forward mode is refused by PyTorch."""

    @staticmethod
    def forward(*arguments):
        return tuple(_forward(*arguments))

    setup_context = staticmethod(_setup_terms)
    backward = staticmethod(_terms_backward)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        raise NotImplementedError("fastsupcon's losses cannot be batched by torch.func.vmap: loop over the problems")


class _Terms(torch.autograd.Function):
    """The same with its context set up in the forward: to ask for a setup_context costs 40 microseconds a call."""

    @staticmethod
    def forward(ctx, *arguments):
        *arguments, keep = arguments
        output = tuple(_forward(*arguments, keep=keep))
        _setup_terms(ctx, arguments, output)
        return output

    backward = staticmethod(_terms_backward)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *flat, line, backend, keep = arguments
        terms = _forward(*flat, line.names, (), backend, keep=keep)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*flat[:_TENSORS], *terms)
        ctx.options = (*flat[_TENSORS:], line, backend)
        return _backend(backend, flat[0]).line(line.names, terms.rows, line)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, row_terms, column_terms, norms, kept = ctx.saved_tensors
        scale, unit, line, backend = ctx.options
        needs = tuple(ctx.needs_input_grad[:_DIFFERENTIABLE])
        if torch.is_grad_enabled():  # create_graph=True

            def grads_of(values):
                return reference.line_backward(line.names, values, grad, line)

            gradients = _differentiable_backward(_pairs(*tensors, scale, unit), line.names, (), grads_of, column_terms, needs)
        else:
            _refuse_batches(grad)
            row_grads = _backend(backend, tensors[0]).line_backward(line.names, row_terms, grad, line)
            sides = (line.names, (), row_terms, row_grads, column_terms, column_terms)
            gradients = _call_backward((*tensors, scale, unit), sides, norms, kept, needs, backend)
        return *gradients, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("fastsupcon: second derivatives of a traced gradient are not supported; call the loss outside of the tracer")


torch.library.register_autograd("fastsupcon::pairs", _terms_backward, setup_context=_setup_terms, lib=_library)
torch.library.register_autograd("fastsupcon::pairs_backward", _no_second_derivative, lib=_library)
