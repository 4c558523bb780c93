"""Several runs in one table and one picture.

    python train/compare.py runs/A runs/B runs/C --out runs/comparison
    python train/compare.py runs/* --over-budget        # a picture of accuracy over images and updates, a line for each method

A run is a folder with metrics.json, or one with seed-*/metrics.json of several seeds. Differences are paired: by seed, to the first run.
"""

from __future__ import annotations

import packages

if __name__ == "__main__":
    packages.start("python train/compare.py")

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoint
import plots
import tyro
from data import describe_difference
from terminal import Rows, console, printable, say, show_rows, spread

# What is shown of a run's metrics, where one of the runs has it.
FIGURES = {
    "balanced": "balanced",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "worst": "worst class",
    "top5": "top-5",
    "calibration_error": "ECE",
    "knn_features": "kNN, features",
    "knn_embeddings": "kNN, embeddings",
}
Run = dict[str, Any]  # what metrics.json holds


def paths_of(folder: Path) -> list[Path]:
    """The metrics.json of a run, or of each seed."""
    paths = [folder / "metrics.json"] if (folder / "metrics.json").is_file() else sorted(folder.glob("seed-*/metrics.json"))
    if not paths:
        what = "is the run finished?" if folder.exists() else "there is no such folder"
        raise FileNotFoundError(f"{folder} must hold metrics.json or seed-*/metrics.json: {what}")
    return paths


