"""The one operator of the losses: a backend's forward and backward as ``torch.library`` operators, and autograd around them.

:func:`terms` gives the quantities of a problem (problem.py), for any formula. :func:`loss` gives a loss that is linear in them, as one
forward and one backward.

The operators are what tracers see (torch.compile, torch.export, make_fx, FakeTensor), and carry their autograd there. Where nothing
traces, autograd Functions call the backend directly: the dispatcher and ``register_autograd`` cost some 30 microseconds a step, which is as
long as the kernels of a hundred rows take.

Second derivatives come from the reference backend's gradient, which is made of differentiable operators: right, but with the N x M matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .backends import BACKENDS, LineBackend, LossBackend, cpu, reference, select
from .backends._dtypes import sum_dtype
from .problem import Gradients, Line, Pairs, Side, Terms, names_of

try:
    _library = torch.library.Library("fastsupcon", "DEF")
except RuntimeError as error:
    raise ImportError(
        "fastsupcon's operators are loaded, and PyTorch takes them once in a process: to load them anew, start it anew"
    ) from error
_PAIRS = (
    "Tensor rows, Tensor? columns, Tensor? bias, Tensor? scale_tensor, Tensor? row_keys, Tensor? column_keys, Tensor? own_column, "
    "float scale, bool unit"
)
_DIFFERENTIABLE = 4  # rows, columns, bias, scale_tensor


def terms(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...] = (), *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The quantities ``row_names`` of the rows [len(row_names), N] and ``column_names`` of the columns [len(column_names), M].

    Differentiable in rows, columns, bias and a scale that is a tensor. The names stand in the order of problem.QUANTITIES; columns'
    quantities are for the cross shape.
    """
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return _transformed_terms(*_flat(pairs), row_names, column_names, backend)[:2]
    if traced(pairs):
        return _forward_op(*_flat(pairs), row_names, column_names, backend)[:2]
    outputs: tuple[Tensor, Tensor] = _apply(_Terms, pairs, row_names, column_names, backend)[:2]
    return outputs


def loss(pairs: Pairs, line: Line, *, backend: str = "auto") -> Tensor:
    """``line`` over the problem's rows: 0-d, or [N] with reduction="none", in the sum dtype."""
    if traced(pairs) or torch._C._functorch.peek_interpreter_stack() is not None:
        names = names_of(line)
        return reference.line(names, terms(pairs, names, backend=backend)[0], line)
    outcome: Tensor = _apply(_Loss, pairs, line.names, line, backend)
    return outcome


def _apply(function: type[torch.autograd.Function], pairs: Pairs, *rest: Any) -> Any:
    """function.apply, which would ask again whether a transform of torch.func is active, and each argument whether it is of one.

    What is not differentiable comes as one argument: there is a price for each.
    """
    # torch's stubs lack what Function inherits.
    return super(torch.autograd.Function, function).apply(*_differentiable(pairs), (pairs, *rest, _keep(pairs, rest[-1])))  # type: ignore[misc]


def traced(arguments: Iterable[Any]) -> bool:
    """Whether something looks on that must be shown operators: a compiler, a dispatch mode, a tensor without storage of its own."""
    if torch._C._get_tracing_state() is not None:  # which cannot record a list of names, and would take the loss for a constant
        raise NotImplementedError("torch.jit.trace cannot record fastsupcon's losses: use torch.compile or torch.export")
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            if x.is_meta:
                return True
        elif x is not None and isinstance(x, Tensor):
            return True
    return False


def _keep(pairs: Pairs, backend: str) -> bool:
    """Whether the forward shall keep exponentials for the backward: where there will be one, and only the C++ kernels do so.

    As an operator it never does: their number would have to be known from symbolic shapes.
    """
    if backend not in ("auto", "cpu") or not pairs.rows.is_cpu or cpu.kept_size(*pairs.shape, pairs.columns is None) == 0:
        return False
    if pairs.columns is None and pairs.bias is not None:  # they are not symmetric then, and are made anew
        return False
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in pairs)


def _differentiable(pairs: Pairs) -> tuple[Tensor | None, ...]:
    return pairs.rows, pairs.columns, pairs.bias, pairs.scale if isinstance(pairs.scale, Tensor) else None


