"""What is special of supcon_loss: its forms against published arithmetic, other columns, lists, weights, ignored rows, a queue."""

import copy
import math

import naive
import pytest
import torch
from conftest import assert_same
from table import unit
from torch import Tensor

from fastsupcon import MemoryQueue, SupConLoss, functional

FINE = {"rtol": 1e-10, "atol": 1e-10}
OPTIONS = {"temperature": 0.2, "normalize": True}


def batch(samples: int = 24, depth: int = 8, classes: int = 5, device="cpu") -> tuple[Tensor, Tensor]:
    return unit(samples, depth).to(device).requires_grad_(), torch.randint(0, classes, (samples,), device=device)


# --- against published arithmetic, in our own words --------------------------------------------------------------------------------------


def decoupled(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """Yeh et al. 2022 as their code has it: one view's rows against both views, neither the row nor its positive among the negatives."""
    within, across = z0 @ z0.T / temperature, z0 @ z1.T / temperature
    itself = torch.eye(len(z0), dtype=torch.bool).repeat(1, 2)
    negatives = torch.cat([within, across], 1).masked_fill(itself, -torch.inf)
    return (negatives.logsumexp(1) - across.diagonal()).mean()


def hard_negatives(z0: Tensor, z1: Tensor, temperature: float, beta: float) -> Tensor:
    """Robinson et al. 2021 as their code has it, tau+ = 0: -log(pos / (pos + Ng)), Ng = n mean of e^t weighted by e^(beta t)."""
    z = torch.cat([z0, z1])
    e = (z @ z.T / temperature).exp()
    pair = torch.arange(len(z)) % len(z0)
    negative = e[pair[:, None] != pair[None, :]].view(len(z), -1)
    positive = ((z0 * z1).sum(1) / temperature).exp().repeat(2)
    importance = negative**beta
    ng = (importance * negative).sum(1) / importance.mean(1)
    return -(positive / (positive + ng)).log().mean()


def test_the_published_code_of_decoupled_contrastive_learning(backend):
    z0, z1 = (unit(9, 6).requires_grad_() for _ in range(2))
    views = torch.stack([z0, z1], 1)
    got = functional.supcon_loss(views, denominator="negatives", temperature=0.3, backend=backend_of(backend))
    assert_same(got, (decoupled(z0, z1, 0.3) + decoupled(z1, z0, 0.3)) / 2, z0, z1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_the_published_code_of_hard_negatives(backend, beta):
    z0, z1 = (unit(9, 6).requires_grad_() for _ in range(2))
    got = functional.supcon_loss(torch.stack([z0, z1], 1), beta=beta, temperature=0.5, backend=backend_of(backend))
    assert_same(got, hard_negatives(z0, z1, 0.5, beta), z0, z1)


def backend_of(name: str) -> str:
    """The backend, where it takes float64."""
    if name in ("cuda", "triton"):
        pytest.skip(f"{name} does not serve float64")
    return name


@pytest.mark.parametrize("seed", range(40))
def test_supcontrast_over_random_settings(seed):
    """The reference code's steps (naive.supcon_loss), in float64: labels, masks, both modes, any number of views, any temperature."""
    torch.manual_seed(seed)
    samples, views, depth = (int(torch.randint(low, high, ())) for low, high in ((2, 20), (1, 4), (1, 12)))
    features = unit(samples, views, depth).requires_grad_()
    labels = torch.randint(0, max(1, samples // 2), (samples,)) if seed % 3 < 2 or views == 1 else None
    mask = None
    if seed % 3 == 1:
        labels, mask = None, (labels[:, None] == labels).double() * torch.rand(samples, samples, dtype=torch.float64)
    options = {
        "temperature": 10 ** float(torch.empty(()).uniform_(-2, 1)),
        "contrast_mode": ("all", "one")[seed % 2],
        "base_temperature": (None, 0.07)[seed // 2 % 2],
    }
    got, want = (loss(features, labels, mask, **options) for loss in (functional.supcon_loss, naive.supcon_loss))
    assert_same(got, want, features)


# --- whom anchors meet --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"form": "in"}, {"denominator": "negatives"}, {"beta": 0.5}, {"ignore_index": 1}], ids=str)
def test_other_columns(backend, options):
    features, labels = batch()
    columns, of_columns = batch(11)
    options = OPTIONS | options
    given = {"keys": columns, "key_labels": of_columns}
    got = functional.supcon_loss(features, labels, **given, **options, backend=backend_of(backend))
    assert_same(got, naive.hard_negative_supcon_loss(features, labels, **given, **options), features, columns)


@pytest.mark.parametrize("options", [{}, {"form": "in"}, {"denominator": "negatives"}, {"beta": 0.5}, {"ignore_index": 1}], ids=str)
def test_a_queue_is_more_columns(backend, options):
    """Of batches of different sizes, until the oldest rows fall out; without gradient, whatever became of the rows."""
    queue, memory = MemoryQueue(20, 8, dtype=torch.float64), (torch.empty(0, 8, dtype=torch.float64), torch.empty(0, dtype=torch.int64))
    options = OPTIONS | options
    for samples in (6, 1, 9, 7, 25, 3):
        features, labels = batch(samples)
        got = functional.supcon_loss(features, labels, queue=queue, **options, backend=backend_of(backend))
        assert_same(got, naive.hard_negative_supcon_loss(features, labels, memory=memory, **options), features)
        memory = (torch.cat([features.detach(), memory[0]])[:20], torch.cat([labels, memory[1]])[:20])
        assert len(queue) == len(memory[0])


@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"denominator": "negatives", "ignore_index": 1}], ids=str)
@pytest.mark.parametrize("first", [-(2**40), -(2**30), 2**30 - 1, 2**40])
def test_labels_may_be_any_numbers(first, options):
    """As hashes of names are: in the batch, among other columns and in a queue they serve as small ones do."""
    small, large = (MemoryQueue(20, 8, dtype=torch.float64) for _ in range(2))
    moved = options | ({"ignore_index": first + 1} if "ignore_index" in options else {})
    for _ in range(3):
        features, labels = batch(9)
        want = functional.supcon_loss(features, labels, queue=small, **OPTIONS, **options)
        assert_same(functional.supcon_loss(features, labels + first, queue=large, **OPTIONS, **moved), want, features)
        columns, of_columns = batch(5)
        want = functional.supcon_loss(features, labels, keys=columns, key_labels=of_columns, **OPTIONS, **options)
        got = functional.supcon_loss(features, labels + first, keys=columns, key_labels=of_columns + first, **OPTIONS, **moved)
        assert_same(got, want, features, columns)


def test_views_without_labels_find_no_positive_in_a_queue(device):
    queue = MemoryQueue(64, 4).to(device)
    for _ in range(3):
        before = [row.clone() for row in queue.rows[: len(queue)]]
        features = unit(5, 2, 4).float().to(device)
        got = functional.supcon_loss(features, queue=queue, **OPTIONS)
        rows = torch.cat([features.transpose(0, 1).flatten(0, 1), *(row[None] for row in before)])
        ids = torch.cat([torch.arange(5).repeat(2), -1 - torch.arange(len(before))]).to(device)
        each = functional.supcon_loss(rows, ids, **OPTIONS, reduction="none")[:10]
        torch.testing.assert_close(got, each.mean())


def test_a_queue_takes_the_keys_where_they_are_given(device):
    """MoCo: the momentum encoder's rows are columns of this batch and of the next."""
    queue = MemoryQueue(8, 4).to(device)
    features, labels = torch.randn(3, 4, device=device), torch.arange(3, device=device)
    keys, key_labels = torch.randn(5, 4, device=device), torch.arange(5, device=device)
    functional.supcon_loss(features, labels, keys=keys, key_labels=key_labels, queue=queue)
    assert torch.equal(queue.rows[:5], keys) and torch.equal(queue.keys[:5], key_labels) and len(queue) == 5
    queue.eval()
    functional.supcon_loss(features, labels, keys=keys, key_labels=key_labels, queue=queue)
    assert len(queue) == 5


def test_gradient_accumulation_with_a_queue(device):
    """Two losses and one backward: each keeps the queue that it saw."""
    loss = SupConLoss(0.2, base_temperature=None, normalize=True, queue=MemoryQueue(16, 4)).to(device)
    features, labels = torch.randn(12, 4, device=device, requires_grad=True), torch.arange(12, device=device) % 3
    late = copy.deepcopy(loss)
    total = loss(features[:6], labels[:6]) + loss(features[6:], labels[6:])
    (together,) = torch.autograd.grad(total, features)
    one_by_one = sum(torch.autograd.grad(late(features[part], labels[part]), features)[0] for part in (slice(0, 6), slice(6, 12)))
    torch.testing.assert_close(together, one_by_one)


def test_a_queue_is_saved_and_loaded(device):
    loss = SupConLoss(0.2, queue=MemoryQueue(16, 4)).to(device)
    loss(torch.randn(5, 4, device=device), torch.arange(5, device=device))
    assert list(loss.state_dict()) == ["queue.rows", "queue.keys", "queue.filled"]
    other = SupConLoss(0.2, queue=MemoryQueue(16, 4)).to(device)
    other.load_state_dict(loss.state_dict())
    assert len(other.queue) == 5
    features, labels = torch.randn(4, 4, device=device), torch.arange(4, device=device)
    assert torch.equal(loss(features, labels), other(features, labels))
    other.queue.clear()
    assert len(other.queue) == 0 and int(other.queue.filled) == 0


def test_a_queue_whose_buffers_another_process_overwrites(device):
    """DistributedDataParallel copies the first process's buffers into the others' when it is built, which may have loaded a checkpoint."""
    first, other = (SupConLoss(0.2, normalize=True, queue=MemoryQueue(16, 4)).to(device) for _ in range(2))
    features, labels = torch.randn(6, 4, device=device), torch.arange(6, device=device) % 2
    first(features, labels)
    for put_here in (0, 3):
        if put_here:
            other(features[:put_here], labels[:put_here])
        with torch.no_grad():
            for buffer, of_first in zip(other.buffers(), first.buffers(), strict=True):
                buffer.copy_(of_first)
        assert len(other.queue) == len(first.queue) == 6
        assert torch.equal(copy.deepcopy(other)(features, labels), copy.deepcopy(first)(features, labels))


def test_a_batch_that_is_refused_stays_out_of_the_queue(device):
    queue = MemoryQueue(8, 4).to(device)
    features, labels = torch.randn(3, 4, device=device), torch.arange(3, device=device)
    for options in ({"lone_anchors": "error"}, {"backend": "none"}):
        with pytest.raises(ValueError):
            functional.supcon_loss(features, labels, queue=queue, **options)
        assert len(queue) == 0


@pytest.mark.parametrize(("size", "dim", "text"), [(0, 4, "size must be an int of at least 1, got 0"), (4, 0.5, "dim must be an int")])
def test_a_queue_refuses_at_construction(size, dim, text):
    with pytest.raises(ValueError, match=text):
        MemoryQueue(size, dim)


# --- who is a positive, and what an anchor weighs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast_mode", ["all", "one"])
@pytest.mark.parametrize("lone_anchors", ["zero", "skip"])
def test_lists_of_positives(backend, contrast_mode, lone_anchors):
    features = unit(7, 2, 5).requires_grad_()
    anchors = 14 if contrast_mode == "all" else 7
    positives = torch.randint(-1, 14, (anchors, 3))
    positives[2] = torch.tensor([-1, 2, -1])  # none, as its own number lists none
    options = OPTIONS | {"contrast_mode": contrast_mode, "lone_anchors": lone_anchors}
    got = functional.supcon_loss(features, positives=positives, **options, backend=backend_of(backend))
    z = naive.unit(features.transpose(0, 1).flatten(0, 1))
    mask = naive.listed(positives, 14)
    logits = (z[:anchors] @ z.T / 0.2).masked_fill(torch.eye(anchors, 14, dtype=torch.bool), -torch.inf)
    log_probabilities = torch.where(mask > 0, logits.log_softmax(1), 0)
    losses = -(mask * log_probabilities).sum(1) / mask.sum(1).clamp_min(1)
    assert_same(got, losses.sum() / (anchors if lone_anchors == "zero" else (mask.sum(1) > 0).sum()), features)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_lists_of_positives_of_any_integers(device, dtype):
    z, positives = torch.randn(5, 4, device=device), torch.randint(0, 5, (5, 2), device=device)
    want = functional.supcon_loss(z, positives=positives)
    assert torch.equal(functional.supcon_loss(z, positives=positives.to(dtype)), want)


def test_a_base_temperature_in_a_tensor(device):
    z, labels = torch.randn(6, 4, device=device), torch.arange(6, device=device) % 3
    want = functional.supcon_loss(z, labels, temperature=0.2, base_temperature=0.5)
    for base in (torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)):
        got = functional.supcon_loss(z, labels, temperature=0.2, base_temperature=base)
        torch.testing.assert_close(got, want)


def test_the_published_arithmetic_of_k_positive_contrastive_learning(backend):
    """Kang et al. 2021: queries against momentum keys and a memory, positives the own key and k of the memory."""
    queries, keys, memory = unit(6, 5).requires_grad_(), unit(6, 5), unit(20, 5)
    drawn = torch.stack([torch.randperm(20)[:3] for _ in range(6)])  # of the class, in their code
    columns, positives = torch.cat([keys, memory]), torch.cat([torch.arange(6)[:, None], drawn + 6], 1)
    got = functional.supcon_loss(queries, positives=positives, keys=columns, temperature=0.1, backend=backend_of(backend))
    log_probabilities = (queries @ columns.T / 0.1).log_softmax(1)
    assert_same(got, -log_probabilities.gather(1, positives).mean(1).mean(), queries)


@pytest.mark.parametrize(("samples", "length"), [(40, 1e6), (150, 1e6)])  # one block of rows, and three
def test_several_labels_next_to_a_long_row(backend, samples, length):
    """No row is ever in its own sums, so that nothing of it is left in them."""
    z, labels = unit(samples, 8), torch.rand(samples, 6).round() + torch.eye(samples, 6)
    z[0] *= length
    got = functional.supcon_loss(z.float(), labels, temperature=1.0, reduction="none", backend=backend)
    want = naive.supcon_loss(z.float().double(), mask=naive.several_labels(labels.double()), temperature=1.0, reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7 * length)  # float32's rounding of z_i . z_0


def test_labels_that_nobody_shares(device):
    z = torch.randn(6, 4, device=device, requires_grad=True)
    loss = functional.supcon_loss(z, torch.eye(6, device=device) * 1e-3, normalize=True)
    assert loss.item() == 0 and torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


@pytest.mark.parametrize("lone_anchors", ["zero", "skip"])
def test_weights_of_classes_and_of_anchors(backend, lone_anchors):
    features, labels = batch()
    labels[3], weights = 5, torch.rand(6, dtype=torch.float64)
    options = OPTIONS | {"lone_anchors": lone_anchors, "ignore_index": 2, "class_weights": weights}
    got = functional.supcon_loss(features, labels, **options, backend=backend_of(backend))
    assert_same(got, naive.hard_negative_supcon_loss(features, labels, **options), features)
    of_anchors = torch.rand(24, dtype=torch.float64)
    each = functional.supcon_loss(features, labels, **OPTIONS, reduction="none")
    got = functional.supcon_loss(features, labels, anchor_weights=of_anchors, **OPTIONS)
    assert_same(got, (each * of_anchors).sum() / of_anchors.sum(), features)
    views = features.detach()[:, None].repeat(1, 2, 1)
    each = functional.supcon_loss(views, labels, **OPTIONS, reduction="none")
    of_views = of_anchors.repeat(2)
    for given in (of_anchors, of_views):
        got = functional.supcon_loss(views, labels, anchor_weights=given, **OPTIONS)
        torch.testing.assert_close(got, (each * of_views).sum() / of_views.sum(), **FINE)


def test_weights_move_with_their_module_and_are_no_state(device):
    loss = SupConLoss(torch.tensor(0.07), class_weights=torch.tensor([1.0, 1.0, 1.1])).to(device).bfloat16()
    assert [name for name, _ in loss.named_buffers()] == ["temperature", "class_weights"] and not loss.state_dict()
    assert loss.class_weights.device.type == loss.temperature.device.type == device.type
    assert loss.temperature.item() == torch.tensor(0.07).item() and loss.class_weights[2].item() == torch.tensor(1.1).item()
    loss.class_weights = torch.ones(3, device=device)
    features, labels = torch.randn(6, 4, device=device), torch.arange(6, device=device) % 3
    torch.testing.assert_close(loss(features, labels), SupConLoss()(features, labels))


def test_all_rows_ignored_or_without_negatives(backend, device):
    z, labels = torch.randn(6, 4, device=device, requires_grad=True), torch.zeros(6, dtype=torch.int64, device=device)
    for options in ({"ignore_index": 0}, {"denominator": "negatives"}, {"denominator": "negatives", "beta": 1.0, "form": "in"}):
        for lone_anchors in ("zero", "skip"):
            loss = functional.supcon_loss(z, labels, lone_anchors=lone_anchors, **options, backend=backend)
            assert loss.item() == 0
            assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))
        bad = z.detach().clone()
        bad[1, 0] = math.nan
        assert functional.supcon_loss(bad, labels, **options, backend=backend).isnan()
    with pytest.raises(ValueError, match="every anchor must have a positive and a negative, got 6 of 6 without"):
        functional.supcon_loss(z, labels, denominator="negatives", lone_anchors="error", backend=backend)


def test_the_chance_level(device):
    for views, options in ((1, {}), (2, {"base_temperature": None}), (2, {"temperature": 0.5})):
        loss = SupConLoss(**options)
        features = torch.ones(8, views, 3, device=device)
        labels = torch.arange(8, device=device) % 2
        assert loss(features, labels).item() == pytest.approx(loss.chance_level(8 * views), rel=1e-6)
    loss = SupConLoss(form="in")
    assert loss(torch.ones(8, 3, device=device), labels).item() == pytest.approx(loss.chance_level(8), rel=1e-6)
    with pytest.raises(ValueError, match="chance_level is known for denominator='all'"):
        SupConLoss(denominator="negatives").chance_level(8)
