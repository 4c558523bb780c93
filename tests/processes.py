"""Processes that need not import torch, as they are forked off one that has: scripts, and four with gloo for a whole run of the tests.

Importing torch, and what its optimisers and DistributedDataParallel import at their first step, is most of what a short script does.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

IMPORTED = [  # of what is installed
    *("torch", "torch._dynamo", "torch._dynamo.backends.debugging", "fastsupcon", "tests.work_of_ranks"),
    *("sklearn.datasets", "matplotlib.pyplot", "tyro"),
]
SIZE = 4
PATIENCE = 60  # seconds for one call
TIMEOUT = datetime.timedelta(seconds=20)  # of the groups
SHORT = datetime.timedelta(seconds=2)  # of those named "short", for what happens when a rank does not come


@functools.cache
def warm() -> BaseContext:
    """Starts processes that have imported torch: off a process that has done nothing else, so they are as new ones.

    Off the tests' own process they would hang where its OpenMP threads stood, and would know of the tests before. Where there is no such
    server (Windows) they are new ones.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


_scripts: weakref.WeakSet[Script] = weakref.WeakSet()


@atexit.register
def _end_scripts() -> None:
    """Those that tests left behind when they were interrupted, before multiprocessing waits for them without limit."""
    for script in list(_scripts):
        if script.poll() is None:
            script.kill()


class Script:
    """A script in a process of its own, as ``python file arguments`` would run it, with the methods of a subprocess.Popen.

    Its modules are looked for where those of the tests are, and torch has as many threads as in the tests. What it prints is in ``output``,
    errors with the rest or in ``errors``.
    """

    def __init__(
        self,
        run: str | Path | Callable[..., object],
        *arguments: str,
        folder: Path | None = None,
        apart: bool = False,
        own_group: bool = False,
    ) -> None:
        """``run`` is a file or a function; ``apart``: errors in a file of their own; ``own_group``: it leads a group of processes."""
        self._kept = tempfile.TemporaryDirectory()
        self.output = Path(self._kept.name) / "output"
        self.errors = self.output.with_name("errors") if apart else self.output
        import torch

        given = (run, arguments, folder or Path.cwd(), self.output, self.errors, torch.get_num_threads(), own_group)
        self._process = warm().Process(target=_play, args=given)
        self._process.start()
        self.pid = self._process.pid
        _scripts.add(self)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.output.read_text(), timeout)
        return self._process.exitcode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.output.read_text(), self.errors.read_text()

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _play(
    run: str | Path | Callable[..., object],
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    errors: Path,
    threads: int,
    own_group: bool,
) -> None:
    import torch

    if own_group:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, path in ((1, output), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(folder)
    torch.set_num_threads(threads)
    if sys.version_info < (3, 14) and "forkserver" in multiprocessing.get_all_start_methods():
        # Its own processes come off the same server. They are sent the same as new ones and import as much, from where it lies already.
        from multiprocessing.forkserver import _forkserver as server

        server.ensure_running = lambda: None  # else it would start another, though it knows this one's address
        known = multiprocessing.get_context
        multiprocessing.get_context = lambda method=None: known("forkserver" if method == "spawn" else method)
    if callable(run):
        run(*arguments)
        return
    sys.argv = [str(run), *arguments]
    sys.path.insert(0, str(Path(run).parent))
    multiprocessing.process._parent_process = None  # to the script it is the first process
    runpy.run_path(str(run), run_name="__main__")


class Pool:
    """Four processes with gloo: ``run`` calls a function of work_of_ranks.py on some of them, or one of another file: "file.function"."""

    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            ours, theirs = warm().Pipe()
            process = warm().Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: str, size: int, *arguments: Any, group: str = "") -> list[Any]:
        """What ``function(group, *arguments)`` gives on each of ``size`` ranks; an exception comes as itself, and is not raised."""
        if not self.pipes:
            self._start()
        for pipe in self.pipes[:size]:
            pipe.send((function, f"{group}{size}", arguments))
        missing = dict(zip(self.pipes[:size], range(size), strict=True))
        results: list[Any] = [None] * size
        while missing:
            ready = wait(list(missing), PATIENCE)
            if not ready:
                self.end()
                raise TimeoutError(f"ranks {sorted(missing.values())} gave no answer to {function} in {PATIENCE} s")
            for pipe in ready:
                results[missing.pop(pipe)] = pipe.recv()
        return results

    def results(self, function: str, size: int, *arguments: Any) -> list[Any]:
        """The same where none may raise."""
        found = self.run(function, size, *arguments)
        for one in found:
            if isinstance(one, Exception):
                self.end()  # another rank may wait for this one
                raise one
        return found

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.pipes, self.processes = [], []


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=SIZE, timeout=TIMEOUT)
    groups = {}
    for size in range(1, SIZE + 1):
        groups[f"{size}"] = dist.new_group(list(range(size)), timeout=TIMEOUT)
        groups[f"short{size}"] = dist.new_group(list(range(size)), timeout=SHORT)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, group, arguments = pipe.recv()
            try:
                module, _, name = function.rpartition(".")
                work = importlib.import_module(f"tests.{module or 'work_of_ranks'}")
                result = getattr(work, name)(groups[group], *arguments)
            except Exception as error:
                error.add_note(traceback.format_exc()) if hasattr(error, "add_note") else None
                result = error
            try:
                pipe.send(result)
            except Exception as error:  # what cannot be pickled
                pipe.send(RuntimeError(f"{type(result).__name__}: {result} ({error})"))
