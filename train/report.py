"""What is written of a run that ended: figures, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import card
import checkpoint
import evaluate
import exports
import plots
import processes
import run_folder
import terminal
import trained
from methods import METHODS
from networks import parameters_of
from run import Run
from settings import as_json
from torch import Tensor


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
    run_folder.write_log(run)  # again: a kill between the last checkpoint and its row would have left it out
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
