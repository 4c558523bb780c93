"""Tables of runs: methods, budgets, ablations, sweeps. Each is one folder with results.md, results.json and pictures.

    python train/tables.py methods                        # digits: every method, at equal images and at equal updates
    python train/tables.py ablation                       # digits: samplers, losses of each branch, schedules, parts of ours
    python train/tables.py budget --root D --jobs 6       # CIFAR-10-LT (JPEG copies): accuracy over images and over updates
    python train/tables.py cifar10 --root D               # its shortened form for a CPU
    python train/tables.py sweep --set lr 0.05 0.1 0.2 --set batch 32 64 --method hybrid-psc

A table that was interrupted goes on where it stopped, each run from its last epoch. On digits every seed has its own split into training
pool and test set. ``--jobs`` trains so many runs at the same time, on one GPU or on the CPU's cores.
"""

from __future__ import annotations

import packages

if __name__ == "__main__":
    packages.start("python train/tables.py")

import contextlib
import itertools
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import checkpoint
import compare
import data as datasets
import hybrid
import plots
import processes
import reported
import settings
import side_by_side
import terminal
import tyro
from errors import TOLD
from methods import METHODS, passes
from settings import Config

Settings = dict[str, Any]
Results = dict[str, dict[str, list[dict[str, Any]]]]  # by title and row, a run for each seed


@dataclass(frozen=True)
class Table:
    """Rows of settings, the rows that the others are compared with, and what holds of all of them."""

    title: str
    rows: dict[str, Settings]
    against: tuple[str, ...] = ()
    common: Settings = field(default_factory=dict)


#: What every table of methods holds, beside its own: the paper's claim is tested against these.
BASELINES = ("ce", "ce-balanced", "logit-adjustment")
COMPARED = (*BASELINES, "hybrid-sc", "hybrid-psc", "ours")


def rows(*methods: str, **common: Any) -> dict[str, Settings]:
    return {method: {"method": method, **common} for method in methods}


def budget_rows(images: int, **common: Any) -> dict[str, Settings]:
    """The methods compared, BCL, and logit adjustment on the batches of ours, which ours has a contrastive loss more than.

    From 620,300 images on CIFAR-10-LT these batches are the instance-balanced ones of logit adjustment itself.
    """
    found = rows(*COMPARED, "bcl", images=images, **common)
    if images < 620_300:
        found["logit-adjustment, budgeted"] = {"method": "logit-adjustment", "sampler": "budgeted", "images": images, **common}
    return found


# On digits 160 epochs of 5 steps of 64 images are 51,200 images; a method that takes more of each batch has fewer epochs or more images.
METHOD_TABLES = [
    Table("Equal images", rows(*METHODS, images=51_200), BASELINES[::2]),
    Table("Equal updates", rows(*COMPARED, epochs=80), BASELINES[::2]),
]

BALANCED_SOFTMAX = {"sampler": "instance", "logit_adjustment": 1.0}
OURS = {"method": "ours", "images": 51_200}
ROOTS = {"feature_sampler": "square-root", "sampler": "square-root"}
RULES = ("class-balanced", "instance", "square-root", "reverse")
SCHEDULES = ("parabolic-decay", "linear", "cosine", "constant", "parabolic-increment", "beta", "switch")
ABLATION_TABLES = [
    Table("Sampler of the classifier", {rule: {"sampler": rule} for rule in RULES}, RULES[:1]),
    Table("Sampler of the feature branch", {rule: {"feature_sampler": rule} for rule in (RULES[1], RULES[0], *RULES[2:])}, RULES[1:2]),
    Table(
        "Losses",
        {
            "SC + CE": {},
            "PSC + CE": {"method": "hybrid-psc"},
            "MPSC (4) + CE": {"method": "hybrid-mpsc"},
            "none + CE": {"method": "ce-balanced"},
            "SC + balanced softmax": BALANCED_SOFTMAX,
            "PSC + balanced softmax": {"method": "hybrid-psc", **BALANCED_SOFTMAX},
            "none + balanced softmax": {"method": "ce", **BALANCED_SOFTMAX},
        },
        ("SC + CE",),
    ),
    Table("Schedule of α", {name: {"schedule": name} for name in SCHEDULES}, SCHEDULES[:1]),
    Table(
        "Parts of ours",
        {
            "ours": OURS,
            "without SupCon": OURS | {"method": "logit-adjustment"},
            "SupCon of two views": OURS | {"feature_loss": "sc"},
            "SupCon × 0.25": OURS | {"loss_weights": (0.25, 1.0)},
            "SupCon × 1": OURS | {"loss_weights": (1.0, 1.0)},
            "τ = 0.1": OURS | {"temperature": 0.1},
            "square-root batches": OURS | ROOTS,
        },
        ("ours", "without SupCon"),
    ),
]

