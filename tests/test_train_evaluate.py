"""Metrics against numbers worked out by hand, networks against their known sizes, files whole or not at all."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the [train] extra")
pytest.importorskip("matplotlib", reason="needs the [train] extra")

import checkpoint
import evaluate
from networks import HybridNetwork, freeze_below_classifier, make_backbone


def logits_for(predicted, classes, margin=10.0):
    return torch.nn.functional.one_hot(torch.tensor(predicted), classes) * margin


def test_metrics_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])
    logits = logits_for([0, 0, 0, 1, 1, 0, 2, 2, 2], 4)
    found = evaluate.metrics(logits, labels, torch.tensor([150, 50, 3, 7]), many=100, few=20)
    assert found["per_class"] == [75.0, 50.0, 100.0, None]  # class 3 has no test image
    assert found["balanced"] == pytest.approx(75.0) == evaluate.balanced_accuracy(logits, labels)
    assert (found["many"], found["medium"], found["few"]) == (75.0, 50.0, 100.0)
    assert found["accuracy"] == pytest.approx(700 / 9)
    assert (found["worst_class"], found["worst"]) == (1, 50.0)
    assert evaluate.metrics(logits, labels, torch.tensor([150, 150, 150, 150]), 100, 20)["few"] is None


def test_calibration_error_by_hand():
    def with_confidence(p, n):  # two classes, class 0 with probability p
        return torch.tensor([[math.log(p / (1 - p)), 0.0]]).repeat(n, 1)

    logits = torch.cat([with_confidence(0.9, 10), with_confidence(0.6, 10)])
    labels = torch.tensor([0] * 8 + [1] * 2 + [0] * 6 + [1] * 4)  # right 80 % and 60 % of the time
    assert evaluate.calibration_error(logits, labels) == pytest.approx(100 * (0.5 * 0.1 + 0.5 * 0.0), abs=1e-4)


def test_confusion_and_csv(tmp_path):
    labels, logits = torch.tensor([0, 0, 1]), logits_for([0, 1, 1], 2)
    assert evaluate.confusion(logits, labels).tolist() == [[0.5, 0.5], [0, 1]]
    evaluate.write_per_class(tmp_path / "c.csv", ["a, b", "c"], torch.tensor([5, 2]), labels, [50.0, None])
    assert (tmp_path / "c.csv").read_text().splitlines() == [
        "class,name,train_images,test_images,accuracy",
        '0,"a, b",5,2,50.00',
        "1,c,2,1,",
    ]


def test_resnet32_is_the_cifar_variant():
    backbone = make_backbone("resnet32", channels=3, width=16)
    network = HybridNetwork(backbone, classes=10, hidden=64, embedding=128)
    weights = sum(p.numel() for p in [*backbone.parameters(), *network.classifier.parameters()])
    assert weights == 464_154  # the 0.46 M of the literature
    assert sum(isinstance(m, torch.nn.Conv2d) for m in backbone.modules()) == 31
    z, logits = network(torch.randn(5, 3, 32, 32), split=3)
    assert z.shape == (3, 128) and logits.shape == (2, 10) and backbone.num_features == 64


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match=r"network must be one of resnet8.*no-such-net"):
        make_backbone("no-such-net", 3, 16)


def test_frozen_below_the_classifier():
    network = HybridNetwork(make_backbone("resnet8", 1, 4), 3, 8, 8).train()
    freeze_below_classifier(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    network(torch.randn(4, 1, 8, 8), 0)[1].sum().backward()
    optimizer.step()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})

    def half(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_whole(path, half)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_unreadable_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pt does not exist"):
        checkpoint.load(tmp_path / "gone.pt")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"bad\.pt is not a readable checkpoint"):
        checkpoint.load(tmp_path / "bad.pt")
