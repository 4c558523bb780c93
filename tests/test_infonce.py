"""InfoNCE and CLIP: what the table of losses (test_losses.py) does not ask."""

import math
import re

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, serves
from table import unit

from fastsupcon import InfoNCELoss, MemoryQueue, functional, operators

N, D, K = 7, 5, 4


def rows(device, count=N, dtype=torch.float64):
    return torch.randn(count, D, dtype=dtype, device=device, requires_grad=True)


# --- against the published code ---------------------------------------------------------------------------------------------------------


def clip_of_figure_3(a, b, log_scale):
    """Radford et al. 2021, figure 3: unit rows, logits times exp(t), cross-entropy against 0 … N - 1 along both axes, halved."""
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T * log_scale.exp()
    numbers = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2


def unicl(a, b, labels, temperature):
    """Yang et al. 2022: targets 1 where labels are equal, each row of them over its sum, against the logits of either direction."""
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
    targets = (labels[:, None] == labels).double()
    targets = targets / targets.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def moco(queries, keys, queue, temperature):
    """He et al. 2020, algorithm 1: the positive in column 0, the queue behind it; of the batch no other key is a negative."""
    queries, keys, queue = (F.normalize(x, dim=1) for x in (queries, keys, queue))
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue.T], 1)
    return F.cross_entropy(logits / temperature, torch.zeros(len(queries), dtype=torch.int64, device=queries.device))


def test_clip(device):
    a, b, log_scale = rows(device), rows(device), torch.tensor(math.log(1 / 0.07), dtype=torch.float64, device=device, requires_grad=True)
    assert_same(functional.info_nce_loss(a, b, temperature=torch.exp(-log_scale)), clip_of_figure_3(a, b, log_scale), a, b, log_scale)


def test_unicl(device):
    a, b, labels = rows(device), rows(device), torch.tensor([0, 2, 0, 1, 2, 2, -5], device=device)
    assert_same(functional.info_nce_loss(a, b, labels, temperature=0.2), unicl(a, b, labels, 0.2), a, b)


def test_moco_has_no_negatives_in_its_batch_and_ours_has(device):
    """So the published value is the smaller one, by what the other keys of the batch add to the denominator."""
    queries, keys, earlier = rows(device), rows(device).detach(), rows(device, 9).detach()
    queue = MemoryQueue(20, D, dtype=torch.float64).to(device)
    queue.put(earlier, torch.zeros(9, dtype=torch.int64, device=device))
    ours = functional.info_nce_loss(queries, keys, temperature=0.2, symmetric=False, queue=queue, reduction="none")
    for i in range(N):
        others = torch.cat([keys[:i], keys[i + 1 :], earlier])
        torch.testing.assert_close(ours[i], moco(queries[i : i + 1], keys[i : i + 1], others, 0.2), rtol=1e-10, atol=1e-10)
    assert ours.mean() > moco(queries, keys, earlier, 0.2)


# --- directions ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_half_of_each_direction_from_one_pass(backend, device, monkeypatch, keyed, reduction):
    a, b = rows(device, dtype=torch.float32), rows(device, dtype=torch.float32)
    keys = torch.arange(N, device=device) // 3 if keyed else None
    options = {"temperature": 0.3, "reduction": reduction, "backend": backend}
    there, back = (functional.info_nce_loss(x, y, keys, symmetric=False, **options) for x, y in ((a, b), (b, a)))
    calls = []
    terms = operators.terms
    monkeypatch.setattr(operators, "terms", lambda *arguments, **options: calls.append(arguments) or terms(*arguments, **options))
    both = functional.info_nce_loss(a, b, keys, **options)
    torch.testing.assert_close(both, (there + back) / 2)
    torch.testing.assert_close(both, functional.info_nce_loss(b, a, keys, **options))
    assert len(calls) == 2  # one for each of the two losses


@pytest.mark.parametrize("keyed", [False, True])
def test_negatives_are_columns_of_the_first_direction_alone(backend, device, keyed):
    a, b, negatives = (rows(device, count, torch.float32) for count in (N, N, K))
    keys = torch.arange(N, device=device) % 4 if keyed else None
    wide = [x.detach().double().requires_grad_() for x in (a, b, negatives)]
    for symmetric in (True, False):
        loss = functional.info_nce_loss(a, b, keys, negatives, temperature=0.2, symmetric=symmetric, backend=backend)
        want = naive.info_nce_loss(*wide[:2], keys, wide[2], temperature=0.2, symmetric=symmetric)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(loss, (a, b, negatives))
        for gradient, wanted in zip(gradients, torch.autograd.grad(want, wide), strict=True):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)
    plain, with_them = (functional.info_nce_loss(a, b, keys, x, symmetric=False, reduction="none") for x in (None, negatives))
    assert (with_them > plain).all()