# A CIFAR network and batches for a CPU.
SHORT = {
    "data": "cifar10-jpeg", "network": "resnet8", "batch": 64, "lr": 0.1, "milestones": (), "warmup": 0.05,
    "nesterov": True, "weight_decay": 5e-4,
}  # fmt: skip
CIFAR10_TABLES = [Table(f"{images:,} images", budget_rows(images, **SHORT), BASELINES[::2]) for images in (125_000, 250_000)]

# The paper's network and batch; with a warm-up, without which cross-entropy at this lr stays at chance for hundreds of updates.
PAPER = {"data": "cifar10-jpeg", "warmup": 0.05}
BUDGETS = (125_000, 250_000, 500_000, 1_000_000, 2_500_000)
BUDGET_TABLES = [Table(f"{images:,} images", budget_rows(images, **PAPER), BASELINES[::2]) for images in BUDGETS]


@dataclass(frozen=True)
class Given:
    table: tyro.conf.Positional[Literal["methods", "ablation", "cifar10", "budget", "sweep"]]
    data: str = "digits"  # for sweep
    method: str = "hybrid-sc"  # for sweep
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()  # for sweep: a setting and its values; several: their grid
    only: tuple[str, ...] | None = None  # of the table's rows; None: all
    seed: int = 100
    seeds: int = 6
    root: Path | None = None  # of the data, for cifar10 and budget
    out: Path | None = None  # None: runs/TABLE
    jobs: int = 1  # runs at the same time
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    threads: int = 1  # of each run
    shorten: float = 1.0  # times the epochs, for a quick look


FIXED = ("root", "device", "precision", "compile", "threads", "pictures", "seed", "data_seed", "out", "seeds", "against", "jobs")
TABLES = {"methods": METHOD_TABLES, "ablation": ABLATION_TABLES, "cifar10": CIFAR10_TABLES, "budget": BUDGET_TABLES}


def value_of(name: str, text: str) -> Any:
    """What the command line would make of ``--name text``; where it takes several values, these have commas between them."""
    kinds = {n: kind for group in settings.GROUPS for n, kind in typing.get_type_hints(type(getattr(Config(), group))).items()}
    if name in FIXED:
        raise ValueError(f"set must not name {name}, which is the same in all runs of a sweep or has a flag of its own")
    kind = kinds.get(name, str)
    if several := typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if text == "None":
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    kind = str if typing.get_origin(kind) is Literal else kind
    try:
        values = tuple(
            {"True": True, "False": False}[one] if kind is bool else kind(one) for one in (text.split(",") if several else [text])
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"set {name} must be of type {kind.__name__}, got {text!r}") from error
    return values if several else values[0]


def tables_of(given: Given) -> list[Table]:
    for name in ("seeds", "jobs", "shorten"):
        if not 0 < getattr(given, name) < math.inf:
            raise ValueError(f"{name} must be positive, got {getattr(given, name)}")
    if given.table != "sweep":
        if given.set or given.data != "digits" or given.method != "hybrid-sc":
            raise ValueError(f"set, data and method act on table 'sweep' alone, got table {given.table!r}")
        return TABLES[given.table]
    if not given.set:
        raise ValueError("set must name a setting and its values for table 'sweep', got none")
    axes = {}
    for name, *values in given.set:
        if not values or name in axes or len(set(values)) < len(values):
            raise ValueError(f"set must name {name} once, with values that differ, got {' '.join(values) or 'none'}")
        axes[name] = [value_of(name, text) for text in values]
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    named = {", ".join(f"{name} {value}" for name, value in one.items()): one for one in grid}
    return [Table(f"{given.method} on {given.data}", named, common={"data": given.data, "method": given.method})]


