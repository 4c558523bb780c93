"""``python -m fastsupcon``: the version, what was built, and which backend serves which device and dtype here, and why others do not."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .backends import BACKENDS, select
from .backends._extension import missing
from .backends._extension import module as extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEPTH = 128  # rows' dimension asked about


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        devices += [torch.device(accelerator.type, i) for i in range(torch.accelerator.device_count())]
    return devices


def _built() -> str:
    if missing:
        return missing
    cuda = f"without CUDA kernels ({why})" if (why := extension.without_cuda()) else "with CUDA kernels"
    sets, used = ", ".join(extension.cpu.instruction_sets()), extension.cpu.instruction_set()
    return f"extension {cuda}; CPU instruction sets usable here: {sets}; in use: {used}, on {extension.cpu.threads()}"


def facts() -> dict[str, Any]:
    """What :func:`main` says, as data: also what ``python -m bench --share`` sends along."""
    devices = []
    for device in _devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        name = f"{torch.get_num_threads()} threads" if device.type == "cpu" else name
        dtypes: dict[str, dict[str, Any]] = {}
        refusals: dict[tuple[str, str], list[str]] = {}  # (backend, reason) -> dtypes
        for dtype in DTYPES:
            short = str(dtype).removeprefix("torch.")
            reasons = {known: module.unusable(device, dtype, DEPTH) for known, module in BACKENDS.items()}
            usable = [known for known, reason in reasons.items() if reason is None]
            dtypes[short] = {"auto": select("auto", device, dtype, DEPTH), "usable": usable}
            for known, reason in reasons.items():
                if reason is not None:
                    refusals.setdefault((known, reason), []).append(short)
        refused = [{"backend": known, "reason": reason, "dtypes": of} for (known, reason), of in refusals.items()]
        devices.append({"device": str(device), "name": name, "dtypes": dtypes, "refusals": refused})
    versions = {"fastsupcon": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "machine": platform.machine(), "built": _built(), "dimension": DEPTH, "devices": devices}


def main() -> None:
    found = facts()
    lines = [f"fastsupcon {found['fastsupcon']}, torch {found['torch']}, Python {found['python']}, {found['machine']}"]
    lines += [f"built: {found['built']}", f"from: {Path(__file__).resolve().parent}"]
    for device in found["devices"]:
        lines += ["", f"{device['device']} ({device['name']}), rows of dimension {found['dimension']}"]
        for dtype, served in device["dtypes"].items():
            lines += [f"  {dtype:9} auto = {served['auto']}; usable: {', '.join(served['usable'])}"]
        for refused in device["refusals"]:
            of = refused["dtypes"]
            lines += [f"  not {refused['backend']}{'' if len(of) == len(DTYPES) else ' for ' + ', '.join(of)}: {refused['reason']}"]
    print("\n".join(lines))  # in one piece: `| head` may close the pipe after a line


if __name__ == "__main__":
    main()
