"""NT-Xent and its form with a memory: what the table of losses (test_losses.py) does not ask."""

import math
import re

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, serves
from table import unit

from fastsupcon import MemoryQueue, NTXentLoss, functional, operators

B, D = 7, 5


def rows(device, count=B, dtype=torch.float64):
    return torch.randn(count, D, dtype=dtype, device=device, requires_grad=True)


# --- against the published code ---------------------------------------------------------------------------------------------------------


def simclr(z0, z1, temperature):
    """Chen et al. 2020: for each view the logits against the other view, then against its own less 1e9 where a row meets itself; the two
    views' cross-entropies are added."""
    a, b = F.normalize(z0, dim=1), F.normalize(z1, dim=1)
    numbers = torch.arange(len(a), device=a.device)
    itself = torch.eye(len(a), dtype=a.dtype, device=a.device) * 1e9

    def of_view(x, other):
        return F.cross_entropy(torch.cat([x @ other.T / temperature, x @ x.T / temperature - itself], 1), numbers)

    return of_view(a, b) + of_view(b, a)


def with_memory(z0, z1, bank, temperature):
    """lightly with a memory bank, MoCo: the positive's logit in column 0, those of the bank behind it, classes 0."""
    a, b, bank = (F.normalize(x, dim=1) for x in (z0, z1, bank))
    logits = torch.cat([(a * b).sum(1, keepdim=True), a @ bank.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64, device=a.device))


def test_simclr_adds_what_we_take_the_mean_of(device):
    z0, z1 = rows(device), rows(device)
    assert_same(functional.nt_xent_loss(z0, z1, temperature=0.3), simclr(z0, z1, 0.3) / 2, z0, z1)


def test_memory(device):
    z0, z1, earlier = rows(device), rows(device), rows(device, 9).detach()
    queue = MemoryQueue(9, D, dtype=torch.float64).to(device)
    queue.put(earlier, torch.zeros(9, dtype=torch.int64, device=device))  # their keys say nothing here
    temperature = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    want = with_memory(z0, z1, earlier, temperature)
    assert_same(functional.nt_xent_loss(z0, z1, temperature=temperature, queue=queue), want, z0, z1, temperature)
    assert torch.equal(queue.rows, torch.cat([z1.detach(), earlier[: 9 - B]]))


# --- without a memory -----------------------------------------------------------------------------------------------------------------


def test_it_is_supcon_of_two_views_without_labels(backend, device):
    z0, z1 = (rows(device, dtype=torch.float32) for _ in range(2))
    options = {"temperature": 0.3, "normalize": True, "backend": backend, "reduction": "none"}
    each = functional.nt_xent_loss(z0, z1, **options)
    assert torch.equal(each, functional.supcon_loss(torch.stack([z0, z1], 1), **options))
    torch.testing.assert_close(each.roll(B), functional.nt_xent_loss(z1, z0, **options))


def test_one_call_of_the_operator(device, monkeypatch):
    calls = []
    loss = operators.loss
    monkeypatch.setattr(operators, "terms", None)
    monkeypatch.setattr(operators, "loss", lambda *arguments, **options: calls.append(arguments) or loss(*arguments, **options))
    functional.nt_xent_loss(rows(device), rows(device)).backward()
    assert len(calls) == 1


def test_chance_level(device):
    zeros = torch.zeros(B, D, device=device)
    assert functional.nt_xent_loss(zeros, zeros).item() == pytest.approx(math.log(2 * B - 1), rel=1e-6)
    queue = MemoryQueue(9, D).to(device)
    queue.put(zeros, torch.zeros(B, dtype=torch.int64, device=device))
    assert functional.nt_xent_loss(zeros, zeros, queue=queue).item() == pytest.approx(math.log(1 + B), rel=1e-6)
    for loss in (NTXentLoss(), NTXentLoss(queue=queue)):
        expected = loss.chance_level(2 * B)
        assert loss(zeros, zeros).item() == pytest.approx(expected, rel=1e-6)


# --- queue ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_queue(backend, device, reduction, normalize):
    """Three batches: the first has no negatives, the third those of the two before."""
    batches = [(rows(device, dtype=torch.float32), rows(device, dtype=torch.float32)) for _ in range(3)]
    queue = MemoryQueue(3 * B, D).to(device)
    loss = NTXentLoss(0.3, normalize=normalize, reduction=reduction, queue=queue, backend=backend)
    first = loss(*batches[0])
    assert not first.any()
    assert all(not x.any() for x in torch.autograd.grad(first.sum(), batches[0]))
    loss(*batches[1])
    got = loss(*batches[2])
    a, b = (x.detach().double().requires_grad_() for x in batches[2])
    earlier = torch.cat([batches[1][1], batches[0][1]]).detach().double()
    u, v, w = (naive.unit(x) if normalize else x for x in (a, b, earlier))
    positive = (u * v).sum(1) / 0.3
    losses = torch.cat([positive[:, None], u @ w.T / 0.3], 1).logsumexp(1) - positive
    want = naive.reduce(losses, torch.ones(B, dtype=torch.bool, device=device), reduction)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got.sum(), batches[2])
    for gradient, wanted in zip(gradients, torch.autograd.grad(want.sum(), (a, b)), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(queue.columns(batches[0][0])[0], torch.cat([z1 for _, z1 in reversed(batches)]).detach())


def test_a_queue_is_left_alone_in_evaluation(device):
    loss = NTXentLoss(queue=MemoryQueue(4, D).to(device)).eval()
    loss(rows(device, dtype=torch.float32), rows(device, dtype=torch.float32))
    assert len(loss.queue) == 0
    loss.train()(rows(device, dtype=torch.float32), rows(device, dtype=torch.float32))
    assert len(loss.queue) == 4


def test_derivatives_with_a_queue(device):
    """First and second, in float64, with the temperature's."""
    z0, z1, temperature = rows(device, 3), rows(device, 3), torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)
    queue = MemoryQueue(4, D, dtype=torch.float64).to(device).eval()
    for held in (False, True):
        if held:
            queue.put(rows(device, 4), torch.zeros(4, dtype=torch.int64, device=device))

        def loss(z0, z1, temperature):
            return functional.nt_xent_loss(z0, z1, temperature=temperature, reduction="none", queue=queue)

        assert torch.autograd.gradcheck(loss, (z0, z1, temperature))
        assert torch.autograd.gradgradcheck(loss, (z0, z1, temperature))


