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

import packages

if __name__ == "__main__":
    packages.start("python train/hybrid.py")

import contextlib
import functools
import math
import multiprocessing
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import checkpoint
import data as datasets
import evaluate
import processes
import run_folder
import settings
import several
import torch
from check import check_images
from command_line import Command, parse
from errors import TOLD, what_to_lower
from loggers import Loggers
from report import report
from run import Run
from settings import Config
from terminal import console, hint, printable, progress_bar, say, show, status


@what_to_lower()
def train(config: Config, data: datasets.Data, *, resume: bool = False) -> dict[str, Any]:
    """Train one network in the run's folder; returns its metrics. A stop signal ends the process after a checkpoint."""
    with run_folder.alone(config.records.out), contextlib.ExitStack() as at_the_end:
        return _train(config, data, at_the_end, resume=resume)


def _train(config: Config, data: datasets.Data, at_the_end: contextlib.ExitStack, *, resume: bool) -> dict[str, Any]:
    records, epochs, writes = config.records, config.optimiser.epochs, processes.rank() == 0
    out = records.out
    if not resume and processes.told((out / "config.json").exists()):
        raise ValueError(f"out {out} holds a run already: go on with --resume {out}, or name another folder")
    if config.machine.threads:
        torch.set_num_threads(config.machine.threads)
    torch.backends.cudnn.deterministic = True  # so that a resumed run comes to the same bits
    monitored = "test" if data.validation is None else "validation"
    eval_every = records.eval_every or max(1, epochs // 10)

    with checkpoint.StopSignal() as stop, progress_bar() as progress:
        # One process may leave between two batches, in an evaluation too; several do so at a step, together.
        run = Run(config, data, stopped=lambda: stop.received is not None and processes.count() == 1)
        for batches in run.batches.values():
            at_the_end.callback(batches.end_workers)
        if resume and processes.told(run_folder.has_checkpoint(out)):
            run_folder.load(run)
        if writes:
            run_folder.begin(run, anew=not resume)
        loggers = Loggers(run)
        name, done = run_folder.name_of(run), run.epoch * run.steps + run.step
        task = progress.add_task(name, total=epochs * run.steps, completed=done, text="")

        def leave_if_stopped(*, unsaved: bool) -> None:
            """All processes at the same step, whichever was told to stop; they ask each other at every one."""
            if not (received := processes.largest(stop.received or 0)):
                return
            if unsaved:
                run_folder.save(run)
            processes.wait_for_all()  # torchrun ends the others as soon as one has left
            progress.stop()
            say(f"{out}: stopped in epoch {run.epoch}")
            sys.exit(128 + received)

        saved_at = -math.inf
        while run.epoch < epochs:
            began, first = time.perf_counter(), run.step
            indices = run.plan.indices
            try:
                for raw, labels in run.batches["train"](indices, first, (records.seed, run.epoch), run.plan.own):
                    run.update(raw, labels)
                    progress.advance(task)
                    leave_if_stopped(unsaved=True)
                    if run.step % records.log_every == 0:
                        progress.update(task, text=status(run.means()))
            except checkpoint.Stopped:
                leave_if_stopped(unsaved=True)

            row = {"epoch": run.epoch, "of": epochs, **run.means(), "processes": processes.count()}
            row["seconds"] = time.perf_counter() - began
            row["images"] = indices.numel()
            row["images_per_second"] = (run.step - first) * indices.shape[1] / row["seconds"]
            losses = {name: row[name] for name in ("feature_loss", "classifier_loss") if row[name] is not None}
            if not all(map(math.isfinite, losses.values())):
                told = ", ".join(f"{name} {value:g}" for name, value in losses.items())
                before = f"{out}/last.pt is of an epoch before" if run.epoch else "there is no epoch before"
                raise FloatingPointError(f"the loss is not finite in epoch {run.epoch} of {out} ({told}; {before}): try a lower --lr")
            if evaluated := (run.epoch + 1) % eval_every == 0 or run.epoch + 1 == epochs:
                try:
                    logits, labels = run.predict(monitored, "logits")
                except checkpoint.Stopped:
                    leave_if_stopped(unsaved=True)  # with all steps done: the evaluation is what is left of the epoch
                row[f"{monitored}_balanced"] = balanced = evaluate.balanced_accuracy(logits, labels)
                if monitored == "validation" and balanced > run.best["balanced"]:
                    run.best = {"epoch": run.epoch, "balanced": balanced}
                    if writes:
                        checkpoint.save(out / "best.pt", run.averaged.state_dict())
            run.history.append(row)
            run.end_epoch()
            if due := run_folder.is_due(run, time.monotonic() - saved_at):
                run_folder.save(run)
                saved_at = time.monotonic()
            progress.update(task, text=status(row))
            if evaluated and not console.is_interactive:
                figure = "–" if balanced is None else f"{balanced:.1f}"
                say(f"{name}: epoch {row['epoch'] + 1} of {epochs}, {monitored} {figure} %  {status(row)}")
            if text := hint(row, epochs):
                say(f"{name}: {text}")
            loggers.send(row)
            leave_if_stopped(unsaved=not due)
        loggers.close()
    try:
        return report(run)
    except SystemExit:
        say(f"{out}: stopped after the last epoch")
        raise


def finish(config: Config, data: datasets.Data, *, extend: bool = False) -> dict[str, Any]:
    """The run in its folder: trained from the start, from where it was stopped, or read where it is finished.

    With ``extend`` the run may be of another number of epochs, and goes on to the config's.
    """
    out = config.records.out
    if not processes.told((out / "config.json").exists()):
        return train(config, data)
    run_folder.refuse_other_data(out, data)
    stored = settings.read(out)
    if names := [name for name in settings.differing(stored, config) if not (extend and name == "epochs")]:
        raise ValueError(f"out {out} holds a run of other settings ({', '.join(names)}): name another folder")
    if processes.told(run_folder.is_finished(out, config.optimiser.epochs)):
        if all(getattr(stored.records, name) == getattr(config.records, name) for name in REPORTED):
            return checkpoint.read_json(out / "metrics.json")
        if processes.rank() == 0:
            run_folder.write_config(config)
        return evaluate_again(config, data)
    return train(config, data, resume=True)


REPORTED = ("knn", "pictures", "export")  # what --resume may ask of a finished run beside what it has


def metrics_of(config: Config, *, extend: bool = False) -> dict[str, Any]:
    return finish(config, checked_data(config.images), extend=extend)


@what_to_lower()
def evaluate_again(config: Config, data: datasets.Data) -> dict[str, Any]:
    with run_folder.alone(config.records.out):
        run_folder.refuse_other_data(config.records.out, data)
        run = Run(config, data)
        run_folder.load(run)
        return report(run)


# ---- from the command line to runs


def main(arguments: list[str]) -> None:
    try:
        with checkpoint.stop_signals(checkpoint.leave):
            command(*parse(arguments, __doc__))
    except TOLD as error:
        sys.exit(f"error{f' on rank {processes.rank()}' if processes.count() > 1 else ''}: {printable(str(error))}")


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
    records, out, own = config.records, config.records.out, config.method.method
    begun = processes.told((out / "config.json").exists())
    if begun and not (asked.resume or asked.eval_only or processes.restarts("RESTART_COUNT")):
        raise ValueError(f"out {out} holds a run already: go on with --resume {out}, or name another folder")
    if records.jobs > 1 and processes.launched():
        raise ValueError(f"jobs must be 1 under torchrun, whose processes share each run, got {records.jobs}")
    runs = several.runs_of(config)
    run_folder.refuse_unwritable(out)
    with processes.first_of_machine_first():  # what may be wrong with the data is said before anything is written
        classes = checked_data(runs[0].images).classes
    with run_folder.alone(out):
        try:
            results = _results(config, asked, runs)
        except SystemExit:
            if (out / "config.json").exists() and not asked.eval_only:
                say(f"go on with: python train/hybrid.py --resume {shlex.quote(str(out))}")
            raise
    groups = several.by_method(runs, results)
    if records.against:
        several.show_comparison(groups, own, records.against, out)
        if config.images.data == "digits":
            say("what to expect of these figures, and what six seeds say: docs/long-tail.md")
    else:
        show(groups[own], classes)
    say(f"written to {out}")


def _results(config: Config, asked: Command, runs: list[Config]) -> list[dict[str, Any]]:
    """The metrics of each run."""
    records = config.records
    if settings.of_several(config) and not asked.eval_only and processes.rank() == 0:
        run_folder.write_config(config)
    extend = asked.resume is not None
    if asked.eval_only:
        return [evaluate_again(one, checked_data(one.images)) for one in runs]
    if records.jobs == 1:
        return [metrics_of(one, extend=extend) for one in runs]
    return several.trained(runs, records.jobs, functools.partial(metrics_of, extend=extend))


@what_to_lower()
@functools.lru_cache(2)  # runs on the same data read it once in a process
def checked_data(images: datasets.Source) -> datasets.Data:
    """The data, every image of which was opened once, unless that is not wanted."""
    data = datasets.load(images)
    if images.check:
        with checkpoint.StopSignal() as stop, progress_bar() as progress:
            task = progress.add_task("opening every image", total=None, visible=False, text="")

            def show_progress(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total, visible=True)

            options = {"progress": show_progress, "stopped": lambda: stop.received is not None}
            try:
                data = check_images(data, images.workers, skip_bad=images.skip_bad_images, **options)
            except checkpoint.Stopped:
                sys.exit(128 + stop.received)
    if multiprocessing.parent_process() is None:  # or every process of runs side by side would say them
        for note in data.notes:
            say(note)
    return data


if __name__ == "__main__":
    main(sys.argv[1:])
