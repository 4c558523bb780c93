"""Files that are whole or not there, and a run that stops when it is told to."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

_being_written: set[Path] = set()


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write beside ``path``, then rename: who reads it finds the old file or the new one, and a failed write leaves the old one."""
    partial = path.with_name(path.name + ".partial")
    _being_written.add(path)
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # torch.save raises its own RuntimeError where the file raised an OSError.
        if isinstance(cause := error.__context__ if isinstance(error, RuntimeError) else error, OSError):
            raise OSError(f"{path} could not be written, and is as it was before: {cause}") from error
        raise
    finally:
        _being_written.discard(path)


def write_text(path: Path, text: str) -> None:
    """In UTF-8. Names of folders may hold bytes that are no text, which it has no place for: these are escaped."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote of a dict; a byte order mark that an editor left is no harm."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def save(path: Path, state: dict) -> None:
    write_whole(path, lambda file: torch.save(state, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Tensors, numbers and strings only: loading runs no code of the file's."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist, expected a checkpoint") from None
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a readable checkpoint: {type(error).__name__}: {told}") from error


@contextlib.contextmanager
def stop_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Within it Ctrl-C and the signals by which clusters announce an end go to ``handler``. A hang-up that nohup ignores stays ignored.

    A terminal may ask that what writes from the background is halted (stty tostop): it writes all the same.
    """
    asked_by = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    heeded = [s for s in asked_by if s.name != "SIGHUP" or signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, handler) for s in heeded}
    if hasattr(signal, "SIGTTOU"):
        before[signal.SIGTTOU] = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def leave(number: int, _frame: object = None) -> None:
    """For what is not in the middle of anything: the exit status is that of a process which the signal ended."""
    raise SystemExit(128 + number)


class Stopped(BaseException):
    """Told to stop between two batches. No Exception, for it may be raised inside a decoder, any Exception of which is a broken image."""


_interruptible: Callable[[], object] | None = None


@contextlib.contextmanager
def interruptible(stopped: Callable[[], object]) -> Iterator[None]:
    """What may hang, and leaves nothing half done: within it :class:`Stopped` is raised as soon as ``stopped`` says yes.

    Python reads on after a signal whose handler returns, and so the handler of :class:`StopSignal` raises.
    """
    global _interruptible
    before, _interruptible = _interruptible, stopped
    try:
        if stopped():
            raise Stopped
        yield
    finally:
        _interruptible = before


class StopSignal:
    """Within it a stop signal asks to stop after the step at hand; where that waits for images, at once (:func:`interruptible`).

    A second one stops at once, but not while a file is written, nor where it comes with the first: a terminal that closes sends two.
    """

    TOGETHER = 1.0  # seconds

    def __enter__(self) -> StopSignal:
        self.received: int | None = None
        self.handling = stop_signals(self._receive)
        self.handling.__enter__()
        return self

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            if _interruptible is not None and _interruptible():
                raise Stopped
        elif time.monotonic() - self.at > self.TOGETHER and not _being_written:
            leave(number)

    def __exit__(self, kind: object, *_: object) -> None:
        self.handling.__exit__(None, None, None)
        if kind is None and self.received is not None:  # it came after the last look
            leave(self.received)


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
