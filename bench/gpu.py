"""Everything that needs a GPU, in one call of at most nine minutes, what matters most first: ``python -m bench.gpu OUT`` (see GPU.md).

Every part runs in a process group of its own and has a time limit, so that one that hangs or crashes costs no other its result. OUT gets
log.txt, the end of what each part printed; parts.json, how each ended; ladder.json, kernels.json, suite.json with its table and plots; and
what the later parts leave, which run only where they are named.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .report import write_whole

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
KEPT = 1 << 20  # bytes of each part's log, its end,
SHOWN = 40  # and lines of it that are printed
PATIENCE = 6  # seconds that a part has to report once it is interrupted


@dataclass(frozen=True)
class Part:
    name: str
    limit: float  # seconds
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    program: str = PYTHON  # without which the part is skipped
    folder: Path = ROOT
    results: Path | None = None  # a folder whose files, but not its folders, are copied to OUT when the part has ended


def standard(out: Path, scratch: Path) -> dict[str, list[Part]]:
    """Stages by name: the parts of one run at the same time, here what only compiles beside what is not timed."""
    tests = ["-m", "pytest", "tests/test_gpu.py", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "bench.gpu_failures"]
    tests += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "worksteal", "--timeout", "40", "--timeout-method", "thread"]
    return {
        "ladder": [
            Part("ladder", 75, [PYTHON, "-m", "bench.gpu_ladder", str(out / "ladder.json")]),
            Part("compiling", 75, [PYTHON, "-m", "bench.gpu_kernels", str(scratch / "compiling.json"), "triton"]),
            Part("compiling peers", 75, [PYTHON, "-m", "bench.gpu_compile"]),
        ],
        "kernels": [Part("kernels", 45, [PYTHON, "-m", "bench.gpu_kernels", str(out / "kernels.json")])],
        "suite": [Part("suite", 180, [PYTHON, "-m", "bench", "gpu", "--quick", "--seconds", "145", "--out", str(out / "suite.json")])],
        "tests": [Part("tests", 100, [PYTHON, *tests])],
        "memcheck": sanitizers("memcheck"),
        "racecheck": sanitizers("racecheck"),
    }


def sanitizers(tool: str) -> list[Part]:
    """A process for each dtype: what takes long is the instrumented host."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", PYTHON, "-m", "bench.gpu_sanitize"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FASTSUPCON_TRIANGLE": "8"}  # the square serves the cross shape
    return [
        Part(f"{tool} {dtype}", 70, [*command, dtype], environment, "compute-sanitizer") for dtype in ("bfloat16", "float16", "float32")
    ]


