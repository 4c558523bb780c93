"""Everything that needs a GPU, in one call of at most nine minutes, what matters most first: ``python -m bench.gpu OUT`` (see GPU.md).

Every part runs in processes of its own and has a time limit, so that one that hangs or crashes costs no other its result. OUT gets at most
eight files: log.txt, the end of what each part printed; parts.json, how each ended; ladder.json; kernels.json; suite.json with its table and
plots.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .report import write_whole

ROOT = Path(__file__).resolve().parent.parent
KEPT = 1 << 20  # bytes of each part's log, its end
SHOWN = 40  # lines of it
PYTHON = sys.executable


@dataclass
class Part:
    name: str
    limit: float  # seconds
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    program: str = ""  # that must be on the PATH


def parts(out: Path, scratch: Path) -> list[list[Part]]:
    """Those of one list run at the same time: what only compiles beside what is not timed."""

    def sanitizer(tool: str) -> Part:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", PYTHON, "-m", "bench.gpu_sanitize"]
        return Part(tool, 60, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "compute-sanitizer")

    workers = str(min(14, os.cpu_count() or 1))
    pytest = [PYTHON, "-m", "pytest", "tests/test_gpu.py", "-n", workers, "--dist", "worksteal", "--timeout", "40", "--timeout-method", "thread"]
    return [
        [
            Part("ladder", 75, [PYTHON, "-m", "bench.gpu_ladder", str(out / "ladder.json")]),
            Part("compiling", 75, [PYTHON, "-m", "bench.gpu_kernels", str(scratch / "compiling.json"), "triton"]),
        ],
        [Part("kernels", 45, [PYTHON, "-m", "bench.gpu_kernels", str(out / "kernels.json")])],
        [Part("suite", 200, [PYTHON, "-m", "bench", "gpu", "--quick", "--out", str(out / "suite.json")])],
        [Part("tests", 100, [*pytest, "-q", "--tb=short", "-p", "no:cacheprovider"])],
        [sanitizer("memcheck")],
        [sanitizer("racecheck")],
    ]


def run(part: Part, log: Path) -> subprocess.Popen | str:
    """The process under way, or why there is none."""
    if part.program and shutil.which(part.program) is None:
        return f"skipped: no {part.program} on the PATH"
    with log.open("wb") as file:
        return subprocess.Popen(
            part.command, cwd=ROOT, env=os.environ | part.environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(process: subprocess.Popen, seconds: float) -> str:
    """How it ended; what still runs after so many seconds is interrupted, which lets Python report, then killed with all it started."""
    for number, patience in ((None, max(seconds, 0.1)), (signal.SIGINT, 4), (signal.SIGKILL, 4)):
        if number is not None:
            os.killpg(process.pid, number)
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        return ("stopped at its limit" if number else "passed" if status == 0 else f"failed with status {status}")
    return "could not be killed"


def main() -> int:
    parser = argparse.ArgumentParser(description="Everything that needs a GPU, in one call.")
    parser.add_argument("out", type=Path)
    parser.add_argument("only", nargs="*", help="the parts to run: " + ", ".join(part.name for stage in parts(Path(), Path()) for part in stage))
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    results, begin = [], time.monotonic()
    described = f"{datetime.datetime.now(datetime.timezone.utc):%FT%TZ}, commit {output('git', 'rev-parse', '--short', 'HEAD')}\n"
    described += output("nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader") + "\n"
    log = bytearray(described.encode())
    print(described, end="", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("TRITON_CACHE_DIR", f"{scratch}/triton")  # shared by the parts: each kernel is compiled once
        for stage in parts(out, Path(scratch)):
            started = [(part, run(part, Path(scratch, part.name)), time.monotonic()) for part in stage if not options.only or part.name in options.only]
            for part, process, start in started:
                result = process if isinstance(process, str) else end(process, part.limit - (time.monotonic() - start))
                seconds = time.monotonic() - start
                results.append({"part": part.name, "result": result, "seconds": round(seconds, 1)})
                print(f"== {part.name}: {result}, {seconds:.0f} s; {time.monotonic() - begin:.0f} s in all", flush=True)
                text = Path(scratch, part.name).read_bytes()[-KEPT:] if Path(scratch, part.name).exists() else b""
                print(*(line[:240] for line in text.decode(errors="replace").splitlines()[-SHOWN:]), sep="\n", flush=True)
                log += f"\n== {part.name}: {result}\n".encode() + text
                write_whole(out / "log.txt", bytes(log))
                write_whole(out / "parts.json", json.dumps(results, indent=1).encode())
    return 0 if all(result["result"] in ("passed",) or result["result"].startswith("skipped") for result in results) else 1


def output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
