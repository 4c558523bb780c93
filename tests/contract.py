"""The contract of a backend (fastsupcon/backends), as cases to hold any object with its functions to.

The truth is plain PyTorch in float64, differentiated by autograd; it shares no code with the package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsupcon.backends import reference
from fastsupcon.problem import Line, Pairs, Side

ALL = ("all", "different", "equal", "similarity", "count")
SCL = ("all", "similarity", "count")
PSC = ("different", "similarity", "count")


@dataclass(frozen=True)
class Case:
    n: int
    m: int | None = None  # None: the self shape
    d: int = 16
    dtype: torch.dtype = torch.float32
    scale: float = 3.0
    learned: bool = False  # the scale is a 0-d tensor
    unit: bool = True
    bias: bool = False
    keys: str = ""  # "", "few", "int64"
    own: bool = False
    length: float = 1.0  # of the rows, times a factor of 0.5 to 2 each
    long_row: float = 1.0  # so much longer is the last row,
    long_column: float = 1.0  # and the last column of a cross shape
    rows: tuple[str, ...] = SCL
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        shape = f"{self.n}x{self.d}" if self.m is None else f"{self.n}x{self.m}x{self.d}"
        flags = [name for name in ("learned", "unit", "bias", "own") if getattr(self, name)]
        flags += [f"long{x:g}" for x in (self.long_row, self.long_column) if x != 1]
        names = "".join(name[0] for name in self.rows) + ("|" + "".join(name[0] for name in self.columns) if self.columns else "")
        return "-".join([shape, str(self.dtype)[6:], f"{self.scale:g}", f"len{self.length:g}", f"keys={self.keys}", *flags, names])


def problem(case: Case, device: torch.device) -> Pairs:
    generator = torch.Generator().manual_seed(case.n * 7919 + (case.m or 0) * 31 + case.d)

    def rows(count: int, longer: float) -> Tensor:
        x = torch.nn.functional.normalize(torch.randn(count, case.d, generator=generator, dtype=torch.float64))
        x[-1] *= longer
        return (x * case.length * (0.5 + 1.5 * torch.rand(count, 1, generator=generator, dtype=torch.float64))).to(device, case.dtype)

    def keys(count: int) -> Tensor | None:
        if not case.keys:
            return None
        few = torch.randint(0, 5, (count,), generator=generator)
        far = torch.tensor([-(2**63), 2**63 - 1, 0, 2**32, -1])  # equal in one half, different in the other
        return (few if case.keys == "few" else far[few]).to(device)

    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    m = case.m
    own = None
    if case.own:
        own = torch.randint(-1, m, (case.n,), generator=generator).to(device)
    return Pairs(
        rows(case.n, case.long_row),
        None if m is None else rows(m, case.long_column),
        torch.tensor(case.scale, dtype=wide, device=device) if case.learned else case.scale,
        case.unit,
        torch.randn(m or case.n, generator=generator).to(device, wide) if case.bias else None,
        keys(case.n),
        None if m is None else keys(m),
        own,
    )


def incoming(names: tuple[str, ...], values: Tensor) -> Tensor:
    """Gradients for the quantities, 0 where a log-sum is -inf or there is no pair of equal keys to speak of."""
    grads = torch.randn(values.shape, generator=torch.Generator().manual_seed(5)).to(values) / values.shape[1]
    return torch.where(values.isinf(), 0, grads)


class Truth:
    """Quantities and gradients of a problem in float64."""

    def __init__(self, pairs: Pairs, case: Case) -> None:
        def leaf(x):
            return x.detach().double().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

        self.rows, self.columns, scale, unit, self.bias, row_keys, column_keys, own = (leaf(x) for x in pairs)
        self.scale = scale if isinstance(scale, Tensor) else torch.tensor(float(scale), dtype=torch.float64, requires_grad=True)
        a, b = self.rows, self.rows if self.columns is None else self.columns
        if unit:
            a, b = (x / torch.where(x.norm(dim=1, keepdim=True) == 0, 1, x.norm(dim=1, keepdim=True)) for x in (a, b))
        self.dots = a @ b.T
        s = self.dots * self.scale.to(a.device)
        t = s if self.bias is None else s + self.bias
        pair = torch.ones_like(s, dtype=torch.bool)
        if self.columns is None:
            pair.fill_diagonal_(False)
        elif own is not None:
            pair = own[:, None] != torch.arange(len(b), device=own.device)
        same = torch.zeros_like(pair) if row_keys is None else row_keys[:, None] == (row_keys if column_keys is None else column_keys)

        def side(names, dim):
            over = {"all": pair, "different": pair & ~same, "equal": pair & same}
            linear = {"similarity": torch.where(over["equal"], s, 0).sum(dim), "count": over["equal"].sum(dim).double()}
            return [linear[q] if q in linear else t.masked_fill(~over[q], -torch.inf).logsumexp(dim) for q in names]

        self.similarities = s
        self.largest = float(s.detach().masked_fill(~pair, 0).abs().max())
        self.row_values, self.column_values = side(case.rows, 1), side(case.columns, 0)

    def gradients(self, row_grads: Tensor, column_grads: Tensor) -> list[Tensor | None]:
        total = torch.zeros((), dtype=torch.float64)
        for values, grads in ((self.row_values, row_grads), (self.column_values, column_grads)):
            for value, grad in zip(values, grads, strict=True):
                total = total + (torch.where(value.isinf(), 0, value) * grad.double()).sum().cpu()
        leaves = [x for x in (self.rows, self.columns, self.bias, self.scale) if x is not None]
        # Sums of |w_ij|, and of |w_ij a^_i . b^_j|: what the rounding of a sum is relative to.
        self.row_terms = self.column_terms = self.scale_terms = 0.0
        if not total.requires_grad:
            return [None if x is None else torch.zeros_like(x) for x in (self.rows, self.columns, self.bias, self.scale)]
        *found, weights = torch.autograd.grad(total, [*leaves, self.similarities], allow_unused=True, materialize_grads=True)
        terms_of_rows, terms_of_columns = (weights.abs().sum(dim) for dim in (1, 0))
        if self.columns is None:
            terms_of_rows = terms_of_rows + terms_of_columns
        self.row_terms, self.column_terms = float(terms_of_rows.norm()), float(terms_of_columns.norm())
        self.scale_terms = float((weights * self.dots.detach()).abs().sum())
        found = iter(found)
        return [None if x is None else next(found) for x in (self.rows, self.columns, self.bias, self.scale)]


def error(got: Tensor, want: Tensor) -> float:
    """Frobenius, relative."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def run(backend, pairs: Pairs, case: Case):
    """Quantities of rows and columns, their incoming gradients, and the gradients (rows, columns, bias, scale) that the backend makes."""
    terms = backend.forward(pairs, case.rows, case.columns, False)
    row_grads, column_grads = incoming(case.rows, terms.rows), incoming(case.columns, terms.columns)
    needs = (True, pairs.columns is not None, pairs.bias is not None, isinstance(pairs.scale, Tensor))
    sides = Side(case.rows, terms.rows, row_grads), Side(case.columns, terms.columns, column_grads)
    return terms, row_grads, column_grads, backend.backward(pairs, *sides, terms.norms, terms.kept, needs)


