"""Figures of contrastive training against their definitions, pair by pair in float64."""

import itertools
import math
import re
import sys

import naive
import pytest
import torch

from bench.measure import extra_bytes
from fastsupcon import InfoNCELoss, NTXentLoss, PSCLoss, SupConLoss, diagnostics
from fastsupcon.diagnostics import alignment, contrastive_top1, diagnose, lone_share, similarities, uniformity

FIGURES = ("alignment", "uniformity", "positive_similarity", "negative_similarity", "lone_share", "contrastive_top1")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def definitions(features, labels=None, t=2.0):
    """Over a list of ordered pairs. Of rows of zeros: |x - y|^2 is 2 - 2 x . y."""
    if features.ndim == 2:
        features = features[:, None]
    z = naive.unit(features.flatten(2).double().transpose(0, 1).flatten(0, 1)).tolist()
    of_samples = list(range(len(features))) if labels is None else labels.tolist()
    keys = of_samples * features.shape[1]
    cosine = {(i, j): math.fsum(a * b for a, b in zip(z[i], z[j], strict=True)) for i, j in itertools.permutations(range(len(z)), 2)}
    positive = [s for (i, j), s in cosine.items() if keys[i] == keys[j]]
    negative = [s for (i, j), s in cosine.items() if keys[i] != keys[j]]
    hits = 0
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        hits += bool(others) and keys[max(others, key=lambda j: (cosine[i, j], -j))] == keys[i]
    mean = lambda values: math.fsum(values) / len(values) if values else math.nan  # noqa: E731
    spread = mean([math.exp(-t * (2 - 2 * s)) for s in cosine.values()])
    return {
        "alignment": 2 - 2 * mean(positive),
        "uniformity": math.log(spread) if cosine else math.nan,
        "positive_similarity": mean(positive),
        "negative_similarity": mean(negative),
        "lone_share": sum(keys.count(key) == 1 for key in keys) / len(keys),
        "contrastive_top1": hits / len(z),
    }


def assert_figures(features, labels=None, t=2.0, **options):
    figures = diagnose(features, labels, t=t, **options)
    assert tuple(figures) == FIGURES
    for name, want in definitions(features, labels, t).items():
        figure, tolerance = figures[name], 1e-7 if name == "lone_share" else TOLERANCE[features.dtype]
        assert figure.shape == ()
        assert figure.device == features.device
        assert float(figure) == pytest.approx(want, rel=tolerance, abs=tolerance, nan_ok=True), name
    positive, negative = similarities(features, labels)
    one_by_one = {
        "alignment": alignment(features, labels),
        "uniformity": uniformity(features, t, **options),
        "positive_similarity": positive,
        "negative_similarity": negative,
        "contrastive_top1": contrastive_top1(features, labels),
    }
    if features.ndim == 2:
        one_by_one["lone_share"] = lone_share(labels)
    for name, figure in one_by_one.items():
        torch.testing.assert_close(figure, figures[name], rtol=0, atol=0, equal_nan=True, msg=name)
    return figures


def rows(device, *shape, dtype=torch.float64):
    return torch.randn(*shape, device=device).to(dtype)


# --- against the definitions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(13, 5), (13, 2, 5), (6, 3, 2, 4)], ids=str)
def test_definitions(shape, dtype, device):
    """With a lone label among them, and of any values."""
    labels = torch.randint(0, 4, shape[:1], device=device) * 2**40 - 7
    labels[2] = 5
    assert_figures(rows(device, *shape, dtype=dtype), labels)


def test_views_are_positives_without_labels(device):
    assert_figures(rows(device, 6, 3, 4))


@pytest.mark.parametrize("t", [0.1, 2, 30.0, 1000.0])
def test_uniformity_on_every_backend(backend, device, t):
    assert_figures(rows(device, 12, 4, dtype=torch.float32), torch.arange(12, device=device) % 3, t=t, backend=backend)


def test_blocks(device, monkeypatch):
    """Of any size, with a last one that is smaller, and of one row."""
    features, labels = rows(device, 23, 4), torch.randint(0, 3, (23,), device=device)
    for least, block in ((5, 1), (1, 23), (1, 200), (1, 10**6)):
        monkeypatch.setattr(diagnostics, "LEAST_ROWS", least)
        monkeypatch.setattr(diagnostics, "BLOCK", block)
        assert_figures(features, labels)


