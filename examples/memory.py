"""Peak memory of one step, as the examples print it."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path


def peak_bytes(step: Callable[[], object]) -> int | None:
    """Of a step on a CPU, over what there was before it, by Linux's high-water mark of the process; None elsewhere."""
    if sys.platform != "linux":
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: pages that are free go back, or the step would use them unseen
    if trim:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = _status("VmRSS")
    step()
    return max(_status("VmHWM") - before, 0)


def shown(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "(not measured on this system)"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
