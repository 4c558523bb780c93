"""Grids of runs, each written as one table (results.md), one picture and all figures (results.json).

    python train/ablate.py methods            # digits: baselines and hybrids, at equal images and at equal updates
    python train/ablate.py ablation           # digits: samplers, losses of each branch, schedules
    python train/ablate.py cifar10 --root D   # CIFAR-10 (JPEG copies), long-tailed 5000 ... 50, shortened for one CPU core

On digits every seed has its own split into training pool and test set. A grid that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import checkpoint
import compare
import data as datasets
import hybrid
import processes
import torch
import tyro

# Each table: rows of settings, and the rows that the others are compared with.
Table = tuple[dict[str, dict[str, Any]], list[str]]
BALANCED_SOFTMAX = {"sampler": "instance", "logit_adjustment": 1.0}


def baselines(**size: Any) -> dict[str, dict[str, Any]]:
    return {
        "CE": {"loss": "ce", **size},
        "CE class-balanced": {"loss": "ce", "sampler": "class-balanced", **size},
        "logit adjustment": {"loss": "ce", "logit_adjustment": 1.0, **size},
    }


METHODS: dict[str, Table] = {
    # 51,200 images through the network, 64 in each branch's batch (SC: 2 views of them): 160 x 5 x 64 = (64 x 128 + 32 x 64) x 5 =
    # 80 x 5 x 128; SC 53 x 5 x 192 = 50,880.
    "equal images": (
        baselines(epochs=160)
        | {
            "two-stage": {"loss": "sc", "schedule": "two-stage", "epochs": 96, "switch_at": 2 / 3},
            "Hybrid-SC": {"loss": "sc", "epochs": 53},
            "Hybrid-PSC": {"loss": "psc", "epochs": 80},
        },
        ["CE", "logit adjustment"],
    ),
    # 400 updates, the baselines with batches of 128, as many as Hybrid-PSC's two branches hold together.
    "equal updates": (
        baselines(epochs=200, batch=128)
        | {
            "two-stage": {"loss": "sc", "schedule": "two-stage", "epochs": 80, "switch_at": 2 / 3},
            "Hybrid-SC": {"loss": "sc", "epochs": 80},
            "Hybrid-PSC": {"loss": "psc", "epochs": 80},
        },
        ["CE", "logit adjustment"],
    ),
}

SCHEDULES = ("parabolic-decay", "linear", "cosine", "constant", "parabolic-increment", "beta", "switch")
ABLATION: dict[str, Table] = {
    "classifier's sampler": (
        {rule: {"sampler": rule} for rule in ("class-balanced", "instance", "square-root", "reverse")},
        ["class-balanced"],
    ),
    "feature branch's sampler": (
        {rule: {"feature_sampler": rule} for rule in ("instance", "class-balanced", "square-root", "reverse")},
        ["instance"],
    ),
    "losses": (
        {
            "SC + CE": {},
            "PSC + CE": {"loss": "psc"},
            "MPSC (4) + CE": {"loss": "mpsc"},
            "none + CE": {"loss": "ce", "sampler": "class-balanced"},
            "SC + balanced softmax": BALANCED_SOFTMAX,
            "PSC + balanced softmax": {"loss": "psc", **BALANCED_SOFTMAX},
            "none + balanced softmax": {"loss": "ce", **BALANCED_SOFTMAX},
        },
        ["SC + CE"],
    ),
    "schedule of α": ({name: {"schedule": name} for name in SCHEDULES}, ["parabolic-decay"]),
}

SHORT = {
    "data": "cifar10-jpeg", "network": "resnet8", "batch": 64, "lr": 0.1, "milestones": (), "warmup": 0.05,
    "nesterov": True, "weight_decay": 5e-4,
}  # fmt: skip
CIFAR10: dict[str, Table] = {
    "equal images": (
        {
            "CE": {"loss": "ce", "epochs": 20, **SHORT},
            "Hybrid-SC": {"loss": "sc", "epochs": 7, **SHORT},
            "Hybrid-PSC": {"loss": "psc", "epochs": 10, **SHORT},
        },
        ["CE"],
    )
}
GRIDS = {"methods": METHODS, "ablation": ABLATION, "cifar10": CIFAR10}


@dataclass(frozen=True)
class Ablate:
    grid: tyro.conf.Positional[Literal["methods", "ablation", "cifar10"]]
    seed: int = 100
    seeds: int = 6
    root: Path | None = None  # of the data, for cifar10
    out: Path | None = None  # None: runs/GRID
    device: str | None = None
    threads: int = 1
    shorten: float = 1.0  # times the epochs, for a quick look


def run_grid(options: Ablate) -> dict[str, Any]:
    if processes.launched():
        raise ValueError("ablate.py must be started once, by python: under torchrun each process would write the same tables")
    out = options.out or Path("runs") / options.grid
    out.mkdir(parents=True, exist_ok=True)
    load = functools.lru_cache(1)(datasets.load)
    results, text = {}, []
    for title, (rows, against) in GRIDS[options.grid].items():
        groups: dict[str, list[dict]] = {name: [] for name in rows}
        for seed in range(options.seed, options.seed + options.seeds):
            for name, settings in rows.items():
                config = configure(options, settings, seed, out / slug(title) / slug(name) / f"seed-{seed}")
                groups[name].append(hybrid.finish(config, load(hybrid.source_of(config))))
        results[title] = {name: {"settings": rows[name], "seeds": [figures(run) for run in runs]} for name, runs in groups.items()}
        text.append(f"### {title[0].upper()}{title[1:]}\n\n{compare.table(groups, against)}\n")
        compare.draw(out / slug(title), groups)
    environment = checkpoint.environment(torch.device(options.device or "cpu"))
    seeds = f"{options.seed} … {options.seed + options.seeds - 1}"
    origin = f"`{environment['command']}`, seeds {seeds}, {environment['device']}, {options.threads} thread(s), "
    origin += f"torch {environment['packages']['torch']}, commit {environment['git_commit']}, {environment['date']}"
    checkpoint.write_json(out / "results.json", {"environment": environment, "tables": results})
    checkpoint.write_text(out / "results.md", "\n".join(text) + f"\n{origin}\n")
    hybrid.console.print("\n".join(text), soft_wrap=True)
    return results


def figures(run: dict[str, Any]) -> dict[str, Any]:
    return {"seed": run["config"]["seed"], **{name: run[name] for name in ("updates", "images", "seconds")}, **run["best"]}


def configure(options: Ablate, settings: dict[str, Any], seed: int, out: Path) -> hybrid.Config:
    settings = {"data": "digits", **settings}
    settings["data_seed"] = seed if settings["data"] == "digits" else 0
    machine = {"root": options.root, "device": options.device, "threads": options.threads, "pictures": False}
    config = hybrid.resolve(hybrid.Config(**settings, **machine, seed=seed, out=out))
    return dataclasses.replace(config, epochs=max(1, round(options.shorten * config.epochs)))


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()


if __name__ == "__main__":
    try:
        run_grid(tyro.cli(Ablate, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
