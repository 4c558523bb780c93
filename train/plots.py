"""The pictures of a run's folder and of several runs. Each is written whole, and does not depend on a person's matplotlibrc."""

from __future__ import annotations

import functools
import math
import re
import statistics
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkpoint
import matplotlib
import matplotlib.style
import numpy as np
from data import shots
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor, as_tensor

DOTS_PER_INCH = 130
# Ten colours that stay apart for colour-blind eyes: Petroff, Accessible Color Sequences for Data Visualization, 2021.
PALETTE = ("#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#92dadd", "#a96b59", "#e76300", "#b9ac70", "#717581", "#94a4a2")
QUIET, INK, GROUPS = "#d5d9df", "#3a3f47", ("many", "medium", "few")
# A method has the same colour in every picture; others get those that are left.
METHODS = {"ce": 8, "ce-balanced": 5, "logit-adjustment": 1, "hybrid-sc": 0, "hybrid-psc": 3, "ours": 2}
ALIASES = {"ce-class-balanced": "ce-balanced", "class-balanced-ce": "ce-balanced", "cross-entropy": "ce"}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
ONE_BY_ONE = 30  # with more classes than this, pictures show groups of them

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9aa1ab",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "xtick.color": "#9aa1ab",
    "ytick.color": "#9aa1ab",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.parse_math": False,  # a $ in a name is a $
    "text.usetex": False,
}


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    with matplotlib.style.context(["default", STYLE | {"font.sans-serif": list(fonts())}]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        options = {"dpi": DOTS_PER_INCH, "format": path.suffix.removeprefix("."), "bbox_inches": "tight"}
        checkpoint.write_whole(path, lambda file: figure.savefig(file, **options))


# ---- names


@functools.cache
def fonts() -> dict[str, frozenset[int]]:
    """The characters of each font that texts are set in: matplotlib's own, then whichever of these the machine has."""
    more = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"]
    more += ["Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS", "Noto Emoji", "Symbola"]
    there = set(font_manager.get_font_names())
    found = {}
    for name in ["DejaVu Sans", *(name for name in more if name in there)]:
        file = font_manager.findfont(name)
        found[name] = frozenset(font_manager.get_font(file).get_charmap())
    return found


def shown(name: str, length: int = 22) -> str:
    """The name as it can be drawn: characters that no font has are escaped, and too long a name loses its middle."""
    # Letters that are written from right to left come in their order from matplotlib 3.11 on, which shapes its texts.
    shapes = tuple(map(int, matplotlib.__version__.split(".")[:2])) >= (3, 11)

    def drawn(c: str) -> bool:
        covered = any(ord(c) in characters for characters in fonts().values())
        return covered and c.isprintable() and (shapes or unicodedata.bidirectional(c) not in ("R", "AL"))

    text = "".join(c if drawn(c) else c.encode("unicode_escape").decode() for c in name)
    first = length * 2 // 3
    return text if len(text) <= length else f"{text[:first]}…{text[len(text) - (length - first - 1) :]}"


def short(number: float) -> str:
    """Of a count: 50, 2,500, 250k, 2.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:,.3g}" if number < 1000 else f"{number:,.0f}"


def logarithmic(axes: Axes, which: str, lowest: float, highest: float, values: Iterable[float] = ()) -> None:
    """A log scale of counts from ``lowest`` to ``highest``: numbers at the ``values`` where there is room, else at round ones."""
    axes.set(**{f"{which}scale": "log", f"{which}lim": (lowest, highest)})
    decades = 10.0 ** np.arange(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    given = np.array(sorted(set(values)))
    roomy = 1 < len(given) <= 8 and (given[1:] / given[:-1]).min() > (highest / lowest) ** 0.1
    rounds = [*(np.outer(decades, steps).ravel() for steps in ((1,), (1, 3), (1, 2, 5))), MaxNLocator(4).tick_values(lowest, highest)]
    inside = ([tick for tick in ticks if lowest <= tick <= highest] for ticks in rounds)
    ticks = given if roomy else next((ticks for ticks in inside if len(ticks) >= 3), [lowest, highest])
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, dashes and marker of each method or run."""
    names = list(names)
    keys = [re.sub(r"\W+", "-", name).strip("-").lower() for name in names]
    fixed = [METHODS.get(ALIASES.get(key, key)) for key in keys]
    if len(names) == 1 and fixed == [None]:
        fixed = [0]
    left = [i for i in range(len(PALETTE)) if i not in fixed] or list(range(len(PALETTE)))
    others, found = 0, {}
    for name, colour in zip(names, fixed, strict=True):
        turn = 0
        if colour is None:
            turn, place = divmod(others, len(left))
            colour, others = left[place], others + 1
        style = {"color": PALETTE[colour], "linestyle": DASHES[turn % len(DASHES)], "marker": MARKERS[turn % len(MARKERS)]}
        found[name] = style
    return found


# ---- class by class


def numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return values.mean() if len(values) else math.nan


def by_size(counts: Sequence[int]) -> np.ndarray:
    """The classes, those with most training images first."""
    return np.argsort(-np.asarray(counts), kind="stable")


def members(counts: Sequence[int], many: int, few: int) -> dict[str, np.ndarray]:
    """The classes of each group that has one."""
    groups = shots(as_tensor(list(counts)), many, few)
    return {name: np.flatnonzero(groups[name].numpy()) for name in GROUPS if groups[name].any()}


def per_class(
    path: Path, counts: list[int], accuracies: dict[str, list[float | None]], classes: list[str] | None, many: int, few: int
) -> None:
    """Accuracy of each class, largest first, one line for each run; its training images above; at the right the means of the groups.

    With many classes a line is a moving mean over their ranks. ``classes`` None: they are not named.
    """
    order, groups, style = by_size(counts), members(counts, many, few), looks(accuracies)
    total, sizes = len(order), np.asarray(counts)[by_size(counts)]
    one_by_one = total <= ONE_BY_ONE
    window = max(5, total // 12) | 1
    named = one_by_one and classes is not None
    names = [shown(classes[c]) for c in order] if named else []
    slanted = max(map(len, names), default=0) * total > 75
    with picture(path, 9.2, 4.4 + 0.045 * slanted * max(map(len, names), default=0)) as figure:
        axes = figure.subplots(
            2, 2, sharex="col", gridspec_kw={"width_ratios": [3.2, 1.1 + 0.12 * len(accuracies)], "height_ratios": [1, 3.2]}
        )
        (above, corner), (main, right) = axes
        corner.axis("off")
        ranks = np.arange(total)
        above.fill_between(np.arange(total + 1) - 0.5, 0.5, np.append(sizes, sizes[-1]), step="post", color=QUIET, linewidth=0)
        logarithmic(above, "y", 0.5, 2 * max(1, sizes[0]))
        above.set(ylabel="training\nimages", xlim=(-0.5 - 0.01 * total, total - 0.5 + 0.01 * total))
        above.tick_params(bottom=False)
        above.grid(axis="x", visible=False)

        lines = {name: numbers(values)[order] for name, values in accuracies.items()}
        for name, row in lines.items():
            if one_by_one:
                main.plot(ranks, row, label=shown(name, 40), **style[name])
                continue
            if len(lines) == 1 and total <= 300:
                main.scatter(ranks, row, s=7, color=style[name]["color"], alpha=0.3, linewidth=0)
            lines[name] = np.array([mean(row[max(0, i - window // 2) : i + window // 2 + 1]) for i in ranks])
            main.plot(ranks, lines[name], label=shown(name, 40), color=style[name]["color"], linestyle=style[name]["linestyle"])
        highest = max((value for row in lines.values() for value in row[np.isfinite(row)]), default=100)
        top = 104 if highest > 60 else max(5, 1.25 * highest)  # from 0 in any case
        title = "test accuracy, %" if one_by_one else f"test accuracy, % (mean over {window} neighbouring classes)"
        main.set(title=title, ylim=(-0.03 * top, top), xlabel="class, by training images" if not named else None)
        main.grid(axis="x", visible=False)
        if named:
            turned = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if total <= 16 else {"rotation": 90, "fontsize": 7}
            main.set_xticks(ranks, names, **(turned if slanted else {}))
        else:
            round_ones = [int(tick) for tick in MaxNLocator(6, integer=True).tick_values(1, total) if total / 12 < tick - 1 < total]
            main.set_xticks([0, *(tick - 1 for tick in round_ones)], [f"{tick:,}" for tick in (1, *round_ones)])
        start = 0
        for name, group in groups.items():
            end = start + len(group)
            for axis in (above, main) if start else ():
                axis.axvline(start - 0.5, color="#9aa1ab", linewidth=0.8, linestyle=(0, (3, 3)))
            if len(group) >= 0.07 * total:
                above.text((start + end - 1) / 2, 1, name, transform=above.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
            start = end

        width = 0.8 / max(1, len(accuracies))
        for i, (name, values) in enumerate(accuracies.items()):
            for place, group in enumerate(groups.values()):
                height = mean(numbers(values)[group])
                if math.isnan(height):
                    continue
                at = place + (i + 0.5) * width - 0.4
                right.bar(at, height, width * 0.92, color=style[name]["color"])
                if len(accuracies) <= 3:
                    right.text(at, height + 0.01 * top, f"{height:.0f}", ha="center", va="bottom", fontsize=8)
        right.set(title="mean of the classes", ylim=(-0.03 * top, top), xlim=(-0.6, len(groups) - 0.4))
        right.set_xticks(range(len(groups)), [f"{name}\n{len(group):,} cl." for name, group in groups.items()])
        right.grid(axis="x", visible=False)
        if len(accuracies) > 1:
            figure.legend(*main.get_legend_handles_labels(), loc="outside upper left", ncols=min(4, len(accuracies)), fontsize=8)


def confusion(path: Path, matrix: Tensor, classes: list[str], counts: list[int], many: int, few: int) -> None:
    """Which classes are taken for which: shares of the true class [C, C]; with many classes, means over ranks and over groups."""
    order, shares = by_size(counts), matrix.float().numpy()
    tested = shares.sum(1) > 0
    if len(classes) <= ONE_BY_ONE:
        _confusion_of_classes(path, shares[np.ix_(order, order)], tested[order], [shown(classes[c]) for c in order])
    else:
        _confusion_of_groups(path, shares, tested, order, members(counts, many, few))


def _heat(axes: Axes, shares: np.ndarray, digits: bool) -> Any:
    """Cells from white to blue, grey where there is nothing to show; zeros are not written."""
    cells = axes.imshow(np.ma.masked_invalid(shares), vmin=0, vmax=max(0.01, np.nanmax(shares, initial=0)), cmap="Blues", aspect="auto")
    axes.set_facecolor(QUIET)  # seen where a cell is missing
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for (i, j), share in np.ndenumerate(shares):
        if digits and share > 0.005:  # rounds to 1 % or more
            dark = share > 0.55 * cells.norm.vmax
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    return cells


def _confusion_of_classes(path: Path, shares: np.ndarray, tested: np.ndarray, names: list[str]) -> None:
    total, longest = len(names), max(map(len, names))
    side = max(2.6, min(7.5, 0.42 * total)) + min(1.6, 0.06 * longest)
    with picture(path, side + 1.0, side + 0.3) as figure:
        axes = figure.add_subplot()
        cells = _heat(axes, np.where(tested[:, None], shares, np.nan), total <= 20)
        upright = longest * total <= 60
        axes.set(xlabel="predicted", ylabel="true", title="% of the true class, largest class first")
        axes.set_xticks(range(total), names, rotation=0 if upright else 90, fontsize=9 if total <= 20 else 7)
        axes.set_yticks(range(total), names, fontsize=9 if total <= 20 else 7)
        figure.colorbar(cells, format=FuncFormatter(lambda value, _: f"{100 * value:.0f} %"), shrink=0.7, aspect=25).outline.set_visible(
            False
        )


def _confusion_of_groups(path: Path, shares: np.ndarray, tested: np.ndarray, order: np.ndarray, groups: dict[str, np.ndarray]) -> None:
    bins = np.array_split(order, min(20, len(order)))
    by_rank, by_group = (np.full((len(sets), len(sets)), np.nan) for sets in (bins, groups))
    by_rank = np.array([[_share(shares, tested, a, b) for b in bins] for a in bins])
    by_group = np.array([[_share(shares, tested, a, b) for b in groups.values()] for a in groups.values()])
    right = np.array([mean(shares[a, a][tested[a]]) for a in groups.values()])
    table = np.column_stack([right, by_group - np.diag(right)])  # within its own group: another class of it
    with picture(path, 9.6, 4.3) as figure:
        left, axes = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]})
        cells = _heat(left, by_rank, False)
        left.set(title=f"% of the true class, {len(order):,} classes in {len(bins)} ranges", xlabel="predicted, rank", ylabel="true, rank")
        firsts = np.cumsum([0, *map(len, bins)])[:-1] + 1
        ticks = range(0, len(bins), 4)
        left.set_xticks(ticks, [f"{firsts[i]:,}" for i in ticks])
        left.set_yticks(ticks, [f"{firsts[i]:,}" for i in ticks])
        bar = figure.colorbar(cells, ax=left, format=FuncFormatter(lambda value, _: f"{100 * value:.0f} %"), shrink=0.8, aspect=25)
        bar.outline.set_visible(False)
        _heat(axes, table, True)
        axes.set(title="where the test images of a group go, %", ylabel="true group")
        axes.set_xticks(range(len(groups) + 1), ["right\nclass", *(f"wrong,\n{name}" for name in groups)])
        axes.set_yticks(range(len(groups)), [f"{name}\n{len(group):,} cl." for name, group in groups.items()])
        axes.axvline(0.5, color="white", linewidth=4)


def _share(shares: np.ndarray, tested: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """The mean over the tested classes among ``rows`` of what goes to ``columns``."""
    rows = rows[tested[rows]]
    return shares[np.ix_(rows, columns)].sum(1).mean() if len(rows) else math.nan


# ---- embeddings


def embedding(path: Path, embeddings: Tensor, labels: Tensor, classes: list[str], counts: list[int], limit: int = 1500) -> None:
    """t-SNE of the unit embeddings of (at most ``limit``) test images, by class; their principal components where they are few.

    Of more than 10 classes, the largest and the smallest that were tested are coloured.
    """
    finite = embeddings.isfinite().all(1)
    points, of = embeddings[finite].float().numpy(), labels[finite].numpy()
    order, present = by_size(counts), np.bincount(of, minlength=len(classes)) > 0
    order = [int(c) for c in order if present[c]]
    coloured = order if len(order) <= 10 else order[:4] + order[-4:]
    shuffled = np.random.default_rng(0).permutation(len(of))
    if len(order) > 10:  # of each coloured class so many as leave half of the points to the others
        first = np.concatenate([shuffled[of[shuffled] == c][: limit // 16] for c in coloured])
        shuffled = np.concatenate([first, np.setdiff1d(shuffled, first, assume_unique=True)[: limit - len(first)]])
        shuffled = np.random.default_rng(0).permutation(shuffled)
    chosen = shuffled[:limit]
    points, of = points[chosen], of[chosen]
    plane, how = _plane(points)
    with picture(path, 6.6, 4.6) as figure:
        axes = figure.add_subplot()
        every, others = len(order) <= 10, ~np.isin(of, coloured)
        grey = axes.scatter(*plane[others].T, s=5, color=QUIET, linewidth=0, label=f"{len(order) - len(coloured):,} other classes")
        heading = Line2D([], [], linestyle="", label="smallest classes")
        entries = []
        for i, c in enumerate(coloured):
            here = of == c
            size = 9 if every else max(13, min(45, 500 / here.sum()))
            style = {"marker": "o" if every or i < 4 else "^", "color": PALETTE[i], "label": f"{shown(classes[c])} ({short(counts[c])})"}
            entries.append(axes.scatter(*plane[here].T, s=size, linewidth=0, **style))
        if not every:
            entries = [*entries[:4], heading, *entries[4:], grey]
        axes.legend(
            handles=entries, title="class (training images)" if every else "largest classes (training images)", alignment="left",
            loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, title_fontsize=8.5, handletextpad=0.3,
            markerscale=1.8 if every else 1, borderpad=0,
        )  # fmt: skip
        axes.set(xticks=[], yticks=[], title=f"{how} of the embeddings of {len(of):,} test images")
        axes.spines[:].set_visible(False)


def _plane(points: np.ndarray) -> tuple[np.ndarray, str]:
    """[N, 2], and what it shows."""
    centred = points.astype(np.float64) - (points.mean(0) if len(points) else 0)
    if len(points) == 0:
        return np.zeros((0, 2)), "No finite embedding: nothing"
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    plane = np.zeros((len(points), 2))
    plane[:, : len(axes)] = centred @ axes.T
    spread = plane[:, 0].std()
    if len(points) < 50 or spread < 1e-6:  # t-SNE divides by the distances
        return plane, "PCA"
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    # At scikit-learn's own learning rate, about 50 for so few points, points without clusters may shrink into one.
    options = {"init": (plane / spread * 1e-4).astype(np.float32), "learning_rate": 200, "random_state": 0, "max_iter": 500}
    with threadpool_limits(1):  # on a machine that is busy with other runs more threads wait for each other, many times as long
        found = TSNE(2, perplexity=min(30, len(points) / 4), **options).fit_transform(points)
    return (found, "t-SNE") if np.isfinite(found).all() and found.std() > 1e-2 else (plane, "PCA")


# ---- over the epochs

CURVES: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "feature loss": [
        ("chance", "all similarities equal", {"color": INK, "linestyle": ":"}),
        ("feature_loss", "training", {"color": PALETTE[0]}),
    ],
    "classifier's loss": [("classifier_loss", "training", {"color": PALETTE[6]})],
    "accuracy, %": [
        ("train_accuracy", "training batches", {"color": PALETTE[8]}),
        ("validation_balanced", "validation, balanced", {"color": PALETTE[3]}),
        ("test_balanced", "test, balanced (chooses nothing)", {"color": PALETTE[2]}),
    ],
    "α, weight of the features": [("alpha", "", {"color": PALETTE[0]})],
    "learning rate": [("lr", "", {"color": PALETTE[5]})],
}


def curves(path: Path, history: list[dict[str, Any]]) -> None:
    """What the log holds of each epoch, one panel for each kind of thing."""

    def rows(key: str) -> list[tuple[float, float]]:
        return [(row["epoch"], row[key]) for row in history if row.get(key) is not None and math.isfinite(row[key])]

    panels = {title: [line for line in lines if rows(line[0])] for title, lines in CURVES.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    height = math.ceil(len(panels) / columns)
    with picture(path, 3.2 * columns, 2.5 * max(1, height)) as figure:
        grid = figure.subplots(max(1, height), columns, squeeze=False).flat
        for axes in grid[len(panels) :]:
            axes.axis("off")
        for axes, (title, lines) in zip(grid, panels.items(), strict=False):
            for key, label, style in lines:
                found = rows(key)
                axes.plot(*zip(*found, strict=True), marker="o" if len(found) <= 12 else None, markersize=3, label=label, **style)
            axes.set(title=title, xlabel="epoch")
            axes.set_xlim(history[0]["epoch"] - max(0.5, 0.03 * len(history)), history[-1]["epoch"] + max(0.5, 0.03 * len(history)))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.margins(y=0.12)
            if title.startswith("α"):
                axes.set_ylim(-0.05, 1.05)
            if title == "learning rate":
                axes.set_ylim(bottom=0)
            if len(lines) > 1:
                axes.legend(fontsize=7.5, borderpad=0.2)


# ---- several runs


def comparison(path: Path, groups: dict[str, dict[str, list[float]]]) -> None:
    """A row for each method, a panel for each figure (balanced, many, ...): its seeds, their mean and standard deviation, in percent."""
    figures = list(dict.fromkeys(figure for values in groups.values() for figure in values))
    names, style = list(groups), looks(groups)
    with picture(path, 2.2 * max(1, len(figures)) + 1.6, 0.9 + 0.36 * len(names)) as figure:
        panels = figure.subplots(1, max(1, len(figures)), sharey=True, squeeze=False)[0]
        for axes, title in zip(panels, figures, strict=False):
            axes.set(title=f"{title}, %", ylim=(len(names) - 0.4, -0.6))
            for row, name in enumerate(names):
                if not (values := groups[name].get(title)):
                    axes.text(0.02, row, "–", transform=axes.get_yaxis_transform(), va="center")
                    continue
                centre, colour = statistics.mean(values), style[name]["color"]
                spread = statistics.stdev(values) if len(values) > 1 else 0
                axes.scatter(values, [row] * len(values), s=10, color=colour, alpha=0.35, linewidth=0)
                axes.errorbar(centre, row, xerr=spread or None, color=colour, marker=style[name]["marker"], markersize=5.5, linewidth=1.6)
                axes.annotate(f"{centre:.1f}", (centre, row), (0, 5), textcoords="offset points", ha="center", va="bottom", fontsize=7.5)
            axes.margins(x=0.18)
            axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
            axes.grid(axis="y", visible=False)
            axes.spines["left"].set_visible(False)
            axes.tick_params(left=False)
        panels[0].set_yticks(range(len(names)), [shown(name, 30) for name in names])


def over_budget(path: Path, series: dict[str, list[tuple[int, int, float]]]) -> None:
    """Balanced accuracy over images (left) and over updates (right), both on log axes, a line for each method.

    ``series`` has (images, updates, accuracy in percent) of each run: those of equal images and updates are the seeds of one point. The
    line goes through their means, the band from the least to the largest.
    """
    for name, runs in series.items():
        if bad := [run for run in runs if not (run[0] > 0 and run[1] > 0 and math.isfinite(run[2]))]:
            raise ValueError(f"series must hold positive images and updates and finite accuracies, got {bad[0]} of {name!r}")
    series = {name: runs for name, runs in series.items() if runs}
    if not series:
        raise ValueError("series must hold a run, got none")
    style = looks(series)
    height = max(4.3, 1.2 + 0.19 * len(series))
    with picture(path, 10.6, height) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        ends = [_over(axes, which, series, style) for which, axes in enumerate(panels)]
        panels[0].set(xlabel="images through the network", title="balanced test accuracy, %")
        panels[1].set(xlabel="updates")
        panels[1].tick_params(labelleft=True)
        for axes, of_panel in zip(panels, ends, strict=True):
            _label_ends(axes, of_panel, {name: look["color"] for name, look in style.items()}, 0.17 / (height - 0.8))


def _over(axes: Axes, which: int, series: dict[str, list[tuple[int, int, float]]], style: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The lines over images (``which`` 0) or updates (1); where each ends."""
    ends = {}
    for name, runs in series.items():
        points: dict[tuple[int, int], list[float]] = {}
        for run in sorted(runs, key=lambda run: run[which]):
            points.setdefault(run[:2], []).append(run[2])
        x, y = [point[which] for point in points], [statistics.mean(values) for values in points.values()]
        low, high = list(map(min, points.values())), list(map(max, points.values()))
        axes.fill_between(x, low, high, color=style[name]["color"], alpha=0.15, linewidth=0)
        if len(x) == 1:  # of one point a band has no width
            axes.vlines(x, low, high, color=style[name]["color"], alpha=0.5)
        axes.plot(x, y, **style[name])
        ends[name] = x[-1], y[-1]
    every = [run[which] for runs in series.values() for run in runs]
    logarithmic(axes, "x", min(every) / 1.15, max(every) * 1.15, every)
    return ends


def _label_ends(axes: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, str], gap: float) -> None:
    """The lines' names in the margin, each as near its line's end as the others allow, which are ``gap`` of the axes' height away."""
    from sklearn.isotonic import isotonic_regression

    names = sorted(ends, key=lambda name: ends[name][1])
    low, high = axes.get_ylim()
    gaps = gap * (high - low) * np.arange(len(names))
    places = isotonic_regression([ends[name][1] for name in names] - gaps, y_min=low, y_max=max(low, high - gaps[-1])) + gaps
    for name, place in zip(names, places, strict=True):
        at, colour = ends[name], colours[name]
        link = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
        options = {"textcoords": axes.get_yaxis_transform(), "va": "center", "ha": "left", "annotation_clip": False, "fontsize": 8.5}
        axes.annotate(shown(name, 26), at, (1.04, place), arrowprops=link, color=darker(colour), **options)


def darker(colour: str) -> str:
    """For letters, which need more contrast with the white than a line."""
    return to_hex(0.72 * np.array(to_rgb(colour)))
