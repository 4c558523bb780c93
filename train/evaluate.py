"""What a classifier is worth on a balanced test set after training on a long tail."""

from __future__ import annotations

import csv
from pathlib import Path

import processes
import torch
from data import Batches, shots
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score
from torch import Tensor


@torch.no_grad()
def predict(network, batches: Batches, augmentation, autocast, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (the head's, unit length), logits and labels of every image, in order, on the CPU. Processes share the images out."""
    network.eval()
    embeddings, logits = [], []
    for images, _ in batches.in_order(size, processes.part(len(batches.labels))):
        with autocast:
            features = network.backbone(augmentation.evaluate(images))
            embeddings.append(torch.nn.functional.normalize(network.head(features).float()))
            logits.append(network.classifier(features).float())
    embeddings, logits = (torch.cat(processes.gathered([part.cpu() for part in parts])) for parts in (embeddings, logits))
    return embeddings, logits, batches.labels.cpu()


def metrics(logits: Tensor, labels: Tensor, counts: Tensor, many: int, few: int) -> dict:
    """All in percent. ``balanced`` is the mean of per-class accuracies over the classes the split has; many, medium, few their means."""
    predicted, classes = logits.argmax(1), range(len(counts))
    recall = torch.from_numpy(recall_score(labels, predicted, labels=list(classes), average=None, zero_division=float("nan"))) * 100
    groups = {name: recall[members].nanmean().item() for name, members in shots(counts, many, few).items() if members.any()}
    present = labels.bincount(minlength=len(counts)) > 0
    worst = int(torch.where(present, recall, torch.inf).argmin())
    return {
        "balanced": recall[present].mean().item(),
        "accuracy": (predicted == labels).double().mean().item() * 100,
        **{name: groups.get(name) for name in ("many", "medium", "few")},
        "worst_class": worst,
        "worst": recall[worst].item(),
        "calibration_error": calibration_error(logits, labels),
        "per_class": [value if here else None for value, here in zip(recall.tolist(), present.tolist(), strict=True)],
    }


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent: |confidence - accuracy| in equal-width bins of confidence, weighted by their images."""
    confidence, predicted = logits.double().softmax(1).max(1)
    bin_of = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, confidence - (predicted == labels).double())
    return gap.abs().sum().item() / len(labels) * 100


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float(balanced_accuracy_score(labels, logits.argmax(1)))


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Row: true class, column: predicted; rows sum to 1."""
    return torch.from_numpy(confusion_matrix(labels, logits.argmax(1), labels=list(range(logits.shape[1])), normalize="true"))


def write_per_class(path: Path, classes: list[str], counts: Tensor, labels: Tensor, accuracies: list[float | None]) -> None:
    tested = labels.bincount(minlength=len(classes)).tolist()
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["class", "name", "train_images", "test_images", "accuracy"])
        for c, row in enumerate(zip(classes, counts.tolist(), tested, accuracies, strict=True)):
            table.writerow([c, *row[:3], "" if row[3] is None else f"{row[3]:.2f}"])