def check(backend, case: Case, device: torch.device) -> None:
    """Values and gradients within twice the error of plain fp32 (f64) arithmetic on the same rows, and a few roundings of their type.

    A GPU's tensor cores truncate at each addition, of 16 products each: half an ulp on the average, of a sum that is half of the whole on
    the average. And its kernels may round a logit one way in the forward and another way in the backward, whose weight exp(logit - value)
    is then off by as much: half an ulp of the largest logit.
    """
    truncated, rounded_apart = (case.d / 16 / 4, 1 / 2) if device.type == "cuda" else (0, 0)
    pairs = problem(case, device)
    found, row_grads, column_grads, gradients = run(backend, pairs, case)
    truth = Truth(pairs, case)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    plain_pairs = pairs._replace(rows=pairs.rows.to(wide), columns=None if pairs.columns is None else pairs.columns.to(wide))
    plain_found, _, _, plain = run(reference, plain_pairs, case)
    eps, fine = torch.finfo(case.dtype).eps, torch.finfo(wide).eps
    for names, got, base, want in (
        (case.rows, found.rows, plain_found.rows, truth.row_values),
        (case.columns, found.columns, plain_found.columns, truth.column_values),
    ):
        for name, g, p, w in zip(names, got, base, want, strict=True):
            assert g.dtype == wide
            assert torch.equal(g.isneginf(), w.isneginf()), name
            finite = ~w.isneginf()
            allowed = 2 * (p.double() - w)[finite].abs().max() + (8 + truncated) * fine * (w[finite].abs().max() + 1) if finite.any() else 0
            off = (g.double() - w)[finite].abs().max() if finite.any() else 0
            assert off <= allowed, f"{name}: off by {off:.2e}, allowed {allowed:.2e}"
    # In float64 the truth has the roundings of its own logits, by which the weights are off.
    shared = 4 * fine * float(truth.similarities.detach().abs().max()) if case.dtype == torch.float64 else 0
    shared += rounded_apart * fine * truth.largest
    expected = truth.gradients(row_grads, column_grads)
    # The terms of each sum, an ulp or two of which are lost where they cancel: rows of unit length in one dimension have no gradient.
    of_rows = abs(case.scale) * (1 / case.length if case.unit else case.length)
    terms = (of_rows * truth.row_terms, of_rows * truth.column_terms, truth.column_terms, 4 * truth.scale_terms)
    for name, got, base, want, term in zip(("rows", "columns", "bias", "scale"), gradients, plain, expected, terms, strict=True):
        if got is None:
            assert base is None
            continue
        rounded = eps if name in ("rows", "columns") else fine
        allowed = 2 * (base.double() - want).norm() + (rounded / 2 + shared) * want.norm() + fine * (8 * want.norm()).clamp_min(2 * term)
        off = (got.double() - want).norm()
        assert off <= allowed, f"gradient of {name}: off by {off:.2e}, allowed {allowed:.2e}, of {want.norm():.2e}"