def _flat(pairs: Pairs) -> tuple[Any, ...]:
    """The arguments of _PAIRS."""
    scale = 1.0 if isinstance(pairs.scale, Tensor) else pairs.scale
    return *_differentiable(pairs), pairs.row_keys, pairs.column_keys, pairs.own_column, scale, pairs.unit


def _pairs(
    rows: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    scale_tensor: Tensor | None,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    own_column: Tensor | None,
    scale: float,
    unit: bool,
) -> Pairs:
    return Pairs(rows, columns, scale if scale_tensor is None else scale_tensor, unit, bias, row_keys, column_keys, own_column)


def _backend(name: str, rows: Tensor) -> LineBackend | LossBackend:
    """Chosen as the op runs, from the rows' true shape, so that torch.compile may keep shapes symbolic."""
    return BACKENDS[select(name, rows.device, rows.dtype, rows.shape[1])]


def _contiguous(pairs: Pairs) -> Pairs:
    for x in pairs:
        if isinstance(x, Tensor) and (x.is_neg() or not x.is_contiguous()):
            return Pairs._make(x.contiguous().resolve_neg() if isinstance(x, Tensor) else x for x in pairs)
    return pairs


def _forward(pairs: Pairs, row_names: tuple[str, ...], column_names: tuple[str, ...], backend: str, keep: bool) -> Terms:
    return _backend(backend, pairs.rows).forward(_contiguous(pairs), row_names, column_names, keep)


def _backward(
    pairs: Pairs, rows: Side, columns: Side, norms: Tensor, kept: Tensor, needs: tuple[bool, bool, bool, bool], backend: str
) -> Gradients:
    rows, columns = (Side(names, values.contiguous(), grads.contiguous()) for names, values, grads in (rows, columns))
    return _backend(backend, pairs.rows).backward(_contiguous(pairs), rows, columns, norms, kept, needs)