def test_every_pair_with_the_same_key(device):
    """One document throughout: all columns are positives, and the loss of equal rows is the chance level."""
    a, keys = torch.ones(N, D, device=device), torch.zeros(N, dtype=torch.int64, device=device)
    loss = functional.info_nce_loss(a, a, keys, reduction="none")
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(N)), rtol=1e-5, atol=1e-5)


def test_chance_level(device):
    zeros = torch.zeros(N, D, device=device)
    assert functional.info_nce_loss(zeros, zeros).item() == pytest.approx(math.log(N), rel=1e-6)
    one_way = functional.info_nce_loss(zeros, zeros, negatives=zeros[:K], symmetric=False)
    assert one_way.item() == pytest.approx(math.log(N + K), rel=1e-6)
    for symmetric in (True, False):
        for queue in (None, MemoryQueue(2 * N, D).to(device)):
            loss = InfoNCELoss(symmetric=symmetric, queue=queue)
            for _ in range(2):  # the second with rows in the queue
                expected = loss.chance_level(N)
                assert loss(zeros, zeros).item() == pytest.approx(expected, rel=1e-6)
    assert expected == math.log(2 * N)


# --- queue ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_queue(backend, device, keyed, symmetric):
    """Three batches: the third meets the rows of the two before, under their keys, as more columns of the first direction."""
    batches = [(rows(device, dtype=torch.float32), rows(device, dtype=torch.float32)) for _ in range(3)]
    of_batch = [torch.randint(0, 4, (N,), device=device) if keyed else None for _ in batches]
    loss = InfoNCELoss(0.2, symmetric, queue=MemoryQueue(3 * N, D).to(device), backend=backend)
    first = loss(*batches[0], of_batch[0])
    torch.testing.assert_close(first, functional.info_nce_loss(*batches[0], of_batch[0], temperature=0.2, symmetric=symmetric))
    loss(*batches[1], of_batch[1]).backward()
    got = loss(*batches[2], of_batch[2])
    a, b = (x.detach().double().requires_grad_() for x in batches[2])
    earlier = torch.cat([batches[1][1], batches[0][1]]).detach().double()
    everything = naive.unit(a) @ naive.unit(torch.cat([b, earlier])).T / 0.2
    own = torch.arange(N, device=device)
    keys = torch.cat([own, own.new_full((2 * N,), -1)]) if not keyed else torch.cat([of_batch[2], of_batch[1], of_batch[0]])
    positives = keys[:N, None] == keys
    want = (everything.logsumexp(1) - (everything * positives).sum(1) / positives.sum(1)).mean()
    if symmetric:
        logits, positives = everything[:, :N].T, positives[:, :N]
        want = (want + (logits.logsumexp(1) - (logits * positives).sum(1) / positives.sum(1)).mean()) / 2
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(torch.autograd.grad(got, batches[2]), torch.autograd.grad(want, (a, b)), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)
    held, held_keys = loss.queue.columns(batches[0][0])
    assert torch.equal(held, torch.cat([y for _, y in reversed(batches)]).detach())
    assert not keyed or torch.equal(held_keys, torch.cat(of_batch[::-1]))


def test_a_queue_is_filled_in_training_mode_only_and_after_the_loss(device):
    a, b = (rows(device, dtype=torch.float32) for _ in range(2))
    loss = InfoNCELoss(queue=MemoryQueue(10, D).to(device)).eval()
    alone = functional.info_nce_loss(a, b)
    assert torch.equal(loss(a, b), alone)
    assert len(loss.queue) == 0
    assert torch.equal(loss.train()(a, b), alone)
    assert len(loss.queue) == N
    assert loss(a, b) > alone
    assert list(loss.state_dict()) == ["queue.rows", "queue.keys", "queue.filled"]


def test_rows_queued_without_keys_are_nobodys_positives(device):
    """Where later calls have keys, whatever these are."""
    a, b = (rows(device) for _ in range(2))
    queue = MemoryQueue(N, D, dtype=torch.float64).to(device)
    earlier = rows(device)
    functional.info_nce_loss(a, earlier, queue=queue)
    keys = torch.arange(N, device=device) // 2
    got = functional.info_nce_loss(a, b, keys, temperature=0.2, queue=queue)
    torch.testing.assert_close(got, naive.info_nce_loss(a, b, keys, earlier, temperature=0.2))