def test_long_and_short_rows(device):
    """Only directions count."""
    features, labels = rows(device, 10, 4, dtype=torch.float32), torch.arange(10, device=device) % 3
    longer = features * torch.tensor([1e-18, 1e15], device=device).repeat(5)[:, None]
    for name, figure in diagnose(longer, labels).items():
        torch.testing.assert_close(figure, diagnose(features, labels)[name])


def test_labels_in_other_shapes_and_dtypes(device):
    features, labels = rows(device, 8, 4), torch.arange(8, device=device) % 3
    want = diagnose(features, labels)
    for same in (labels[:, None], labels[None], labels.to(torch.uint8), labels.float(), labels.repeat_interleave(2)[::2]):
        assert diagnose(features, same) == want
        assert lone_share(same) == want["lone_share"]
    assert diagnose(features.T.contiguous().T, labels) == want


def test_a_tight_class_is_as_exact_as_a_wide_one(device):
    """2 - 2 x . y would leave nothing of distances of 1e-5 in float32."""
    centres = rows(device, 4, 16, dtype=torch.float32)
    features, labels = centres.repeat(25, 1) + 1e-5 * rows(device, 100, 16, dtype=torch.float32), torch.arange(100, device=device) % 4
    got, want = alignment(features, labels), alignment(features.double(), labels)
    assert 1e-11 < want < 1e-9
    assert float(got) == pytest.approx(float(want), rel=0.02)  # a row's own rounding is 6e-8 of its length


def test_large_classes(device):
    """Sums over many rows of two classes, one of which is nearly all."""
    labels = (torch.arange(30_000, device=device) % 1000 == 0).long()
    features = rows(device, 30_000, 8, dtype=torch.float32) + labels[:, None] + 1
    for name, got, want in zip("+-", similarities(features, labels), similarities(features.double(), labels), strict=True):
        assert float(got) == pytest.approx(float(want), abs=3e-6), name


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_no_matrix_in_memory():
    """The similarities of 10,000 rows are 381 MiB."""
    features, labels = torch.randn(10_000, 8), torch.arange(10_000) % 10
    diagnose(features[:100], labels[:100])  # libraries and threads
    assert extra_bytes(lambda: diagnose(features, labels), "cpu") < 120 * 2**20


# --- edge cases -----------------------------------------------------------------------------------------------------------------------


def test_no_positives_at_all(device):
    """A mean over no pair is NaN, with the lone share of 1 that says why; nothing else is."""
    figures = assert_figures(rows(device, 6, 4), torch.arange(6, device=device))
    assert {name for name, figure in figures.items() if figure.isnan()} == {"alignment", "positive_similarity"}
    assert figures["lone_share"] == 1
    assert figures["contrastive_top1"] == 0


def test_one_class_alone(device):
    figures = assert_figures(rows(device, 6, 4), torch.zeros(6, dtype=torch.int64, device=device))
    assert {name for name, figure in figures.items() if figure.isnan()} == {"negative_similarity"}
    assert figures["contrastive_top1"] == 1


def test_one_row_alone(device):
    figures = assert_figures(rows(device, 1, 4), torch.zeros(1, dtype=torch.int64, device=device))
    assert {name for name, figure in figures.items() if figure.isnan()} == {*FIGURES[:4]}
    assert figures["contrastive_top1"] == 0


def test_lone_anchors(device):
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4], device=device)
    assert lone_share(labels) == 3 / 8
    features = torch.eye(5, device=device)[labels]  # all that can be hit is
    assert assert_figures(features, labels)["contrastive_top1"] == 5 / 8


def test_duplicates(device):
    """Rows that are all alike within their class, then all alike: exact."""
    labels = torch.arange(12, device=device) % 3
    figures = assert_figures(torch.eye(4, device=device)[labels], labels)
    assert figures["alignment"] == 0
    assert figures["contrastive_top1"] == 1
    figures = assert_figures(torch.eye(4, device=device)[torch.zeros_like(labels)], labels)
    assert figures["alignment"] == 0
    assert figures["uniformity"] == 0
    assert figures["contrastive_top1"] == 1 / 4  # the first row is taken, and for it the second: three hits of twelve


