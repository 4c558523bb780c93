"""Value and gradient of both losses, every option and backend, against the textbook writing of them in float64 (naive.py)."""

import math

import naive
import pytest
import torch
from conftest import serves

from fastsupcon import PSCLoss, SupConLoss, functional

# error allowed against float64, relative to the largest gradient entry: rounding of the rows themselves is part of it for halves
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(TOLERANCE)


def unit(*shape, device, dtype=torch.float64):
    rows = torch.randn(*shape, device=device, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype)


def assert_agrees(ours, theirs, tensors, dtype, parts=1.0):
    """The two losses of the same tensors, and their gradients, agree; ``theirs`` is computed in float64.

    ``parts``: the size of a gradient's two parts, the lse's and the positives' (1 / temperature for unit rows). Each is rounded to the
    dtype before they are added, so that where they cancel two roundings of that size are left.
    """
    mine = [tensor.detach().requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss, expected = ours(*mine), theirs(*wide)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape)
    gradients = torch.autograd.grad((loss * weights).sum(), mine)
    wide_gradients = torch.autograd.grad((expected * weights).sum(), wide)
    for gradient, wide_gradient in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - wide_gradient).abs().max()
        largest = wide_gradient.abs().max()
        assert error <= tolerance * largest + torch.finfo(dtype).eps * parts, (error, largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), [(1, 4), (2, 1), (63, 3), (65, 64), (130, 129)])
def test_supcon_shapes(backend, device, dtype, n, d):
    if not serves(backend, dtype, d):
        pytest.skip(f"{backend} does not serve {dtype}")
    labels = torch.randint(0, max(1, n // 4), (n,), device=device)

    def ours(z):
        return functional.supcon_loss(z, labels, temperature=0.1, backend=backend)

    def theirs(z):
        return naive.supcon_loss(z, labels, temperature=0.1)

    assert_agrees(ours, theirs, [unit(n, d, device=device, dtype=dtype)], dtype, parts=1 / 0.1)


@pytest.mark.parametrize("temperature", [10.0, 0.1, 0.0229, 0.005, 1e-3])
@pytest.mark.parametrize("normalize", [True, False])
def test_supcon_temperatures(backend, device, temperature, normalize):
    features = torch.randn(9, 2, 6, device=device)  # raw rows
    labels = torch.randint(0, 3, (9,), device=device)
    options = {"temperature": temperature, "base_temperature": temperature / 2, "normalize": normalize}

    def ours(z):
        return functional.supcon_loss(z, labels, backend=backend, **options) * temperature

    def theirs(z):
        return naive.supcon_loss(z, labels, **options) * temperature

    assert_agrees(ours, theirs, [features], torch.float32)


@pytest.mark.parametrize("positives", ["labels", "views", "mask", "soft mask"])
@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lone_anchors", ["zero", "skip"])
def test_supcon_options(backend, device, positives, contrast_mode, reduction, lone_anchors):
    samples, views = 7, 3
    features = unit(samples, views, 2, 4, device=device, dtype=torch.float32)
    labels = mask = None
    if positives == "labels":
        labels = torch.tensor([5, -3, 5, 2**40, 2**40, 5, 0], device=device)
    elif positives == "mask":
        mask = torch.randint(0, 2, (samples, samples), device=device)
    elif positives == "soft mask":
        mask = torch.rand(samples, samples, device=device)
    options = {"temperature": 0.2, "contrast_mode": contrast_mode, "reduction": reduction, "lone_anchors": lone_anchors}

    def ours(z):
        return functional.supcon_loss(z, labels, mask, backend=backend, **options)

    def theirs(z):
        return naive.supcon_loss(z, labels, mask, **options)

    assert_agrees(ours, theirs, [features], torch.float32)
    expected_shape = () if reduction != "none" else ((samples * views,) if contrast_mode == "all" else (samples,))
    assert ours(features).shape == expected_shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("denominator", ["negatives", "all"])
@pytest.mark.parametrize(("n", "classes", "d", "per_class"), [(1, 2, 3, 1), (33, 10, 16, 1), (5, 300, 65, 1), (40, 7, 5, 3)])
def test_psc(backend, device, dtype, denominator, n, classes, d, per_class):
    if not serves(backend, dtype, d):
        pytest.skip(f"{backend} does not serve {dtype}")
    labels = torch.randint(0, classes, (n,), device=device)
    features = unit(n, d, device=device, dtype=dtype)
    prototypes = unit(classes * per_class, d, device=device, dtype=dtype)
    options = {"temperature": 0.2, "denominator": denominator, "prototypes_per_class": per_class}

    def ours(z, p):
        return functional.psc_loss(z, labels, p, backend=backend, **options)

    def theirs(z, p):
        return naive.psc_loss(z, labels, p, **options)

    assert_agrees(ours, theirs, [features, prototypes], dtype, parts=1 / 0.2)


@pytest.mark.parametrize(("classes", "temperature", "minimum"), [(10, 1.0, 1.0861), (10, 0.1, -8.9139), (100, 0.1, -5.5059)])
def test_psc_minimum_is_at_the_simplex(backend, device, classes, temperature, minimum):
    """-(1/tau) (1 + 1/(C-1)) + log(C-1), where the prototypes are the vertices of a simplex and the anchors sit on them."""
    simplex = torch.eye(classes, device=device) - 1 / classes
    labels = torch.arange(classes, device=device)
    loss = functional.psc_loss(simplex, labels, simplex, temperature=temperature, backend=backend)
    assert loss.item() == pytest.approx(minimum, abs=1e-4)
    chance = functional.psc_loss(torch.zeros(4, 3, device=device), labels[:4], torch.zeros(classes, 3, device=device), backend=backend)
    assert chance.item() == pytest.approx(math.log(classes - 1), rel=1e-6)


def test_learned_temperature(backend, device):
    """A 0-d tensor gets its gradient, in both losses."""
    features, labels = unit(12, 2, 5, device=device, dtype=torch.float32), torch.randint(0, 3, (12,), device=device)
    temperature = torch.tensor(0.3, device=device)
    prototypes = unit(3, 5, device=device, dtype=torch.float32)

    def ours(z, p, t):
        return functional.supcon_loss(z, labels, temperature=t, backend=backend) + functional.psc_loss(
            z[:, 0], labels, p, temperature=t, backend=backend
        )

    def theirs(z, p, t):
        return naive.supcon_loss(z, labels, temperature=t) + naive.psc_loss(z[:, 0], labels, p, temperature=t)

    assert_agrees(ours, theirs, [features, prototypes, temperature], torch.float32)


def test_modules_are_the_functions_with_their_options_held(device):
    features, labels = unit(8, 2, 5, device=device, dtype=torch.float32), torch.randint(0, 3, (8,), device=device)
    torch.testing.assert_close(
        SupConLoss()(features, labels), functional.supcon_loss(features, labels, temperature=0.07, base_temperature=0.07)
    )
    torch.testing.assert_close(
        SupConLoss(0.1, "one", 0.2, normalize=True, reduction="none")(features, labels),
        functional.supcon_loss(
            features, labels, temperature=0.1, contrast_mode="one", base_temperature=0.2, normalize=True, reduction="none"
        ),
    )
    psc = PSCLoss(3, 5, temperature=0.2, prototypes_per_class=2).to(device)
    expected = functional.psc_loss(features[:, 0], labels, psc.prototypes, temperature=0.2, prototypes_per_class=2)
    torch.testing.assert_close(psc(features[:, 0], labels), expected)
    assert [name for name, _ in psc.named_parameters()] == ["prototypes"]
    assert psc.prototypes.shape == (6, 5)
    logits = psc.logits(features[:, 0])
    z, p = (torch.nn.functional.normalize(rows, dim=1) for rows in (features[:, 0], psc.prototypes))
    torch.testing.assert_close(logits, (z @ p.T / 0.2).exp().unflatten(1, (3, 2)).sum(2).log())


def test_the_peers_definitions_differ_by_these_options(device):
    """Two lone anchors of twelve: SupContrast divides by all anchors, pytorch-metric-learning by those that have a positive."""
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5], device=device)
    features = torch.randn(12, 8, device=device)
    losses = functional.supcon_loss(features, labels, temperature=0.1, normalize=True, reduction="none")
    assert torch.equal(losses[10:], torch.zeros(2, device=device))
    supcontrast = functional.supcon_loss(features, labels, temperature=0.1, normalize=True)
    pml = functional.supcon_loss(features, labels, temperature=0.1, normalize=True, lone_anchors="skip")
    torch.testing.assert_close(supcontrast, losses.sum() / 12)
    torch.testing.assert_close(pml, losses.sum() / 10)


