"""Several runs in one table and one picture.

    python train/compare.py runs/A runs/B runs/C --out runs/comparison

A run is a folder with metrics.json, or one with seed-*/metrics.json of several seeds. Differences are paired: by seed, to the first run.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoint
import plots
import tyro

FIGURES = {"balanced": "balanced", "many": "many", "medium": "medium", "few": "few", "worst": "worst class", "calibration_error": "ECE"}


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, one for each seed."""
    paths = [folder / "metrics.json"] if (folder / "metrics.json").is_file() else sorted(folder.glob("seed-*/metrics.json"))
    if not paths:
        raise FileNotFoundError(f"{folder} must hold metrics.json or seed-*/metrics.json: is the run finished?")
    return [json.loads(path.read_text()) for path in paths]


def spread(values: list[float | None], form: str = "{:.1f}") -> str:
    """mean ± standard deviation over seeds (n - 1)."""
    if not values or None in values:
        return "–"
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def paired(runs: list[dict], reference: list[dict], figure: str = "balanced") -> list[float]:
    """Differences seed by seed; none unless both ran the same seeds."""
    ours, theirs = ({run["config"]["seed"]: run["best"][figure] for run in group} for group in (runs, reference))
    return [ours[seed] - theirs[seed] for seed in ours] if ours.keys() == theirs.keys() else []


def table(groups: dict[str, list[dict]], against: list[str]) -> str:
    """Markdown: a row for each group of runs, test accuracies in percent, differences of balanced accuracy to the groups ``against``."""
    header = ["", "updates", "images", *FIGURES.values(), *(f"− {name}" for name in against), "s a run"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, runs in groups.items():
        figures = [spread([run["best"][figure] for run in runs]) for figure in FIGURES]
        differences = ["" if name == other else spread(paired(runs, groups[other]), "{:+.1f}") for other in against]
        cost = [f"{runs[0]['updates']:,}", f"{runs[0]['images']:,}"]
        rows.append([name, *cost, *figures, *differences, f"{statistics.mean(run['seconds'] for run in runs):.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(out: Path, groups: dict[str, list[dict]]) -> None:
    """comparison.png: shots as bars with spread; per_class.png: the mean over seeds, class by class."""
    bars = {}
    for name, runs in groups.items():
        values = {figure: [run["best"][figure] for run in runs] for figure in ("balanced", "many", "medium", "few")}
        bars[name] = {
            figure: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for figure, v in values.items() if None not in v
        }
    plots.comparison(out / "comparison.png", bars)
    counts = next(iter(groups.values()))[0]["train_images"]
    if all(run["train_images"] == counts for runs in groups.values() for run in runs):
        by_class = {name: zip(*(run["best"]["per_class"] for run in runs), strict=True) for name, runs in groups.items()}
        means = {name: [None if None in seeds else statistics.mean(seeds) for seeds in classes] for name, classes in by_class.items()}
        plots.per_class(out / "per_class.png", counts, means)


@dataclass
class Compare:
    runs: tyro.conf.Positional[list[Path]]
    out: Path = Path("runs/comparison")
    names: list[str] = field(default_factory=list)  # one for each run; none: the folders' names


def main(options: Compare) -> None:
    if not options.runs:
        raise SystemExit("error: runs must name at least one folder")
    names = options.names or [folder.name for folder in options.runs]
    if len(set(names)) != len(options.runs):
        raise SystemExit(f"error: names must be {len(options.runs)} different ones, got {names}: give --names")
    try:
        groups = {name: read_runs(folder) for name, folder in zip(names, options.runs, strict=True)}
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    if len(data := {run["config"]["data"] for runs in groups.values() for run in runs}) > 1:
        raise SystemExit(f"error: runs must be of one data set, got {', '.join(sorted(data))}")
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(groups, against=names[:1])
    checkpoint.write_text(options.out / "comparison.md", text + "\n")
    draw(options.out, groups)
    print(text)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Compare, description=__doc__))
