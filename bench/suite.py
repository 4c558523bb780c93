"""What ``python -m bench`` does: measures the cases of a preset and writes them as JSON, with a table and plots made from it.

Cases already in the output file are replaced, others kept: a long run can be taken in pieces (``--rows 4096 8192``).
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastsupcon.backends._extension import module as extension

from . import report
from . import share as sharing
from .cases import cores, cpu_cases, gpu_cases, quick_cases
from .contenders import CONTENDERS, NOT_ASKED, PRESETS, ROWS, Case, absent, at_once
from .measure import PRODUCT, REFERENCE, TURN, Ended, Worker
from .report import AFTER, BOTH

ROUNDS = 9  # turns of each contender in each mode
START = 3  # seconds, to foretell how long it takes: on a CPU, until a process has loaded torch and prepared its step;
FIRST, EACH = 30, 13  # on a GPU, until all have, and a case, as on an H200
SLOW, SLOW_ROUNDS = {"cpu": 1.0, "cuda": 0.1}, 3  # seconds a step; from there on fewer turns


def main(
    preset: tyro.conf.Positional[Literal["auto", "cpu", "gpu"]] = "auto",
    *,
    quick: bool = False,
    share: bool = False,
    rows: tuple[int, ...] = (),
    depth: tuple[int, ...] = (),
    prototypes: tuple[int, ...] = (),
    loss: tuple[str, ...] = (),
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = (),
    threads: tuple[int, ...] = (),
    contenders: tuple[str, ...] = (),
    seconds: float = math.inf,
    out: Path | None = None,
) -> None:
    """Measure the losses against the naive loss and the peers.

    Args:
        preset: the cases of a CPU or of a GPU; auto: the GPU's where there is one.
        quick: three small cases on a CPU, in about a minute; the twelve that matter most on a GPU, in about three.
        share: as with --quick, and what was measured is written once more into a file of its own, <out>-share.json, to attach to a report:
            with what ``python -m fastsupcon`` says, without names of people or machines and without paths.
        rows: only the cases of these N.
        depth: only the cases of these D.
        prototypes: only the cases of so many prototypes or, of cross and clip, columns; 0: those without.
        loss: only the cases of these losses (rows of tests/table.py) and operators (self, cross).
        dtype: only the cases of these dtypes.
        threads: only the cases of these numbers of threads.
        contenders: only these; default: all of the preset.
        seconds: no case is begun later than so many seconds after the first.
        out: the JSON file, added to where it exists; the table and plots are written beside it. Default: runs/bench/<preset>.json, and
            runs/bench/quick.json with --quick or --share.
    """
    for option, names, known in (("loss", loss, ROWS), ("contenders", contenders, CONTENDERS)):
        if unknown := set(names) - set(known):
            raise SystemExit(f"--{option} must be among {', '.join(known)}; got {', '.join(sorted(unknown))}")
    if preset == "auto":
        preset = "gpu" if torch.cuda.is_available() else "cpu"
    if preset == "gpu" and not torch.cuda.is_available():
        raise SystemExit("preset gpu needs a CUDA device, and torch sees none")
    device, quick = "cuda" if preset == "gpu" else "cpu", quick or share
    cases = quick_cases(device) if quick else gpu_cases() if preset == "gpu" else cpu_cases(cores())
    chosen = (("rows", rows), ("depth", depth), ("prototypes", prototypes), ("loss", loss), ("dtype", dtype), ("threads", threads))
    cases = [case for case in cases if all(not values or getattr(case, key) in values for key, values in chosen)]
    if not cases:
        raise SystemExit("no case is left: " + ", ".join(f"--{key} {values}" for key, values in chosen if values))
    out = out or Path("runs/bench") / f"{'quick' if quick else preset}.json"
    rounds = 3 if quick and device == "cpu" else ROUNDS
    if out.exists():
        earlier(out, machine(device))  # another machine's file is refused before its table is made anew
    try:
        measured = run(cases, contenders or PRESETS[preset], out, rounds, keep=device == "cuda", seconds=seconds)
    except KeyboardInterrupt:
        told = f"{out} holds the cases that were complete" if out.exists() else "no case was complete"
        print(f"interrupted: {told}{', nothing was written to be shared' * share}", file=sys.stderr, flush=True)
        raise
    finally:  # also of what there is when it is interrupted
        for path in report.write(out) if out.exists() else ():
            print(path)
    if share and not measured:
        raise SystemExit(f"--share: no case was measured in --seconds {seconds:g}, so there is nothing to share")
    if share:
        file = out.with_name(f"{out.stem}-share.json")
        sharing.write(file, machine(device), measured)
        print(f"{file}: attach this file to an issue. It holds versions, the processor or card and the figures, no name of a person or")
        print("machine and no path; look into it before you send it.")


def earlier(out: Path, here: dict) -> dict:
    """What the file holds, if there is one, which must be of this machine."""
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"machine": here, "cases": []}
    for key in ("processor", "cores", "device"):
        if results["machine"][key] != here[key]:
            raise SystemExit(f"{out} holds figures of another {key}, {results['machine'][key]} and not {here[key]}: name another file")
    return results


def run(cases: list[Case], names: tuple[str, ...], out: Path, rounds: int, *, keep: bool = False, seconds: float = math.inf) -> list[dict]:
    """Measure the cases and merge each, as soon as it is complete, into the JSON file ``out``. Returned are those measured now.

    With ``keep`` a contender keeps its process for all cases, and all prepare at the same time. On a CPU they do not: a process's peak of
    memory would hide in what an earlier case left to it, and they would take the cores from each other.
    """
    here = machine(cases[0].device)
    results = earlier(out, here)
    results["machine"] = here
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bars = Progress(*columns, console=console, disable=not console.is_terminal)
    end = time.monotonic() + seconds
    workers: dict[str, Worker] = {}
    measured: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch, bars as progress:
        bar = progress.add_task("", total=len(cases) * (len(names) + rounds))

        def say(text: str) -> None:
            if console.is_terminal:  # above the bar
                console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)

        def step(text: str, done: int = 1) -> None:
            if not console.is_terminal and text != progress.tasks[bar].description:  # what shows no bar shows a line
                say(text)
            progress.update(bar, description=text, advance=done)

        for line in (*foretold(cases, names, rounds), f"results: {out}, after each case"):
            say(line)
        if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5 * here["cores"]:
            say(f"this machine is busy (a load of {load:.1f} on {here['cores']} cores): times will be too long")
        try:
            for number, case in enumerate(cases, 1):
                if time.monotonic() >= end:
                    say(f"not begun in {seconds:g} s: {report.title(asdict(case))}")
                    continue
                result = run_case(case, names, rounds, Path(scratch), workers, keep, step)
                kept = [other for other in results["cases"] if other["case"] != result["case"]]
                results["cases"] = sorted([*kept, result], key=lambda entry: [str(value).rjust(9) for value in entry["case"].values()])
                report.write_whole(out, json.dumps(results, indent=1, ensure_ascii=False).encode())
                say(f"{number} of {len(cases)}: {report.in_a_line(result)}")
                measured.append(result)
                if not keep:
                    dismiss(workers, *workers)
        finally:
            dismiss(workers, *workers)
    return measured


def foretold(cases: list[Case], names: tuple[str, ...], rounds: int) -> list[str]:
    """What will be measured, by whom, about how long it takes; and who has no part, but for those who were not asked."""
    present = [[name for name in names if absent(name, case) is None] for case in cases]
    losses = ", ".join(dict.fromkeys(case.loss.upper() for case in cases))
    counts = sorted({case.rows for case in cases})
    sizes = f"{counts[0]:,} to {counts[-1]:,} rows" if len(counts) > 1 else f"{counts[0]:,} rows"
    if cases[0].device == "cuda":
        seconds = FIRST + EACH * len(cases)
    else:  # processes start one after the other; each has a turn in two modes, or three on several threads
        modes = [3 if case.threads > 1 else 2 for case in cases]
        seconds = sum((len(who) + 2) * START + rounds * len(who) * of * TURN["cpu"] for who, of in zip(present, modes, strict=True))
    minutes = f"about {seconds / 60:.0f} minutes" if seconds >= 90 else "about a minute"
    lines = [f"{len(cases)} case{'s' * (len(cases) > 1)} ({losses}; {sizes}), {minutes}, longer where a step takes seconds"]
    lines += [f"measured: {', '.join(name for name in names if any(name in who for who in present)) or 'nobody'}"]
    for name in names:
        reasons = {absent(name, case) for case in cases}
        if None not in reasons and reasons != {NOT_ASKED}:
            lines.append(f"left out: {name}: {'; '.join(sorted(reasons - {NOT_ASKED}))}")
    return lines


def dismiss(workers: dict[str, Worker], *names: str) -> None:
    for name in names:
        workers.pop(name).end()


def run_case(
    case: Case, names: tuple[str, ...], rounds: int, scratch: Path, workers: dict[str, Worker], keep: bool, step: Callable[..., None]
) -> dict:
    title = report.title(asdict(case))
    results: dict[str, dict] = {name: {"absent": reason} for name in names if (reason := absent(name, case))}
    step(title, len(results))
    reference = scratch / f"{case.loss}-{case.rows}-{case.depth}-{case.prototypes}-{case.dtype}.pt"
    needed = [] if reference.exists() else [REFERENCE]  # the same for any number of threads
    needed += [*(name for name in names if name not in results), PRODUCT]
    dismiss(workers, *(name for name, worker in workers.items() if worker.ended or worker.failed))
    for name in needed:  # all at once: importing torch takes the longest
        if name not in workers:
            workers[name] = Worker(name, case.device, case.threads)

    def failed(name: str, failure: Ended) -> None:
        print(f"{title}: {name}: {failure}", file=sys.stderr, flush=True)
        results[name] = {"absent": str(failure)}
        dismiss(workers, name)

    for group in at_once(needed, case) if keep else [[name] for name in needed]:
        for name in group:
            workers[name].send("prepare", case, reference)
        for name in group:
            step(f"{title}: {name}", name in names)
            try:
                answer = workers[name].receive()
                if name != REFERENCE:  # whose answer lies in its file
                    results[name] = answer
                elif not keep:
                    dismiss(workers, name)
            except Ended as failure:
                failed(name, failure)
                if name == REFERENCE:
                    reference.unlink(missing_ok=True)  # it may be half written
    competing = [name for name in needed if name in workers and name != REFERENCE]
    for name in competing[:]:
        if name == PRODUCT:
            continue
        if CONTENDERS[name].another_loss:
            results[name]["unchecked"] = CONTENDERS[name].another_loss
        elif not reference.exists():
            results[name]["unchecked"] = "the reference failed"
        else:
            try:
                results[name] |= workers[name].ask("check")
            except Ended as failure:
                failed(name, failure)
                competing.remove(name)
    seconds = take_turns(case, {name: workers[name] for name in competing}, results, rounds, lambda: step(f"{title}: {rounds} rounds"))
    for name, modes in seconds.items():
        results[name]["seconds"] = {mode: spread(samples) for mode, samples in modes.items() if samples}
    described = {key: value for key, value in asdict(case).items() if key != "only"}
    floor = {mode: case.flops(mode) for mode in ("forward", BOTH)}
    return {
        "case": described,
        **provenance(),
        "floor_flops": floor,
        "product": product(results.pop(PRODUCT)),
        "contenders": results,
    }


def product(found: dict) -> dict:
    """The rate of the floor; or why there is none, which leaves the case without a floor."""
    if seconds := found.get("seconds", {}).get("product"):
        return found | {"seconds": seconds}
    return {"absent": found.get("absent") or found["failed"]["product"]}


def take_turns(case: Case, workers: dict[str, Worker], results: dict, rounds: int, step: Callable[[], None]) -> dict[str, dict]:
    """Seconds by contender and mode. Each round gives every contender one turn in every mode, beginning with another one each time."""
    modes = ("forward", BOTH, *(["graph"] if case.device == "cuda" else [AFTER] if case.threads > 1 else []))
    seconds = {name: {mode: [] for mode in (["product"] if name == PRODUCT else modes)} for name in workers}
    for turn in range(rounds if workers else 0):
        step()
        order = list(workers)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            for mode, samples in seconds[name].items():
                if mode in results[name].get("failed", {}) or (turn >= SLOW_ROUNDS and samples and samples[0] > SLOW[case.device]):
                    continue
                if case.device == "cpu":
                    time.sleep(0.01)  # the last one's OpenMP threads stop spinning
                try:
                    samples += workers[name].ask(mode)
                except Ended as failure:
                    failed = results[name].setdefault("failed", {})
                    lost = list(seconds[name]) if workers[name].ended else [mode]
                    failed |= {mode: str(failure) for mode in lost if mode not in failed}
                    print(f"{report.title(asdict(case))}: {name}: {failure}", file=sys.stderr, flush=True)
    return seconds


def spread(samples: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": median, "q1": q1, "q3": q3, "min": min(samples), "max": max(samples), "samples": len(samples)}


def machine(device: str) -> dict:
    described = {"processor": processor(), "cores": cores(), "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        query = "driver_version,clocks.max.sm,clocks.sm,power.limit"
        described["gpu"] = f"{query}: {output('nvidia-smi', f'--query-gpu={query}', '--format=csv,noheader')}; CUDA {torch.version.cuda}"
    return described


def processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def provenance() -> dict:
    """When, of which commit, and with what a case was measured."""
    root = Path(__file__).resolve().parent.parent
    changed = bool(output("git", "-C", str(root), "status", "--porcelain", "-uno", "--", "fastsupcon", "csrc"))
    packages = {}
    for name in ("torch", "triton", "fastsupcon", "pytorch-metric-learning", "cut-cross-entropy", "inf-cl", "memeff"):
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": (output("git", "-C", str(root), "rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else ""),
        "versions": {"python": platform.python_version(), **packages},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # 1 minute's; the measured contender itself is 1 of it
        "instruction_set": extension.cpu.instruction_set() if extension else None,
    }


def output(*command: str) -> str:
    with suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""