def configure(given: Given, table: Table, row: Settings, seed: int, out: Path) -> Config:
    """The run of a row and a seed. ``images`` in a row is how many are to go through the network, and gives the epochs."""
    chosen = {"data": "digits", "method": "hybrid-sc", **table.common, **row}
    data, method, images = chosen.pop("data"), chosen.pop("method"), chosen.pop("images", None)
    datasets.check_root(data, given.root)
    recipe = settings.recipe(data, method)
    base = settings.refuse_idle(settings.change(recipe, **chosen, root=given.root), recipe)
    if images is not None:
        batch = base.optimiser.batch
        of_epoch = max(1, len(hybrid.checked_data(base.images).train) // batch) * batch
        base = settings.change(base, epochs=round(images / (of_epoch * passes(base.method))))
    machine = {"device": given.device, "precision": given.precision, "compile": given.compile, "threads": given.threads}
    epochs = max(1, round(given.shorten * base.optimiser.epochs))
    if given.table != "sweep":  # which may set how often, and whose data may have validation images, that choose among the evaluations
        base = settings.change(base, eval_every=epochs)
    records = {"pictures": False, "seed": seed, "data_seed": seed if data == "digits" else 0, "out": out}
    return settings.checked(settings.change(base, epochs=epochs, **machine, **records))


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()


def planned(given: Given, tables: list[Table], out: Path) -> list[tuple[str, str, Config]]:
    """Title, row and settings of each run."""
    every = {name: None for table in tables for name in table.rows}
    if given.only is not None and (not given.only or not every.keys() >= set(given.only)):
        raise ValueError(f"only must be among {', '.join(every)}, got {', '.join(given.only) or 'none'}")
    runs = []
    for table in tables:
        for seed in range(given.seed, given.seed + given.seeds):
            for name, row in table.rows.items():
                if given.only is None or name in given.only:
                    folder = out / slug(table.title) / slug(name) / f"seed-{seed}"
                    runs.append((table.title, name, configure(given, table, row, seed, folder)))
    return runs


def fill(given: Given) -> Results:
    if processes.launched():
        raise ValueError("tables.py must be started once, by python: under torchrun each process would write the same tables")
    out, tables = given.out or Path("runs") / given.table, tables_of(given)
    rows_of: dict[Config, list[tuple[str, str, Config]]] = {}  # a run that is in several tables is trained once, in its first folder
    for one in planned(given, tables, out):
        rows_of.setdefault(settings.change(one[2], out=None), []).append(one)
    runs = list(rows_of.values())
    out.mkdir(parents=True, exist_ok=True)
    results: Results = {table.title: {} for table in tables}
    trained = side_by_side.trained([config for (_, _, config), *_ in runs], given.jobs, hybrid.metrics_of)
    with terminal.progress_bar() as progress, contextlib.closing(trained), contextlib.ExitStack() as at_the_end:
        at_the_end.callback(draw, out, given, tables, results)  # also of what there is when it is interrupted
        bar = progress.add_task(str(out), total=len(runs), text="")
        for number, metrics in trained:
            for title, name, _ in runs[number]:
                results[title].setdefault(name, []).append(metrics)
            title, name, config = runs[number][0]
            said = f"{title}: {name}, seed {config.records.seed}: {metrics['best']['balanced']:.1f}"
            progress.update(bar, advance=1, text=said)
            if not terminal.console.is_interactive:
                terminal.say(said)
            write(out, given, tables, results)
    return results


def groups_of(table: Table, results: Results) -> dict[str, list[dict[str, Any]]]:
    """The rows in their order, and the seeds in theirs."""
    return {name: sorted(runs, key=compare.seed) for name in table.rows if (runs := results[table.title].get(name))}


def draw(out: Path, given: Given, tables: list[Table], results: Results) -> None:
    for table in tables:
        if groups := groups_of(table, results):
            compare.draw(out / slug(table.title), groups)
    runs = [(name, run) for groups in results.values() for name, one in groups.items() for run in one]
    if given.table in ("budget", "cifar10") and runs:
        plots.over_budget(out / "budget.png", compare.budgets(runs))


def write(out: Path, given: Given, tables: list[Table], results: Results) -> None:
    """After every run: a table that was interrupted is there as far as it came."""
    text, kept = [], {}
    for table in tables:
        groups = groups_of(table, results)
        kept[table.title] = {name: [figures_of(run) for run in runs] for name, runs in groups.items()}
        if groups:
            against = [name for name in table.against if name in groups]
            text.append(f"### {table.title}\n\n{compare.table(groups, against, reported_of(groups) or None)}\n")
    environment = checkpoint.environment(
        processes.device(given.device if given.device != "auto" else settings.checked(Config()).machine.device)
    )
    versions = f"torch {environment['packages']['torch']}, commit {environment['git_commit']}, {environment['date']}"
    text.append(f"`{environment['command']}`, {environment['device']}, {given.threads} thread(s) a run, {given.jobs} at a time, {versions}")
    checkpoint.write_json(out / "results.json", {"environment": environment, "tables": kept})
    checkpoint.write_text(out / "results.md", "\n".join(text) + "\n")


def reported_of(groups: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """What others report of a row's method on this data, where they do: the first figure of the list."""
    found = {}
    for name, runs in groups.items():
        config = runs[0]["config"]
        if figures := reported.reported(config["method"]["method"], config["images"]["data"], config["images"]["imbalance"]):
            found[name] = f"{figures[0].accuracy:g} ({figures[0].of})"
    return found


def figures_of(run: dict[str, Any]) -> dict[str, Any]:
    kept = ("updates", "images", "seconds", "split", "train_images")
    return {"seed": compare.seed(run), **{name: run[name] for name in kept}, "config": run["config"], **run["best"]}


if __name__ == "__main__":
    try:
        fill(tyro.cli(Given, description=__doc__))
    except TOLD as error:
        raise SystemExit(f"error: {terminal.printable(str(error))}") from None
