"""What is written of a run: its log, figures, tables and pictures."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import card
import checkpoint
import evaluate
import exports
import plots
import processes
import terminal
import trained
from data import Data, describe_difference
from methods import METHODS
from networks import parameters_of
from run import Run
from settings import Config, as_json
from torch import Tensor

try:
    import fcntl
except ImportError:
    fcntl = None


def refuse_unwritable(out: Path) -> None:
    """Before anything is computed for it."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"out {out} must be a folder, and {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"out {out} must be a folder that can be written, and {there} is read-only here")


_locked: set[Path] = set()


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Within it no other run writes into the folder: it is refused. However the process ends, the system unlocks it.

    Windows has no such locks.
    """
    if (folder := out.resolve()) in _locked or processes.rank() > 0 or fcntl is None:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's it is not inherited by workers, which may live on for a while
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(f"out {out} is being written by another run, {file.read() or 'unknown'}: name another folder") from None
        except OSError as error:
            terminal.say_aside(f"{out} cannot be locked ({error}): see to it that no other run writes there")
        file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk, whose error names no file: what the run is to write there says so
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        _locked.add(folder)
        try:
            yield
        finally:
            _locked.discard(folder)
            if [path.name for path in out.iterdir()] == [".lock"]:  # nothing was begun
                (out / ".lock").unlink()
                out.rmdir()


def has_checkpoint(out: Path) -> bool:
    """A run that was stopped before its first checkpoint begins anew; one that lost it is not trained over again without a word."""
    there, log = (out / "last.pt").exists(), out / "log.jsonl"
    if not there and log.exists():
        raise FileNotFoundError(f"{out / 'last.pt'} does not exist, and {log} tells of epochs that were trained: name another folder")
    return there


def load(run: Run) -> None:
    """The run as its last checkpoint has it."""
    path = run.config.records.out / "last.pt"
    state = checkpoint.load(path, run.device)
    try:
        run.load_state_dict(state)
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} is not a checkpoint of this run: {type(error).__name__}: {told}") from error


def write_config(config: Config) -> None:
    config.records.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(config.records.out / "config.json", as_json(config))


def begin_folder(run: Run, *, anew: bool) -> None:
    """Settings, which --resume may extend; and once what they ran on, and what a reader of the network needs."""
    out = run.config.records.out
    out.mkdir(parents=True, exist_ok=True)
    if anew:
        checkpoint.write_json(out / "data.json", run.data.fingerprint)
        checkpoint.write_json(out / "environment.json", checkpoint.environment(run.device) | {"processes": processes.count()})
        trained.write_description(out, run.data, run.config.images.image_size)
        sizes = parameters_of(run.network)
        told = f"{run.config.network.network} of {sizes['backbone'] + sizes['classifier']:,} parameters, classifier included"
        terminal.say(f"{name_of(run)}: {told}; {len(run.data.train):,} training images, split {run.data.split_hash}")
    write_config(run.config)  # the last: a folder that has it is a run to go on with, and lacks nothing


def refuse_other_data(out: Path, data: Data) -> None:
    """A run goes on with the data that it began with."""
    path = out / "data.json"
    if told := describe_difference(checkpoint.read_json(path), data.fingerprint) if path.exists() else []:
        raise ValueError(f"the data are not those of the run in {out}: {'; '.join(told)}")


def save(run: Run) -> None:
    """The checkpoint, as last.pt and where asked also under the epoch's name. Every process must come here."""
    state, every = run.state_dict(), run.config.records.keep_every
    if processes.rank() == 0:
        folder = run.config.records.out
        checkpoint.save(folder / "last.pt", state)
        if every and run.step == 0 and run.epoch % every == 0:
            checkpoint.save(folder / f"epoch-{run.epoch}.pt", state)


def write_log(run: Run) -> None:
    checkpoint.write_text(run.config.records.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))


