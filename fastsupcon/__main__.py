"""``python -m fastsupcon``: the version, what was built, and which backend serves which device and dtype here, and why others do not."""

from __future__ import annotations

import platform

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


def main() -> None:
    print(f"fastsupcon {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(f"built: {_built()}")
    for device in _devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"\n{device} ({name}), rows of dimension {DEPTH}")
        refusals: dict[tuple[str, str], list[str]] = {}  # (backend, reason) -> dtypes
        for dtype in DTYPES:
            short = str(dtype).removeprefix("torch.")
            reasons = {known: module.unusable(device, dtype, DEPTH) for known, module in BACKENDS.items()}
            usable = [known for known, reason in reasons.items() if reason is None]
            print(f"  {short:9} auto = {select('auto', device, dtype, DEPTH)}; usable: {', '.join(usable)}")
            for known, reason in reasons.items():
                if reason is not None:
                    refusals.setdefault((known, reason), []).append(short)
        for (known, reason), dtypes in refusals.items():
            print(f"  not {known}{'' if len(dtypes) == len(DTYPES) else ' for ' + ', '.join(dtypes)}: {reason}")


if __name__ == "__main__":
    main()
