"""Metrics against numbers worked out by hand, networks against their known sizes, files whole or not at all."""

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")

import checkpoint
import evaluate
from data import Batches, Split
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


def test_metrics_beyond_the_mean():
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    found = evaluate.metrics(logits_for([0, 0, 1, 0, 0, 0], 2), labels, torch.tensor([5, 2]), many=4, few=3)
    assert found["per_class"] == [100.0, 25.0] and found["geometric_mean"] == pytest.approx(50.0)
    assert found["harmonic_mean"] == pytest.approx(40.0) and found["top5"] is None
    never = evaluate.metrics(logits_for([0, 0, 0, 0, 0, 0], 2), labels, torch.tensor([5, 2]), many=4, few=3)
    assert (never["geometric_mean"], never["harmonic_mean"], never["worst"]) == (0.0, 0.0, 0.0)
    nothing = evaluate.metrics(torch.zeros(0, 11), labels[:0], torch.ones(11), many=4, few=3, neighbours={"features": labels[:0]})
    assert {value for name, value in nothing.items() if name != "per_class"} == {None} and nothing["per_class"] == [None] * 11
    json.dumps(found), json.dumps(nothing, allow_nan=False)


def test_figures_are_those_of_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score

    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 12, generator=generator), torch.randint(12, (500,), generator=generator)
    found, predicted = evaluate.metrics(logits, labels, torch.full((12,), 50), many=100, few=20), logits.argmax(1)
    assert found["per_class"] == pytest.approx((100 * recall_score(labels, predicted, average=None)).tolist())
    assert found["balanced"] == pytest.approx(100 * balanced_accuracy_score(labels, predicted)) == found["medium"]
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5))
    expected = torch.from_numpy(confusion_matrix(labels, predicted, normalize="true")).float()
    torch.testing.assert_close(evaluate.confusion(logits, labels), expected)


def test_calibration_error_does_not_depend_on_the_blocks(monkeypatch):
    logits, labels = torch.randn(300, 7), torch.randint(7, (300,))
    whole, blocks = evaluate.calibration_error(logits, labels), evaluate.row_blocks
    monkeypatch.setattr(evaluate, "row_blocks", lambda *tensors: blocks(*tensors, elements=40))
    assert evaluate.calibration_error(logits, labels) == pytest.approx(whole, rel=1e-12)
    assert [len(a) for a, _ in blocks(logits, labels, elements=700)] == [100, 100, 100]


@pytest.mark.parametrize(("k", "elements"), [(20, 2**24), (20, 1000), (1, 1), (200, 500)])
def test_nearest_neighbours_are_those_of_scikit_learn(k, elements):
    from sklearn.neighbors import KNeighborsClassifier

    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    labels = torch.randint(4, (150,), generator=generator)
    train, test = torch.randn(150, 6, **draw) + labels[:, None] / 2, torch.randn(90, 6, **draw) + torch.arange(90)[:, None] % 4 / 2
    options = {"metric": "cosine", "weights": lambda distance: np.exp((1 - distance) / 0.07)}
    expected = KNeighborsClassifier(min(k, len(train)), **options).fit(train, labels).predict(test)
    found = evaluate.nearest_neighbours(3 * train, labels, test, k=k, elements=elements)
    assert found.tolist() == expected.tolist() and 0.3 < (found == torch.arange(90) % 4).double().mean() < 1
    figures = evaluate.metrics(torch.zeros(90, 4), torch.arange(90) % 4, labels.bincount(), 100, 20, {"features": found})
    assert figures["knn_features"] == pytest.approx(evaluate.per_class_accuracy(found, torch.arange(90) % 4, 4).mean().item())


def test_nearest_neighbours_by_hand():
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), torch.tensor([7, 3, 3])
    assert evaluate.nearest_neighbours(train, labels, torch.tensor([[5.0, 0.1], [1.0, 0.99]])).tolist() == [7, 3]
    # At a high temperature every neighbour counts alike, and two are more than one.
    assert evaluate.nearest_neighbours(train, labels, torch.tensor([[5.0, 0.1]]), temperature=1e6).tolist() == [3]
    assert evaluate.nearest_neighbours(train, labels, torch.tensor([[5.0, 0.1]]), temperature=1e-6).tolist() == [7]
    assert evaluate.nearest_neighbours(train, labels, train[:0]).tolist() == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": torch.ones(3, 4)}, r"of one D, train not empty, got \[3, 4\] and \[2, 5\]"),
        ({"train": torch.ones(0, 5)}, "train not empty"),
        ({"train_labels": torch.zeros(2, dtype=torch.int64)}, "one for each of the 3 rows of train, got 2"),
        ({"k": 0}, "k and temperature must be positive, got k 0"),
        ({"temperature": 0.0}, "got k 20 and temperature 0"),
        ({"test": torch.full((2, 5), torch.nan)}, "must be finite"),
    ],
)
def test_neighbours_of_what_cannot_be(given, message):
    good = {"train": torch.ones(3, 5), "train_labels": torch.zeros(3, dtype=torch.int64), "test": torch.ones(2, 5)}
    with pytest.raises(ValueError, match=message):
        evaluate.nearest_neighbours(**good | given)


