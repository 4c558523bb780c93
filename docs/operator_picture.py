"""Makes operator.png: what a step holds of the N x N matrix. python docs/operator_picture.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

TILES = 6  # rows and columns of tiles in the drawing
AT = (2, 4)  # row and column of the tile at work
INK, PAPER, DONE, NOW, ROWS, KEPT = "#1b1f24", "#ffffff", "#d5dbe3", "#e8883a", "#4c86c6", "#3f9c6b"


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=INK, linewidth=1.4, shrinkA=0, shrinkB=0))


def matrix(axes: Axes, left: float) -> None:
    """The tiles on and above the diagonal, of which each serves its rows and its columns: only the one at work is in memory."""
    for i in range(TILES):
        for j in range(TILES):
            y = TILES - 1 - i
            if (i, j) == AT:
                box(axes, left + j, y, 1, 1, NOW)
            elif j >= i:
                box(axes, left + j, y, 1, 1, DONE if (i, j) < AT else PAPER)
            else:
                axes.add_patch(Rectangle((left + j, y), 1, 1, facecolor="none", edgecolor="#c3c9d1", linewidth=0.6, linestyle=":"))


def strip(axes: Axes, x: float, width: float, color: str) -> None:
    """Rows [N, ...], those of the tile at work marked: of its rows, and of its columns."""
    for i in range(TILES):
        box(axes, x, TILES - 1 - i, width, 1, NOW if i in AT else color)


def words(axes: Axes, x: float, y: float, text: str, size: float = 13, **options: str) -> None:
    axes.text(x, y, text, fontsize=size, color=INK, **({"ha": "center", "va": "center"} | options))


def panel(axes: Axes, title: str, inputs: list[tuple[float, float, str, str]], tile: str, output: tuple[float, str, str]) -> None:
    axes.set(xlim=(-4.7, 12.2), ylim=(-2.6, 7.9), aspect="equal")
    axes.axis("off")
    words(axes, -4.5, 7.3, title, 15, ha="left", weight="bold")
    for x, width, color, name in inputs:
        strip(axes, x, width, color)
        words(axes, x + width / 2, -0.9, name)
    matrix(axes, 0.6)
    words(axes, 3.6, -0.9, tile)
    arrow(axes, (-0.7, 3), (0.4, 3))
    arrow(axes, (6.9, 3), (8.2, 3))
    width, color, name = output
    strip(axes, 8.5, width, color)
    words(axes, 8.5 + width / 2, -0.9, name)


def main() -> None:
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure, (forward, backward) = plt.subplots(2, 1, figsize=(6.4, 8.0), facecolor=PAPER)
    panel(
        forward,
        "Forward: each pair of rows once",
        [(-2.6, 1.6, ROWS, "rows\n[N, D]")],
        "one tile in memory:\nthe matrix is never held",
        (0.9, KEPT, "kept: a few\nnumbers a row"),
    )
    panel(
        backward,
        "Backward: the tile made anew, then weighed",
        [(-4.3, 1.6, ROWS, "rows\n[N, D]"), (-1.9, 0.9, KEPT, "kept\n[N]")],
        "the same tiles,\nthe same numbers",
        (1.6, ROWS, "gradient\n[N, D]"),
    )
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.99, hspace=0.03)
    path = Path(__file__).with_name("operator.png")
    part = path.with_suffix(".part")
    figure.savefig(part, format="png", dpi=150, facecolor=PAPER)
    part.replace(part.with_suffix(".png"))


if __name__ == "__main__":
    main()
