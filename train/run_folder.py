"""The folder of a run: whose it is, what it begins with, its checkpoints and its log."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import checkpoint
import processes
import terminal
import trained
from data import Data, describe_difference
from networks import parameters_of
from run import Run
from settings import Config, as_json

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
            with contextlib.suppress(OSError):  # what was wrong inside is to be told, not that the folder is gone
                if [path.name for path in out.iterdir()] == [".lock"]:  # nothing was begun
                    (out / ".lock").unlink()
                    out.rmdir()


def begin(run: Run, *, anew: bool) -> None:
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


def write_config(config: Config) -> None:
    config.records.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(config.records.out / "config.json", as_json(config))


def refuse_other_data(out: Path, data: Data) -> None:
    """A run goes on with the data that it began with."""
    path = out / "data.json"
    if told := describe_difference(checkpoint.read_json(path), data.fingerprint) if path.exists() else []:
        raise ValueError(f"the data are not those of the run in {out}: {'; '.join(told)}")


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


def is_due(run: Run, seconds: float) -> bool:
    """Whether the epoch that has ended is written, so many seconds after the last that was; every process must ask, and is told the same.

    A checkpoint of digits takes a quarter of the time of one of their epochs. The last epoch is always due, and so are those that are kept
    and that which best.pt is of: last.pt says which it is.
    """
    always = run.epoch == run.config.optimiser.epochs or _is_kept(run) or run.best["epoch"] == run.epoch - 1
    return processes.told(always or seconds >= 1)


def _is_kept(run: Run) -> bool:
    every = run.config.records.keep_every
    return every is not None and run.step == 0 and run.epoch % every == 0


def save(run: Run) -> None:
    """The checkpoint, as last.pt and where asked also under the epoch's name, then the log. Every process must come here."""
    state = run.state_dict()
    if processes.rank() == 0:
        folder = run.config.records.out
        checkpoint.save(folder / "last.pt", state)
        if _is_kept(run):
            checkpoint.save(folder / f"epoch-{run.epoch}.pt", state)
        write_log(run)


def write_log(run: Run) -> None:
    checkpoint.write_text(run.config.records.out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in run.history))


def is_finished(out: Path, epochs: int) -> bool:
    """With fewer epochs the figures are those of --eval-only on a run that was stopped."""
    if not all((out / name).exists() for name in ("metrics.json", "log.jsonl", "README.md")):
        return False
    return len((out / "log.jsonl").read_bytes().splitlines()) == epochs


def name_of(run: Run) -> str:
    """In trackers. A run among others is named after its method and seed, and after their folder."""
    return "/".join(run.config.records.out.parts[-3:]).replace("//", "/")
