"""Bad input: the error names the argument, what was expected and what came. And what ``python -m fastsupcon`` says."""

import importlib.util
import os
import re
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import DEVICE

from fastsupcon import MemoryQueue, PaCoLoss, PrototypeCrossEntropyLoss, PSCLoss, SupConLoss, functional
from fastsupcon.backends import BACKENDS

DTYPES = "torch.float32, torch.float16, torch.bfloat16, torch.float64"


def z(n=4, d=3, dtype=torch.float32):
    return torch.zeros(n, d, device=DEVICE, dtype=dtype)


def ids(n=4, high=2):
    return torch.arange(n, device=DEVICE) % high


SUPCON = [  # arguments, options, error, text
    (("x",), {}, TypeError, "features must be a torch.Tensor, got str"),
    ((z(4, 3).long(),), {}, TypeError, f"features must have dtype {DTYPES}, got torch.int64"),
    ((z()[0],), {}, ValueError, "features must have shape [N, D] or [B, V, ...], got [3]"),
    ((z(0),), {}, ValueError, "features must not be empty, got shape [0, 3]"),
    ((z(4, 0),), {}, ValueError, "features must not be empty, got shape [4, 0]"),
    ((z(), [0, 1, 0, 1]), {}, TypeError, "labels must be a torch.Tensor of an integer dtype, got list"),
    ((z(), ids() / 4), {}, ValueError, "labels must be whole numbers below 2**53, got 0.25"),
    ((z(),), {}, ValueError, "features hold one view of 4 samples, and neither labels nor mask is given: no anchor can have a positive"),
    ((z()[:, None],), {}, ValueError, "features hold one view of 4 samples"),
    ((z(), ids(5)), {}, ValueError, "labels must have shape [4], got [5]"),
    ((z(), ids(), torch.eye(4)), {}, ValueError, "labels and mask both define the positives: expected at most one, got both"),
    ((z(), None, [[1]]), {}, TypeError, "mask must be a torch.Tensor, got list"),
    ((z(), None, torch.eye(3)), {}, ValueError, "mask must have shape [4, 4], got [3, 3]"),
    ((z(), ids()), {"contrast_mode": "some"}, ValueError, "contrast_mode must be one of 'all', 'one', got 'some'"),
    ((z(), ids()), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ((z(), ids()), {"lone_anchors": "drop"}, ValueError, "lone_anchors must be one of 'zero', 'skip', 'error', got 'drop'"),
    ((z(), ids()), {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ((z(), ids()), {"temperature": float("nan")}, ValueError, "temperature must be positive and finite, got nan"),
    ((z(), ids()), {"temperature": "hot"}, TypeError, "temperature must be a number or a tensor of one element, got str"),
    (
        (z(), ids()),
        {"temperature": torch.ones(2)},
        TypeError,
        "temperature must be a number or a tensor of one element, got torch.float32 of shape [2]",
    ),
    ((z(), ids()), {"temperature": True}, TypeError, "temperature must be a number or a tensor of one element, got bool"),
    ((z(), ids()), {"base_temperature": -1}, ValueError, "base_temperature must be positive and finite, got -1"),
    ((z(), z() + 1, ids()), {}, ValueError, "labels look like a second view of the features: pass both views as one"),
    ((z(), None, -torch.eye(4, device=DEVICE)), {}, ValueError, "mask must not be negative, got -1"),
    ((z(), ids(3)[:, None] * torch.ones(2, device=DEVICE)), {}, ValueError, "labels must have shape [4] or [4, C], got [3, 2]"),
    ((z(), -torch.ones(4, 2, device=DEVICE)), {}, ValueError, "labels must not be negative, got -1"),
    (
        (z(), z() - 1),
        {},
        ValueError,
        "labels (a second view goes into features, torch.stack([z1, z2], dim=1)) must not be negative, got -1",
    ),
    ((z(), torch.ones(4, 2, device=DEVICE)), {"form": "in"}, ValueError, "form='in' needs positives that one class a row names"),
    ((z(), None, torch.eye(4, device=DEVICE)), {"denominator": "negatives"}, ValueError, "denominator='negatives' needs positives that"),
    ((z(), None, torch.eye(4, device=DEVICE)), {"beta": 1.0}, ValueError, "beta needs positives that one class a row names"),
    (
        (z(), None, torch.eye(4, device=DEVICE)),
        {"queue": MemoryQueue(8, 3)},
        ValueError,
        "queue needs positives that one class a row names",
    ),
    ((z(), ids()), {"form": "both"}, ValueError, "form must be one of 'out', 'in', got 'both'"),
    ((z(), ids()), {"denominator": "some"}, ValueError, "denominator must be one of 'all', 'negatives', got 'some'"),
    ((z(), ids()), {"beta": -1.0}, ValueError, "beta must be finite and lie in [0, inf], got -1.0"),
    ((z(), ids()), {"beta": "much"}, TypeError, "beta must be a number, got str"),
    ((z(), ids()), {"positives": ids()[:, None]}, ValueError, "labels and positives both define the positives"),
    ((z(),), {"positives": ids()}, ValueError, "positives must have shape [4, K] with K >= 1, got [4]"),
    ((z(),), {"positives": z()}, TypeError, "positives must be a torch.Tensor of an integer dtype, got torch.float32"),
    ((z(),), {"positives": ids()[:, None] + 4}, ValueError, "positives must lie in [-1, 4), got values from 4 to 5"),
    ((z(),), {"keys": z(5), "key_labels": ids(5)}, ValueError, "keys needs labels, one class a row, or positives, and got none"),
    ((z(), ids()), {"keys": z(5)}, ValueError, "key_labels must be given together with keys and labels, got None"),
    ((z(), ids()), {"key_labels": ids(5)}, ValueError, "key_labels must be given together with keys and labels, got no keys"),
    ((z(), ids()), {"keys": z(5, 2), "key_labels": ids(5)}, ValueError, "keys must have shape [rows, 3], got [5, 2]"),
    ((z(), ids()), {"keys": z(5), "key_labels": ids(4)}, ValueError, "key_labels must have shape [5], got [4]"),
    ((z()[:, None].repeat(1, 2, 1),), {"ignore_index": 0}, ValueError, "ignore_index needs labels, one class a row, and got none"),
    ((z(), ids()), {"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
    ((z()[:, None].repeat(1, 2, 1),), {"class_weights": z()[0]}, ValueError, "class_weights needs labels, one class a row, and got none"),
    ((z(), ids() + 2), {"class_weights": z()[0]}, ValueError, "labels must lie in [0, 3), got values from 2 to 3"),
    ((z(), ids()), {"class_weights": ids()}, TypeError, "class_weights must have a floating-point dtype, got torch.int64"),
    ((z(), ids()), {"class_weights": [1.0, 2.0]}, TypeError, "class_weights must be a torch.Tensor of a floating-point dtype, got list"),
    ((z(), ids()), {"class_weights": z()[0, :0]}, ValueError, "class_weights must have shape [1], got [0]"),
    ((z(), None, torch.ones(4, 4, device=DEVICE) * 1j), {}, TypeError, "mask must have a real dtype, got torch.complex64"),
    ((z(), torch.ones(4, 2, device=DEVICE) * 1j), {}, TypeError, "labels must have a real dtype, got torch.complex64"),
    ((z(), ids(), torch.eye(4)), {"positives": ids()}, ValueError, "define the positives: expected at most one, got all three"),
    ((z(), ids()), {"anchor_weights": z()[0]}, ValueError, "anchor_weights must have shape [4], got [3]"),
    ((z(), ids()), {"anchor_weights": -ids().float()}, ValueError, "anchor_weights must not be negative, got -1"),
    ((z(), ids()), {"class_weights": ids() - 1.0}, ValueError, "class_weights must not be negative, got -1"),
    ((z(), ids()), {"queue": 8}, TypeError, "queue must be a fastsupcon.MemoryQueue or None, got int"),
    ((z(), ids()), {"queue": MemoryQueue(8, 2)}, ValueError, "queue holds rows of dimension 2, got features of dimension 3"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), SUPCON, ids=[case[3][:40] for case in SUPCON])
def test_supcon(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.supcon_loss(*arguments, **options)


PSC = [
    ((z(), ids(), z(2, 4)), {}, ValueError, "prototypes must have shape [classes, 3], as the features have 3 dimensions, got [2, 4]"),
    ((z(), ids(), z(0)), {}, ValueError, "prototypes must not be empty, got shape [0, 3]"),
    ((z(), ids(), z(3, 2)), {}, ValueError, "prototypes must have shape [classes, 3], the number of classes first, got [3, 2]"),
    ((z(), ids(4, 1), z(1)), {}, ValueError, "prototypes must hold at least 2 classes, got 1: there is no other to tell them from"),
    ((z(), ids(4, 1), z(1)), {"denominator": "all"}, ValueError, "prototypes must hold at least 2 classes, got 1"),
    ((z(), ids(), z(2, 3).long()), {}, TypeError, f"prototypes must have dtype {DTYPES}, got torch.int64"),
    ((z(), None, z(2)), {}, TypeError, "labels must be a torch.Tensor of an integer dtype, got NoneType"),
    ((z(), ids(3), z(2)), {}, ValueError, "labels must have shape [4], got [3]"),
    ((z(), ids(), z(2)), {"denominator": "own"}, ValueError, "denominator must be one of 'all', 'negatives', got 'own'"),
    (
        (z(), ids(), z(5)),
        {"prototypes_per_class": 2},
        ValueError,
        "prototypes_per_class must be a positive divisor of the 5 prototypes, got 2",
    ),
    (
        (z(), ids(), z(2)),
        {"prototypes_per_class": 0},
        ValueError,
        "prototypes_per_class must be a positive divisor of the 2 prototypes, got 0",
    ),
    ((z(), ids(), z(2)), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ((z(), ids(), z(2)), {"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), PSC, ids=[case[3][:40] for case in PSC])
def test_psc(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.psc_loss(*arguments, **options)


def counts(*numbers):
    return torch.tensor(numbers, device=DEVICE)


PROTOTYPES = [
    ((z(), ids(4, 1), z(1)), {}, ValueError, "prototypes must hold at least 2 classes, got 1: there is no other to tell them from"),
    ((z(), ids(), z(2, 4)), {}, ValueError, "prototypes must have shape [classes, 3], as the features have 3 dimensions, got [2, 4]"),
    ((z().long(), ids(), z(2)), {}, TypeError, f"features must have dtype {DTYPES}, got torch.int64"),
    ((z(), ids(3), z(2)), {}, ValueError, "labels must have shape [4], got [3]"),
    ((z(), ids(), z(2)), {"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
    ((z(), ids(), z(2)), {"margin": -0.1}, ValueError, "margin must be finite and lie in [0, inf], got -0.1"),
    ((z(), ids(), z(2)), {"margin": float("inf")}, ValueError, "margin must be finite and lie in [0, inf], got inf"),
    ((z(), ids(), z(2)), {"margin": torch.ones(2)}, TypeError, "margin must be a number, got Tensor"),
    ((z(), ids(), z(2)), {"angular_margin": 28.6}, ValueError, "angular_margin must be finite and lie in [0, 1.5708], got 28.6"),
    ((z(), ids(), z(2)), {"angular_margin": float("nan")}, ValueError, "angular_margin must be finite and lie in [0, 1.5708], got nan"),
    ((z(), ids(), z(2)), {"angular_margin": 0.5, "normalize": False}, ValueError, "angular_margin needs normalize=True, got False"),
    ((z(), ids(), z(2)), {"ignore_index": 1.0}, TypeError, "ignore_index must be an int or None, got float"),
    ((z(), ids(), z(2)), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    ((z(), ids(), z(2)), {"class_counts": [1, 2]}, TypeError, "class_counts must be a torch.Tensor of an integer dtype, got list"),
    ((z(), ids(), z(2)), {"class_counts": counts(1, 2, 3)}, ValueError, "class_counts must have shape [2], got [3]"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), PROTOTYPES, ids=[case[3][:40] for case in PROTOTYPES])
def test_prototype_cross_entropy(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.prototype_cross_entropy(*arguments, **options)


BALANCED = [
    ((z()[0], ids(), z(2)), {}, ValueError, "features must have shape [N, D] or [B, V, ...], got [3]"),
    ((z(), ids(), z(2, 4)), {}, ValueError, "prototypes must have shape [classes, 3], as the features have 3 dimensions, got [2, 4]"),
    ((z(), None, z(2)), {}, TypeError, "labels must be a torch.Tensor of an integer dtype, got NoneType"),
    ((z()[:, None], ids(3), z(2)), {}, ValueError, "labels must have shape [4], got [3]"),
    ((z(), ids(), z(2)), {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ((z(), ids(), z(2)), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), BALANCED, ids=[case[3][:40] for case in BALANCED])
def test_balanced_supcon(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.balanced_supcon_loss(*arguments, **options)


PACO = [
    ((z(), ids(), None), {}, TypeError, "prototypes must be a torch.Tensor, got NoneType"),
    ((z(), ids(), z()[0, 0]), {}, ValueError, "prototypes must have shape [rows, 3], got []"),
    ((z(), ids(), z(2)), {"queue": MemoryQueue(8, 2)}, ValueError, "queue holds rows of dimension 2, got features of dimension 3"),
    ((z(), ids(), z(2, 4)), {}, ValueError, "prototypes must have shape [classes, 3], as the features have 3 dimensions, got [2, 4]"),
    ((z(), ids(3), z(2)), {}, ValueError, "labels must have shape [4], got [3]"),
    ((z(), ids(), z(2), "x"), {}, TypeError, "momentum_features must be a torch.Tensor, got str"),
    ((z(), ids(), z(2), z(4, 2)), {}, ValueError, "momentum_features must have shape [rows, 3], got [4, 2]"),
    ((z(), ids(), z(2), z(8)), {}, ValueError, "momentum_features must be of 4 samples like the features, got 8"),
    ((z(), ids(), z(2, 5), None, z()[0]), {}, ValueError, "class_features must have shape [N, D] or [B, V, ...], got [3]"),
    (
        (z(), ids(), z(2, 5), None, z()),
        {},
        ValueError,
        "prototypes must have shape [classes, 3], as the features have 3 dimensions, got [2, 5]",
    ),
    ((z()[:, None].expand(4, 2, 3), ids(), z(2), None, z()), {}, ValueError, "class_features must be 8 rows like the features, got 4"),
    ((z(), ids(), z(2), None, z().to("meta")), {}, ValueError, f"class_features must be on {DEVICE}"),
    ((z(), ids(), z(2)), {"alpha": -1}, ValueError, "alpha must be finite and lie in [0, inf], got -1"),
    ((z(), ids(), z(2)), {"beta": 0}, ValueError, "beta must be above 0, got 0: an anchor without another of its class would have no"),
    ((z(), ids(), z(2)), {"gamma": float("nan")}, ValueError, "gamma must be finite and lie in [0, inf], got nan"),
    ((z(), ids(), z(2)), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be finite and lie in [0, 1], got 1.5"),
    ((z(), ids(4, 1), z(1)), {"label_smoothing": 0.1}, ValueError, "label_smoothing needs at least 2 prototypes, got 1"),
    ((z(), ids(), z(2)), {"class_temperature": 0}, ValueError, "class_temperature must be positive and finite, got 0"),
    ((z(), ids(), z(2)), {"class_counts": counts(1, 2, 3)}, ValueError, "class_counts must have shape [2], got [3]"),
    ((z(), ids(), z(2)), {"queue": []}, TypeError, "queue must be a fastsupcon.MemoryQueue or None, got list"),
    ((z(), ids(), z(2)), {"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), PACO, ids=[case[3][:40] for case in PACO])
def test_paco(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.paco_loss(*arguments, **options)


CROSS = [
    ((z(), z(2, 4)), {}, ValueError, "b must have shape [rows, 3], got [2, 4]"),
    ((z(), z(2, 3, torch.float64)), {}, TypeError, "b must have a's dtype torch.float32, got torch.float64"),
    ((z(), z(2)), {"bias": ids(2)}, TypeError, "bias must have a floating-point dtype, got torch.int64"),
    ((z(), z(2)), {"bias": z()[0]}, ValueError, "bias must have shape [2], got [3]"),
    ((z(), z()), {"scale": torch.ones(2)}, TypeError, "scale must be a number or a tensor of one element, got torch.float32 of shape [2]"),
    ((z(), z(2)), {"scale": "1"}, TypeError, "scale must be a number or a tensor of one element, got str"),
    ((z(), z(2)), {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
    ((z(), z(2)), {"skip": ids(2)}, ValueError, "skip must have shape [4], got [2]"),
    ((z(), z(2)), {"row_labels": ids()}, ValueError, "column_labels must be given together with row_labels, got None"),
    ((z(), z(2)), {"column_labels": ids()}, ValueError, "row_labels must be given together with column_labels, got None"),
    ((z(), z(2)), {"row_labels": ids(), "column_labels": ids(3)}, ValueError, "column_labels must have shape [2], got [3]"),
    (
        (z(), z(2)),
        {"row_labels": ids(), "column_labels": ids(2), "skip": ids()},
        ValueError,
        "skip and row_labels/column_labels are two exclusion rules: expected at most one, got both",
    ),
]


@pytest.mark.parametrize(("arguments", "options", "error", "text"), CROSS, ids=[case[3][:40] for case in CROSS])
def test_cross_logsumexp(arguments, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        functional.cross_logsumexp(*arguments, **options)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU these are device-side assertions: reading them back would wait")
def test_values_out_of_range():
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 2), got values from 0 to 3")):
        functional.psc_loss(z(), ids(4, 4), z(2))
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 2), got values from -1 to 0")):
        functional.psc_loss(z(), ids() - 1, z(2))
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 2), got values from 0 to 3")):
        functional.balanced_supcon_loss(z(), ids(4, 4), z(2))
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 2), got values from 0 to 3")):
        functional.paco_loss(z(), ids(4, 4), z(2))
    for ignored in (None, 3):
        with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 2), got values from 0 to ")):
            functional.prototype_cross_entropy(z(), ids(4, 4), z(2), ignore_index=ignored)
    for numbers in ((1, -1), (0, 0), (1.0, float("nan")), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="class_counts must be finite, at least 0 and not all 0, got a least of "):
            functional.prototype_cross_entropy(z(), ids(), z(2), class_counts=counts(*numbers))
    with pytest.raises(ValueError, match=re.escape("skip must lie in [-1, 2), got values from 0 to 2")):
        functional.cross_logsumexp(z(), z(2), skip=ids(4, 3))


@pytest.mark.parametrize(
    ("dtype", "classes"),
    [(torch.uint8, 256), (torch.int8, 128), (torch.int16, 1000), (torch.int32, 1000), (torch.uint16, 1000), (torch.uint32, 1000)],
)
def test_labels_of_a_narrow_dtype(dtype, classes):
    """Their bounds, -1 and the number of classes, may lie outside of it."""
    rows, table, labels = (
        torch.randn(4, 3, device=DEVICE),
        torch.randn(classes, 3, device=DEVICE),
        torch.tensor([0, 7, 100, 127], device=DEVICE),
    )
    narrow = labels.to(dtype)
    assert torch.equal(functional.psc_loss(rows, narrow, table), functional.psc_loss(rows, labels, table))
    assert torch.equal(functional.supcon_loss(rows, narrow), functional.supcon_loss(rows, labels))
    assert torch.equal(functional.cross_logsumexp(rows, table, skip=narrow), functional.cross_logsumexp(rows, table, skip=labels))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 100\), got values from 0 to 127"):
        functional.psc_loss(rows.cpu(), narrow.cpu(), table[:100].cpu())


def test_what_other_libraries_take():
    """NumPy's numbers and arrays of one, labels in a row or a column or as whole floats, tables of any integer dtype."""
    rows, labels = torch.randn(4, 3, device=DEVICE), ids()
    want = functional.supcon_loss(rows, labels, temperature=0.1)
    for same in (labels[None], labels[:, None], labels.float(), labels.double()[:, None]):
        assert torch.equal(functional.supcon_loss(rows, same, temperature=0.1), want)
    close = functional.supcon_loss(rows, labels, temperature=numpy.float32(0.1))
    torch.testing.assert_close(close, want)
    psc = PSCLoss(numpy.int64(2), 3).to(DEVICE)
    assert torch.equal(psc(rows, labels[:, None]), psc(rows, labels))
    assert SupConLoss(base_temperature=None)(rows, labels) == functional.supcon_loss(rows, labels)
    pairs = functional.info_nce_loss(rows, rows.flip(0), labels)
    for same in (labels[None], labels[:, None], labels.float()):
        assert torch.equal(functional.info_nce_loss(rows, rows.flip(0), same), pairs)
    alike = labels == labels[:, None]
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(functional.supcon_loss(rows, mask=alike.to(dtype)), functional.supcon_loss(rows, mask=alike.float()))
    counted = [
        functional.prototype_cross_entropy(rows, labels, rows[:2], class_counts=counts(3, 1).to(dtype))
        for dtype in (torch.int64, torch.uint16)
    ]
    assert torch.equal(*counted)


@pytest.mark.parametrize(
    "temperature", [numpy.array(0.25), numpy.array([0.25]), torch.tensor([[0.25]], dtype=torch.float64), torch.tensor(0.25).half()]
)
def test_logits_take_every_temperature_that_the_loss_takes(temperature):
    """And are in the rows' sum dtype."""
    loss = PSCLoss(2, 3, temperature=0.25).to(DEVICE)
    want = loss.logits(z())
    other = PSCLoss(2, 3, temperature=temperature).to(DEVICE)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.logits(z()), want)


@pytest.mark.parametrize("name", ["features", "labels", "mask", "prototypes"])
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (torch.Tensor.to_sparse_csr, "torch.sparse_csr"),
        (lambda x: torch.nested.nested_tensor(list(x)), "a nested tensor"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(name, form, kind):
    given = {"features": z(), "labels": torch.ones(4, 2, device=DEVICE), "mask": torch.eye(4, device=DEVICE), "prototypes": z(2)}[name]
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got {kind}: make it one with"):
        if name == "prototypes":
            functional.psc_loss(z(), ids(), form(given))
        else:
            functional.supcon_loss(**({"features": z()} | {name: form(given)}))


def test_another_device():
    other = torch.zeros(4, 3, device="meta")
    with pytest.raises(ValueError, match=f"prototypes must be on {DEVICE}.* like the rows, got meta"):
        functional.psc_loss(z(), ids(), other)
    with pytest.raises(ValueError, match=f"labels must be on {DEVICE}.* like the rows, got meta"):
        functional.supcon_loss(z(), ids().to("meta"))


def test_modules_refuse_at_construction():
    with pytest.raises(ValueError, match="contrast_mode must be one of 'all', 'one', got 'two'"):
        SupConLoss(contrast_mode="two")
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1"):
        SupConLoss(-1)
    with pytest.raises(ValueError, match="num_classes must be an int of at least 2, got 1"):
        PSCLoss(1, 4)
    with pytest.raises(ValueError, match="embedding_dim must be an int of at least 1, got 0"):
        PSCLoss(3, 0)
    with pytest.raises(ValueError, match=r"prototypes_per_class must be an int of at least 1, got 2\.0"):
        PSCLoss(3, 4, prototypes_per_class=2.0)
    with pytest.raises(ValueError, match="num_classes must be an int of at least 2, got 1"):
        PrototypeCrossEntropyLoss(1, 4)
    with pytest.raises(ValueError, match="dim must be an int of at least 1, got None"):
        PaCoLoss(3, None)
    with pytest.raises(ValueError, match=re.escape("class_counts must have shape [3], got [2]")):
        PrototypeCrossEntropyLoss(3, 4, [1, 2])
    with pytest.raises(ValueError, match="class_counts must be finite, at least 0 and not all 0, got a least of -1 and a sum of 4"):
        PrototypeCrossEntropyLoss(3, 4, [-1, 2, 3])


@pytest.mark.parametrize("call", [lambda z, backend: functional.supcon_loss(z, ids(), backend=backend), functional.self_logsumexp])
def test_an_unknown_backend_says_which_there_are(call):
    with pytest.raises(
        ValueError, match=r"backend='fast' cannot serve .*known are cuda, triton, cpu, chunked, reference and auto.*Usable here: "
    ):
        call(z(), backend="fast")


@pytest.mark.parametrize("name", list(BACKENDS))
def test_an_unusable_backend_says_why(name):
    reason = BACKENDS[name].unusable(DEVICE, torch.float64, 3)
    if reason is None:
        functional.self_logsumexp(z(dtype=torch.float64), backend=name)
        return
    with pytest.raises(
        ValueError, match=re.escape(f"backend={name!r} cannot serve torch.float64 rows of dimension 3 on {DEVICE}")
    ) as caught:
        functional.self_logsumexp(z(dtype=torch.float64), backend=name)
    assert reason in str(caught.value)
    assert "Usable here: " in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_is_not_chosen_where_it_cannot_build_its_launchers(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert BACKENDS["triton"].unusable(torch.device("cuda", 0), torch.float32, 64).startswith("Triton needs a C compiler")


def test_python_dash_m_says_what_serves_what():
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-m", "fastsupcon"], capture_output=True, text=True, check=True, env=plain).stdout
    lines = out.splitlines()
    assert re.match(rf"fastsupcon \S+, torch {re.escape(torch.__version__)}, Python ", lines[0])
    assert lines[1].startswith("built: ")
    assert any(line.startswith("cpu (") for line in lines)
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert re.search(rf"^  {dtype} +auto = \w+; usable: .*reference", out, re.MULTILINE)
    if not torch.cuda.is_available():
        assert re.search(r"^  not cuda: \S", out, re.MULTILINE)
        assert re.search(r"^  not triton: \S", out, re.MULTILINE)
