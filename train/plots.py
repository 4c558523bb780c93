"""The pictures of a run folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

DOTS_PER_INCH = 110
ABOVE = {"frameon": False, "fontsize": 8, "ncols": 3, "loc": "lower left", "bbox_to_anchor": (0, 1)}  # a legend over no line or bar


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH, bbox_inches="tight")


def per_class(path: Path, counts: list[int], accuracies: dict[str, list[float | None]], classes: list[str] | None = None) -> None:
    """Accuracy of each class (lines, one for each run) over its training images (bars), largest class first."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    figure = Figure(figsize=(7, 3.6))
    sizes = figure.add_subplot()
    sizes.bar(range(len(order)), np.asarray(counts)[order], color="#d9dde3", width=0.9)
    sizes.set(yscale="log", ylabel="training images", xlabel="class, by training images", xlim=(-0.6, len(order) - 0.4))
    if classes and len(classes) <= 20:
        sizes.set_xticks(range(len(order)), [classes[i] for i in order], rotation=30 if max(map(len, classes)) > 3 else 0)
    accuracy = sizes.twinx()
    for name, values in accuracies.items():
        values = np.asarray([np.nan if v is None else v for v in values])[order]
        accuracy.plot(values, ".-" if len(order) <= 30 else "-", label=name, linewidth=1.4)
    lowest = min(v for values in accuracies.values() for v in values if v is not None)
    accuracy.set(ylabel="test accuracy, %", ylim=(min(50, lowest) - 2, 102))
    accuracy.legend(**ABOVE)
    save(figure, path)


def confusion(path: Path, matrix: Tensor, classes: list[str]) -> None:
    shares = matrix.numpy()
    figure = Figure(figsize=(5, 4.4))
    axes = figure.add_subplot()
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 3 else 0)
        axes.set_yticks(range(len(classes)), classes)
        for (i, j), share in np.ndenumerate(shares):
            if share >= 0.005:
                axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color="white" if share > 0.5 else "black")
    figure.colorbar(shown, label="share of the true class")
    save(figure, path)


def embedding(path: Path, embeddings: Tensor, labels: Tensor, classes: list[str], limit: int = 1500) -> None:
    """t-SNE of the head's unit embeddings of (at most ``limit``) test images, by class; PCA where there are too few for it."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    chosen = np.random.default_rng(0).permutation(len(labels))[:limit]
    points, of = embeddings.numpy()[chosen], labels.numpy()[chosen]
    few = len(points) < 50
    plane = (PCA(2) if few else TSNE(2, perplexity=30, init="pca", random_state=0, max_iter=500)).fit_transform(points)
    figure = Figure(figsize=(5.4, 4.4))
    axes = figure.add_subplot()
    colors = axes.scatter(*plane.T, c=of, cmap="tab10" if len(classes) <= 10 else "turbo", s=7, vmin=-0.5, vmax=len(classes) - 0.5)
    axes.set(xticks=[], yticks=[], title=f"{'PCA' if few else 't-SNE'} of the embeddings, test images")
    bar = figure.colorbar(colors, label="class", ticks=range(len(classes)) if len(classes) <= 20 else None)
    if len(classes) <= 20:
        bar.set_ticklabels(classes)
    save(figure, path)


def curves(path: Path, history: list[dict]) -> None:
    figure = Figure(figsize=(9, 3))
    losses, weights, accuracies = figure.subplots(1, 3)

    def draw(axes, key: str, label: str, **style) -> None:
        rows = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if rows:
            axes.plot(*zip(*rows, strict=True), label=label, linewidth=1.4, **style)

    draw(losses, "feature_loss", "feature")
    draw(losses, "chance", "feature, chance", linestyle=":", color="grey")
    draw(losses, "classifier_loss", "classifier")
    draw(weights, "alpha", "α (feature)")
    draw(weights, "lr", "learning rate")
    draw(accuracies, "train_accuracy", "train batches")
    draw(accuracies, "validation_balanced", "validation, balanced")
    draw(accuracies, "test_balanced", "test, balanced (chooses nothing)")
    for axes, title in ((losses, "loss"), (weights, "schedule"), (accuracies, "accuracy, %")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))  # below: over no line
    save(figure, path)


def comparison(path: Path, groups: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Bars with spread: for each method the balanced, many, medium and few-shot accuracy as (mean, std)."""
    figure = Figure(figsize=(8, 3.4))
    axes = figure.add_subplot()
    names = ["balanced", "many", "medium", "few"]
    width = 0.8 / len(groups)
    for i, (method, values) in enumerate(groups.items()):
        shown = [n for n in names if n in values]
        mean, std = zip(*(values[n] for n in shown), strict=True)
        places = [names.index(n) + (i + 0.5) * width - 0.4 for n in shown]
        axes.bar(places, mean, width, yerr=std, label=method, error_kw={"linewidth": 0.8})
    lowest = min(mean - std for values in groups.values() for mean, std in values.values())
    axes.set(ylabel="test accuracy, %", ylim=(max(0, lowest - 3), 101))
    axes.set_xticks(range(4), names)
    axes.legend(**ABOVE)
    save(figure, path)
