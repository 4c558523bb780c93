"""Parametric contrastive loss: the authors' arithmetic, the queue, what its weights leave at 0."""

import math

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import serves
from table import unit

from fastsupcon import MemoryQueue, PaCoLoss
from fastsupcon.functional import paco_loss

CLASSES, DEPTH, WIDE = 5, 6, 9
COUNTS = [500, 120, 40, 11, 3]


def problem(device, samples=8, views=0, dtype=torch.float64):
    """Features, labels, prototypes, momentum features, class features."""
    shape = (samples, views) if views else (samples,)
    labels = torch.randint(0, CLASSES, (samples,), device=device)
    leaves = unit(*shape, DEPTH), unit(CLASSES, WIDE), unit(samples, DEPTH), torch.randn(*shape, WIDE, dtype=torch.float64)
    features, prototypes, momentum, backbone = (x.to(device, dtype).requires_grad_() for x in leaves)
    return features, labels, prototypes, momentum, backbone


def published(rows, labels, logits, *, alpha, beta=1.0, gamma=1.0, supt=1.0, temperature=0.2, smooth=0.0, counts=None, tiny=(1e-9, 1e-12)):
    """The arithmetic of the authors' PaCoLoss: logits [B, C] of the classifier beside rows [B + ..., D], whose first B are anchors."""
    anchors = len(logits)
    if counts is not None:
        logits = logits + (counts / counts.sum() + tiny[0]).log()
    scores = torch.cat([logits / supt, rows[:anchors] @ rows.T / temperature], 1)
    scores = scores - scores.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(anchors, len(rows), dtype=scores.dtype, device=scores.device)
    targets = torch.full_like(logits, smooth / (CLASSES - 1)).scatter(1, labels[:anchors, None], 1 - smooth)
    weights = torch.cat([targets * beta, (labels[:anchors, None] == labels) * others * alpha], 1)
    exps = scores.exp() * torch.cat([torch.ones_like(logits), gamma * others], 1)
    log_probabilities = scores - (exps.sum(1, keepdim=True) + tiny[1]).log()
    return -((weights * log_probabilities).sum(1) / weights.sum(1)).mean()


FORMS = {
    "PaCo": {"alpha": 0.05, "counts": COUNTS},
    "PaCo's full ImageNet": {"alpha": 1.0, "gamma": 0.0},
    "GPaCo": {"alpha": 0.045, "counts": COUNTS, "smooth": 0.1},
    "all weights": {"alpha": 0.3, "beta": 0.7, "gamma": 0.4, "supt": 1.5, "temperature": 0.07, "counts": COUNTS, "smooth": 0.2},
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("momentum", [True, False])
def test_against_the_authors_arithmetic(backend, device, form, momentum):
    """PaCo: anchors, the momentum encoder's rows of them, the queue. GPaCo: both views as anchors, the queue."""
    dtype = torch.float64 if serves(backend, torch.float64) else torch.float32
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    options = dict(FORMS[form])
    counts = torch.tensor(options.pop("counts"), device=device) if "counts" in options else None
    features, labels, prototypes, keys, backbone = problem(device, views=0 if momentum else 2, dtype=dtype)
    queue = MemoryQueue(16, DEPTH, dtype=dtype).to(device)
    queue.put(unit(16, DEPTH).to(device, dtype), torch.randint(0, CLASSES, (16,), device=device))
    names = {"supt": "class_temperature", "smooth": "label_smoothing"}
    more = {"class_counts": counts, "queue": queue.eval(), "backend": backend, "normalize": False}  # the authors' rows come of unit length
    more |= {names.get(name, name): value for name, value in options.items()}
    ours = paco_loss(features, labels, prototypes, keys if momentum else None, backbone, **more)
    normalized = paco_loss(features, labels, prototypes, keys if momentum else None, backbone, **more | {"normalize": True})
    torch.testing.assert_close(normalized, ours, rtol=tolerance, atol=tolerance)

    leaves = tuple(x for x in (features, prototypes, keys, backbone) if momentum or x is not keys)
    wide = {x: x.detach().double().requires_grad_() for x in leaves}
    anchors, x = (y if momentum else torch.cat([y[:, 0], y[:, 1]]) for y in (wide[features], wide[backbone]))
    rows = torch.cat([anchors, *([wide[keys]] if momentum else []), queue.rows.double()])
    arguments = rows, torch.cat([labels, labels, queue.keys]), x @ wide[prototypes].T
    counts = None if counts is None else counts.double()
    theirs = published(*arguments, counts=counts, tiny=(0, 0), **options)
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    # they add 1e-9 to the share of every class and 1e-12 to every sum; here 1e-9 stands for a share of 0
    torch.testing.assert_close(ours.double(), published(*arguments, counts=counts, **options), rtol=max(1e-6, tolerance), atol=1e-6)
    for got, want in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, tuple(wide.values())), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_class_features_the_features_meet_the_prototypes(backend, device, dtype):
    """As they come, whatever their length is brought to among themselves."""
    if not serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    features, labels, _, _, _ = problem(device, views=2, dtype=dtype)
    features = (features.detach() * 3).requires_grad_()
    prototypes = torch.randn(CLASSES, DEPTH, device=device, dtype=dtype, requires_grad=True)
    ours = paco_loss(features, labels, prototypes, label_smoothing=0.1, backend=backend)
    wide = features.detach().double().requires_grad_(), labels, prototypes.detach().double().requires_grad_()
    theirs = naive.paco_loss(*wide, temperature=0.2, label_smoothing=0.1)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    got, want = torch.autograd.grad(ours, (features, prototypes)), torch.autograd.grad(theirs, wide[::2])
    for x, y in zip(got, want, strict=True):
        assert (x.double() - y).abs().max() < (1e-5 if dtype == torch.float32 else 8e-3) * y.abs().max()


