"""The edge cases that are part of the contract, the same on every backend: each row of the table in the README."""

import math

import naive
import pytest
import torch
from conftest import DEVICE, serves
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsupcon import functional


def loss_and_gradient(features, labels, **options):
    features = features.detach().requires_grad_()
    loss = functional.supcon_loss(features, labels, **options)
    loss.sum().backward()
    return loss.detach(), features.grad


def assert_finite(*tensors):
    for tensor in tensors:
        assert tensor.isfinite().all()


def test_lone_anchor(backend, device):
    features, labels = torch.randn(5, 4, device=device), torch.tensor([0, 0, 1, 1, 2], device=device)
    each, _ = loss_and_gradient(features, labels, reduction="none", backend=backend)
    assert each[4] == 0
    zero, zero_gradient = loss_and_gradient(features, labels, lone_anchors="zero", backend=backend)
    skip, skip_gradient = loss_and_gradient(features, labels, lone_anchors="skip", backend=backend)
    torch.testing.assert_close(zero, each.sum() / 5)
    torch.testing.assert_close(skip, each.sum() / 4)
    torch.testing.assert_close(skip_gradient, zero_gradient * 5 / 4)
    with pytest.raises(ValueError, match="lone_anchors='error': every anchor must have a positive, got 1 of 5"):
        functional.supcon_loss(features, labels, lone_anchors="error", backend=backend)
    functional.supcon_loss(features[:4], labels[:4], lone_anchors="error", backend=backend)


@pytest.mark.parametrize("lone_anchors", ["zero", "skip"])
def test_all_anchors_lone(backend, device, lone_anchors):
    loss, gradient = loss_and_gradient(
        torch.randn(6, 4, device=device), torch.arange(6, device=device), lone_anchors=lone_anchors, backend=backend
    )
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_one_class_only(backend, device):
    features = torch.randn(6, 4, device=device)
    loss, gradient = loss_and_gradient(features, torch.zeros(6, dtype=torch.int64, device=device), temperature=1.0, backend=backend)
    wide = features.double().requires_grad_()
    naive.supcon_loss(wide, torch.zeros(6, dtype=torch.int64, device=device), temperature=1.0).backward()
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert_finite(loss)


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("lone_anchors", ["zero", "skip"])
def test_a_single_row(backend, device, contrast_mode, lone_anchors):
    options = {"contrast_mode": contrast_mode, "lone_anchors": lone_anchors, "backend": backend}
    loss, gradient = loss_and_gradient(torch.randn(1, 1, 4, device=device), torch.tensor([3], device=device), **options)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    nan, _ = loss_and_gradient(torch.full((1, 1, 4), math.nan, device=device), torch.tensor([3], device=device), **options)
    assert nan.isnan()


def test_empty_sums_of_the_primitive(backend, device):
    """A row that allows no column: -inf, and no gradient, not even 0 * inf."""
    z = torch.randn(1, 4, device=device, requires_grad=True)
    lse = functional.self_logsumexp(z, backend=backend)
    assert lse.item() == -math.inf
    a, b = (torch.randn(2, 4, device=device, requires_grad=True) for _ in range(2))
    labels = torch.tensor([0, 1], device=device)
    masked = functional.cross_logsumexp(a, b, row_labels=labels, column_labels=torch.zeros_like(labels), backend=backend)
    assert masked[0].item() == -math.inf
    gradients = torch.autograd.grad(lse.sum() + masked.sum(), (z, a, b))
    assert_finite(*gradients)
    assert torch.equal(gradients[1][0], torch.zeros_like(gradients[1][0]))
    skipped = functional.cross_logsumexp(a, b[:1], skip=torch.tensor([0, -1], device=device), backend=backend)
    assert skipped[0].item() == -math.inf
    assert skipped[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [10.0, 0.07, 1e-3])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0])