def test_tau_normalisation():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-30]])
    assert torch.equal(evaluate.tau_normalised(weight, 0), weight)
    torch.testing.assert_close(evaluate.tau_normalised(weight, 1), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 1.0]]))
    weight = torch.randn(5, 7, dtype=torch.float64)
    expected = torch.stack([row / row.square().sum().sqrt() ** 0.7 for row in weight])
    torch.testing.assert_close(evaluate.tau_normalised(weight, 0.7), expected)
    for tau in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tau must be finite and not negative"):
            evaluate.tau_normalised(weight, tau)
    with pytest.raises(ValueError, match=r"weight must be \[classes, D\], got \[7\]"):
        evaluate.tau_normalised(weight[0], 1)


class AsItIs:
    def evaluate(self, images):
        return images.float()


def test_predictions_come_in_the_size_asked_for():
    labels = torch.arange(7) % 3
    batches = Batches(Split(torch.randint(256, (7, 1, 8, 8), dtype=torch.uint8), labels), torch.device("cpu"), 8, 0)
    network = HybridNetwork(make_backbone("resnet8", 1, 4), 3, 8, 5)
    seen = []
    network.backbone.register_forward_hook(lambda module, given, result: seen.append(len(result)))
    features, embeddings, logits, found = evaluate.predict(network, batches, AsItIs(), nullcontext(), 3, evaluate.OUTPUTS)
    assert seen == [3, 3, 1] and found.tolist() == labels.tolist()
    assert [list(x.shape) for x in (features, embeddings, logits)] == [[7, 16], [7, 5], [7, 3]]
    torch.testing.assert_close(logits, network.classifier(features).detach())
    torch.testing.assert_close(embeddings, torch.nn.functional.normalize(network.head(features)).detach())
    whole = evaluate.predict(network, batches, AsItIs(), nullcontext(), 100)
    torch.testing.assert_close(whole, (embeddings, logits, labels), rtol=1e-5, atol=1e-6)
    for outputs in ((), ("logit",)):
        with pytest.raises(ValueError, match="outputs must be some of features, embeddings, logits, got"):
            evaluate.predict(network, batches, AsItIs(), nullcontext(), 3, outputs)


def test_names_of_folders_that_are_no_text(tmp_path):
    evaluate.write_per_class(tmp_path / "c.csv", ["\udcff", "猫"], torch.tensor([5, 2]), torch.tensor([0]), [50.0, None])
    assert (tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()[1:] == ["0,\\udcff,5,1,50.00", "1,猫,2,0,"]


def test_resnet32_is_the_cifar_variant():
    backbone = make_backbone("resnet32", channels=3, width=16)
    network = HybridNetwork(backbone, classes=10, hidden=64, embedding=128)
    weights = sum(p.numel() for p in [*backbone.parameters(), *network.classifier.parameters()])
    assert weights == 464_154  # the 0.46 M of the literature
    assert sum(isinstance(m, torch.nn.Conv2d) for m in backbone.modules()) == 31
    z, logits, features = network(torch.randn(5, 3, 32, 32), head_until=3, classifier_from=1)
    assert z.shape == (3, 128) and logits.shape == (4, 10) and features.shape == (5, 64) and backbone.num_features == 64


def test_gradients_keep_the_layout_of_the_images():
    """Convolutions of channels-last images would copy a gradient of another layout before they use it."""
    backbone, strides = make_backbone("resnet14", 3, 4).to(memory_format=torch.channels_last), []
    for block in list(backbone)[3:]:
        block.register_full_backward_hook(lambda block, into, out: strides.extend([into[0].stride(1), out[0].stride(1)]))
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    backbone(images).sum().backward()
    assert strides == [1] * 12


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match=r"no-such-net.*resnet8|resnet8.*no-such-net"):
        make_backbone("no-such-net", 3, 16)


def test_frozen_below_the_classifier():
    network = HybridNetwork(make_backbone("resnet8", 1, 4), 3, 8, 8).train()
    freeze_below_classifier(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=0.1)
    network(torch.randn(4, 1, 8, 8), 0, 0)[1].sum().backward()
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
