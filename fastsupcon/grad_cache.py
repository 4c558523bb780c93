"""Batches whose activations do not fit: the encoder takes them in chunks, twice (GradCache, Gao et al. 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from . import _checks

_Output = TypeVar("_Output")


def grad_cache(encoder: Callable[..., _Output], *inputs: Any, chunk: int, **options: Any) -> _Output:
    """``encoder(*inputs, **options)`` while only the activations of ``chunk`` rows are held: about chunk / N of the memory.

    The rows are embedded in chunks and without a graph. What comes out is the embeddings of the whole batch, for any loss: when the
    loss's gradient of them arrives in the backward, each chunk is embedded again, with a graph, and takes its part of the gradient on to
    the parameters (Gao et al. 2021, arXiv 2101.06983, section 3). It costs one forward more. Losses, their learned parameters, sums of
    losses, GradScaler and gradient accumulation need no change, as nothing but the encoder's call is replaced.

    The gradient is that of ``torch.cat([encoder(part) for part in images.split(chunk)])``. So a batch norm in training mode takes the
    statistics of a chunk. Random numbers (dropout), autocast and all buffers are in the second pass what they were in the first, and
    running statistics go on once. Other state that a forward changes, as a counter in Python, changes twice.

    Under DistributedDataParallel hand in the wrapped module: its gradients are averaged once, in the last chunk's backward, and the
    number of rows may differ from process to process. Where the forward itself communicates (fully_shard, SyncBatchNorm), each chunk
    does, so all processes need the same number of chunks. Hooks on parameters see each chunk's gradient. torch.compile breaks its graph
    here and goes on inside of the encoder.

    Args:
        encoder: an nn.Module, or a method of one: what belongs to it (buffers, DistributedDataParallel) has to be found. Of each row it
            makes a row, of every output.
        *inputs: tensors [N, ...] that are cut along their first dimension; also in tuples, lists and dicts. A tensor of no dimensions
            and what is no tensor goes to every chunk. Gradients reach inputs that require them.
        chunk: rows that the encoder takes at once. The last chunk may have fewer.
        **options: as ``inputs``, handed on by name.

    Returns:
        What the encoder returns, with N rows: a tensor, or tensors in tuples, lists and dicts.

    Raises:
        TypeError, ValueError: an argument, or what the encoder returned, is not of this form; the text names it.
        RuntimeError: in the backward, where parameters were changed in place since the forward, where torch.autograd.grad or
            backward(inputs=...) ask for gradients (those of the parameters are added to their ``grad``), and for a second derivative.

    Examples:
        >>> network = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Dropout(0.1), nn.Linear(2048, 128))
        >>> criterion = SupConLoss(temperature=0.1, normalize=True)
        >>> features = grad_cache(network, images, chunk=64)  # instead of network(images); images [4096, 512]
        >>> criterion(features, labels).backward()

        Two views of a sample are rows of one batch; two encoders, as CLIP's, are two calls, whose chunks may differ:

        >>> rows = grad_cache(network, views.flatten(0, 1), chunk=64)  # views [B, V, ...]
        >>> criterion(rows.unflatten(0, views.shape[:2]), labels).backward()
        >>> a = grad_cache(clip.encode_image, images, chunk=64)
        >>> b = grad_cache(clip.encode_text, texts, chunk=256)
        >>> InfoNCELoss(temperature=0.07, symmetric=True)(a, b).backward()
    """
    module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"encoder must be an nn.Module or a method of one, got {type(encoder).__name__}")
    _checks.size("chunk", chunk)
    leaves, structure = tree_flatten((inputs, options))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    lengths = sorted({len(x) for x in tensors if x.ndim})
    if len(lengths) != 1:
        raise ValueError(f"inputs must be tensors of one number of rows, got {' and '.join(map(str, lengths)) or 'no tensor with rows'}")
    embed = _Chunks(encoder, leaves, structure, lengths[0], chunk)
    state = _State(module, tensors)
    learned = torch.empty(0, requires_grad=bool(state.parameters))
    outputs = _TwoPasses.apply(embed, state, learned, *tensors)  # type: ignore[no-untyped-call]  # torch's
    result: _Output = tree_unflatten(list(outputs), embed.form)
    return result


class _TwoPasses(torch.autograd.Function):
    """Takes, beside the inputs, an empty tensor that requires grad where a parameter does: the outputs require it then."""

    @staticmethod
    def forward(ctx: Any, embed: _Chunks, state: _State, learned: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.embed, ctx.state, ctx.random = embed, state, []
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        chunks, versions = [], _versions(tensors)
        for rows in embed.rows:
            ctx.random.append(state.random())
            chunks.append(embed([_cut(x, rows) for x in tensors], rows))
        if _versions(tensors) != versions:
            raise ValueError("encoder must not write to its inputs, which it takes twice, and did")
        ctx.versions = _versions(state.parameters)
        torch.clear_autocast_cache()  # it holds weights that were cast without a graph, and would hand them to who needs one
        outputs = tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.mark_non_differentiable(*(z for z in outputs if not (z.is_floating_point() or z.is_complex())))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("grad_cache adds to the parameters' grad: call loss.backward() without inputs=, and not torch.autograd.grad")
        if _versions(ctx.state.parameters) != ctx.versions:
            raise RuntimeError("grad_cache embeds again in the backward: parameters must not be changed in place before, and were")
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        totals = [torch.zeros_like(x) if need else None for x, need in zip(tensors, needed, strict=True)]
        with ctx.state.as_in_first_pass():
            for rows, random in zip(ctx.embed.rows, ctx.random, strict=True):
                parts = [_cut(x, rows).detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=True)]
                ctx.state.set_random(random)
                with ctx.state.averaged(last=rows is ctx.embed.rows[-1]):
                    with torch.enable_grad(), ctx.state.autocast():
                        outputs = ctx.embed(parts, rows)
                    pairs = [(z, g[rows]) for z, g in zip(outputs, grads, strict=True) if g is not None and z.requires_grad]
                    if pairs:
                        torch.autograd.backward([z for z, _ in pairs], [g for _, g in pairs])
                for x, total in zip(parts, totals, strict=True):
                    if total is not None and x.grad is not None:
                        _cut(total, rows).add_(x.grad)
        return None, None, None, *totals


def _cut(x: Tensor, rows: slice) -> Tensor:
    return x[rows] if x.ndim else x


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """They rise where somebody writes to the tensors. Those of inference mode have none."""
    return [x._version for x in tensors if not x.is_inference()]


class _Chunks:
    """The encoder's call over some of the rows, from tensors to tensors."""

    def __init__(self, encoder: Callable[..., Any], leaves: list[Any], structure: TreeSpec, length: int, chunk: int) -> None:
        self.encoder, self.structure = encoder, structure
        self.others = [None if isinstance(x, Tensor) else x for x in leaves]  # the graph keeps the tensors
        self.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        self.rows = [slice(i, min(i + chunk, length)) for i in range(0, max(1, length), chunk)]  # one of no rows, where others wait for it
        self.form: TreeSpec  # of what the encoder returns

    def __call__(self, tensors: Sequence[Tensor], rows: slice) -> list[Tensor]:
        leaves = list(self.others)
        for place, x in zip(self.places, tensors, strict=True):
            leaves[place] = x
        inputs, options = tree_unflatten(leaves, self.structure)
        outputs, self.form = tree_flatten(self.encoder(*inputs, **options))
        for z in outputs:
            if not isinstance(z, Tensor) or z.ndim == 0 or len(z) != rows.stop - rows.start:
                got = f"a tensor of shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"encoder must return tensors of a row for each of the {rows.stop - rows.start} that it takes, got {got}")
        return outputs


