"""Files that are whole or not there, and a run that stops when it is told to."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside ``path``, then rename: who reads it finds the old file or the new one, and a failed write leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """In UTF-8. Names of folders may hold bytes that are no text, which it has no place for: these are escaped."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def save(path: Path, state: dict) -> None:
    write_whole(path, lambda file: torch.save(state, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Tensors, numbers and strings only: loading runs no code of the file's."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist, expected a checkpoint") from None
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error


class StopSignal:
    """Within it, Ctrl-C and the signals of clusters that announce an end ask to stop after the step at hand; a second one stops at once."""

    ASKED_BY = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))

    def __enter__(self) -> StopSignal:
        self.received: int | None = None
        self.previous = {s: signal.signal(s, self._receive) for s in self.ASKED_BY}
        return self

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def leave_process_group(*_: object) -> None:
    """Called in a process that another one ends: Ctrl-C, and often SIGTERM, reach the whole group, but the step at hand is to be finished.

    Windows has no such groups.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:  # a run of the CPU's may be evaluated on a GPU
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader of the run needs to run it again."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        except OSError:  # there is no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in ("torch", "fastsupcon", "triton", "numpy", "scikit-learn", "timm")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
