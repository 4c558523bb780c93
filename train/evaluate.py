"""What a classifier is worth on a balanced test set after training on a long tail."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path

import checkpoint
import processes
import torch
import torch.nn.functional as F
from data import Batches, shots
from torch import Tensor

OUTPUTS = ("features", "embeddings", "logits")


@torch.no_grad()
def predict(
    network, batches: Batches, augmentation, autocast, size: int, outputs: tuple[str, ...] = ("embeddings", "logits")
) -> tuple[Tensor, ...]:
    """The named outputs of every image, then the labels: float32, in order, on the CPU. Processes share the images out.

    ``features`` are the backbone's, ``embeddings`` the head's at unit length, ``logits`` the classifier's. What is not named is not
    computed, and ``size`` images are on the device at once. Outputs that are not finite have no class: a FloatingPointError.
    """
    if not outputs or not set(outputs) <= set(OUTPUTS):
        raise ValueError(f"outputs must be some of {', '.join(OUTPUTS)}, got {outputs}")
    network.eval()
    compute = {
        "features": lambda features: features,
        "embeddings": lambda features: F.normalize(network.head(features).float()),
        "logits": lambda features: network.classifier(features),
    }
    share, parts, done = processes.part(len(batches.labels)), {}, 0
    for images, _ in batches.in_order(size, share):
        with autocast:
            features = network.backbone(augmentation.evaluate(images))
            found = {name: compute[name](features) for name in outputs}
        for name, rows in found.items():
            if name not in parts:  # whole from the start: joining the batches at the end would need the memory twice
                parts[name] = torch.empty(len(share), rows.shape[1])
            parts[name][done : done + len(rows)] = rows
            if not parts[name][done : done + len(rows)].isfinite().all():
                raise FloatingPointError(f"{name} of images {done} to {done + len(rows) - 1} are not finite: try a lower --lr")
        done += len(images)
    everyone = [processes.gathered([parts[name]] if name in parts else []) for name in outputs]
    return *(of_all[0] if len(of_all) == 1 else torch.cat(of_all) for of_all in everyone), batches.labels.cpu()


# ---- figures


def metrics(
    logits: Tensor, labels: Tensor, counts: Tensor, many: int, few: int, neighbours: dict[str, Tensor] | None = None
) -> dict[str, float | int | list[float | None] | None]:
    """All in percent, None where it is not defined: a group without a class, a class without a test image.

    ``balanced`` is the mean of per-class accuracies over the classes the split has, ``many``, ``medium`` and ``few`` their means in groups
    by training images, ``geometric_mean`` and ``harmonic_mean`` their other means, which are 0 where a class is never recognised.
    ``accuracy`` and ``top5`` (of more than 10 classes) are shares of the images. ``neighbours`` are classes that
    :func:`nearest_neighbours` found, by the name of what they were found from: their balanced accuracy comes as ``knn_NAME``.
    """
    predicted = logits.argmax(1)
    recall = per_class_accuracy(predicted, labels, len(counts))
    worst = int(recall.nan_to_num(torch.inf).argmin()) if len(labels) else None
    return {
        "balanced": mean(recall),
        "accuracy": mean(100.0 * (predicted == labels)),
        "top5": top(5, logits, labels) if len(counts) > 10 else None,
        **{name: mean(recall[members]) for name, members in shots(counts, many, few).items()},
        "worst_class": worst,
        "worst": None if worst is None else recall[worst].item(),
        "geometric_mean": mean(recall, by="log"),
        "harmonic_mean": mean(recall, by="reciprocal"),
        "calibration_error": calibration_error(logits, labels),
        **{f"knn_{name}": mean(per_class_accuracy(found, labels, len(counts))) for name, found in (neighbours or {}).items()},
        "per_class": [None if math.isnan(value) else value for value in recall.tolist()],
    }


def per_class_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[classes] in percent, float64; NaN for a class without a test image."""
    right = labels[predicted == labels].bincount(minlength=classes)
    return 100 * right.double() / labels.bincount(minlength=classes)


def mean(values: Tensor, by: str = "value") -> float | None:
    """The arithmetic mean of what is not NaN, or the geometric (``by`` "log") or harmonic one ("reciprocal"); None of nothing."""
    values = values[~values.isnan()].double()
    if not len(values):
        return None
    if by == "log":
        return values.log().mean().exp().item()  # log 0 is -inf, whose exp is 0
    return values.mean().item() if by == "value" else values.reciprocal().mean().reciprocal().item()  # 1 / 0 is inf, and 1 / inf 0


