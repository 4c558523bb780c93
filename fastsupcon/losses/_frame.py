"""What every loss repeats: views, labels and temperature as they come from users, the reduction, and the module made from the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks
from ..backends import BACKENDS, sum_dtype
from ..options import REDUCTIONS, Across, Reduction
from ..queue import MemoryQueue
from ..ranks import Ranks


def ranks_of(group: ProcessGroup | None, across: Across) -> Ranks | None:
    """Those that the loss is taken over, or None for this process alone."""
    if group is None and across != "gather":
        raise ValueError(f"across={across!r} needs a group, got None: this process meets no other")
    return None if group is None else Ranks(group, across)


def said(value: float | Tensor | MemoryQueue | None) -> str:
    """An argument in what ranks tell each other: of a tensor no value, which would have to be read back, but where a gradient is to go.

    Both decide how often they meet: in the backward for each gradient, and after the loss to fill a queue in training mode.
    """
    if isinstance(value, Tensor):
        return f"a tensor, requires_grad={value.requires_grad}"
    if isinstance(value, MemoryQueue):
        return f"{len(value)} of {len(value.rows)} rows, training={value.training}"
    return str(value)


def rows_of(features: Tensor, name: str = "features", *, least: int = 1) -> tuple[Tensor, int]:
    """features [N, D], or [B, V, ...] with V views of B samples, as rows [V B, D], view-major, and V."""
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(features).__name__}")
    _checks.dense(name, features)
    if features.ndim < 2:
        raise ValueError(f"{name} must have shape [N, D] or [B, V, ...], got {list(features.shape)}")
    rows = features if features.ndim == 2 else features.flatten(2).transpose(0, 1).flatten(0, 1)
    _checks.rows(name, rows, least=least)
    return rows, 1 if features.ndim == 2 else features.shape[1]


def class_labels(labels: Tensor, samples: int, device: torch.device, name: str = "labels") -> Tensor:
    """Integer labels [B], or [B, 1] or [1, B] as some loaders give them, as int64 [B]. Floats are taken where they are whole numbers."""
    flat = labels
    if (
        isinstance(labels, Tensor)
        and labels.layout == torch.strided
        and labels.ndim == 2
        and tuple(labels.shape) in ((samples, 1), (1, samples))
    ):
        flat = labels.reshape(-1)
    if isinstance(flat, Tensor) and flat.dtype in _checks.DTYPES:
        _checks.vector(name, flat, samples, device, floating=True)
        _checks.whole(name, flat)
    else:
        _checks.vector(name, flat, samples, device)
    return flat if flat.dtype == torch.int64 else flat.long()


def weights_of(
    labels: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int | None,
    anchor_weights: Tensor | None,
    samples: int,
    anchors: int,
    z: Tensor,
) -> Tensor | None:
    """Of the anchors [A] in the sum dtype, from weights of classes [C] and of samples [B] or anchors [A]; None where there are none.

    Rows of the label ``ignore_index`` weigh nothing. As each other's positives they are the others' negatives alone.
    """
    dtype, weights = sum_dtype(z.dtype), None
    if ignore_index is not None and labels is not None:
        weights = (labels != ignore_index).to(dtype)
    if class_weights is not None:
        if labels is None:
            raise ValueError("class_weights needs labels, one class a row, and got none")
        of_classes = max(1, class_weights.numel()) if isinstance(class_weights, Tensor) else 1
        _checks.vector("class_weights", class_weights, of_classes, z.device, floating=True)
        classes = labels if ignore_index is None else labels.masked_fill(labels == ignore_index, 0)
        _checks.within("labels", classes, 0, of_classes)
        _checks.not_negative("class_weights", class_weights)
        of_class = torch.nn.functional.embedding(classes, class_weights[:, None].to(dtype))[:, 0]
        weights = of_class if weights is None else weights * of_class
    weights = None if weights is None else weights.repeat(anchors // max(1, samples))
    if anchor_weights is not None:
        of_samples = isinstance(anchor_weights, Tensor) and anchor_weights.shape == (samples,)
        _checks.vector("anchor_weights", anchor_weights, samples if of_samples else anchors, z.device, floating=True)
        _checks.not_negative("anchor_weights", anchor_weights)
        of_anchor = anchor_weights.to(dtype).repeat(anchors // max(1, len(anchor_weights)))
        weights = of_anchor if weights is None else weights * of_anchor
    return weights


def reduce(losses: Tensor, reduction: Reduction, weights: Tensor | None = None, ranks: Ranks | None = None) -> Tensor:
    """Of losses [N], each times its weight; the mean is over the weights, which may be all 0 and may be bools: who counts in the mean.

    Over all ranks' losses where there are several, the same on each.
    """
    if weights is not None:
        losses = losses * weights
    if reduction == "none":
        return losses
    if ranks is not None:
        weight = losses.new_full((), len(losses)) if weights is None else weights.sum(dtype=losses.dtype)
        sums: Tensor = ranks.sum(torch.stack([losses.sum(), weight]))  # and all ranks' weights
        return sums[0] if reduction == "sum" else sums[0] / torch.where(sums[1] == 0, 1, sums[1])
    if reduction == "sum":
        return losses.sum()
    if weights is None:
        return losses.mean()
    total = weights.sum()
    return losses.sum() / torch.where(total == 0, 1, total)


def check_options(temperature: float | Tensor, reduction: object, queue: object = None) -> None:
    """Those that every loss has; a queue where it takes one."""
    _checks.temperature("temperature", temperature)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    if queue is not None and not isinstance(queue, MemoryQueue):
        raise TypeError(f"queue must be a fastsupcon.MemoryQueue or None, got {type(queue).__name__}")


def check_backend(backend: object) -> None:
    """Known, as a module is made; whether it serves is known when there are rows."""
    _checks.one_of("backend", backend, ("auto", *BACKENDS))


def refuse_lone_anchors(paired: Tensor, needed: str, ranks: Ranks | None = None) -> None:
    """For lone_anchors="error". On a GPU this waits for the device; under torch.compile it is an assertion on it.

    Of several ranks all raise where one has such an anchor.
    """
    message = f"lone_anchors='error': every anchor must have {needed}"
    if ranks is not None:
        lone, anchors = ranks.sum_here(torch.stack([(~paired).sum(), torch.ones_like(paired).sum()])).tolist()
        if lone:
            raise ValueError(f"{message}, got {lone} of {anchors} on all ranks without one (labels)")
        return
    if torch.compiler.is_compiling():
        torch._assert_async(paired.all(), message)
        return
    values = _checks.readable(paired)
    paired = paired if values is None else values
    if not paired.all():
        raise ValueError(f"{message}, got {int((~paired).sum())} of {paired.numel()} without one (labels or mask)")


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result", covariant=True)


class _Module(Protocol[_Arguments, _Result]):
    """For type checkers."""

    def forward(self, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result: ...


class _Uncopied:
    """A process group in a module that is being copied."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> _Uncopied:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a loss with a process group cannot be pickled: save its state_dict, or set its group to None first")