def test_a_queue_and_hard_negatives_under_compile(device):
    a, b = (rows(device, dtype=torch.float32) for _ in range(2))
    negatives, keys = rows(device, K, torch.float32), torch.arange(N, device=device) // 2
    plain, compiled = (InfoNCELoss(0.2, queue=MemoryQueue(9, D).to(device)) for _ in range(2))
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        got, want = call(a, b, keys, negatives), plain(a, b, keys, negatives)
        torch.testing.assert_close(got, want)
        for mine, theirs in zip(*(torch.autograd.grad(x, (a, b, negatives)) for x in (got, want)), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert torch.equal(compiled.queue.rows, plain.queue.rows)
    assert len(compiled.queue) == 9


# --- edges ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_single_pair(backend, device, symmetric):
    a, b = (rows(device, 1, torch.float32) for _ in range(2))
    for keys in (None, torch.tensor([3], device=device)):
        loss = functional.info_nce_loss(a, b, keys, symmetric=symmetric, backend=backend)
        assert loss == 0
        assert all(torch.equal(x, torch.zeros_like(x)) for x in torch.autograd.grad(loss, (a, b)))
    assert functional.info_nce_loss(a * math.nan, b, symmetric=symmetric, backend=backend).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_and_duplicate_rows_at_a_low_temperature(backend, device, dtype, keyed, normalize):
    if not serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    a, b, negatives = (unit(6, D).to(device, dtype) for _ in range(3))
    a[0] = b[0] = negatives[0] = 0
    a[2], b[3] = a[1], a[1]
    leaves = [x.requires_grad_() for x in (a, b, negatives)]
    keys = torch.arange(6, device=device) // 2 if keyed else None
    loss = functional.info_nce_loss(a, b, keys, negatives, temperature=1e-3, normalize=normalize, backend=backend)
    assert loss.dtype == torch.float32
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["a", "b", "negatives", "queue"])
def test_what_is_not_finite_shows(backend, device, bad, where):
    of = {name: torch.rand(N, D, device=device) + 0.1 for name in ("a", "b", "negatives", "queue")}
    of[where][2, 1] = bad
    queue = MemoryQueue(N, D).to(device)
    queue.put(of["queue"], torch.arange(N, device=device))
    for keys in (None, torch.arange(N, device=device) // 2):
        for normalize in (True, False):
            options = {"normalize": normalize, "queue": queue.eval(), "backend": backend}
            assert not functional.info_nce_loss(of["a"], of["b"], keys, of["negatives"], **options).isfinite()


def z(n=4, d=3, dtype=torch.float32):
    return torch.zeros(n, d, dtype=dtype)


WRONG = [
    (("x", z()), {}, TypeError, "a must be a torch.Tensor, got str"),
    ((z(), z(4, 2)), {}, ValueError, "b must have shape [rows, 3], got [4, 2]"),
    ((z(), z(dtype=torch.float64)), {}, TypeError, "b must have a's dtype torch.float32, got torch.float64"),
    (
        (z(), z(5)),
        {},
        ValueError,
        "b must have shape [4, 3] like a, a row for each of a's, got [5, 3]. Columns",
    ),
    (
        (z(), z(5)),
        {},
        ValueError,
        "into negatives=[K, D]; rows with several positives into a and b once for each",
    ),
    ((z(), z(), [0, 1, 2, 3]), {}, TypeError, "keys must be a torch.Tensor of an integer dtype, got list"),
    ((z(), z(), torch.arange(3)), {}, ValueError, "keys must have shape [4], got [3]"),
    ((z(), z(), None, z(2, 4)), {}, ValueError, "negatives must have shape [rows, 3], got [2, 4]"),
    ((z(), z(), None, z(0)), {}, ValueError, "negatives must not be empty, got shape [0, 3]"),
    ((z(), z(), None, z(2).half()), {}, TypeError, "negatives must have a's dtype torch.float32, got torch.float16"),
    ((z(), z()), {"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    ((z(), z()), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ((z(), z()), {"queue": z()}, TypeError, "queue must be a fastsupcon.MemoryQueue or None, got Tensor"),
    ((z(), z()), {"queue": MemoryQueue(4, 5)}, ValueError, "queue holds rows of dimension 5, got features of dimension 3"),
    ((z(), z().to("meta")), {}, ValueError, "b must be on cpu like the rows, got meta"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), WRONG, ids=[case[3][:50] for case in WRONG])
def test_wrong_input(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.info_nce_loss(*arguments, **options)


def test_the_module_refuses_at_construction():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        InfoNCELoss(-1)
    with pytest.raises(TypeError, match=r"queue must be a fastsupcon\.MemoryQueue or None, got int"):
        InfoNCELoss(queue=4096)