def check_loss(backend, case: Case, line: Line, device: torch.device, keep: bool = False) -> None:
    """A backend's own loss, and its gradients, on rows of which three are lone."""
    pairs = problem(case, device)
    pairs.row_keys[:3] = torch.tensor([100, 101, 102], device=device)
    wide = pairs._replace(**{name: x.double() for name, x in pairs._asdict().items() if isinstance(x, Tensor) and x.is_floating_point()})
    values, nothing, norms, kept = reference.forward(wide, case.rows, (), False)
    want = reference.line(case.rows, values, line)
    size = 1000 if line.reduction == "mean" else 10  # a gradient of fp16 has to hold the result
    grad = size * (1 + torch.rand(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).to(device)
    sides = Side(case.rows, values, reference.line_backward(case.rows, values, grad, line)), Side((), nothing, nothing)
    needs = (True, case.m is not None, case.bias, case.learned)
    expected = reference.backward(wide, *sides, norms, kept, needs)
    loss, mine = backend.loss(pairs, case.rows, line, keep)
    fine = 1e-12 if case.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss.double(), want, rtol=fine, atol=fine, equal_nan=True)
    found = backend.loss_backward(pairs, case.rows, line, mine, grad.to(loss.dtype), needs)
    for name, got, exact, need in zip(found._fields, found, expected, needs, strict=True):
        assert (got is not None) == need
        if not need:
            continue
        if exact.isnan().any():  # of lone rows, to whatever they meet
            assert torch.equal(got.isnan(), exact.isnan()), name
            continue
        allowed = 2 * fine + (torch.finfo(case.dtype).eps if name in ("rows", "columns") else 0)
        assert error(got, exact) <= allowed, f"gradient of {name}: off by {error(got, exact):.2e}, allowed {allowed:.2e}"