def report(run: Run) -> dict[str, Any]:
    """Evaluate the last epoch and the best on the test split; write metrics, tables and pictures."""
    config, data, out = run.config, run.data, run.config.records.out
    shots = {"many": config.images.many, "few": config.images.few}
    measure = {"counts": data.counts, **shots}
    embeddings, logits, labels = run.predict("test", "embeddings", "logits")
    last = chosen = evaluate.metrics(logits, labels, **measure)
    weights = "last.pt" if data.validation is None else "best.pt"
    if data.validation is not None:
        run.averaged.load_state_dict(checkpoint.load(out / weights, run.device))
        embeddings, logits, labels = run.predict("test", "embeddings", "logits")
        chosen = evaluate.metrics(logits, labels, **measure)
    if config.records.knn:
        chosen = evaluate.metrics(logits, labels, **measure, neighbours=nearest(run))
    result = {
        "chosen_by": "last epoch" if data.validation is None else "validation",
        "best_epoch": max(0, run.epoch - (run.step == 0)) if data.validation is None else run.best["epoch"],
        "best": chosen,
        "last": last,
        "train_images": data.counts.tolist(),
        "split": data.split_hash,  # of the indices of the training images kept
        "parameters": parameters_of(run.network),
        "updates": run.steps * len(run.history),
        "images": sum(row["images"] for row in run.history),
        "seconds": sum(row["seconds"] for row in run.history),
        "processes": sorted({row.get("processes", 1) for row in run.history}),  # more than one number: it was resumed by other ones
        "of_epochs": sorted({row.get("of", config.optimiser.epochs) for row in run.history}),  # more than one: extended, its schedules too
        "source": METHODS[config.method.method].source,
        "config": as_json(config),
    }
    if processes.rank() > 0:
        return result
    (out / "README.md").unlink(missing_ok=True)
    write_log(run)  # again: a kill between the last checkpoint and its row would have left it out
    checkpoint.write_json(out / "metrics.json", result)  # the figures come first: nothing that follows can lose them
    evaluate.write_per_class(out / "per_class.csv", data.classes, data.counts, labels, chosen["per_class"])
    if config.records.export:
        exports.export(trained.load(out, weights=weights), config.records.export)
    if config.records.pictures:
        counts = result["train_images"]
        draw(plots.per_class, out / "per_class.png", counts, {out.name: chosen["per_class"]}, data.classes, **shots)
        draw(plots.confusion, out / "confusion.png", evaluate.confusion(logits, labels), data.classes, counts, **shots)
        draw(plots.embedding, out / "embedding.png", embeddings, labels, data.classes, counts)
        draw(plots.curves, out / "curves.png", run.history)
    # The last: a folder that has it is a finished run's, and lacks nothing.
    checkpoint.write_text(out / "README.md", card.card(out, config, result, data.classes, tested=len(labels)))
    return result


def is_finished(out: Path, epochs: int) -> bool:
    """With fewer epochs the figures are those of --eval-only on a run that was stopped."""
    if not all((out / name).exists() for name in ("metrics.json", "log.jsonl", "README.md")):
        return False
    return len((out / "log.jsonl").read_bytes().splitlines()) == epochs


def draw(plot: Callable[..., None], path: Path, *given: Any, **options: Any) -> None:
    """What cannot be drawn is said: it does not end the run, nor the runs after it."""
    try:
        plot(path, *given, **options)
    except Exception as error:
        terminal.say_aside(f"{path} could not be drawn: {type(error).__name__}: {error}")


def nearest(run: Run) -> dict[str, Tensor]:
    """The class of each test image by its nearest training images, in the backbone's features and in the head's embeddings."""
    spaces = ("features", "embeddings")
    *train, train_labels = run.predict("train", *spaces)
    *test, _ = run.predict("test", *spaces)
    return {name: evaluate.nearest_neighbours(x, train_labels, y) for name, x, y in zip(spaces, train, test, strict=True)}


class Loggers:
    """The rows of log.jsonl, sent to experiment trackers too."""

    def __init__(self, run: Run) -> None:
        self.senders = [SENDERS[name](run) for name in run.config.records.log_to] if processes.rank() == 0 else []

    def send(self, row: dict[str, Any]) -> None:
        figures = {
            name: value for name, value in row.items() if isinstance(value, int | float) and name not in ("epoch", "of", "processes")
        }
        for send, _ in self.senders:
            send(figures, row["epoch"])

    def close(self) -> None:
        for _, close in self.senders:
            close()


def name_of(run: Run) -> str:
    """In trackers. A run among others is named after its method and seed, and after their folder."""
    return "/".join(run.config.records.out.parts[-3:]).replace("//", "/")


def _tensorboard(run: Run):
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run wrote of this epoch and after is hidden.
    writer = SummaryWriter(str(run.config.records.out), purge_step=run.epoch)

    def send(figures: dict[str, float], epoch: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, epoch)

    return send, writer.close


def _wandb(run: Run):
    import wandb

    out = run.config.records.out
    # The same when the run goes on, and another for each run, whose folders may all be called seed-0.
    own = hashlib.sha256(str(out.resolve()).encode() + (out / "environment.json").read_bytes()).hexdigest()[:16]
    tracked = wandb.init(project="fastsupcon", name=name_of(run), id=own, dir=str(out), resume="allow", config=as_json(run.config))
    return lambda figures, epoch: tracked.log(figures, step=epoch), tracked.finish


def _mlflow(run: Run):
    import mlflow

    mlflow.start_run(run_name=name_of(run))
    mlflow.log_params({f"{group}.{name}": value for group, part in as_json(run.config).items() for name, value in part.items()})
    return lambda figures, epoch: mlflow.log_metrics(figures, step=epoch), mlflow.end_run


SENDERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
