"""The picture of docs/which-loss.md: python docs/which_loss_picture.py writes docs/which-loss.png, whole or not at all.

A phone shows the figure's 7.2 inches on about 360 points, so that 16 pt are 11 of a phone's. It has a ground of its own, as pages may be
white or dark.
"""

import os
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

GROUND, INK, FAINT = "#fbfaf6", "#1d2733", "#56616d"
POSITIVES = {  # of a row: the colours of a loss's edge and of its box
    "its pair": ("#8a4b08", "#fbeedb"),
    "rows of its class": ("#1f5f99", "#e3eef8"),
    "its prototype": ("#27703a", "#e2f2e5"),
}


class Step(NamedTuple):
    question: str
    example: str
    loss: str  # where the answer is yes
    options: str
    positives: str


STEPS = [
    Step(
        "Pairs of two kinds?",
        "image and caption,\nquery and passage",
        "InfoNCELoss",
        "keys= several captions\nnegatives= hard ones",
        "its pair",
    ),
    Step("Two views,\nno labels?", "SimCLR, MoCo", "NTXentLoss", "queue= small batches", "its pair"),
    Step(
        "A classifier,\nno features?", "also of a million classes", "PrototypeCrossEntropyLoss", "class_counts= long tail", "its prototype"
    ),
    Step("Features of\na long tail?", "the head fills each batch", "BalancedSupConLoss", "or PaCoLoss with a queue", "rows of its class"),
    Step("Few rows of a class\nin a batch?", "many classes, small batches", "PSCLoss", "or SupConLoss with queue=", "its prototype"),
    Step("Else", "labels, features to train", "SupConLoss", "beta= hard negatives\nqueue= small batches", "rows of its class"),
]
WIDTH, LEFT, RIGHT, MARGIN = 7.2, 3.05, 3.45, 0.12  # of the figure, its two columns, around them
BOX, STEP = 1.34, 1.78  # heights: of a box, from one to the next
LINE = 0.3  # of large text
WRITTEN = {"va": "center", "linespacing": 1.15}


def box(axes: Axes, left: float, middle: float, width: float, height: float, edge: str, fill: str) -> None:
    rounded = f"round,pad=0,rounding_size={0.11 * height}"
    corner = (left, middle - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=rounded, facecolor=fill, edgecolor=edge, linewidth=2))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>,head_width=0.3,head_length=0.55", "color": INK, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def two_texts(axes: Axes, x: float, middle: float, large: str, small: str, **of_large: object) -> None:
    """One above the other, in the middle together."""
    above, below = LINE * (1 + large.count("\n")), 0.8 * LINE * (1 + small.count("\n"))
    gap = 0.07
    axes.text(x, middle + (below + gap) / 2, large, ha="center", weight="bold", **WRITTEN, **of_large)
    axes.text(x, middle - (above + gap) / 2, small, ha="center", fontsize=13.5, color=INK, **WRITTEN)


def draw(axes: Axes, top: float) -> None:
    left, right = MARGIN + LEFT / 2, WIDTH - MARGIN - RIGHT / 2
    for number, step in enumerate(STEPS):
        middle = top - BOX / 2 - STEP * number
        edge, fill = POSITIVES[step.positives]
        box(axes, MARGIN, middle, LEFT, BOX, FAINT, "white")
        two_texts(axes, left, middle, step.question, step.example, fontsize=16.5, color=INK)
        box(axes, WIDTH - MARGIN - RIGHT, middle, RIGHT, BOX, edge, fill)
        two_texts(
            axes, right, middle, step.loss, step.options, fontsize=min(18, 365 / len(step.loss)), color=edge, family="DejaVu Sans Mono"
        )
        start, end = MARGIN + LEFT, WIDTH - MARGIN - RIGHT
        arrow(axes, (start + 0.03, middle), (end - 0.03, middle))
        if step is not STEPS[-1]:
            axes.text((start + end) / 2, middle + 0.2, "yes", ha="center", fontsize=13.5, color=INK, va="center")
            arrow(axes, (left, middle - BOX / 2 - 0.03), (left, middle - STEP + BOX / 2 + 0.03))
            axes.text(left + 0.15, middle - STEP / 2, "no", ha="left", fontsize=13.5, color=INK, va="center")
    below = top - STEP * len(STEPS) + 0.05
    axes.text(MARGIN, below, "A row's positives:", fontsize=13.5, color=INK, va="center")
    for x, (positives, (edge, fill)) in zip((1.92, 3.2, 5.2), POSITIVES.items(), strict=True):
        box(axes, x, below, 0.3, 0.22, edge, fill)
        axes.text(x + 0.38, below, positives, fontsize=13.5, color=INK, va="center")


def main() -> None:
    height = STEP * len(STEPS) + 2 * MARGIN + 0.1
    figure = pyplot.figure(figsize=(WIDTH, height), facecolor=GROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.set_axis_off()
    draw(axes, height - MARGIN)
    path = Path(__file__).with_name("which-loss.png")
    part = path.with_suffix(".part")
    figure.savefig(part, format="png", dpi=130, facecolor=GROUND)
    os.replace(part, path)


if __name__ == "__main__":
    main()
