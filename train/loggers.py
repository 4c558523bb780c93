"""The rows of a run's log, sent to experiment trackers."""

from __future__ import annotations

import hashlib
from typing import Any

import processes
from run import Run
from run_folder import name_of
from settings import as_json


class Loggers:
    """Those that a run's ``log_to`` names, on the first process alone."""

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