@pytest.mark.parametrize("options", [{}, {"contrast_mode": "one"}, {"normalize": True}, {"prototypes": 1}, {"prototypes": 2}], ids=str)
def test_gradients_are_left_alone_by_a_second_backward_and_by_neighbours(device, options):
    """Inside, a gradient is added to in place. Nobody outside may see it: no graph that is kept, nobody who shares a gradient."""
    per_class = options.get("prototypes", 0)
    x, u = (unit(24, 2, 10, device=device, dtype=torch.float32).requires_grad_() for _ in range(2))
    labels = torch.arange(24, device=device) % 5
    prototypes = unit(5 * max(per_class, 1), 10, device=device, dtype=torch.float32).requires_grad_()

    def loss(features):
        if per_class:
            return functional.psc_loss(features[:, 0], labels, prototypes, prototypes_per_class=per_class)
        return functional.supcon_loss(features, labels, **options)

    leaves = (x, u, prototypes)
    alone = torch.autograd.grad(loss(x), leaves, allow_unused=True)
    y = x * 1
    total = loss(y) + (y + u).square().sum()
    first = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(total, leaves, allow_unused=True)
    assert all(mine is true or torch.equal(mine, true) for mine, true in zip(again, first, strict=True))
    torch.testing.assert_close(first[0], alone[0] + 2 * (x + u).detach())
    assert torch.equal(first[1], 2 * (x + u).detach())
    assert first[2] is alone[2] or torch.equal(first[2], alone[2])
