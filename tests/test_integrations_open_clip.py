"""open_clip's ClipLoss against open_clip's own, and against its arithmetic where the package is not installed."""

import importlib
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from published import alone
from table import unit

from fastsupcon.integrations import open_clip
from fastsupcon.integrations.open_clip import ClipLoss

N, D = 9, 6


@pytest.fixture(scope="module")
def theirs():
    return alone("open_clip.loss").ClipLoss


def model_output(device, dtype=torch.float64, shape=(), count=N):
    """As a model with an init_logit_bias gives it: rows of unit length, exp of a parameter, a parameter."""
    features = [unit(count, D).to(device, dtype).requires_grad_() for _ in range(2)]
    scale = torch.full(shape, 1 / 0.07, dtype=dtype, device=device, requires_grad=True)
    return *features, scale, torch.full(shape, -10.0, dtype=dtype, device=device, requires_grad=True)


def definition(image_features, text_features, logit_scale, logit_bias=None):
    logits = logit_scale * image_features @ text_features.T + (0 if logit_bias is None else logit_bias)
    numbers = torch.arange(len(logits), device=logits.device)
    return 0.5 * F.cross_entropy(logits, numbers) + 0.5 * F.cross_entropy(logits.T, numbers)


def assert_same(ours, published, leaves, tolerance):
    torch.testing.assert_close(ours, published, rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad(loss, leaves) for loss in (ours, published))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one element"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_definition(device, shape, biased):
    output = model_output(device, shape=shape)[: 3 + biased]
    assert_same(ClipLoss()(*output), definition(*output), output, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one element"])
@pytest.mark.parametrize("biased", [False, True])
def test_open_clip(theirs, device, dtype, tolerance, shape, biased):
    output = model_output(device, dtype, shape)[: 3 + biased]
    arguments = {"local_loss": True, "gather_with_grad": True, "cache_labels": True, "rank": 0, "world_size": 1, "use_horovod": False}
    ours, own = ClipLoss(**arguments), theirs(**arguments)
    assert_same(ours(*output), own(*output), output, tolerance)
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    by_name = [loss(**dict(zip(names, output, strict=False)), output_dict=True) for loss in (ours, own)]
    assert [list(losses) for losses in by_name] == [["contrastive_loss"]] * 2
    assert_same(by_name[0]["contrastive_loss"], by_name[1]["contrastive_loss"], output, tolerance)


def test_a_scale_that_is_a_number(theirs, device):
    image_features, text_features, *_ = model_output(device)
    assert_same(ClipLoss()(image_features, text_features, 14.3), theirs()(image_features, text_features, 14.3), [image_features], 1e-10)


def test_a_training_step_of_each(theirs, device):
    """Parameters after ten steps of SGD, the scale learned as its logarithm."""
    x, y = torch.randn(N, 4, device=device, dtype=torch.float64), torch.randn(N, 5, device=device, dtype=torch.float64)

    def train(loss):
        torch.manual_seed(0)
        towers = torch.nn.ModuleList([torch.nn.Linear(4, D), torch.nn.Linear(5, D)]).to(device, torch.float64)
        log_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=torch.float64, device=device))
        optimiser = torch.optim.SGD([*towers.parameters(), log_scale], lr=0.1)
        for _ in range(10):
            optimiser.zero_grad()
            loss(*(F.normalize(tower(z), dim=-1) for tower, z in zip(towers, (x, y), strict=True)), log_scale.exp()).backward()
            optimiser.step()
        return [*towers.parameters(), log_scale]

    for mine, other in zip(train(ClipLoss(cache_labels=True)), train(theirs(cache_labels=True)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_features_are_nearer_to_float64_than_open_clips(theirs, device, dtype):
    output = [x.detach() for x in model_output(device, dtype, count=200)[:3]]
    exact = definition(*(x.double() for x in output))
    loss = ClipLoss()(*output)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    assert (loss - exact).abs() <= (theirs()(*output) - exact).abs()


def test_autocast_rounds_nothing(device):
    output = model_output(device, torch.float32)
    outside = ClipLoss()(*output)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(ClipLoss()(*output), outside)


def test_labels_are_kept_where_asked_for(device):
    for cache in (True, False):
        loss = ClipLoss(cache_labels=cache)
        for count in (N, N, N + 1):
            output = model_output(device, count=count)
            torch.testing.assert_close(loss(*output), definition(*output))
        assert len(loss.labels) == cache
    assert not loss.state_dict()
    loss = ClipLoss(cache_labels=True)
    with torch.inference_mode():
        loss(*model_output(device))
    loss(*model_output(device)).backward()


def test_a_bias_gets_the_gradient_zero_and_shows_if_it_is_not_finite(device):
    *output, bias = model_output(device)
    loss = ClipLoss()(*output, bias)
    assert torch.equal(loss, ClipLoss()(*output))
    (gradient,) = torch.autograd.grad(loss, bias)
    assert torch.equal(gradient, torch.zeros_like(bias))
    assert ClipLoss()(*output, math.nan * bias).isnan()


def test_compile_fullgraph(device):
    output = model_output(device, torch.float32)
    loss = ClipLoss(cache_labels=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_same(compiled(*output), ClipLoss()(*output), output, 1e-6)


def test_it_does_not_import_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # whose import fails from here on
    importlib.reload(open_clip)


def test_no_processes_to_gather_from():
    with pytest.raises(NotImplementedError, match=r"use_horovod must be False with world_size=2, got True"):
        ClipLoss(world_size=2, use_horovod=True)
    text = "rank and world_size must be 0 and 1, as torch.distributed has no process group of several, got 1 and 2"
    with pytest.raises(ValueError, match=text):
        ClipLoss(rank=1, world_size=2)(z(), z(), 1.0)


def z(n=4, d=3, dtype=torch.float32):
    return torch.zeros(n, d, dtype=dtype)


WRONG = [
    ((z()[0], z(), 1.0), ValueError, "image_features must have shape [rows, dimension], got [3]"),
    ((z(), z(5), 1.0), ValueError, "text_features must have shape [4, 3], got [5, 3]"),
    ((z(), z(dtype=torch.float64), 1.0), TypeError, "text_features must have image_features's dtype torch.float32, got torch.float64"),
    ((z(), z(), "1"), TypeError, "logit_scale must be a number or a"),
    ((z(), z(), torch.ones(2)), TypeError, "logit_scale must be a number or a"),
    ((z(), z(), 1.0, torch.ones(2)), TypeError, "logit_bias must be a number or a"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), WRONG, ids=[case[2][:40] for case in WRONG])
def test_wrong_input(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        ClipLoss()(*arguments)
