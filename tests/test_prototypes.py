"""Cross-entropy over class prototypes: priors, margins, the definitions that others use, a million classes."""

import math
import sys

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, serves
from table import unit

from bench.measure import extra_bytes
from fastsupcon import PrototypeCrossEntropyLoss
from fastsupcon.functional import prototype_cross_entropy, psc_loss

COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # CIFAR-10 with an imbalance of 100


def problem(device, samples=12, classes=10, depth=6, dtype=torch.float64):
    labels = torch.randint(0, classes, (samples,), device=device)
    return unit(samples, depth).to(device, dtype).requires_grad_(), labels, unit(classes, depth).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_counts_and_margins_it_is_psc_over_all(backend, device, normalize, reduction):
    z, labels, p = problem(device, dtype=torch.float32)
    options = {"temperature": 0.1, "normalize": normalize, "reduction": reduction, "backend": backend}
    assert_same(
        prototype_cross_entropy(z, labels, p, **options), psc_loss(z, labels, p, denominator="all", **options), z, p, tolerance=1e-5
    )


def test_against_the_published_definitions(device):
    """Each from the arithmetic of its paper or code, over logits that are all there."""
    z, labels, p = problem(device)
    own = F.one_hot(labels, 10).bool()
    cosines, leaves = F.normalize(z) @ F.normalize(p).T, (z, p)

    # CosFace (eq. 4) and insightface's module of that name: s (cos - m) for the own class, s cos for the others
    assert_same(prototype_cross_entropy(z, labels, p, margin=0.4), F.cross_entropy(64 * (cosines - 0.4 * own.double()), labels), *leaves)

    # ArcFace (eq. 3): s cos(theta + m), by the sum of angles
    turned = cosines * math.cos(0.5) - (1 - cosines**2).sqrt() * math.sin(0.5)
    assert (cosines[own] > -math.cos(0.5)).all()  # elsewhere papers and codes differ
    assert_same(
        prototype_cross_entropy(z, labels, p, angular_margin=0.5), F.cross_entropy(64 * torch.where(own, turned, cosines), labels), *leaves
    )

    # The combined margin (eq. 4), and insightface's for MXNet: arccos, plus m2, cosine, minus m3
    combined = (cosines.arccos() + 0.3).cos() - 0.2
    ours = prototype_cross_entropy(z, labels, p, margin=0.2, angular_margin=0.3)
    assert_same(ours, F.cross_entropy(64 * torch.where(own, combined, cosines), labels), *leaves)

    # Balanced softmax: n_y e^(eta_y) / sum_c n_c e^(eta_c); and logit adjustment at tau = 0.5
    counts = torch.tensor(COUNTS, device=device, dtype=torch.float64)
    weighted = counts * (cosines / 0.1).exp()
    ours = prototype_cross_entropy(z, labels, p, class_counts=counts, temperature=0.1, reduction="none")
    assert_same(ours, -(weighted[own] / weighted.sum(1)).log(), *leaves)
    adjusted = cosines / 0.1 + 0.5 * (counts / counts.sum()).log()
    ours = prototype_cross_entropy(z, labels, p, class_counts=counts**0.5, temperature=0.1)
    assert_same(ours, F.cross_entropy(adjusted, labels), *leaves)