def _loss_forward(pairs: Pairs, names: tuple[str, ...], line: Line, backend: str, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and what _loss_backward needs of its forward."""
    module, pairs = _backend(backend, pairs.rows), _contiguous(pairs)
    if hasattr(module, "loss"):
        return module.loss(pairs, names, line, keep)
    terms = module.forward(pairs, names, (), keep)
    return module.line(names, terms.rows, line), terms


def _loss_backward(
    pairs: Pairs,
    names: tuple[str, ...],
    line: Line,
    kept: Sequence[Tensor],
    grad: Tensor,
    needs: tuple[bool, bool, bool, bool],
    backend: str,
) -> Gradients:
    module, pairs = _backend(backend, pairs.rows), _contiguous(pairs)
    if hasattr(module, "loss_backward"):
        return module.loss_backward(pairs, names, line, kept, grad.contiguous(), needs)
    values, nothing, norms, exponentials = kept
    rows = Side(names, values, module.line_backward(names, values, grad, line))
    return module.backward(pairs, rows, Side((), nothing, nothing), norms, exponentials, needs)


# ---- Operators ------------------------------------------------------------------------------------------------------------------------


def _forward_of_op(*arguments: Any) -> Terms:
    *flat, row_names, column_names, backend = arguments
    return _forward(_pairs(*flat), tuple(row_names), tuple(column_names), backend, keep=False)


def _fake_forward(*arguments: Any) -> Terms:
    *flat, row_names, column_names, _ = arguments
    pairs = _pairs(*flat)
    n, m, _ = pairs.shape

    def empty(*shape: int) -> Tensor:
        return pairs.rows.new_empty(shape, dtype=sum_dtype(pairs.rows.dtype))

    return Terms(empty(len(row_names), n), empty(len(column_names), m), empty(pairs.norms_size), empty(0))


def _backward_of_op(*arguments: Any) -> tuple[Tensor, ...]:
    *flat, row_names, row_values, row_grads, column_names, column_values, column_grads, norms, kept, needs, backend = arguments
    rows, columns = Side(tuple(row_names), row_values, row_grads), Side(tuple(column_names), column_values, column_grads)
    gradients = _backward(_pairs(*flat), rows, columns, norms, kept, tuple(needs), backend)
    return tuple(norms.new_empty(0) if gradient is None else gradient for gradient in gradients)  # an op cannot return None


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-2]
    outputs = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else arguments[-3].new_empty(0)
        for tensor, need in zip(arguments[:_DIFFERENTIABLE], needs, strict=True)
    )
    return tuple(outputs)


def _define(
    name: str, schema: str, run: Callable[..., Iterable[Tensor]], fake: Callable[..., Iterable[Tensor]]
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    _library.define(f"{name}({schema}")
    _library.impl(name, lambda *arguments: tuple(run(*arguments)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsupcon::{name}", lambda *arguments: tuple(fake(*arguments)), lib=_library)
    operator: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = getattr(torch.ops.fastsupcon, name).default
    return operator


_forward_op = _define(
    "pairs",
    f"{_PAIRS}, str[] row_names, str[] column_names, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_of_op,
    _fake_forward,
)
_backward_op = _define(
    "pairs_backward",
    f"{_PAIRS}, str[] row_names, Tensor row_values, Tensor row_grads, str[] column_names, Tensor column_values, Tensor column_grads, "
    "Tensor norms, Tensor kept, bool[4] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_of_op,
    _fake_backward,
)


# ---- Autograd -------------------------------------------------------------------------------------------------------------------------


def _gradients(ctx: Any, rows: Side, columns: Side, pairs: Pairs, norms: Tensor, kept: Tensor, backend: str) -> tuple[Tensor | None, ...]:
    """Of a Function's inputs, the differentiable ones first."""
    needs = tuple(ctx.needs_input_grad[:_DIFFERENTIABLE])
    if traced((rows.grads,)) or _is_batched(rows.grads):
        gradients = _backward_op(*_flat(pairs), *rows, *columns, norms, kept, needs, backend)
        return _padded(ctx, (gradient if need else None for gradient, need in zip(gradients, needs, strict=True)))
    return _padded(ctx, _backward(pairs, rows, columns, norms, kept, needs, backend))


def _differentiable_gradients(
    ctx: Any,
    pairs: Pairs,
    row_names: tuple[str, ...],
    row_grads_of: Callable[[Tensor], Tensor],
    column_names: tuple[str, ...] = (),
    column_grads: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The same for create_graph=True, as a differentiable function of pairs and incoming gradients, the rows' from their values."""
    row_values, column_values, norms, kept = reference.forward(pairs, row_names, column_names, False)
    rows = Side(row_names, row_values, row_grads_of(row_values))
    columns = Side(column_names, column_values, column_values if column_grads is None else column_grads)
    return _padded(ctx, reference.backward(pairs, rows, columns, norms, kept, tuple(ctx.needs_input_grad[:_DIFFERENTIABLE])))


def _is_batched(grads: Tensor) -> bool:
    """By vmap: for autograd.grad(is_grads_batched=True), and what is made with it, and torch.func."""
    return not torch._C._has_storage(grads)


def _of_each(
    function: Callable[..., Iterable[Tensor]], problems: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """What vmap makes of ``function``: problem after problem, for each has kernels of its own; the outputs stacked, and the dim of that."""
    outputs = []
    for i in range(problems):
        one = (x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x for x, dim in zip(arguments, in_dims, strict=True))
        outputs.append(function(*one))
    stacked = tuple(torch.stack(output) for output in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _padded(ctx: Any, gradients: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    return *gradients, *[None] * (len(ctx.needs_input_grad) - _DIFFERENTIABLE)


def _save(ctx: Any, pairs: Pairs, kept: tuple[Tensor, ...], *options: Any) -> None:
    rows, columns, scale, unit, bias, row_keys, column_keys, own_column = pairs
    learned = isinstance(scale, Tensor)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rows, columns, bias, scale if learned else None, row_keys, column_keys, own_column, *kept)
    ctx.options = (1.0 if learned else scale, unit, *options)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """pairs, what the forward kept, and the options."""
    rows, columns, bias, scale_tensor, row_keys, column_keys, own_column, *kept = ctx.saved_tensors
    scale, unit, *options = ctx.options
    return _pairs(rows, columns, bias, scale_tensor, row_keys, column_keys, own_column, scale, unit), kept, *options


def _setup_terms(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *flat, row_names, column_names, backend = inputs
    ctx.mark_non_differentiable(*output[2:])
    _save(ctx, _pairs(*flat), output, tuple(row_names), tuple(column_names), backend)


def _terms_backward(ctx: Any, row_grads: Tensor | None, column_grads: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if row_grads is None and column_grads is None:
        return _padded(ctx, [None] * _DIFFERENTIABLE)
    pairs, (row_values, column_values, norms, kept), row_names, column_names, backend = _saved(ctx)
    row_grads = torch.zeros_like(row_values) if row_grads is None else row_grads
    column_grads = torch.zeros_like(column_values) if column_grads is None else column_grads
    if torch.is_grad_enabled():  # create_graph=True
        return _differentiable_gradients(ctx, pairs, row_names, lambda values: row_grads, column_names, column_grads)
    rows, columns = Side(row_names, row_values, row_grads), Side(column_names, column_values, column_grads)
    return _gradients(ctx, rows, columns, pairs, norms, kept, backend)


def _no_forward_mode(ctx: object, *tangents: object) -> NoReturn:
    raise NotImplementedError(
        "fastsupcon's losses have no derivatives in forward mode (jvp, jacfwd, hessian): take jacrev, twice for second ones"
    )


class _TransformedTerms(torch.autograd.Function):
    """For torch.func.grad, which makes its gradients with create_graph=True, and which the operator's own autograd does not serve."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *flat, row_names, column_names, backend = arguments
        run = _forward_op if traced(flat) else _forward_of_op
        return tuple(run(*flat, row_names, column_names, backend))

    setup_context = staticmethod(_setup_terms)
    backward = staticmethod(_terms_backward)
    jvp = staticmethod(_no_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _of_each(_transformed_terms, info.batch_size, in_dims, arguments)


_transformed_terms: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _TransformedTerms.apply


class _Terms(torch.autograd.Function):
    """The same with its context set up in the forward: to ask for a setup_context costs 40 microseconds a call."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, bias: Tensor | None, scale_tensor: Tensor | None, call: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        pairs, row_names, column_names, backend, keep = call
        terms = _forward(pairs, row_names, column_names, backend, keep)
        ctx.mark_non_differentiable(*terms[2:])
        _save(ctx, pairs, terms, row_names, column_names, backend)
        return tuple(terms)

    backward = staticmethod(_terms_backward)
    jvp = staticmethod(_no_forward_mode)


class _Loss(torch.autograd.Function):
    jvp = staticmethod(_no_forward_mode)

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, bias: Tensor | None, scale_tensor: Tensor | None, call: tuple[Any, ...]
    ) -> Tensor:
        pairs, names, line, backend, keep = call
        loss, kept = _loss_forward(pairs, names, line, backend, keep)
        _save(ctx, pairs, kept, names, line, backend)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return _padded(ctx, [None] * _DIFFERENTIABLE)
        pairs, kept, names, line, backend = _saved(ctx)
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_gradients(ctx, pairs, names, lambda values: reference.line_backward(names, values, grad, line))
        if traced((grad,)) or _is_batched(grad):  # the kept form is the backend's own, which operators do not know
            values, nothing, norms, exponentials = _forward_op(*_flat(pairs), names, (), backend)
            rows = Side(names, values, reference.line_backward(names, values, grad, line))
            return _gradients(ctx, rows, Side((), nothing, nothing), pairs, norms, exponentials, backend)
        return *_loss_backward(pairs, names, line, kept, grad, ctx.needs_input_grad[:_DIFFERENTIABLE], backend), None


def _no_second_derivative(ctx: object, *grads: object) -> NoReturn:
    raise NotImplementedError("fastsupcon: second derivatives of a traced gradient are not supported; call the loss outside of the tracer")


torch.library.register_autograd("fastsupcon::pairs", _terms_backward, setup_context=_setup_terms, lib=_library)
torch.library.register_vmap(
    "fastsupcon::pairs_backward",
    lambda info, in_dims, *arguments: _of_each(_backward_op, info.batch_size, in_dims, arguments),
    lib=_library,
)
torch.library.register_autograd("fastsupcon::pairs_backward", _no_second_derivative, lib=_library)