def variants(out: Path, scratch: Path, extensions: list[Path]) -> list[list[Part]]:
    """Times the CUDA kernels of other builds of fastsupcon._C, each in a copy of the package."""
    stages = []
    for extension in extensions:
        folder = scratch / extension.stem
        for package in ("fastsupcon", "bench"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
        shutil.copy(extension, folder / "fastsupcon" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
        command = [PYTHON, "-m", "bench.gpu_kernels", str(out / f"{extension.stem}.json"), "cuda"]
        stages.append([Part(extension.stem, 45, command, folder=folder)])
    return stages


def training(scratch: Path, data: Path, seconds: float) -> list[Part]:
    """Accuracy over images and over updates on CIFAR-10-LT from JPEG copies, several runs side by side, the small budgets first.

    What there is of the table when the limit comes is kept: the runs' own folders are not.
    """
    command = [PYTHON, "train/tables.py", "budget", "--root", str(data), "--seeds", "2", "--jobs", "8", "--device", "cuda"]
    where = scratch / "budget"
    return [Part("budget", seconds, [*command, "--precision", "bf16", "--out", str(where)], results=where)]


def start(part: Part, log: Path) -> subprocess.Popen | str:
    """The process under way, or why there is none."""
    if shutil.which(part.program) is None:
        return f"skipped: no {part.program} on the PATH"
    with log.open("wb") as file:
        path = os.pathsep.join(filter(None, [str(part.folder), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | part.environment
        return subprocess.Popen(
            part.command, cwd=part.folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(process: subprocess.Popen, seconds: float) -> str:
    """How it ended. What still runs after so many seconds is interrupted, which lets Python report, and then killed with all it started."""
    result = "could not be killed"
    for number, patience in ((None, max(seconds, 0.1)), (signal.SIGINT, PATIENCE), (signal.SIGKILL, PATIENCE)):
        if number is not None:
            kill(process, number)
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        result = "stopped at its limit" if number else "passed" if status == 0 else f"failed with status {status}"
        break
    kill(process, signal.SIGKILL)  # what it left behind would hold the GPU
    return result


def kill(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def ended(stages: list[list[Part]], scratch: Path) -> Iterator[tuple[Part, str, float, bytes]]:
    """Each part as it ends: how, after how many seconds, and the end of what it printed."""
    for stage in stages:
        begin = time.monotonic()
        running: list[tuple[Part, subprocess.Popen | str]] = []
        try:
            for part in stage:
                running.append((part, start(part, scratch / f"{part.name}.log")))
            for part, process in running:
                result = process if isinstance(process, str) else end(process, part.limit - (time.monotonic() - begin))
                yield part, result, time.monotonic() - begin, tail(scratch / f"{part.name}.log")
        finally:  # one that outlives an interrupted driver would disturb what is measured next
            for _, process in running:
                if not isinstance(process, str):
                    kill(process, signal.SIGKILL)


def tail(log: Path) -> bytes:
    if not log.exists():
        return b""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - KEPT))
        return file.read()


def drive(stages: list[list[Part]], out: Path, scratch: Path) -> bool:
    """Whether all that could run passed. log.txt and parts.json are written anew after each part."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first, and would leave that to the parts
        signal.signal(number, signal.default_int_handler)
    results, begin = [], time.monotonic()
    log = b"\n".join([f"{datetime.datetime.now(datetime.timezone.utc):%FT%TZ}".encode(), *map(said, DESCRIBED)]) + b"\n"
    print(log.decode(errors="replace"), end="", flush=True)
    for part, result, seconds, text in ended(stages, scratch):
        for file in part.results.glob("*.*") if part.results else ():
            if file.is_file():
                shutil.copy(file, out / f"{part.name}-{file.name}")
        results.append({"part": part.name, "result": result, "seconds": round(seconds, 1)})
        print(f"== {part.name}: {result}, {seconds:.0f} s; {time.monotonic() - begin:.0f} s in all", flush=True)
        for line in text.decode(errors="replace").splitlines()[-SHOWN:]:
            print(line[:240], flush=True)
        log += f"\n== {part.name}: {result}\n".encode() + text
        write_whole(out / "log.txt", log)
        write_whole(out / "parts.json", json.dumps(results, indent=1).encode())
    return all(result["result"].startswith(("passed", "skipped")) for result in results)


DESCRIBED = (
    ("git", "log", "-1", "--format=commit %h"),
    ("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"),
)


def said(command: tuple[str, ...]) -> bytes:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True).stdout.strip()
    except OSError as error:
        return str(error).encode()


def main() -> int:
    names = [*standard(Path(), Path()), "variants", "train"]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Everything that needs a GPU, in one call.")
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(names)}; default: all but the last two")
    parser.add_argument("--extensions", nargs="+", type=Path, default=[], help="for variants: other builds of fastsupcon/_C, named apart")
    parser.add_argument("--data", type=Path, help="for train: the folder of the JPEG copies of CIFAR-10")
    parser.add_argument("--seconds", type=float, default=400, help="for train: its limit")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for part, given in (("variants", options.extensions), ("train", options.data)):
        if (part in options.parts) != bool(given):
            parser.error(f"{part} comes with --{'data' if part == 'train' else 'extensions'}, and this with it")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for cache in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):  # shared by the parts: each kernel is compiled once
            os.environ.setdefault(cache, f"{scratch}/{cache.lower()}")
        stages = [stage for name, stage in standard(out, scratch).items() if name in options.parts or not options.parts]
        stages += variants(out, scratch, [extension.resolve() for extension in options.extensions])
        if options.data:
            stages.append(training(scratch, options.data.resolve(), options.seconds))
        return 0 if drive(stages, out, scratch) else 1


if __name__ == "__main__":
    sys.exit(main())
