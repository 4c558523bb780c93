"""Balanced contrastive loss: the authors' arithmetic, and what balances it."""

import math

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import serves
from table import unit

from fastsupcon import BalancedSupConLoss
from fastsupcon.functional import balanced_supcon_loss

LONG_TAIL = [0, 0, 0, 0, 0, 1, 1, 1, 2, 4]  # class 3 is not in the batch, classes 2 and 4 have one sample


def problem(device, depth=6, views=2, dtype=torch.float64):
    labels = torch.tensor(LONG_TAIL, device=device)
    features = unit(len(labels), views, depth) if views else unit(len(labels), depth)
    return features.to(device, dtype).requires_grad_(), labels, unit(5, depth).to(device, dtype).requires_grad_()


def published(features, labels, centers, temperature):
    """The arithmetic of the authors' BalSCL: weights of 1 / (members less the pair's being positive), the row maximum of all pairs."""
    classes, rows = len(centers), features.shape[0] * features.shape[1]
    targets = torch.cat([labels, labels, torch.arange(classes, device=labels.device)])
    members = torch.stack([(targets == c).sum() for c in range(classes)])
    columns = torch.cat([features[:, 0], features[:, 1], centers])
    logits = columns[:rows] @ columns.T / temperature
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(rows, len(columns), dtype=logits.dtype, device=logits.device)
    positive = (targets[:rows, None] == targets) * others
    denominator = (logits.exp() * others / (members[targets] - positive)).sum(1, keepdim=True)
    return -(positive * (logits - denominator.log())).sum(1) / positive.sum(1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_against_the_authors_arithmetic(backend, device, reduction):
    dtype = torch.float64 if serves(backend, torch.float64) else torch.float32
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    features, labels, centers = problem(device, dtype=dtype)
    wide, wide_centers = (x.detach().double().requires_grad_() for x in (features, centers))
    want = published(wide, labels, wide_centers, 0.1)
    want = want.mean() if reduction == "mean" else want
    for normalize in (True, False):  # the authors' network hands over unit rows
        ours = balanced_supcon_loss(features, labels, centers, temperature=0.1, normalize=normalize, reduction=reduction, backend=backend)
        torch.testing.assert_close(ours.double(), want, rtol=tolerance, atol=tolerance)
        if not normalize:
            got = torch.autograd.grad(ours.sum(), (features, centers))
            for x, y in zip(got, torch.autograd.grad(want.sum(), (wide, wide_centers)), strict=True):
                torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=10 * tolerance)


def test_where_the_authors_overflow(device):
    """Their row maximum is over the row with itself too: at a temperature of 0.001 nothing is left of the others in float32."""
    features, labels, centers = problem(device, dtype=torch.float32)
    assert not published(features, labels, centers, 0.001).isfinite().all()
    ours = balanced_supcon_loss(features, labels, centers, temperature=0.001)
    want = naive.balanced_supcon_loss(features.double(), labels, centers.double(), temperature=0.001)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)


def test_chance_level(backend, device):
    _, labels, _ = problem(device)
    loss = balanced_supcon_loss(torch.zeros(10, 2, 4, device=device), labels, torch.zeros(5, 4, device=device), backend=backend)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)


def test_more_samples_of_a_class_weigh_no_more(backend, device):
    """Of a class whose rows are all its prototype, any number leaves the others' losses as they are; SCL's would rise."""
    features, labels, centers = problem(device, views=0, dtype=torch.float32)
    others, of_others = features[labels > 0], labels[labels > 0]
    losses = []
    for repeats in (0, 1, 40):
        rows, keys = torch.cat([others, centers[:1].expand(repeats, -1)]), torch.cat([of_others, of_others.new_zeros(repeats)])
        losses.append(balanced_supcon_loss(rows, keys, centers, reduction="none", backend=backend)[: len(others)])
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-5)


def test_an_anchor_alone_in_its_class_has_the_prototype(backend, device):
    """With every class there once it is the sum over classes of means of one or two rows."""
    features, _, centers = problem(device, views=0, dtype=torch.float32)
    z, labels = features[:5], torch.arange(5, device=device)
    loss = balanced_supcon_loss(z, labels, centers, temperature=0.1, reduction="none", backend=backend)
    cosines = (F.normalize(z) @ F.normalize(torch.cat([z, centers])).T / 0.1).double()
    for i in range(5):
        denominator = sum(((cosines[i, c].exp() if c != i else 0) + cosines[i, 5 + c].exp()) / (2 - (c == i)) for c in range(5))
        assert loss[i].item() == pytest.approx((denominator.log() - cosines[i, 5 + i]).item(), rel=1e-5)


def test_views_and_labels_as_loaders_give_them(device):
    features, labels, centers = problem(device, views=3, dtype=torch.float32)
    want = balanced_supcon_loss(features.transpose(0, 1).flatten(0, 1), labels.repeat(3), centers)
    for same in (labels, labels[:, None], labels[None].float(), labels.to(torch.uint8)):
        torch.testing.assert_close(balanced_supcon_loss(features, same, centers), want)
    torch.testing.assert_close(balanced_supcon_loss(features[..., None], labels, centers), want)


def test_edge_cases(backend, device):
    _, labels, _ = problem(device)
    z = torch.randn(10, 4, device=device)
    z[0], z[2], z[8] = 0, z[1], 0
    p = torch.stack([z[1], z[0], z[5], -z[5], z[5] * 3]).requires_grad_()
    z.requires_grad_()
    for temperature in (10.0, 1e-3):
        for rows, keys, prototypes in (
            (z, labels, p),
            (z[:1], labels[:1], p),  # one row
            (z[:1], labels[:1], p[:1]),  # which meets its prototype alone
            (z, labels * 0, p[:1]),  # one class
            (z, labels * 0, p),
        ):
            loss = balanced_supcon_loss(rows, keys, prototypes, temperature=temperature, backend=backend)
            gradients = torch.autograd.grad(loss, (z, p))
            assert loss.isfinite() and all(x.isfinite().all() for x in gradients)
    assert balanced_supcon_loss(z[:1], labels[:1], p[:1], backend=backend) == 0
    for bad in (math.nan, math.inf):
        spoilt = z.detach().clone()
        spoilt[8, 1] = bad
        each = balanced_supcon_loss(spoilt, labels, p, reduction="none", backend=backend)
        assert not (each.isfinite().any() if math.isnan(bad) else each.isfinite().all())
        assert not balanced_supcon_loss(z, labels, spoilt[5:], backend=backend).isfinite()


def test_the_module(device):
    features, labels, _ = problem(device, dtype=torch.float32)
    loss = BalancedSupConLoss(5, 6, 0.2).to(device)
    assert list(loss.state_dict()) == [name for name, _ in loss.named_parameters()] == ["prototypes"]
    torch.testing.assert_close(loss(features, labels), balanced_supcon_loss(features, labels, loss.prototypes, temperature=0.2))
    torch.testing.assert_close(loss.logits(features[:, 0]), F.normalize(features[:, 0]) @ loss.prototypes.T / 0.2)