def top(k: int, logits: Tensor, labels: Tensor) -> float | None:
    """Share in percent of the images whose class is among the ``k`` of the largest logits."""
    return mean(100.0 * torch.cat([(z.topk(k).indices == y[:, None]).any(1) for z, y in row_blocks(logits, labels)]))


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float | None:
    """Expected calibration error in percent: |confidence - accuracy| in equal-width bins of confidence, weighted by their images."""
    gap = torch.zeros(bins, dtype=torch.float64)
    for z, y in row_blocks(logits, labels):
        confidence, predicted = z.double().softmax(1).max(1)
        bin_of = (confidence * bins).long().clamp_max(bins - 1)
        gap.index_add_(0, bin_of, confidence - (predicted == y).double())
    return gap.abs().sum().item() / len(labels) * 100 if len(labels) else None


def row_blocks(*tensors: Tensor, width: int | None = None, elements: int = 2**22) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all tensors together, so many at a time that rows times ``width`` (of the first's rows) are about ``elements``."""
    rows = max(1, elements // max(1, tensors[0].shape[1] if width is None else width))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float | None:
    """Mean of per-class accuracies in percent, over the classes that have a test image."""
    return mean(per_class_accuracy(logits.argmax(1), labels, logits.shape[1]))


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Row: true class, column: predicted; float32. Rows sum to 1, or to 0 for a class without a test image."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    matrix = torch.zeros(classes * classes).index_add_(0, pairs, torch.ones(len(pairs))).view(classes, classes)
    return matrix.div_(labels.bincount(minlength=classes).clamp_min(1)[:, None])


# ---- without and after the classifier


@torch.no_grad()
def nearest_neighbours(
    train: Tensor, train_labels: Tensor, test: Tensor, k: int = 20, temperature: float = 0.07, elements: int = 2**24
) -> Tensor:
    """The class of each test row by its ``k`` most similar training rows (all, where there are fewer), int64 [rows of test].

        class = argmax_c  sum over the k nearest i with label c of  exp(cos(test, train_i) / temperature)

    after Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018. Rows are brought to unit length.
    About ``elements`` similarities are held at a time, and never those of all test rows with all training rows.
    """
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or not len(train):
        raise ValueError(f"train and test must be [rows, D] of one D, train not empty, got {list(train.shape)} and {list(test.shape)}")
    if len(train_labels) != len(train):
        raise ValueError(f"train_labels must be one for each of the {len(train)} rows of train, got {len(train_labels)}")
    if k < 1 or not temperature > 0:
        raise ValueError(f"k and temperature must be positive, got k {k} and temperature {temperature}")
    if not (train.isfinite().all() and test.isfinite().all()):
        raise ValueError("train and test must be finite, got NaN or infinity")
    train, predicted = F.normalize(train).T, []
    for (rows,) in row_blocks(test, width=max(len(train_labels), k * k), elements=elements):
        nearest = (F.normalize(rows) @ train).topk(min(k, len(train_labels)))
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()  # of the nearest 1: a small temperature does not overflow
        # A sum for each of the neighbours' classes, and not for each class: memory does not grow with the number of classes.
        of = train_labels[nearest.indices]
        votes = (weights[:, None, :] * (of[:, :, None] == of[:, None, :])).sum(2)
        predicted.append(of.gather(1, votes.argmax(1, keepdim=True))[:, 0])
    return torch.cat(predicted) if predicted else train_labels.new_empty(0)


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """A linear classifier's weight with rows w_c / ||w_c||^tau, to be used without its bias; a row of zeros stays.

    ``weight`` [C, D]; 0 leaves it as it is, 1 makes all rows of unit length. Large classes have long rows after training on a long tail.
    After Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be [classes, D], got {list(weight.shape)}")
    if not 0 <= tau < float("inf"):
        raise ValueError(f"tau must be finite and not negative, got {tau}")
    lengths = weight.double().norm(dim=1, keepdim=True)
    return (weight / torch.where(lengths > 0, lengths, 1).pow(tau)).to(weight.dtype)


def write_per_class(path: Path, classes: list[str], counts: Tensor, labels: Tensor, accuracies: list[float | None]) -> None:
    tested = labels.bincount(minlength=len(classes)).tolist()
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["class", "name", "train_images", "test_images", "accuracy"])
    for c, row in enumerate(zip(classes, counts.tolist(), tested, accuracies, strict=True)):
        table.writerow([c, *row[:3], "" if row[3] is None else f"{row[3]:.2f}"])
    checkpoint.write_text(path, text.getvalue())