def test_where_the_authors_overflow(device):
    """Their maximum is over the row with itself too, and their sum of exponentials has 1e-12 added, which then is all there is."""
    features, labels, prototypes, momentum, backbone = problem(device, dtype=torch.float32)
    arguments = torch.cat([features, momentum]), labels.repeat(2), backbone @ prototypes.T
    wide = features.double(), labels, prototypes.double(), momentum.double(), backbone.double()
    want = naive.paco_loss(*wide, temperature=1e-3)
    ours = paco_loss(features, labels, prototypes, momentum, backbone, temperature=1e-3)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-5)
    assert (published(*arguments, alpha=0.05, temperature=1e-3).double() - want).abs() > 1


def test_steps_with_a_queue(backend, device):
    """Each step sees the rows of those before, the newest first; in evaluation none is put in. It begins empty."""
    paco = PaCoLoss(CLASSES, WIDE, COUNTS, queue=MemoryQueue(20, DEPTH), backend=backend).to(device)
    seen, of_seen = torch.zeros(0, DEPTH, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    losses, wanted = [], []
    for step in range(4):
        features, labels, _, momentum, backbone = problem(device, dtype=torch.float32)
        momentum = momentum.detach() if step % 2 else None
        losses.append(paco(features, labels, momentum, backbone))
        inputs = [
            x if x is None or not x.is_floating_point() else x.double() for x in (features, labels, paco.prototypes, momentum, backbone)
        ]
        queue = (seen.double(), of_seen)
        wanted.append(naive.paco_loss(*inputs, temperature=0.2, class_counts=torch.tensor(COUNTS, device=device), queue=queue))
        torch.testing.assert_close(losses[-1].double(), wanted[-1], rtol=1e-5, atol=1e-5)
        assert not torch.equal(paco.eval()(features, labels, momentum, backbone), losses[-1])  # of a queue that holds its own rows now
        paco.train()
        seen = torch.cat([features.detach() if momentum is None else momentum, seen])[:20]
        of_seen = torch.cat([labels, of_seen])[:20]
        assert torch.equal(paco.queue.rows[: len(paco.queue)], seen) and torch.equal(paco.queue.keys[: len(paco.queue)], of_seen)
    got, want = (torch.autograd.grad(sum(x), paco.prototypes)[0] for x in (losses, wanted))  # each step kept the queue that it saw
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def test_compiled_with_a_queue(device):
    """The queue's rows grow from step to step, and with them what is compiled."""
    plain, compiled = (PaCoLoss(CLASSES, WIDE, COUNTS, queue=MemoryQueue(12, DEPTH)).to(device) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    torch._dynamo.reset()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        features, labels, _, momentum, backbone = problem(device, dtype=torch.float32)
        want, got = plain(features, labels, momentum, backbone), step(features, labels, momentum, backbone)
        torch.testing.assert_close(got, want)
        gradients = (torch.autograd.grad(loss, x)[0] for loss, x in ((got, compiled.prototypes), (want, plain.prototypes)))
        torch.testing.assert_close(*gradients)
    assert len(compiled.queue) == 12 and torch.equal(compiled.queue.rows, plain.queue.rows)


def test_of_several_views_the_last_is_queued(device):
    features, labels, prototypes, _, backbone = problem(device, views=2, dtype=torch.float32)
    queue = MemoryQueue(100, DEPTH).to(device)
    paco_loss(features, labels, prototypes, class_features=backbone, queue=queue)
    assert torch.equal(queue.rows[: len(queue)], features[:, 1]) and torch.equal(queue.keys[: len(queue)], labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_without_rows_it_is_the_classifiers_cross_entropy(backend, device, smoothing):
    features, labels, prototypes, _, backbone = problem(device, dtype=torch.float32)
    options = {"alpha": 0, "gamma": 0, "label_smoothing": smoothing, "class_temperature": 0.5, "backend": backend}
    ours = paco_loss(features, labels, prototypes, None, backbone, class_counts=torch.tensor(COUNTS, device=device), **options)
    logits = (backbone @ prototypes.T + (torch.tensor(COUNTS, device=device) / sum(COUNTS)).log()) / 0.5
    # torch smooths over all classes, the own one among them
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=smoothing * CLASSES / (CLASSES - 1)))
    gradients = torch.autograd.grad(ours, (features, prototypes))
    assert torch.equal(gradients[0], torch.zeros_like(features)) and gradients[1].abs().max() > 0


def test_learned_temperatures(backend, device):
    """That of the classes is in the bias too."""
    features, labels, prototypes, momentum, backbone = problem(device, dtype=torch.float32)
    learned = [torch.tensor(x, device=device, requires_grad=True) for x in (0.3, 0.7)]
    wide = [x.detach().double().requires_grad_() for x in learned]
    options = {"class_counts": torch.tensor(COUNTS, device=device), "label_smoothing": 0.1}
    inputs = features, labels, prototypes, momentum, backbone
    ours = paco_loss(*inputs, temperature=learned[0], class_temperature=learned[1], backend=backend, **options)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    theirs = naive.paco_loss(*inputs, temperature=wide[0], class_temperature=wide[1], **options)
    for got, want in zip(torch.autograd.grad(ours, learned), torch.autograd.grad(theirs, wide), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_edge_cases(backend, device):
    features, labels, prototypes, momentum, backbone = problem(device, dtype=torch.float32)
    with torch.no_grad():
        features[0], features[2], momentum[1], backbone[3], prototypes[2] = 0, features[1], features[1], 0, 0
    counts = torch.tensor([0, 1, 2, 3, 4], device=device)
    leaves = features, prototypes, backbone
    one_class, all_lone = labels * 0, torch.arange(8, device=device)[:CLASSES]
    for temperature in (10.0, 1e-3):
        for samples, keys, more in (
            (8, labels, momentum),
            (8, one_class, None),
            (CLASSES, all_lone, None),
            (1, labels, momentum),
            (1, labels, None),
        ):
            momentum_rows = more if more is None else more[:samples]
            inputs = features[:samples], keys[:samples], prototypes, momentum_rows, backbone[:samples]
            loss = paco_loss(*inputs, class_counts=counts, temperature=temperature, backend=backend)
            assert loss.isfinite() and all(x.isfinite().all() for x in torch.autograd.grad(loss, leaves))
    alone = paco_loss(features[:1], labels[:1] * 0, prototypes[:1], None, backbone[:1], backend=backend)
    assert alone == 0  # nothing but the own prototype
    for bad, at in ((math.nan, 0), (math.inf, 0), (math.nan, 2), (math.inf, 3), (math.nan, 4)):
        inputs = [x.detach().clone() for x in (features, labels, prototypes, momentum, backbone)]
        inputs[at][3, 1] = bad
        assert not paco_loss(*inputs, backend=backend).isfinite()


def test_the_module(device):
    features, labels, _, momentum, backbone = problem(device, dtype=torch.float32)
    paco = PaCoLoss(CLASSES, WIDE, COUNTS, class_temperature=0.5, queue=MemoryQueue(16, DEPTH)).to(device)
    assert [name for name, _ in paco.named_parameters()] == ["prototypes"]
    assert list(paco.state_dict()) == ["prototypes", "class_counts", "queue.rows", "queue.keys", "queue.filled"]
    torch.testing.assert_close(paco.logits(backbone), backbone @ paco.prototypes.T / 0.5)
    paco(features, labels, momentum, backbone)
    again = PaCoLoss(CLASSES, WIDE, COUNTS, class_temperature=0.5, queue=MemoryQueue(16, DEPTH)).to(device)
    again.load_state_dict(paco.state_dict())
    assert len(again.queue) == 8
    assert torch.equal(again.eval()(features, labels, momentum, backbone), paco.eval()(features, labels, momentum, backbone))