def test_autocast_changes_no_bit_with_a_queue(backend, device):
    z0, z1 = (rows(device, dtype=torch.float32) for _ in range(2))
    queue = MemoryQueue(B, D).to(device)
    queue.put(rows(device, dtype=torch.float32), torch.zeros(B, dtype=torch.int64, device=device))
    loss = NTXentLoss(queue=queue.eval(), backend=backend)
    outside = loss(z0, z1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = loss(z0, z1)
    for x, y in zip((inside, *torch.autograd.grad(inside, (z0, z1))), (outside, *torch.autograd.grad(outside, (z0, z1))), strict=True):
        assert torch.equal(x, y)


def test_a_queue_under_compile(device):
    z0, z1 = (rows(device, dtype=torch.float32) for _ in range(2))
    plain, compiled = (NTXentLoss(0.2, queue=MemoryQueue(9, D).to(device)) for _ in range(2))
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        got, want = call(z0, z1), plain(z0, z1)
        torch.testing.assert_close(got, want)
        for mine, theirs in zip(*(torch.autograd.grad(x, (z0, z1)) for x in (got, want)), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert torch.equal(compiled.queue.rows, plain.queue.rows)


# --- edges ---------------------------------------------------------------------------------------------------------------------------


def test_one_sample(backend, device):
    z0, z1 = (rows(device, 1, torch.float32) for _ in range(2))
    loss = functional.nt_xent_loss(z0, z1, backend=backend)
    assert loss == 0
    assert all(torch.equal(x, torch.zeros_like(x)) for x in torch.autograd.grad(loss, (z0, z1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queued", [False, True])
def test_zero_and_duplicate_rows_at_a_low_temperature(backend, device, dtype, queued):
    if not serves(backend, dtype):
        pytest.skip(f"{backend} does not serve {dtype}")
    z0, z1, earlier = (unit(6, D).to(device, dtype) for _ in range(3))
    z0[0] = z1[0] = earlier[0] = 0
    z0[2] = z1[2] = z1[3] = earlier[4] = z0[1]
    queue = None
    if queued:
        queue = MemoryQueue(6, D, dtype=dtype).to(device)
        queue.put(earlier, torch.zeros(6, dtype=torch.int64, device=device))
    leaves = [x.requires_grad_() for x in (z0, z1)]
    loss = functional.nt_xent_loss(z0, z1, temperature=1e-3, queue=queue, backend=backend)
    assert loss.dtype == torch.float32
    assert all(x.isfinite().all() for x in (loss, *torch.autograd.grad(loss, leaves)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["z0", "z1", "queue", "empty queue"])
def test_what_is_not_finite_shows(backend, device, bad, where):
    of = {name: torch.rand(B, D, device=device) + 0.1 for name in ("z0", "z1", "queue")}
    of["z0" if where == "empty queue" else where][2, 1] = bad
    queue = MemoryQueue(B, D).to(device)
    if where != "empty queue":
        queue.put(of["queue"], torch.arange(B, device=device))
    for normalize in (True, False):
        for memory in (queue.eval(), None)[: 1 if "queue" in where else 2]:
            loss = functional.nt_xent_loss(of["z0"], of["z1"], normalize=normalize, queue=memory, backend=backend)
            assert not loss.isfinite() or (bad == -math.inf and where == "queue" and not normalize)  # a negative of no weight


def z(n=4, d=3, dtype=torch.float32):
    return torch.zeros(n, d, dtype=dtype)


WRONG = [
    (("x", z()), {}, TypeError, "z0 must be a torch.Tensor, got str"),
    ((z(), z(4, 2)), {}, ValueError, "z1 must have shape [rows, 3], got [4, 2]"),
    ((z(), z(5)), {}, ValueError, "z1 must have shape [4, 3] like z0, a row for each of z0's, got [5, 3]"),
    ((z(), z(dtype=torch.float64)), {}, TypeError, "z1 must have z0's dtype torch.float32, got torch.float64"),
    ((z(), z().to("meta")), {}, ValueError, "z1 must be on cpu like the rows, got meta"),
    ((z(), z()), {"temperature": "hot"}, TypeError, "temperature must be a number or a"),
    ((z(), z()), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ((z(), z()), {"queue": 65536}, TypeError, "queue must be a fastsupcon.MemoryQueue or None, got int"),
    ((z(), z()), {"queue": MemoryQueue(4, 5)}, ValueError, "queue holds rows of dimension 5, got features of dimension 3"),
    ((z(), z()), {"queue": MemoryQueue(4, 3), "backend": "fast"}, ValueError, "backend='fast' cannot serve"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), WRONG, ids=[case[3][:50] for case in WRONG])
def test_wrong_input(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.nt_xent_loss(*arguments, **options)


def test_the_module_refuses_at_construction():
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        NTXentLoss(0)
    with pytest.raises(TypeError, match=r"queue must be a fastsupcon\.MemoryQueue or None, got tuple"):
        NTXentLoss(queue=(4096, 128))
