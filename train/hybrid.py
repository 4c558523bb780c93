"""Train a hybrid network on long-tailed images: contrastive features and a balanced classifier, from one to the other as training goes on.

    L = alpha L_feature(instance-balanced batch) + (1 - alpha) L_CE(class-balanced batch),    alpha = 1 - (T / T_max)^2

after Wang et al., CVPR 2021; --method names another of the table in methods.py. With no argument it trains on scikit-learn's digits, made
long-tailed 100 ... 5, beside the baselines and compares: no network, no GPU needed.

    python train/hybrid.py                                                # digits: the method beside its baselines
    python train/hybrid.py --method hybrid-psc --seeds 6                  # the prototypical loss, six seeds, mean and spread
    python train/hybrid.py --data cifar10-lt                              # the paper's CIFAR-10-LT; downloads
    python train/hybrid.py --data list --root D --train-list A --test-list B --network resnet50
    python train/hybrid.py --resume runs/X                                # go on after Ctrl-C, SIGTERM or a crash, to the same bits
    torchrun --nproc-per-node 2 train/hybrid.py --method hybrid-psc       # the same batches shared out among processes

The defaults that --help shows are those of the --data and the --method beside it; with --paper those of the method's paper.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import compare
import data as datasets
import evaluate
import processes
import settings
import torch
import trained
import tyro
from report import Loggers, report, save, write_log
from run import Run
from settings import Config
from terminal import compared, console, hint, progress_bar, say, show, status


def train(config: Config, data: datasets.Data, *, resume: bool = False) -> dict[str, Any]:
    """Train one network in the run's folder; returns its metrics. A stop signal ends the process after a checkpoint."""
    records, epochs, writes = config.records, config.optimiser.epochs, processes.rank() == 0
    out = records.out
    if not resume and processes.told((out / "config.json").exists()):
        raise ValueError(f"out {out} holds a run already: go on with --resume {out}, or name another folder")
    if config.machine.threads:
        torch.set_num_threads(config.machine.threads)
    torch.backends.cudnn.deterministic = True  # so that a resumed run comes to the same bits
    run = Run(config, data)
    if resume and writes:
        write_config(config)  # --epochs may have changed
    if resume and processes.told((out / "last.pt").exists()):
        run.load_state_dict(checkpoint.load(out / "last.pt", run.device))
    elif writes:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(out / "environment.json", checkpoint.environment(run.device) | {"processes": processes.count()})
        write_config(config)
        trained.write_description(out, data, config.images.image_size)
    loggers = Loggers(run)
    monitored = "test" if data.validation is None else "validation"
    eval_every = records.eval_every or max(1, epochs // 10)

    with checkpoint.StopSignal() as stop, progress_bar() as progress:
        name, done = "/".join(out.parts[-2:]), run.epoch * run.steps + run.step
        task = progress.add_task(name, total=epochs * run.steps, completed=done, text="")

        def leave_if_stopped(*, unsaved: bool) -> None:
            """All processes at the same step, whichever was told to stop; they ask each other at every one."""
            if not (received := processes.largest(stop.received or 0)):
                return
            if unsaved:
                save(run)
            processes.wait_for_all()  # torchrun ends the others as soon as one has left
            progress.stop()
            say(f"stopped in epoch {run.epoch}; go on with: python train/hybrid.py --resume {out}")
            sys.exit(128 + received)

        while run.epoch < epochs:
            began, first = time.perf_counter(), run.step
            indices = run.plan.indices
            for raw, labels in run.batches["train"](indices, first, (records.seed, run.epoch), run.plan.own):
                run.update(raw, labels)
                progress.advance(task)
                leave_if_stopped(unsaved=True)
                if run.step % records.log_every == 0:
                    progress.update(task, text=status(run.means()))

            row = {"epoch": run.epoch, **run.means(), "processes": processes.count()}
            row["seconds"] = time.perf_counter() - began
            row["images"] = indices.numel()
            row["images_per_second"] = (run.step - first) * indices.shape[1] / row["seconds"]
            if not all(math.isfinite(row[name] or 0) for name in ("feature_loss", "classifier_loss")):
                raise FloatingPointError(f"the loss is not finite in epoch {run.epoch}: {row}; {out}/last.pt is the epoch before")
            if (run.epoch + 1) % eval_every == 0 or run.epoch + 1 == epochs:
                logits, labels = run.predict(monitored, "logits")
                row[f"{monitored}_balanced"] = balanced = evaluate.balanced_accuracy(logits, labels)
                if monitored == "validation" and balanced > run.best["balanced"]:
                    run.best = {"epoch": run.epoch, "balanced": balanced}
                    if writes:
                        checkpoint.save(out / "best.pt", run.averaged.state_dict())
            run.history.append(row)
            run.end_epoch()
            save(run)
            if writes:
                write_log(run)
            progress.update(task, text=status(row))
            if text := hint(row, epochs):
                say(text)
            loggers.send(row)
            leave_if_stopped(unsaved=False)  # during the evaluation
    loggers.close()
    return report(run)


def write_config(config: Config) -> None:
    checkpoint.write_json(config.records.out / "config.json", settings.as_json(config))


def finish(config: Config, data: datasets.Data, *, extend: bool = False) -> dict[str, Any]:
    """The run in its folder: trained from the start, from where it was stopped, or read where it is finished.

    With ``extend`` the run may be of another number of epochs, and goes on to the config's.
    """
    out = config.records.out
    if not processes.told((out / "config.json").exists()):
        return train(config, data)
    if names := [name for name in settings.differing(settings.read(out), config) if not (extend and name == "epochs")]:
        raise ValueError(f"out {out} holds a run of other settings ({', '.join(names)}): name another folder")
    if processes.told((out / "metrics.json").exists() and len((out / "log.jsonl").read_text().splitlines()) == config.optimiser.epochs):
        return json.loads((out / "metrics.json").read_text())  # with fewer epochs they are those of --eval-only on a run that was stopped
    return train(config, data, resume=True)


def evaluate_again(config: Config, data: datasets.Data) -> dict[str, Any]:
    run = Run(config, data)
    run.load_state_dict(checkpoint.load(config.records.out / "last.pt", run.device))
    return report(run)


# ---- the command line


@dataclasses.dataclass(frozen=True)
class Command:
    """What to do, beside the settings of a run."""

    config: Path | None = None  # the settings that a config.json holds, instead of a recipe's
    paper: bool = False  # the optimiser and the augmentation of the method's paper, instead of the data set's recipe
    resume: Path | None = None  # go on with the run in this folder, whose settings hold; --epochs may extend it
    eval_only: Path | None = None  # evaluate the run in this folder again


@dataclasses.dataclass(frozen=True)
class Given(Config):
    command: tyro.conf.OmitArgPrefixes[Command] = Command()


def parse(arguments: list[str]) -> tuple[Config, Command]:
    """The recipe is chosen first, so that the defaults that are shown and changed are real."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--data",), ("--method",), ("--config",), ("--resume",), ("--eval-only", "--eval_only"), ("--network",), ("--weights",)):
        first.add_argument(*names)
    for name in ("paper", "pretrained"):
        first.add_argument(f"--{name}", action="store_true")
    chosen, _ = first.parse_known_args(arguments)
    stored = {name: path for name in ("config", "resume", "eval_only") if (path := getattr(chosen, name))}
    if len(stored) > 1:
        raise ValueError(f"one of --config, --resume and --eval-only is expected, got {' and '.join(stored)}")
    if stored:
        path = Path(*stored.values())
        base = settings.read(path)
        if (
            chosen.paper
            or (chosen.data or base.images.data) != base.images.data
            or (chosen.method or base.method.method) != base.method.method
        ):
            raise ValueError(f"--data, --method and --paper choose a recipe, which {path} takes the place of: expected none of them")
        if chosen.config:
            base = settings.change(base, out=None)  # or it would be the old run's
    else:
        network = settings.trained_network(chosen.network, chosen.pretrained, chosen.weights)
        base = settings.recipe(chosen.data or "digits", chosen.method or "hybrid-sc", paper=chosen.paper, network=network)
        if not any(not one.startswith("-h") and one != "--help" for one in arguments):
            base = settings.change(base, **DEMONSTRATION)
    parts = {name: getattr(base, name) for name in settings.GROUPS}
    given = tyro.cli(Given, default=Given(**parts), args=arguments, description=__doc__)
    config = Config(**{name: getattr(given, name) for name in settings.GROUPS})
    if chosen.resume or chosen.eval_only:
        allowed = {"epochs"} if chosen.resume else set()
        if changed := set(settings.differing(base, config)) - allowed:
            raise ValueError(f"--resume and --eval-only take the run's own settings, got also: {', '.join(sorted(changed))}")
        if config.optimiser.epochs < base.optimiser.epochs:
            raise ValueError(f"epochs may extend a run of {base.optimiser.epochs}, got {config.optimiser.epochs}")
        config = settings.change(config, out=path)
    return config, given.command


#: What the command without any argument adds.
DEMONSTRATION: dict[str, Any] = {"seeds": 3, "against": ("ce", "ce-balanced", "logit-adjustment")}


def main(arguments: list[str]) -> None:
    try:
        command(*parse(arguments))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error{f' on rank {processes.rank()}' if processes.count() > 1 else ''}: {error}")


def command(config: Config, asked: Command) -> None:
    if config.records.out is None:
        if processes.restarts("MAX_RESTARTS"):
            raise ValueError("out must be named where torchrun may restart the run (--max-restarts), which must find its folder, got None")
        name = f"{config.images.data}-{config.method.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        config = settings.change(config, out=Path("runs") / name)
    config = settings.checked(config)
    with processes.together(processes.device(config.machine.device)):
        console.quiet = processes.rank() > 0
        perform(settings.change(config, out=processes.told(config.records.out)), asked)


def perform(config: Config, asked: Command) -> None:
    records, out = config.records, config.records.out
    begun = processes.told((out / "config.json").exists())
    if begun and not (asked.resume or asked.eval_only or processes.restarts("RESTART_COUNT")):
        raise ValueError(f"out {out} holds a run already: go on with --resume {out}, or name another folder")
    own = config.method.method
    if len({own, *records.against}) <= len(records.against):
        raise ValueError(f"against must name other methods than {own}, each once, got {', '.join(records.against)}")
    runs = {name: beside(config, name) for name in records.against} | {own: config}
    with processes.first_of_machine_first():
        data = datasets.load(config.images)
    for note in data.notes:
        say(note)
    several = records.seeds > 1 or records.against
    if several and not asked.eval_only and processes.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_config(config)
    groups: dict[str, list[dict]] = {}
    for name, one in runs.items():
        for seed in range(records.seed, records.seed + records.seeds):
            folder = out / name / f"seed-{seed}" if records.against else out / f"seed-{seed}" if records.seeds > 1 else out
            one = settings.change(one, seed=seed, seeds=1, against=(), out=folder)
            result = evaluate_again(one, data) if asked.eval_only else finish(one, data, extend=asked.resume is not None)
            groups.setdefault(name, []).append(result)
    show(groups[own], data.classes)
    if records.against:
        compared(groups, own)
        if processes.rank() == 0:
            checkpoint.write_text(out / "comparison.md", compare.table(groups, list(records.against)) + "\n")
            compare.draw(out, groups)
    say(f"written to {out}")


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


if __name__ == "__main__":
    main(sys.argv[1:])
