"""lightly's NTXentLoss against lightly's own, with and without a memory bank, and the SupConLoss in its style."""

import importlib
import re
import sys

import naive
import pytest
import torch
import torch.nn.functional as F
from published import alone

from fastsupcon import functional
from fastsupcon.integrations import lightly
from fastsupcon.integrations.lightly import NTXentLoss, SupConLoss

B, D = 7, 6


@pytest.fixture(scope="module")
def theirs():
    return alone("lightly.loss.ntx_ent_loss", "lightly.models.utils").NTXentLoss


def views(device, dtype=torch.float64, count=B):
    return tuple((torch.randn(count, D, dtype=torch.float64) * 3).to(device, dtype).requires_grad_() for _ in range(2))


def assert_same(ours, published, leaves, tolerance):
    torch.testing.assert_close(ours, published, rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad(loss, leaves) for loss in (ours, published))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


def both(theirs, device, dtype, **options):
    """The two losses at one seed. Both make the bank in float32; only ours brings it to unit length again as it is used, in float64 too."""
    torch.manual_seed(1)
    ours = NTXentLoss(**options).to(device, dtype)
    torch.manual_seed(1)
    own = theirs(**options).to(device, dtype)
    if own.memory_bank.size[0]:
        own.memory_bank.bank = F.normalize(own.memory_bank.bank, dim=1)
    return ours, own


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("bank", [0, (0, D), (21, D), [14, D]], ids=str)
@pytest.mark.parametrize("gather_distributed", [False, True])
def test_lightly(theirs, device, dtype, tolerance, temperature, bank, gather_distributed):
    """Six steps, through a bank that is written over twice or thrice."""
    ours, own = both(theirs, device, dtype, temperature=temperature, memory_bank_size=bank, gather_distributed=gather_distributed)
    for _ in range(6):
        out = views(device, dtype)
        assert_same(ours(*out), own(*out), out, tolerance)


def test_lightly_evaluates_without_changing_the_bank(theirs, device):
    """Not by the module's mode, but by whether the rows require a gradient."""
    ours, own = both(theirs, device, torch.float64, memory_bank_size=(21, D))
    for module in (ours, own):
        module.eval()
    for frozen in (True, False, True, True, False):
        out = views(device)
        out = tuple(x.detach() for x in out) if frozen else out
        torch.testing.assert_close(ours(*out), own(*out), rtol=1e-10, atol=1e-10)


def test_a_batch_that_does_not_divide_the_bank_is_kept_whole(theirs, device):
    """lightly's bank of 10 takes 4, 4, and 2 of 4; ours holds the last 10 rows."""
    ours, own = both(theirs, device, torch.float64, memory_bank_size=(10, D))
    seen = []
    for step in range(4):
        out = views(device, count=4)
        values = ours(*out), own(*out)
        assert torch.isclose(*values, rtol=1e-10) == (step < 3)
        seen.insert(0, out[1].detach())
    assert torch.equal(ours.queue.rows, torch.cat(seen)[:10])


def test_the_bank_is_in_the_state(device):
    first, second = (NTXentLoss(memory_bank_size=(20, D)).to(device) for _ in range(2))
    for _ in range(2):
        first(*views(device, torch.float32))
    out = views(device, torch.float32)
    assert first.queue.rows.shape == (20, D)
    assert not torch.equal(second(*(x.detach() for x in out)), first(*(x.detach() for x in out)))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(*out), first(*out))
    assert not NTXentLoss().state_dict()


def test_ntxent_is_the_function(device):
    out = views(device)
    assert torch.equal(NTXentLoss(0.2)(*out), functional.nt_xent_loss(*out, temperature=0.2))
    assert "temperature=0.2" in repr(NTXentLoss(0.2))


def test_supcon(backend, device):
    out0, out1 = views(device, torch.float32)
    labels = torch.tensor([0, 2, 0, 1, 2, 2, -5], device=device)
    loss = SupConLoss(0.2, backend=backend)(out0, out1, labels)
    wide = [x.detach().double().requires_grad_() for x in (out0, out1)]
    want = naive.supcon_loss(torch.stack(wide, 1), labels, temperature=0.2, normalize=True)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(torch.autograd.grad(loss, (out0, out1)), torch.autograd.grad(want, wide), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


def test_supcon_of_samples_that_are_all_different_is_lightlys_ntxent(theirs, device):
    out = views(device)
    assert_same(SupConLoss(0.3)(*out, torch.arange(B, device=device)), theirs(0.3)(*out), out, 1e-10)


def test_compile_fullgraph(device):
    out, labels = views(device, torch.float32), torch.arange(B, device=device) // 2
    for build, more in ((NTXentLoss, ()), (lambda: NTXentLoss(memory_bank_size=(14, D)), ()), (SupConLoss, (labels,))):
        torch.manual_seed(0)
        plain = build().to(device)
        torch.manual_seed(0)
        compiled = torch.compile(build().to(device), fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        for _ in range(3):
            assert_same(compiled(*out, *more), plain(*out, *more), out, 1e-6)


def test_it_does_not_import_lightly(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)  # whose import fails from here on
    importlib.reload(lightly)


def z(n=4, d=3, dtype=torch.float32):
    return torch.zeros(n, d, dtype=dtype)


@pytest.mark.parametrize("size", [4096, -1, (4096,), (4, 5, 6), (-1, 4), (4.0, 5), "4096"], ids=str)
def test_wrong_sizes_of_a_bank(size):
    text = f"memory_bank_size must be (rows, dimension), or 0 for no memory bank, got {size!r}"
    with pytest.raises(ValueError, match=re.escape(text)):
        NTXentLoss(memory_bank_size=size)


WRONG = [
    (SupConLoss, (z()[0], z(), torch.zeros(4).long()), ValueError, "out0 must have shape [rows, dimension], got [3]"),
    (SupConLoss, (z(), z(5), torch.zeros(4).long()), ValueError, "out1 must have shape [4, 3] like out0, got [5, 3]"),
    (SupConLoss, (z(), z().double(), torch.zeros(4).long()), TypeError, "out1 must have out0's dtype torch.float32, got torch.float64"),
    (SupConLoss, (z(), z(), torch.zeros(3).long()), ValueError, "labels must have shape [4], got [3]"),
    (SupConLoss, (z(), z(), None), TypeError, "labels must be a torch.Tensor of an integer dtype, got NoneType"),
    (lambda: NTXentLoss(memory_bank_size=(5, 4)), (z(), z()), ValueError, "queue holds rows of dimension 4, got features of dimension 3"),
    (lambda: NTXentLoss(0.0), (), ValueError, "temperature must be positive and finite, got 0.0"),
    (lambda: SupConLoss(-1), (), ValueError, "temperature must be positive and finite, got -1"),
]


@pytest.mark.parametrize(("build", "arguments", "error", "text"), WRONG, ids=[case[3][:40] for case in WRONG])
def test_wrong_input(build, arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        build()(*arguments)


def test_published_arithmetic_of_the_memory_bank(device):
    """Without the package: the positive's logit beside those of the bank, class 0."""
    torch.manual_seed(1)
    loss = NTXentLoss(0.3, memory_bank_size=(12, D)).to(device, torch.float64)
    torch.manual_seed(1)
    bank = F.normalize(torch.randn(12, D), dim=1).double().to(device)
    out0, out1 = views(device)
    a, b = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
    logits = torch.cat([(a * b).sum(1, keepdim=True), a @ bank.T], 1) / 0.3
    want = F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64, device=device))
    assert_same(loss(out0, out1), want, (out0, out1), 1e-7)  # both brought the bank to unit length in float32
