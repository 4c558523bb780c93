"""Several seeds and methods: their runs, and how they compare."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import checkpoint
import compare
import processes
import settings
import side_by_side
import torch
from joblib import cpu_count
from settings import Config
from terminal import console, progress_bar, say, show_rows


def runs_of(config: Config) -> list[Config]:
    """Seed by seed, the methods it is compared with and then its own; a single run is in the folder itself."""
    records, own, threads = config.records, config.method.method, config.machine.threads
    if len({own, *records.against}) <= len(records.against):
        raise ValueError(f"against must name other methods than {own}, each once, got {', '.join(records.against)}")
    if records.jobs > 1 and threads is None:  # each with all cores, they would wait for one another
        threads = max(1, min(torch.get_num_threads(), cpu_count()) // records.jobs)
    methods = {name: beside(config, name) for name in records.against} | {own: config}
    runs = []
    for seed in range(records.seed, records.seed + records.seeds):
        for name, one in methods.items():
            parts = ([name] if records.against else []) + ([f"seed-{seed}"] if settings.of_several(config) else [])
            own_tail = {"data_seed": seed, "data_seeds": False} if records.data_seeds else {}
            alone = {"seeds": 1, "against": (), "jobs": 1, "threads": threads, "out": records.out.joinpath(*parts)}
            runs.append(settings.change(one, seed=seed, **own_tail, **alone))
    return runs


def beside(config: Config, method: str) -> Config:
    """Another method's run that is to be compared with this one: the same but for the method, and as many images through the network."""
    settings.named(settings.METHODS, "against", method)
    theirs, optimiser = settings.method_of(config.images.data, method), config.optimiser
    classifier = (optimiser.classifier_batch or optimiser.batch) / optimiser.batch
    ratio = settings.passes(config.method, classifier) / settings.passes(theirs, classifier)
    changed = dataclasses.replace(settings.change(config, epochs=max(1, round(optimiser.epochs * ratio))), method=theirs)
    try:
        return settings.checked(changed)
    except ValueError as error:
        raise ValueError(f"against {method}: {error}") from error


def trained(configs: list[Config], jobs: int, train_one: Callable[[Config], dict]) -> list[dict]:
    """The metrics of each run."""
    found = {}
    ended = side_by_side.trained(configs, jobs, train_one)
    with progress_bar() as progress, contextlib.closing(ended):
        bar = progress.add_task(f"{len(configs)} runs, {jobs} at a time", total=len(configs), text="")
        for number, metrics in ended:
            method, seed = configs[number].method.method, configs[number].records.seed
            progress.update(bar, advance=1, text=(said := f"{method}, seed {seed}: {metrics['best']['balanced']:.1f}"))
            if not console.is_interactive:
                say(said)
            found[number] = metrics
    return [found[number] for number in range(len(configs))]


def by_method(runs: Sequence[Config], results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one, metrics in zip(runs, results, strict=True):
        groups.setdefault(one.method.method, []).append(metrics)
    return groups


def show_comparison(groups: dict[str, list[dict[str, Any]]], own: str, against: Sequence[str], out: Path) -> None:
    """In brief in the terminal, all beside its own; whole, and drawn, in the folder."""
    show_rows(console, compare.rows(groups, [own], brief=True), "test, %; last column: the difference, and at how many seeds it is above")
    if processes.rank() == 0:
        checkpoint.write_text(out / "comparison.md", compare.table(groups, against) + "\n")
        compare.draw(out, groups)