def test_the_angular_margins_gradient_is_the_true_one(device):
    """insightface's module for PyTorch turns the angle where autograd does not look: the same loss, the gradient of another function."""
    z, labels, p = problem(device)
    own = F.one_hot(labels, 10).bool()
    cosines = F.normalize(z) @ F.normalize(p).T
    turned = torch.where(own, (cosines.arccos() + 0.5).cos(), cosines)
    theirs = F.cross_entropy(64 * (cosines + (turned - cosines).detach()), labels)
    ours = prototype_cross_entropy(z, labels, p, angular_margin=0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    (got,), (want,) = torch.autograd.grad(ours, z), torch.autograd.grad(theirs, z)
    assert (got - want).abs().max() > 0.1 * want.abs().max()
    along = torch.randn_like(z) * 1e-6
    ahead, behind = (prototype_cross_entropy(z + step, labels, p, angular_margin=0.5) for step in (along, -along))
    assert ((ahead - behind) / 2).item() == pytest.approx((got * along).sum().item(), rel=1e-5)


def own_cosine(device, angle, angular_margin, dtype=torch.float64):
    """What takes the own cosine's place at these angles [N], read from the loss of a single other class at a cosine of 0."""
    z = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)], 1).to(device, dtype).requires_grad_()
    p = torch.eye(3, device=device, dtype=dtype)[[0, 2]]
    labels = torch.zeros(len(angle), dtype=torch.int64, device=device)
    losses = prototype_cross_entropy(z, labels, p, temperature=1.0, angular_margin=angular_margin, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    return -losses.expm1().log(), gradient  # log(1 + e^-o) = loss


@pytest.mark.parametrize("margin", [0.1, 0.5, math.pi / 2])
def test_the_own_cosine_falls_with_the_angle(device, margin):
    """Up to pi - m as cos(theta + m), beyond it as cos(theta) - m sin(m)."""
    angle = torch.linspace(0, math.pi, 400, dtype=torch.float64, device=device)
    own, gradient = own_cosine(device, angle, margin)
    before = angle <= math.pi - margin
    torch.testing.assert_close(own[before], (angle + margin)[before].cos(), rtol=1e-7, atol=1e-7)  # the sine is as exact as its square
    torch.testing.assert_close(own[~before], angle[~before].cos() - margin * math.sin(margin))
    assert (own.diff() < 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cosines_of_one_have_a_finite_gradient(backend, device, dtype):
    """Rows that are a prototype, or its opposite, or a hair beside it: cos(theta + m) has no derivative by the cosine there."""
    if not serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    p = torch.nn.functional.normalize(torch.randn(7, 24, device=device), dim=1).to(dtype).requires_grad_()
    labels = torch.arange(7, device=device)
    for factor in (4.0, -0.125):  # powers of two, which round no half
        cosines = naive.unit(p.detach().double()) @ naive.unit(p.detach().double()).T * math.copysign(1, factor)
        own = torch.full_like(cosines[0], math.cos(0.5) if factor > 0 else -1 - 0.5 * math.sin(0.5))
        want = F.cross_entropy(64 * cosines.diagonal_scatter(own), labels)
        for hair in (0, 1e-7):
            z = (p.detach() * factor + hair * torch.randn_like(p)).requires_grad_()
            loss = prototype_cross_entropy(z, labels, p, angular_margin=0.5, backend=backend)
            dz, dp = torch.autograd.grad(loss, (z, p))
            assert dz.isfinite().all() and dp.isfinite().all()
            assert loss.item() == pytest.approx(want.item(), rel=0.03)  # the sine of a cosine that is off by 6e-8, times 64


def test_a_class_without_samples(backend, device):
    """It all but leaves the denominator; a label of it has a loss that is finite."""
    z, labels, p = problem(device, dtype=torch.float32)
    counts = torch.tensor([0, *COUNTS[1:]], device=device)
    options = {"temperature": 0.1, "reduction": "none", "backend": backend}
    loss = prototype_cross_entropy(z, labels, p, class_counts=counts, **options)
    gradients = torch.autograd.grad(loss.sum(), (z, p))
    assert loss.isfinite().all() and all(x.isfinite().all() for x in gradients)
    seen = labels > 0
    assert seen.any() and not seen.all()
    without = prototype_cross_entropy(z[seen], labels[seen] - 1, p[1:], class_counts=counts[1:], **options)
    torch.testing.assert_close(loss[seen], without, rtol=1e-5, atol=1e-5)
    wide = z.double(), labels, p.double()
    want = naive.prototype_cross_entropy(*wide, class_counts=counts, temperature=0.1, reduction="none")
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    assert (loss[~seen] > 10).all()


def test_counts_of_any_dtype_and_scale(device):
    z, labels, p = problem(device, dtype=torch.float32)
    want = prototype_cross_entropy(z, labels, p, class_counts=torch.tensor(COUNTS, device=device))
    for dtype in (torch.int16, torch.int32, torch.float32, torch.float64):
        assert torch.equal(prototype_cross_entropy(z, labels, p, class_counts=torch.tensor(COUNTS, device=device, dtype=dtype)), want)
    shares = torch.tensor(COUNTS, device=device) / sum(COUNTS)
    torch.testing.assert_close(prototype_cross_entropy(z, labels, p, class_counts=shares), want)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3, 255])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_labels_are_those_of_cross_entropy(backend, device, ignore_index, reduction):
    z, labels, p = problem(device, dtype=torch.float32)
    labels[[1, 4, 7]] = ignore_index
    options = {"margin": 0.1, "angular_margin": 0.2, "ignore_index": ignore_index, "reduction": reduction}
    ours = prototype_cross_entropy(z, labels, p, temperature=0.1, backend=backend, **options)
    wide, wide_p = (x.detach().double().requires_grad_() for x in (z, p))
    # the textbook gathers by its labels: an ignored row's own column is any
    theirs = naive.prototype_cross_entropy(wide, labels % 10 if ignore_index == 255 else labels, wide_p, temperature=0.1, **options)
    if ignore_index == 255:
        kept = labels != 255
        each = naive.prototype_cross_entropy(wide, labels % 10, wide_p, temperature=0.1, **options | {"reduction": "none"}) * kept
        theirs = each if reduction == "none" else each.sum() / (kept.sum() if reduction == "mean" else 1)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)
    got, want = torch.autograd.grad(ours.sum(), (z, p)), torch.autograd.grad(theirs.sum(), (wide, wide_p))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