def check_some(backend, case: Case, device: torch.device, some: int = 64) -> None:
    """The same for a self shape too large for its matrix in float64: ``some`` of its rows against all."""
    pairs = problem(case, device)
    terms, row_grads, _, gradients = run(backend, pairs, case)
    picked = torch.arange(some, device=device) * (case.n // some)
    keys = pairs.row_keys
    block = Pairs(pairs.rows[picked].double(), pairs.rows.double(), case.scale, case.unit, None, keys[picked], keys, picked)
    exact, _, norms, kept = reference.forward(block, case.rows, (), False)
    off = (terms.rows[:, picked].double() - exact).abs().max()
    assert off <= 1e-5 * (exact.abs().max() + 1), f"values: off by {off:.2e}"
    # What the picked rows give as columns of all others takes those rows' own log-sums.
    sides = Side(case.rows, exact, row_grads[:, picked].double()), Side(case.rows, terms.rows.double(), row_grads.double())
    expected = reference.backward(block, *sides, norms, kept, (True, False, False, False)).rows
    off, allowed = error(gradients.rows[picked], expected), torch.finfo(case.dtype).eps + 1e-5
    assert off <= allowed, f"gradient of rows: off by {off:.2e}, allowed {allowed:.2e}"


def check_bits(backend, case: Case, device: torch.device) -> None:
    """Values and gradients of 20 runs are the same to the bit."""
    pairs, first = problem(case, device), None
    for turn in range(20):
        terms, _, _, gradients = run(backend, pairs, case)
        first = first or (terms.rows, gradients.rows)
        assert torch.equal(terms.rows, first[0]), f"values differ in turn {turn}"
        assert torch.equal(gradients.rows, first[1]), f"gradients differ in turn {turn}"


F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16

#: fp32 cases, ragged on purpose; :func:`cases` adds the other dtypes.
CASES = [
    *(Case(n, d=d, keys="few") for n, d in ((2, 3), (9, 5), (64, 16), (65, 1), (100, 72), (257, 129))),
    Case(1),
    Case(1, 1, rows=ALL, keys="few"),
    Case(70, rows=("all",)),
    Case(70, rows=ALL, keys="int64"),
    Case(70, rows=("different",), keys="few"),
    Case(70, rows=("all", "equal", "count"), keys="few"),
    Case(70, rows=("equal",), keys="few"),
    Case(70, rows=("different", "similarity", "count"), keys="few", unit=False),
    Case(70, keys="few", learned=True),
    Case(70, keys="few", learned=True, unit=False),
    Case(70, keys="few", scale=-3.0, rows=ALL),
    Case(70, keys="few", scale=-3.0, unit=False),
    Case(70, keys="few", scale=0.0, learned=True, rows=ALL),
    Case(70, keys="few", scale=1000.0),
    Case(70, keys="few", scale=1000.0, learned=True),
    Case(70, keys="few", scale=-1000.0),
    Case(70, keys="few", scale=0.1, length=30.0, unit=False, rows=ALL),
    Case(70, keys="few", length=1e18),
    Case(70, keys="few", length=1e-18),
    Case(70, bias=True, keys="few", rows=ALL),
    Case(70, 41, rows=PSC, keys="few"),
    Case(41, 70, rows=ALL, keys="int64", columns=ALL),
    Case(70, 41, rows=("all",), columns=("all",)),
    Case(70, 41, rows=ALL, columns=ALL, keys="few", own=True, bias=True),
    Case(70, 41, rows=ALL, columns=ALL, keys="few", own=True, bias=True, unit=False, learned=True),
    Case(33, 130, d=100, rows=PSC, keys="few", own=True, scale=1000.0),
    Case(130, 33, d=200, rows=SCL, columns=SCL, keys="few", scale=-20.0, unit=False),
    Case(130, 33, d=200, rows=SCL, columns=PSC, keys="few", scale=0.0),
    Case(300, 10, d=128, rows=PSC, keys="few", learned=True),
    Case(10, 300, d=128, rows=(), columns=SCL, keys="few"),
    Case(200, 200, d=64, rows=("all", "similarity"), columns=("all", "similarity"), keys="few", bias=True),
]


def cases() -> list[Case]:
    others = [replace(case, dtype=dtype) for dtype in (F64, F16, BF16) for case in CASES if 1e-3 < case.length < 1e3]
    return CASES + others


LINES = [
    Line(all=1, similarity=-1),
    Line(all=1, similarity=-1, lone="skip", factor=1.43),
    Line(different=1, similarity=-1, reduction="sum"),
    Line(all=1, equal=-1, log_count=1, reduction="none"),
    Line(different=1, similarity=-1, lone="nan", reduction="none"),
    Line(all=0.5, different=0.25, equal=-0.5, similarity=-2, log_count=3, lone="skip"),
]
