"""What is measured (a case: a row of the tests' table of losses, or an operator, at one size) and who is measured (the contenders)."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsupcon import functional
from fastsupcon.backends import BACKENDS
from tests import naive
from tests.table import LOSSES, Row, unit

TEMPERATURE = 0.1
CLASSES = 8  # where there are labels but no prototypes
NOT_ASKED = "not asked for at this size"
FITS = {"cpu": 0.5, "cuda": 0.75}  # the share of the memory that a contender's matrices may take


def _self(a: Tensor, *, temperature: float, backend: str) -> Tensor:
    return functional.self_logsumexp(a, scale=1 / temperature, backend=backend).mean()


def _plain_self(a: Tensor, *, temperature: float) -> Tensor:
    return (a / temperature @ a.T).fill_diagonal_(-torch.inf).logsumexp(1).mean()


def _cross(a: Tensor, b: Tensor, *, temperature: float, backend: str) -> Tensor:
    return functional.cross_logsumexp(a, b, scale=1 / temperature, backend=backend).mean()


def _plain_cross(a: Tensor, b: Tensor, *, temperature: float) -> Tensor:
    return (a / temperature @ b.T).logsumexp(1).mean()


def _clip(a: Tensor, b: Tensor, *, temperature: float, backend: str) -> Tensor:
    return functional.info_nce_loss(a, b, temperature=temperature, normalize=False, backend=backend)


def _plain_clip(a: Tensor, b: Tensor, *, temperature: float) -> Tensor:
    logits, keys = a / temperature @ b.T, torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, keys) + F.cross_entropy(logits.T, keys)) / 2


def _two_sides(samples: int, depth: int, columns: int) -> tuple[Tensor, Tensor]:
    return unit(samples, depth), unit(columns, depth)


OPERATORS = {
    "self": Row(_self, _plain_self, lambda samples, depth: (unit(samples, depth),), None),
    "cross": Row(_cross, _plain_cross, _two_sides, None),
    "clip": Row(_clip, _plain_clip, _two_sides, None),  # both directions of CLIP's loss, from one pass over the logits
}
ROWS = LOSSES | OPERATORS


@dataclass(frozen=True)
class Case:
    """One problem. ``only`` restricts it to some contenders."""

    loss: str  # a name in ROWS
    rows: int  # all views of all samples
    depth: int
    prototypes: int = 0  # of all classes; of the operators cross and clip the columns
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"
    only: tuple[str, ...] = field(default=(), compare=False)

    @property
    def options(self) -> dict[str, object]:
        return ROWS[self.loss].options | {"temperature": TEMPERATURE}

    def inputs(self) -> tuple[Tensor | None, ...]:
        """In the table's shapes, the same bits in every process: rows of normal noise, of unit length where the loss does not see to it."""
        row, generator = ROWS[self.loss], torch.Generator().manual_seed(0)
        classes = self.prototypes // self.options.get("prototypes_per_class", 1)
        sizes = (self.depth, classes) if classes else (self.depth,)
        as_they_are = self.loss in OPERATORS or not self.options.get("normalize", True)

        def filled(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            if not x.is_floating_point():
                return torch.arange(len(x), device=self.device) % (classes or CLASSES)
            if x.dtype != torch.float64:  # the weights of a mask
                return torch.rand(x.shape, generator=generator).to(self.device)
            noise = torch.randn(x.shape, generator=generator)
            return (F.normalize(noise, dim=-1) if as_they_are else noise).to(self.device, getattr(torch, self.dtype)).requires_grad_()

        with torch.device("meta"):
            views = row.inputs(1, *sizes)[0].numel() // self.depth
            shapes = row.inputs(self.rows // views, *sizes)
        return tuple(map(filled, shapes))

    def flops(self, mode: str) -> int:
        """The least a kernel needs that keeps nothing of the matrix (a multiply-add is 2): the floor of NOTES.md."""
        meets = ROWS[self.loss].meets
        # every logit once; and once more, with the two products of its gradients
        columns = (2 if mode == "forward" else 8) * self.rows * (self.rows if meets == "others" else self.prototypes) * self.depth
        if columns and meets != "both":
            return columns
        square = self.rows**2 * self.depth  # symmetric: the forward computes half of the matrix
        backward = 3 if self.device == "cpu" else 4  # half the matrix and two products; on a GPU, free of atomics, all of it and one
        return columns + (square if mode == "forward" else (1 + backward) * square)


Loss = Callable[..., Tensor]  # of Case.inputs()


@dataclass(frozen=True)
class Contender:
    build: Callable[[Case], Loss]
    absent: Callable[[Case], str | None] = lambda case: None  # why it cannot run here
    environment: dict[str, str] = field(default_factory=dict)  # of its process
    compiles: bool = False  # what its first step at a shape keeps is the compiler's, not the loss's
    matrices: float = 0  # N x N (N x C) matrices of the rows' dtype alive at the peak, as measured; decides only whether it fits
    another_loss: str | None = None  # why its value cannot be checked against the case's loss


def _naive(case: Case) -> Loss:
    return partial(ROWS[case.loss].naive, **case.options)


def _ours(backend: str) -> Contender:
    def build(case: Case) -> Loss:
        return partial(ROWS[case.loss].ours, **case.options, backend=backend)

    return Contender(build, lambda case: BACKENDS[backend].unusable(torch.device(case.device), getattr(torch, case.dtype), case.depth))


def _metric_learning(case: Case) -> Loss:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)


def _from_lse(lse: Callable[[Tensor], Tensor]) -> Loss:
    """SCL from another project's log-sum-exp over j != i and class sums: how its kernel would serve this loss."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        z = naive.unit(features)
        sums = torch.zeros(CLASSES, z.shape[1], device=z.device).index_add(0, labels, z.float())
        count = labels.new_zeros(CLASSES).scatter_add_(0, labels, torch.ones_like(labels))[labels] - 1  # bincount would wait for the GPU
        positives = (z * (sums[labels] - z)).sum(1) / count
        return (lse(z) - positives / TEMPERATURE).mean()

    return loss


def _flex_attention(case: Case) -> Loss:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    attention = torch.compile(flex_attention) if case.device == "cuda" else flex_attention

    def lse(z: Tensor) -> Tensor:
        def others(score, batch, head, row, column):
            return torch.where(row == column, -torch.inf, score)

        rows = z[None, None]
        values = rows[..., :16].detach()  # the narrowest it takes: only the log-sum-exp is asked for
        _, aux = attention(rows, rows, values, score_mod=others, scale=1 / TEMPERATURE, return_aux=AuxRequest(lse=True))
        return aux.lse[0, 0]

    return _from_lse(lse)


def _linear_cross_entropy(case: Case) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # in chunks, as torch chooses them for this device and dtype
    return lambda z, labels, prototypes: F.linear_cross_entropy(z / TEMPERATURE, prototypes, labels, options=options)


def _no_linear_cross_entropy(case: Case) -> str | None:
    if case.loss != "psc all":
        return "serves one positive that stays in the denominator"
    return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} has none; 2.13 does"


def _cut_cross_entropy(case: Case) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    if case.loss == "psc all":
        return lambda z, labels, prototypes: linear_cross_entropy(z / TEMPERATURE, prototypes, labels, filter_eps=None)

    def lse(z: Tensor) -> Tensor:
        itself = (z * z).sum(1).float() / TEMPERATURE
        rows = z * TEMPERATURE**-0.5
        cross_entropy = linear_cross_entropy(rows, rows, torch.arange(len(z), device=z.device), reduction="none", filter_eps=None)
        return cross_entropy + itself + torch.log1p(-torch.exp(-cross_entropy))  # the self pair leaves the sum afterwards

    return _from_lse(lse)


def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_inf_loss

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        z = naive.unit(features)
        return cal_inf_loss(z / TEMPERATURE, z, head_dim=min(case.depth, 256))

    return loss


def _memeff(case: Case) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    return MemoryEfficientCLIPLoss(TEMPERATURE, normalized_inputs=True, stable=False)


def _needs(package: str, *losses: str) -> Callable[[Case], str | None]:
    def absent(case: Case) -> str | None:
        if case.loss not in losses:
            return f"serves {' and '.join(losses)} alone"
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return absent


CONTENDERS: dict[str, Contender] = {
    "naive": Contender(_naive, matrices=9),
    "naive, warm heap": Contender(  # glibc keeps freed matrices, so that their pages are not faulted in anew at every step
        _naive,
        lambda case: None if sys.platform == "linux" else "concerns glibc's heap",
        {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(64 << 20)},
        matrices=9,
    ),
    "torch.compile": Contender(lambda case: torch.compile(_naive(case), dynamic=False), compiles=True, matrices=3),
    "pytorch-metric-learning": Contender(_metric_learning, _needs("pytorch_metric_learning", "scl"), matrices=13),
    "F.linear_cross_entropy": Contender(_linear_cross_entropy, _no_linear_cross_entropy),
    "FlexAttention": Contender(_flex_attention, _needs("torch", "scl"), compiles=True),
    "cut-cross-entropy": Contender(_cut_cross_entropy, _needs("cut_cross_entropy", "scl", "psc all")),
    "inf-cl": Contender(_inf_cl, _needs("inf_cl", "scl"), another_loss="InfoNCE with one positive, which stays in the sum"),
    "memeff": Contender(_memeff, _needs("memeff", "clip")),
    "chunked": _ours("chunked"),
    "cpu": _ours("cpu"),
    "triton": _ours("triton"),
    "cuda": _ours("cuda"),
}
PRESETS = {
    "cpu": ("naive", "naive, warm heap", "torch.compile", "pytorch-metric-learning", "F.linear_cross_entropy", "chunked", "cpu"),
    "gpu": tuple(name for name in CONTENDERS if name not in ("naive, warm heap", "cpu")),
}


def absent(name: str, case: Case) -> str | None:
    """Why this contender has no part in this case, or None."""
    contender = CONTENDERS[name]
    if case.only and name not in case.only:
        return NOT_ASKED
    if reason := contender.absent(case):
        return reason
    if (bytes_needed := need(name, case)) > FITS[case.device] * memory(case.device):
        return f"needs about {bytes_needed / 2**30:.0f} GiB, more than {FITS[case.device]:.0%} of this machine's memory"
    return None


def need(name: str, case: Case) -> float:
    """Bytes of its matrices, as far as known: of what is no contender too."""
    matrices = CONTENDERS[name].matrices if name in CONTENDERS else 0
    return matrices * case.rows * (case.prototypes or case.rows) * getattr(torch, case.dtype).itemsize


def memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def at_once(names: Sequence[str], case: Case) -> list[list[str]]:
    """The names in groups whose matrices fit into the memory together."""
    groups: list[list[str]] = [[]]
    for name in names:
        if sum(need(other, case) for other in (*groups[-1], name)) > FITS[case.device] * memory(case.device):
            groups.append([])
        groups[-1].append(name)
    return groups