class _State:
    """What the second pass must find as the first one did, beside the parameters."""

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.buffers = [buffer for part in module.modules() if part.training for buffer in part.buffers(recurse=False)]
        self.values = [buffer.clone() for buffer in self.buffers]
        devices = {x.device for x in (*tensors, *module.parameters(), *module.buffers())}
        self.devices = [device for device in devices if device.type not in ("cpu", "meta")]
        self.autocasts = [
            torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in {"cpu", *(device.type for device in self.devices)}
        ]
        self.wrapped = [part for part in module.modules() if isinstance(part, DistributedDataParallel)]
        if any(part.static_graph for part in self.wrapped):
            raise ValueError("encoder must not be DistributedDataParallel with static_graph=True: its first backward averages always")
        self.averages = [part.require_backward_grad_sync for part in self.wrapped]  # False in no_sync()

    def random(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(device).get_rng_state(device) for device in self.devices)]

    def set_random(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    @contextlib.contextmanager
    def as_in_first_pass(self) -> Iterator[None]:
        """Buffers are rewound; they and the random numbers go on afterwards from where they are."""
        random, values = self.random(), [buffer.clone() for buffer in self.buffers]
        try:
            self._write(self.values)
            yield
        finally:
            self._write(values)
            self.set_random(random)

    def _write(self, values: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.data.copy_(value)  # past the version counter: a graph that keeps the buffer finds its value again

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for autocast in self.autocasts:
                stack.enter_context(autocast)
            yield

    @contextlib.contextmanager
    def averaged(self, last: bool) -> Iterator[None]:
        """Over the processes, by DistributedDataParallel, in the last chunk alone."""
        before = [part.require_backward_grad_sync for part in self.wrapped]
        try:
            for part, average in zip(self.wrapped, self.averages, strict=True):
                part.require_backward_grad_sync = last and average
            yield
        finally:
            for part, average in zip(self.wrapped, before, strict=True):
                part.require_backward_grad_sync = average