def read_runs(folder: Path) -> list[Run]:
    """The metrics of a run, one for each seed."""
    paths = paths_of(folder)
    runs = [checkpoint.read_json(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        config = run.get("config") if isinstance(run, dict) else None
        if not isinstance(config, dict) or not isinstance(config.get("images"), dict):
            raise ValueError(
                f"{path} must hold settings in groups (images, method, records), got those of an earlier version: train it again"
            )
    return runs


def refuse_unlike_data(folders: Sequence[Path]) -> None:
    """Runs whose tails were drawn by one data_seed must be on the same images, and all runs on as many of the same classes."""
    drawn: dict[int | None, tuple[Path, dict[str, Any]]] = {}
    for path in (path for folder in folders for path in paths_of(folder) if (path.parent / "data.json").is_file()):
        data = checkpoint.read_json(path.parent / "data.json")
        numbers = {"classes": data["classes"], "split": None} | {part: _numbers(data[part]) for part in ("train", "validation", "test")}
        data_seed = checkpoint.read_json(path)["config"]["images"]["data_seed"]
        for key, fingerprint in ((None, numbers), (data_seed, data)):
            first, was = drawn.setdefault(key, (path.parent, fingerprint))
            if told := describe_difference(was, fingerprint):
                raise ValueError(f"runs must be on the same data, and {path.parent} is on other than {first}: {'; '.join(told)}")


def _numbers(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a split's fingerprint, how many images each class has."""
    return part and {"images": part["images"], "counts": part["counts"], "digests": [""] * len(part["counts"])}


def seed(run: Run) -> int:
    return run["config"]["records"]["seed"]


def paired(runs: Sequence[Run], reference: Sequence[Run], figure: str = "balanced") -> list[float]:
    """Differences seed by seed; none unless both ran the same seeds and have the figure."""
    ours, theirs = ({seed(run): run["best"].get(figure) for run in group} for group in (runs, reference))
    for group in (runs, reference):
        if len(seeds := sorted(map(seed, group))) != len(set(seeds)):
            raise ValueError(f"runs must be of one seed each, got seeds {', '.join(map(str, seeds))}")
    if ours.keys() != theirs.keys() or None in ours.values() or None in theirs.values():
        return []
    return [ours[one] - theirs[one] for one in ours]


def won(differences: Sequence[float]) -> str:
    """Mean ± standard deviation, and at how many seeds the difference is positive: +1.2 ± 0.4 (6/6)."""
    return f"{spread(differences, '{:+.1f}')} ({sum(d > 0 for d in differences)}/{len(differences)})" if differences else "–"


BRIEF = ("balanced", "few", "worst")


def rows(
    groups: Mapping[str, Sequence[Run]], against: Sequence[str], reported: Mapping[str, str] | None = None, *, brief: bool = False
) -> Rows:
    """A header, then a row for each group of runs: test accuracies in percent, differences of balanced accuracy to the groups ``against``.

    ``reported`` is what others found, by group, as it is to be shown. In brief there are BRIEF and the differences alone.
    """
    for option, names in (("against", against), ("reported", reported or {})):
        if missing := [name for name in names if name not in groups]:
            raise ValueError(f"{option} must name groups among {', '.join(groups)}, got {', '.join(missing)}")
    every = [run for runs in groups.values() for run in runs]
    shown = BRIEF if brief else tuple(FIGURES)
    figures = {key: FIGURES[key] for key in shown if any(run["best"].get(key) is not None for run in every)}
    costs = () if brief else ("updates", "images")
    titles, theirs = list(figures.values()), [] if reported is None else ["reported"]
    found = [["", *costs, *titles[:1], *theirs, *titles[1:], *(f"− {name}" for name in against), *([] if brief else ["s a run"])]]
    for name, runs in groups.items():
        ours = [spread([run["best"].get(figure) for run in runs]) for figure in figures]
        differences = ["" if name == other else won(paired(runs, groups[other])) for other in against]
        cost = [_one_or_range([run[key] for run in runs]) for key in costs]
        seconds = [] if brief else [f"{statistics.mean(run['seconds'] for run in runs):.0f}"]
        said = [] if reported is None else [reported.get(name, "–")]
        found.append([name, *cost, *ours[:1], *said, *ours[1:], *differences, *seconds])
    return found


def _one_or_range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if len(set(values)) == 1 else f"{min(values):,} … {max(values):,}"


def markdown(found: Rows) -> str:
    lines = [found[0], ["---"] + ["---:"] * (len(found[0]) - 1), *found[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def table(groups: Mapping[str, Sequence[Run]], against: Sequence[str], reported: Mapping[str, str] | None = None) -> str:
    """:func:`rows` as Markdown."""
    return markdown(rows(groups, against, reported))


# ---- pictures


def draw(out: Path, groups: Mapping[str, Sequence[Run]]) -> None:
    """comparison.png: the figures, with each seed; per_class.png: the mean over seeds, class by class, where all have the same classes."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        name: {figure: [run["best"].get(figure) for run in runs] for figure in ("balanced", "many", "medium", "few")}
        for name, runs in groups.items()
    }
    known = {name: {figure: v for figure, v in found.items() if None not in v} for name, found in figures.items()}
    plots.comparison(out / "comparison.png", known)
    first = next(iter(groups.values()))[0]
    if all(run["train_images"] == first["train_images"] for runs in groups.values() for run in runs):
        by_class = {name: zip(*(run["best"]["per_class"] for run in runs), strict=True) for name, runs in groups.items()}
        means = {name: [None if None in seeds else statistics.mean(seeds) for seeds in classes] for name, classes in by_class.items()}
        images = first["config"]["images"]
        plots.per_class(out / "per_class.png", first["train_images"], means, None, images["many"], images["few"])


def budgets(runs: Iterable[tuple[str, Run]]) -> dict[str, list[tuple[int, int, float]]]:
    """What :func:`plots.over_budget` draws, by the name that each run has."""
    series: dict[str, list[tuple[int, int, float]]] = {}
    for name, run in runs:
        series.setdefault(name, []).append((run["images"], run["updates"], run["best"]["balanced"]))
    return series


@dataclass
class Compare:
    runs: tyro.conf.Positional[list[Path]]
    out: Path = Path("runs/comparison")
    names: list[str] = field(default_factory=list)  # one for each run; none: the folders' names
    over_budget: bool = False  # also accuracy over images and updates, where runs of one method are the points of one line


def main(options: Compare) -> None:
    try:
        compare(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {printable(str(error))}") from None


def compare(options: Compare) -> None:
    if not options.runs:
        raise ValueError("runs must name at least one folder")
    if len({folder.resolve() for folder in options.runs}) != len(options.runs):
        raise ValueError(f"runs must name each folder once, got {', '.join(map(str, options.runs))}")
    names = options.names or [folder.name for folder in options.runs]
    if len(names) != len(options.runs) or len(set(names)) != len(names):
        raise ValueError(f"names must be {len(options.runs)} different ones, got {', '.join(names)}: give --names")
    if (options.out / "config.json").exists():
        raise ValueError(f"out {options.out} is a run's folder, whose pictures would be written over: name another")
    groups = {name: read_runs(folder) for name, folder in zip(names, options.runs, strict=True)}
    every = [run for runs in groups.values() for run in runs]
    if len(data := {run["config"]["images"]["data"] for run in every}) > 1:
        raise ValueError(f"runs must be of one data set, got {', '.join(sorted(data))}")
    refuse_unlike_data(options.runs)
    found = rows(groups, against=names[:1] if len(names) > 1 else [])
    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(options.out / "comparison.md", markdown(found) + "\n")
    draw(options.out, groups)
    if options.over_budget:
        plots.over_budget(options.out / "over_budget.png", budgets((run["config"]["method"]["method"], run) for run in every))
    show_rows(console, found, "test, %")
    say(f"written to {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Compare, description=__doc__))
