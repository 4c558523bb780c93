"""Four processes with gloo, started once for a whole run of the tests: ``run`` calls a function of work_of_ranks.py on some of them.

A function of another file comes as "file.function".
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing
import socket
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any

SIZE = 4
PATIENCE = 60  # seconds for one call
TIMEOUT = datetime.timedelta(seconds=20)  # of the groups
SHORT = datetime.timedelta(seconds=2)  # of those named "short", for what happens when a rank does not come


class Pool:
    def __init__(self) -> None:
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tests.work_of_ranks"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
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