class HasGroup(nn.Module):
    """A module that may hold a process group as ``group``. Its deep copies hold the same; pickling one is an error."""

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy, which cannot copy a process group, nor needs to."""
        state = self.__dict__.copy()
        if state.get("group") is not None:
            state["group"] = _Uncopied(state["group"])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state.get("group"), _Uncopied):
            state["group"] = state["group"].group
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's


class Loss(HasGroup):
    """A loss function with its options held as attributes. A temperature that is an nn.Parameter is registered, and learned.

    Options that are other tensors, a temperature or weights, are buffers, which are not saved. They go where the module goes and keep
    their dtype and their values: a temperature of 0.07 would be 0.0698 in a module brought to bfloat16.

    Subclasses annotate their options: to a type checker, an attribute of a module is otherwise a tensor or a module. And they say that
    their call is their forward: mypy and pyright know it from here, but not jedi, which completes in IPython and many editors.
    """

    if TYPE_CHECKING:  # nn.Module says of its call that it takes and gives anything; a loss takes and gives what its forward does

        def __call__(self: _Module[_Arguments, _Result], *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result: ...

    def __init__(self, **options: Any) -> None:
        check_backend(options["backend"])
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Loss:
        were = {name: self._buffers[name] for name in self._names if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        for name, was in were.items():
            now = self._buffers[name]
            if was is not None and now is not None and not was.is_meta:  # on the meta device it would lose what to_empty() brings back
                self._buffers[name] = was if now.is_meta else was.to(now.device)
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError("torch.jit.script cannot read fastsupcon's losses: use torch.compile or torch.export")

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        options = {name: value for name, value in self.options.items() if not isinstance(value, nn.Module)}  # those are shown as children
        if options.get("group", True) is None:  # the others say nothing then
            options = {name: value for name, value in options.items() if name not in ("group", "across", "sharded")}
        return ", ".join(f"{name}={_shown(value)}" for name, value in options.items())


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    has_value = value.numel() == 1 and type(value) in (Tensor, nn.Parameter) and not value.is_meta
    text = f"{value.item():.6g}" if has_value else f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"learned({text})" if isinstance(value, nn.Parameter) else text
