"""Several runs at the same time, each in a process of its own, on one GPU or on the CPU's cores."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import checkpoint
import terminal
from errors import TOLD
from settings import Config

PATIENCE = 1.0  # seconds between two looks whether all processes live

Metrics = dict[str, Any]


def work(train_one: Callable[[Config], Metrics], tasks: Any, results: Any) -> None:
    """Takes runs until there is None. A stop signal ends it with a checkpoint of the run at hand."""
    checkpoint.leave_process_group()  # Ctrl-C reaches the first process alone, which tells the others once
    threading.Thread(target=_stop_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    terminal.console.quiet = terminal.console.is_interactive  # lines would tear the first process's bar; those of a log name their run
    for number, config in iter(tasks.get, None):
        try:
            results.put((number, train_one(config), None))
        except TOLD as error:
            results.put((number, None, f"{config.records.out}: {error}"))
        gc.collect()  # a run refers to itself, and would keep its memory and its workers


def _stop_with(parent: Any) -> None:
    """A parent that was killed could tell nobody, and the runs would go on unseen."""
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def trained(configs: list[Config], jobs: int, train_one: Callable[[Config], Metrics]) -> Iterator[tuple[int, Metrics]]:
    """Number and metrics of each run as it ends; what is wrong with one is a ValueError. A stop signal stops all, with checkpoints.

    Who may leave before the end closes it (``contextlib.closing``), which stops the processes.
    """
    if jobs == 1:
        yield from ((number, train_one(config)) for number, config in enumerate(configs))
        return
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    tasks.cancel_join_thread()  # or a stop would wait for the tasks that nobody takes any more, where they are more than a pipe holds
    for task in [*enumerate(configs), *[None] * jobs]:
        tasks.put(task)
    # Not daemons, which may have no processes of their own, such as those that decode images.
    workers = [context.Process(target=work, args=(train_one, tasks, results)) for _ in range(min(jobs, len(configs)))]
    with checkpoint.stop_signals(checkpoint.leave), _stopped_together(workers):
        for worker in workers:
            worker.start()
        for _ in configs:
            number, metrics, error = _next(results, workers)
            if error is not None:
                raise ValueError(error)
            yield number, metrics


def _next(results: Any, workers: list[Any]) -> tuple[int, dict[str, Any], str | None]:
    while True:
        try:
            return results.get(timeout=PATIENCE)
        except queue.Empty:
            if ended := [worker.exitcode for worker in workers if worker.exitcode]:
                raise OSError(
                    f"a process ended with status {ended[0]} in the middle of a run (too little memory?): fewer jobs may do"
                ) from None


@contextlib.contextmanager
def _stopped_together(workers: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        begun = [worker for worker in workers if worker.pid is not None]
        for worker in begun:  # all are told before any is waited for
            worker.terminate()
        for worker in begun:
            worker.join()