def test_rows_of_zeros_are_orthogonal_to_all(device):
    features, labels = rows(device, 9, 4), torch.arange(9, device=device) % 2
    features[[0, 2, 5]] = 0
    figures = assert_figures(features, labels)
    assert float(figures["alignment"]) == pytest.approx(2 - 2 * float(figures["positive_similarity"]), abs=1e-12)
    assert_figures(torch.zeros_like(features), labels)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(device, bad):
    features, labels = rows(device, 9, 4, dtype=torch.float32), torch.arange(9, device=device) % 2
    features[3, 1] = bad
    figures = diagnose(features, labels)
    assert {name for name, figure in figures.items() if not figure.isfinite()} == {*FIGURES} - {"lone_share"}


def test_no_gradient_and_nothing_rounded_by_autocast(device):
    features, labels = rows(device, 12, 4, dtype=torch.float32).requires_grad_(), torch.arange(12, device=device) % 3
    want = diagnose(features, labels)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        figures = diagnose(features, labels)
    assert figures == want
    assert not any(figure.requires_grad for figure in figures.values())
    assert {figure.dtype for figure in figures.values()} == {torch.float32}


def test_compiled(device):
    features, labels = rows(device, 12, 2, 4, dtype=torch.float32), torch.arange(12, device=device) % 3
    figures = torch.compile(diagnose, fullgraph=True, backend="aot_eager")(features, labels)
    for name, figure in diagnose(features, labels).items():
        torch.testing.assert_close(figures[name], figure)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    features = torch.randn(5000, 2, 64, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 100, (5000,), device="cuda")
    want = diagnose(features, labels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        figures = diagnose(features, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert figures == want  # the same bits


@pytest.mark.parametrize("denominator", ["negatives", "all"])
@pytest.mark.parametrize("per_class", [1, 3])
def test_chance_level_of_prototypes(device, denominator, per_class):
    loss = PSCLoss(5, 4, denominator=denominator, prototypes_per_class=per_class).to(device)
    features, labels = torch.zeros(6, 4, device=device), torch.arange(6, device=device) % 5
    assert loss(features, labels).item() == pytest.approx(loss.chance_level(), rel=1e-6)
    assert loss.chance_level() == math.log((4 if denominator == "negatives" else 5) * per_class)


# --- errors ---------------------------------------------------------------------------------------------------------------------------

Z, LABELS = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnose([1.0], LABELS), TypeError, "features must be a torch.Tensor, got list"),
        (lambda: alignment(Z[0], LABELS), ValueError, "features must have shape [N, D] or [B, V, ...], got [3]"),
        (lambda: similarities(Z.long(), LABELS), TypeError, "features must have dtype torch.float32"),
        (lambda: contrastive_top1(Z[:0], LABELS[:0]), ValueError, "features must not be empty"),
        (lambda: alignment(Z, LABELS[:3]), ValueError, "labels must have shape [4], got [3]"),
        (lambda: contrastive_top1(Z, LABELS + 0.5), ValueError, "labels must be whole numbers"),
        (lambda: diagnose(Z, LABELS.to("meta")), ValueError, "labels must be on cpu like the rows, got meta"),
        (lambda: diagnose(Z), ValueError, "features hold one view of 4 samples, and labels are not given"),
        (lambda: similarities(Z[:, None]), ValueError, "or features [B, V, ...] with V >= 2 views"),
        (lambda: uniformity(Z, 0), ValueError, "t must be positive and finite, got 0"),
        (lambda: diagnose(Z, LABELS, t=math.inf), ValueError, "t must be positive and finite, got inf"),
        (lambda: uniformity(Z, "2"), TypeError, "t must be a number or a tensor of one element, got str"),
        (lambda: uniformity(Z, backend="fast"), ValueError, "backend='fast' cannot serve"),
        (lambda: lone_share([1]), TypeError, "labels must be a torch.Tensor of an integer dtype, got list"),
        (lambda: lone_share(LABELS[:0]), ValueError, "labels must not be empty, got shape [0]"),
        (lambda: lone_share(LABELS.view(2, 2)), ValueError, "labels must have shape [4], got [2, 2]"),
    ],
)
def test_errors_name_what_came(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize(("loss", "of", "least"), [(SupConLoss(), "rows", 2), (NTXentLoss(), "rows", 2), (InfoNCELoss(), "pairs", 1)])
def test_the_chance_level_of_too_few(loss, of, least):
    with pytest.raises(ValueError, match=rf"^{of} must be an int of at least {least}, got {least - 1}$"):
        loss.chance_level(least - 1)