def test_all_labels_ignored(device):
    z, labels, p = problem(device, dtype=torch.float32)
    loss = prototype_cross_entropy(z, labels * 0 - 1, p, ignore_index=-1)
    assert loss == 0 and all(torch.equal(x, torch.zeros_like(x)) for x in torch.autograd.grad(loss, (z, p)))


def test_small_losses_are_not_rounded_away(device):
    """log(1 + e^-x) of rows that are sure: all - own would leave 0, and no gradient of the loss's own size."""
    p = torch.eye(4, device=device)
    z = p.clone().requires_grad_()
    loss = prototype_cross_entropy(z, torch.arange(4, device=device), p, temperature=1 / 32)
    assert loss.item() == pytest.approx(3 * math.exp(-32), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient[0, 1].item() == pytest.approx(32 * math.exp(-32) / 4, rel=1e-4)


def test_edge_cases(backend, device):
    p = torch.randn(5, 4, device=device)
    p[1], p[2] = 0, p[3]
    z = torch.cat([torch.zeros(2, 4, device=device), p, -p]).requires_grad_()
    labels = torch.arange(12, device=device) % 5
    counts = torch.tensor([3, 0, 1, 100, 7], device=device)
    for temperature in (10.0, 1 / 64, 1e-3):
        options = {"temperature": temperature, "class_counts": counts, "margin": 0.3, "angular_margin": 0.4, "backend": backend}
        for rows, classes in ((z, labels), (z[3:4], labels[3:4]), (z, labels * 0)):
            loss = prototype_cross_entropy(rows, classes, p, **options)
            (gradient,) = torch.autograd.grad(loss, z)
            assert loss.isfinite() and gradient.isfinite().all()
    for bad in (math.nan, math.inf):
        spoilt = z.detach().clone()
        spoilt[6, 1] = bad
        for margin in (0.0, 0.4):
            assert not prototype_cross_entropy(spoilt, labels, p, angular_margin=margin, backend=backend).isfinite()
            assert not prototype_cross_entropy(p, labels[:5], spoilt, angular_margin=margin, backend=backend).isfinite()


def test_the_module(device):
    z, labels, _ = problem(device, dtype=torch.float32)
    loss = PrototypeCrossEntropyLoss(10, 6, COUNTS, 0.2, 0.3, temperature=0.1).to(device)
    assert [name for name, _ in loss.named_parameters()] == ["prototypes"]
    assert list(loss.state_dict()) == ["prototypes", "class_counts"]
    torch.testing.assert_close(loss.prototypes.norm(dim=1), torch.ones(10, device=device))
    torch.testing.assert_close(loss.logits(z), F.normalize(z) @ loss.prototypes.T / 0.1)  # neither margins nor priors
    assert loss.half().class_counts.tolist() == COUNTS  # 2,997 is no half
    with torch.device("meta"):
        late = PrototypeCrossEntropyLoss(10, 6, COUNTS, temperature=0.1)
    ready = PrototypeCrossEntropyLoss(10, 6, COUNTS, temperature=0.1).to(device)
    late.to_empty(device=device).load_state_dict(ready.state_dict())
    assert torch.equal(late(z, labels), ready(z, labels))


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is Linux's")
def test_a_million_classes(device):
    """In memory for two copies of the prototypes and some numbers a class: the logits alone would be 256 MB."""
    classes, samples, depth = 1_000_000, 64, 8
    z, p = torch.randn(samples, depth, device=device, requires_grad=True), torch.randn(classes, depth, device=device, requires_grad=True)
    labels = torch.randint(0, classes, (samples,), device=device)
    counts = torch.randint(1, 1000, (classes,), device=device)
    losses = []

    def step(classes=classes):
        loss = prototype_cross_entropy(
            z, labels % classes, p[:classes], class_counts=counts[:classes], angular_margin=0.5, reduction="none"
        )
        losses.append(loss.detach())
        return torch.autograd.grad(loss.mean(), (z, p))

    step(1000)  # what is loaded once is not of the step
    assert extra_bytes(step, device.type) < 160e6
    few = z[:4].detach().double(), labels[:4], p.detach().double()
    want = naive.prototype_cross_entropy(*few, class_counts=counts, angular_margin=0.5, temperature=1 / 64, reduction="none")
    torch.testing.assert_close(losses[-1][:4].double(), want, rtol=2e-5, atol=2e-5)