def test_finite_wherever_float64_is(backend, device, dtype, temperature, norm):
    if not serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    features = (torch.nn.functional.normalize(torch.randn(17, 8, device=device), dim=1) * norm).to(dtype)
    loss, gradient = loss_and_gradient(features, torch.randint(0, 4, (17,), device=device), temperature=temperature, backend=backend)
    assert_finite(loss)
    if dtype != torch.float16 or norm / temperature < 3e3:  # beyond, the gradient itself leaves fp16's range
        assert_finite(gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_and_duplicate_rows(backend, device, dtype, normalize):
    if not serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    features = torch.randn(8, 4, device=device)
    features[0] = features[1] = 0
    features[3] = features[4] = features[2]
    labels = torch.tensor([0, 1, 0, 0, 1, 1, 2, 2], device=device)
    assert_finite(*loss_and_gradient(features.to(dtype), labels, normalize=normalize, temperature=0.1, backend=backend))
    prototypes = torch.zeros(3, 4, device=device, dtype=dtype, requires_grad=True)
    loss = functional.psc_loss(features.to(dtype), labels, prototypes, normalize=normalize, backend=backend)
    assert_finite(loss, *torch.autograd.grad(loss, prototypes))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.1, 1e-3])
def test_nan_and_inf_are_not_hidden(backend, device, bad, temperature):
    features = torch.nn.functional.normalize(torch.randn(70, 4, device=device), dim=1)
    features[66, 1] = bad
    labels = torch.arange(70, device=device) // 2
    for contrast_mode in ("all", "one"):
        loss = functional.supcon_loss(features, labels, temperature=temperature, contrast_mode=contrast_mode, backend=backend)
        assert not loss.isfinite()
    if math.isnan(bad):  # it stands in every denominator
        each = functional.supcon_loss(features, labels, temperature=temperature, reduction="none", backend=backend)
        assert each.isnan().all()
    for normalize in (True, False):
        assert not functional.psc_loss(features, labels % 5, features[:5], normalize=normalize, backend=backend).isfinite()
        assert not functional.psc_loss(features[:60], labels[:60] % 5, features[60:], normalize=normalize, backend=backend).isfinite()


def test_large_incoming_gradients(backend, device):
    """A gradient scaler multiplies the loss by 65,536 or more."""
    features = torch.nn.functional.normalize(torch.randn(20, 4, device=device), dim=1)
    labels = torch.randint(0, 4, (20,), device=device)
    for temperature in (0.1, 0.024, 1e-3):
        plain = loss_and_gradient(features, labels, temperature=temperature, backend=backend)[1]
        rows = features.detach().requires_grad_()
        (functional.supcon_loss(rows, labels, temperature=temperature, backend=backend) * 2.0**20).backward()
        torch.testing.assert_close(rows.grad / 2.0**20, plain, rtol=1e-4, atol=1e-5 / temperature)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([1e-3, 0.02, 0.0234, 0.1, 1.0, 10.0]),
    st.sampled_from([0.0, 1e-4, 1.0, 5.0]),
    st.integers(0, 2**31),
    st.sampled_from(["cpu", "chunked"]),
)
def test_any_shape_and_value(n, d, classes, temperature, norm, seed, name):
    if not serves(name, torch.float32, d):
        pytest.skip(f"{name} does not run here")
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(n, d, generator=generator) * norm).to(DEVICE)
    labels = torch.randint(0, classes, (n,), generator=generator).to(DEVICE)
    loss, gradient = loss_and_gradient(features, labels, temperature=temperature, backend=name)
    wide = features.double().requires_grad_()
    expected = naive.supcon_loss(wide, labels, temperature=temperature)
    expected.backward()
    largest_logit = max(1.0, float((features**2).sum(1).max()) / temperature)  # |s|: fp32 holds it to 6e-8 of itself, exp(s) to as much
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-6 * largest_logit)
    gradient_scale = max(1e-6, norm / temperature, float(wide.grad.abs().max()))
    torch.testing.assert_close(gradient.double(), wide.grad, rtol=1e-3, atol=1e-6 * gradient_scale * largest_logit)


def test_what_is_not_finite_shows_in_lone_anchors_and_masks_too(backend, device):
    z = torch.rand(5, 4, device=device) + 0.1
    z[2, 0] = math.inf
    assert not functional.supcon_loss(z, torch.arange(5, device=device), backend=backend).isfinite()
    mask = torch.eye(6, device=device).roll(1, 0)
    mask[0, 1] = math.nan
    each = functional.supcon_loss(torch.randn(6, 4, device=device), mask=mask, reduction="none", backend=backend)
    assert each[0].isnan()
    assert each[1:].isfinite().all()


def test_a_single_row_obeys_its_options(device):
    z, labels = torch.randn(1, 4, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="every anchor must have a positive, got 1 of 1"):
        functional.supcon_loss(z, labels, lone_anchors="error")
    with pytest.raises(ValueError, match="backend='nonsense' cannot serve"):
        functional.supcon_loss(z, labels, backend="nonsense")
